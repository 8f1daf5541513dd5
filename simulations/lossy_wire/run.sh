#!/bin/sh
# sh run.sh FOLDER: every codec at five seeds, each run into FOLDER/WIRE-SEED. What has ended already is kept.
set -eu
here=$(dirname "$0")
for seed in 0 1 2 3 4; do
  for wire in lossless bf16 f16 step sign; do
    out="$1/$wire-$seed"
    [ -f "$out/digests.json" ] || { rm -rf "$out"; fedlth run "$here/study.yaml" wire=$wire seed=$seed out="$out"; }
  done
done
