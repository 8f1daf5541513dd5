"""Whole federated rounds of fedlth beside plain PyTorch, interleaved: python benchmarks/rounds.py --only W2 --rounds 5.

Work: Fashion-MNIST, 100 clients x 600 of two classes, 10 a round, batch 32, SGD 0.05. Every system is a process that
runs one round when it is told to; the rest wait. Ratios are medians over limit A (benchmarks/yardsticks/raw_torch.py)
in the same run: by the clock, and by CPU seconds of the process tree, which other load on the machine changes less.

Of a client's 600 examples one is kept for validation (a study must have one), so both sides train on 599 in 19 steps
an epoch. Rows with personalised evaluation keep 100 and train on 500, as does their limit A, which evaluates nothing.
Rows with a density are `refine` rounds: after one federated round every client has drawn a random ticket of exactly
that density in every layer and trained in it, and is then visited with its own slice. So that they need not be made
for clients who never come, these rows have as many clients as two rounds visit, at most 100.
Dense rows say what share of the cores' peak (core_peak.py) their training reaches, if all their CPU time were training.
Peers, with --peers, run the dense work of W1 and W2 on the 599 examples too (benchmarks/peers), their own way to use
two cores. Between their turns they are stopped; one that fails, hangs or trains other work is left out, in one line.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from core_peak import core_peak, training_flop
from yardsticks.child import Child, Gone, child
from yardsticks.tree import cpu_seconds

HERE = Path(__file__).parent
WORKS = {  # model, epochs, examples a shard
    "W1": ("leaf_cnn", 1, 300),
    "W2": ("lenet5", 5, 300),
    "ResNet9": ("resnet9", 1, 80),
    "BatchNorm": ("benchmarks.parts:Normed", 1, 300),
}
LIMITS = {  # must, ambitious; of W1 at density 0.5 the dense round's ratio is the must
    ("W1", 1.0): (0.75, 0.65), ("W1", 0.2): (0.40, 0.28), ("W1", 0.05): (0.20, 0.13),
    ("W2", 1.0): (0.24, 0.18), ("W2", 0.2): (0.12, 0.09), ("W2", 0.05): (0.08, 0.06),
    ("ResNet9", 1.0): (1.00, 0.85), ("ResNet9", 0.2): (0.55, 0.35), ("BatchNorm", 1.0): (1.03, 0.80),
}  # fmt: skip
WIDE = {("W1", 1.0): (0.80, 0.60)}  # where vectors are of 16
START, IDLE_S = (1.05, 0.95), (1.5, 0.5)  # START as a ratio to limit A


def study(work: str, density: float, evaluated: bool, wire: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return the study of one row."""
    model, epochs, shard = WORKS[work]
    per = 2 * shard
    tree: dict[str, Any] = {
        "method": {"name": "fedavg"}, "data": {"name": "fashion_mnist", "root": args.data},
        "partition": {"name": "shards", "shard_size": shard}, "model": {"name": model},
        "clients": {"count": 100, "validation": (1 / 6 if evaluated else 1 / per), "test_samples": 10},
        "train": {"epochs": epochs}, "wire": wire, "compute": args.compute, "workers": 2,
        "federate": {"rounds": 10_000, "clients_per_round": args.k}, "personalise": {"arms": ["global"]},
    }  # fmt: skip
    if density < 1:
        count = min(100, 2 * args.k)
        tree["clients"]["count"] = count
        tree |= {
            "method": {"name": "two_step"}, "federate": {"rounds": 1, "clients_per_round": 1},
            "finder": {
                "score": "random", "schedule": {"name": "rescore", "steps": 1}, "rewind": "init",
                "densities": [density],
            },
            "personalise": {"arms": ["ticket"], "epochs": 1, "clients_per_wave": count},
            "refine": {"rounds": 10_000, "clients_per_round": args.k},
        }  # fmt: skip
    return tree


def round_gflop(work: str, args: argparse.Namespace, examples: int) -> float:
    """Return the work of a dense round's training; 0 for a model that the kernel cannot read."""
    from fedlth.kernel.graph import compile_layers
    from fedlth.kernel.table import LayerTable
    from fedlth.models.layout import layout_of
    from fedlth.models.prunable import prunable_names
    from fedlth.models.registry import build

    model, epochs, _ = WORKS[work]
    module = build(model, num_classes=10, input_shape=(1, 28, 28), options={})
    table = compile_layers(module, layout_of(module, prunable_names(module, None)), (1, 28, 28))
    return 1e-9 * training_flop(table) * examples * epochs * args.k if isinstance(table, LayerTable) else 0.0


def over(one: Child, base: Child) -> float:
    """Return the ratio by the clock, the median over turns."""
    return statistics.median(a / b for a, b in zip(one.walls, base.walls, strict=True))


def limits(work: str, systems: list[Child], peaks: dict[int, float]) -> dict[float, tuple[float, float]]:
    """Return what a work's rows are judged by, (must, ambitious) by density."""
    wide = peaks[16] > 1.3 * peaks[8]
    found = {density: one for (of, density), one in (LIMITS | (WIDE if wide else {})).items() if of == work}
    dense = [over(one, systems[0]) for one in systems[1:] if one.name == "fedlth dense, raw"]
    return found | ({0.5: (dense[0], 0.55)} if work == "W1" and dense else {})


def row(one: Child, base: Child, limit: tuple[float, float] | None, gflop: float, peak: float) -> str:
    wall, cpu = (statistics.median(v) for v in (one.walls, one.cpus))
    ratio = over(one, base)
    by_cpu = cpu / statistics.median(base.cpus)
    verdict = ""
    if limit:
        verdict = f"{limit[0]:.2f} / {limit[1]:.2f} " + ("ok" if ratio <= limit[0] else "MISSED")
        verdict += f" (by CPU {'ok' if by_cpu <= limit[0] else 'MISSED'})"
    steps = "/".join(map(str, sorted(one.steps)))
    memory = f"{one.memory['Pss']:.0f}/{one.memory['Rss']:.0f}"
    share = f"{gflop / cpu / peak:.0%}" if gflop and one.density == 1 else ""
    cells = one.name, steps, f"{wall:.2f}", f"{ratio:.2f}", f"{cpu:.2f}", f"{by_cpu:.2f}", share, memory, verdict
    return f"| {' | '.join(cells)} |"


def measure(work: str, args: argparse.Namespace, folder: str) -> None:
    """Print the table of one work."""
    _, epochs, shard = WORKS[work]
    for evaluated in (False, True) if args.evaluation else (False,):
        examples = 2 * shard - (100 if evaluated else 1)
        work_a = {
            "model": WORKS[work][0], "epochs": epochs, "examples": examples, "shard": shard, "clients": args.k,
            "data": args.data,
        }  # fmt: skip
        systems: list[Child] = []
        try:
            systems.append(child("limit A: raw torch, 2 x 1", "yardsticks/raw_torch.py", work_a))
            systems += [
                child(
                    f"fedlth {'dense' if density == 1 else f'density {density:g}'}, {wire}", "ours.py",
                    {
                        "study": study(work, density, evaluated, wire, args), "folder": folder,
                        "skip": 0 if density == 1 else 2,
                    },
                    density,
                )
                for wire in args.wire.split(",")
                for density in map(float, args.densities.split(","))
            ]  # fmt: skip
            systems += peers(work, work_a, args) if not evaluated else []
            for number in range(args.rounds + 1):
                take_turns(systems, work_a)
                if not number:  # a warm-up
                    for one in systems:
                        one.walls, one.cpus = [], []
        finally:
            for one in systems:
                one.end()
        print(f"\n**{work}**, {args.k} clients a round{', with personalised evaluation' if evaluated else ''}, "
              f"{args.rounds} rounds each, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs")  # fmt: skip
        peaks, gflop = core_peak(), round_gflop(work, args, examples)
        told = ", ".join(f"{gflops:.0f} GFLOP/s in vectors of {width}" for width, gflops in peaks.items())
        print(f"One core's peak: {told}\n")
        print("| system | client-steps | s | ratio | CPU s | CPU ratio | of peak | MB PSS/RSS | must / ambitious |")
        print("|---|---|---|---|---|---|---|---|---|")
        judges = limits(work, systems, peaks) if args.k == 10 else {}
        for one in systems:
            limit = judges.get(one.density) if one.name.startswith("fedlth") and one.name.endswith("raw") else None
            print(row(one, systems[0], limit, gflop, max(peaks.values())), flush=True)


def take_turns(systems: list[Child], work: dict[str, Any]) -> None:
    """Run a round of each; a peer that does not is ended and taken off the list."""
    steps = work["clients"] * work["epochs"] * -(-work["examples"] // 32)
    for one in tuple(systems):
        try:
            told = one.round()
            if one.density == 1 and told["steps"] != steps:
                raise Gone(f"{one.name} trained {told['steps']} client steps of {steps}")
        except Gone as error:
            if not one.pauses:  # it is ours, or limit A
                raise
            print(f"peer left out: {error}", flush=True)
            systems.remove(one)
            one.end()


def peers(work: str, given: dict[str, Any], args: argparse.Namespace) -> list[Child]:
    """Start the peers that are installed; they run the dense rows of W1 and W2."""
    if not args.peers or work not in ("W1", "W2"):
        return []
    found = []
    for script in sorted((HERE / "peers").glob("*_.py")):
        name = script.stem.removesuffix("_")
        place = Path(args.peers) / name
        if not (place / "ready").exists():
            print(f"peer left out: {name} is not installed", flush=True)
            continue
        try:
            found.append(child(name, f"peers/{script.name}", given, python=place / "bin" / "python", pauses=True))
        except Gone as error:
            print(f"peer left out: {error}", flush=True)
    return found


def idle_study(args: argparse.Namespace, clients: int = 1000) -> dict[str, Any]:
    """Return the study of rounds of 1,000 clients that train nothing."""
    return {
        "method": {"name": "benchmarks.parts:idle"}, "data": {"name": "fashion_mnist", "root": args.data},
        "clients": {"count": clients, "test_samples": 10}, "model": {"name": "benchmarks.parts:small"}, "workers": 2,
        "federate": {"rounds": 10_000, "clients_per_round": 1000}, "wire": "raw", "compute": args.compute,
    }  # fmt: skip


def idle(args: argparse.Namespace, folder: str, clients: int) -> None:
    """Print rounds of 1,000 clients x 100 KB, out of so many, that train nothing."""
    tree = idle_study(args, clients)
    one = child("idle", "ours.py", {"study": tree, "folder": folder, "skip": 1})
    try:
        for _ in range(args.rounds):
            one.round()
    finally:
        one.end()
    wall, cpu = statistics.median(one.walls), statistics.median(one.cpus)
    print(f"\nno-op round, 1,000 of {clients:,} clients x 100 KB: {wall:.2f} s, {cpu:.2f} CPU s; must {IDLE_S[0]} s "
          f"{'ok' if wall <= IDLE_S[0] else 'MISSED'}, ambitious {IDLE_S[1]} s", flush=True)  # fmt: skip


def start_up(args: argparse.Namespace, folder: str) -> None:
    """Print the seconds from the start of `fedlth run` to a client's first step, beside limit A's to its first."""
    import yaml

    file = Path(folder) / "start.yaml"
    tree = study("W2", 1.0, False, "raw", args)
    tree["federate"]["rounds"] = 1
    file.write_text(yaml.safe_dump(tree))
    ours, theirs = [], []
    env = os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    for i in range(args.rounds + 1):
        began = time.time()
        given = {"model": "lenet5", "epochs": 5, "examples": 599, "shard": 300, "clients": 10, "data": args.data}
        base = child("limit A", "yardsticks/raw_torch.py", given)
        theirs.append((time.time() - began, cpu_seconds(base.process.pid)))
        base.end()
        command = [
            sys.executable, str(HERE / "first_step.py"), str(time.time()), str(file), f"out={folder}/start-{i}"
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=HERE.parent)
        line = next((line for line in done.stdout.splitlines() if line.startswith("first step")), None)
        if line is None:
            raise SystemExit(f"no first step; the run said:\n{done.stderr}")
        ours.append(float(line.split()[2]))
    first, base_s = statistics.median(ours[1:]), statistics.median(t[0] for t in theirs[1:])
    print(f"\nstart to first client step: {first:.2f} s, limit A {base_s:.2f} s, ratio {first / base_s:.2f}; must "
          f"{START[0]} {'ok' if first / base_s <= START[0] else 'MISSED'}, ambitious {START[1]}, load "
          f"{os.getloadavg()[0]:.1f}", flush=True)  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", default="start,idle,W1,W2,ResNet9,BatchNorm", help="parts, by comma")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--densities", default="1,0.5,0.2,0.1,0.05")
    options.add_argument("--wire", default="raw,lossless")
    options.add_argument("--k", type=int, default=10, help="clients a round")
    options.add_argument("--compute", default="auto")
    options.add_argument("--evaluation", action="store_true", help="also with personalised evaluation")
    options.add_argument("--data", help="folder of the Fashion-MNIST idx files; the system's own by default")
    options.add_argument("--peers", help="folder of benchmarks/peers/install.py")
    options.add_argument("--folder", help="where run folders go; the temporary directory by default")
    args = options.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package is not compiled at every start, nor limit A
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for part in args.only.split(","):
            if part == "start":
                start_up(args, folder)
            elif part == "idle":
                idle(args, folder, 1000)
                idle(args, folder, 10_000)
            elif part == "BatchNorm":
                dense = argparse.Namespace(**vars(args) | {"densities": "1"})
                measure(part, dense, folder)
            elif part in WORKS:
                measure(part, args, folder)
            else:
                options.error(f"--only: must be among start, idle, {', '.join(WORKS)}, got {part}")


if __name__ == "__main__":
    main()
