#!/usr/bin/env bash
# Run every partition and seed, two at a time; call it again to go on after a stop. Usage: run.sh OUT [SEED ...]
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
out="$1"
shift
seeds=("${@:-0 1 2}")  # unquoted below: the default is three words
one() {
  here="$1" out="$2/$3" seed="$4"
  case "$3" in
    dirichlet_0.1) partition='{name: dirichlet, alpha: 0.1, seed: 0}' ;;
    dirichlet_0.3) partition='{name: dirichlet, alpha: 0.3, seed: 0}' ;;
    classes_3) partition='{name: classes, classes_per_client: 3, seed: 0}' ;;
    iid) partition='{name: iid, seed: 0}' ;;
  esac
  run="$out/seed-$seed"
  if [ -e "$run/config.yaml" ]; then
    fedlth resume "$run" > "$out-$seed.log" 2>&1
  else
    fedlth run "$here/study.yaml" "study=two_step_$3" "partition=$partition" "seed=$seed" "out=$run" > "$out-$seed.log" 2>&1
  fi
  echo "done: $3 seed $seed"
}
export -f one
mkdir -p "$out"
for seed in ${seeds[@]}; do
  for partition in dirichlet_0.1 dirichlet_0.3 classes_3 iid; do
    echo "$partition $seed"
  done
done | xargs -P 2 -L 1 bash -c 'one "$@"' _ "$here" "$out"
