"""All of `device: cuda` on one card, in ten minutes: python benchmarks/gpu.py [--on cpu] [--quick] [KEY=VALUE ...]

First checks: the same small study on the card as a whole, each run a process of its own, held against the CPU's. Then
times: cohorts of 1 to 64 against one by one. Both are printed as the tables of benchmarks/results/gpu.md. `--on cpu`
goes the same way without a card, so that the script itself can be tried; KEY=VALUE changes the study.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean

import numpy as np
import torch

from fedlth.data.examples import Examples
from fedlth.models.layout import layout_of, read
from fedlth.models.prunable import prunable_names
from fedlth.models.registry import build
from fedlth.storage.records import MetricRow, TimeRow
from fedlth.storage.run_folder import RunFolder
from fedlth.training import cohort
from fedlth.training.budget import Budget
from fedlth.training.flat_model import FlatModel
from fedlth.training.lockstep import side_by_side
from fedlth.training.recipe import TrainingRecipe
from fedlth.training.request import TrainingResult, drawn_request
from fedlth.training.train import train

ROOT = Path(__file__).parents[1]
STUDY = ROOT / "configs" / "smoke.yaml"
ENOUGH_S = 600.0
CLOSE = 0.05  # of accuracy: 360 test examples on six clients, and a card's convolutions round otherwise
PLACED = ("engine=ray", "ray.workers=2")
SIZES = {"cuda": (1, 2, 4, 8, 16, 32, 64), "cpu": (1, 4, 16)}
SHAPE, BATCH, DENSITY = (1, 28, 28), 32, 0.2
WORK = (("leaf_cnn", 1), ("lenet5", 5))  # W1 and W2: a model, epochs a client


@dataclass(frozen=True)
class Check:
    """A run of the study: what it adds to it, and what must be so (`close`: to the CPU's accuracy; or what it says)."""

    name: str
    settings: tuple[str, ...]
    refused: str = ""


def checks(device: str) -> list[Check]:
    """Return the runs of a device: both steps in every backend, cohorts, placements, half precision."""
    logical = () if device == "cuda" else ("ray.logical_gpus=1",)
    bf16 = "" if device == "cuda" else "bf16 needs a GPU"
    kernel = "" if device == "cpu" else "compute: must be tuned or reference"
    return [
        *(Check(f"compute: {name}", (f"compute={name}",)) for name in ("reference", "tuned", "auto")),
        Check("compute: sparse", ("compute=sparse",), kernel),
        *(Check(f"cohort: {size}", (f"cohort={size}", "workers=1")) for size in ("3", "auto")),
        Check("Ray, half a card a worker", (*PLACED, "ray.num_gpus=0.5", *logical)),
        Check("Ray, a third of a card's memory", (*PLACED, "ray.gpu_memory_mb=1000", "ray.gpu_total_memory_mb=3000",
                                                 *logical)),
        Check("bf16", ("train.precision=bf16", "personalise.precision=bf16"), bf16),
    ]  # fmt: skip


def ran(study: Sequence[str], out: Path, limit_s: float) -> tuple[str, float]:
    """Run a study into `out`; return the last line of its errors where it failed, "" else, and its seconds."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "fedlth", "run", str(STUDY), f"out={out}", *study]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return f"it had not ended after {limit_s:.0f} s", limit_s
    said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    return ("" if done.returncode == 0 else (said or [f"exit code {done.returncode}"])[-1]), time.perf_counter() - began


def accuracy(out: Path, arm: str) -> float:
    """Return the mean test accuracy of an arm over the clients."""
    return mean(row.test_accuracy for row in RunFolder(out).rows(MetricRow) if row.arm == arm)  # type: ignore[misc]


def held(check: Check, out: Path, error: str, cpu: dict[str, float]) -> str:
    """Return what is wrong with a run, "" where nothing is."""
    if check.refused or error:
        return "" if check.refused and check.refused in error else error or f"it must say: {check.refused}"
    apart = {arm: accuracy(out, arm) - there for arm, there in cpu.items()}
    wrong = [f"{arm} is {100 * by:+.1f} points from the CPU's" for arm, by in apart.items() if abs(by) > CLOSE]
    if "engine=ray" in check.settings and not all("@gpu" in row.worker for row in served(out)):
        wrong.append("a client trained without its card")
    return "; ".join(wrong)


def served(out: Path) -> list[TimeRow]:
    return [row for row in RunFolder(out).rows(TimeRow) if row.client is not None]


def check_all(device: str, given: Sequence[str], quick: bool) -> int:
    """Print a line a check; return how many failed."""
    failed, ends = 0, time.perf_counter() + ENOUGH_S
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "cpu"
        if error := ran(("device=cpu", "compute=reference", *given), base, ENOUGH_S)[0]:
            raise SystemExit(f"the study does not run on the CPU: {error}")
        cpu = {arm: accuracy(base, arm) for arm in ("global", "ticket")}
        print(f"| {device} | s | global, % | ticket, % | |\n|---|---:|---:|---:|---|", flush=True)
        print(f"| the CPU's | | {100 * cpu['global']:.1f} | {100 * cpu['ticket']:.1f} | |", flush=True)
        for number, check in enumerate(checks(device)[:: 6 if quick else 1]):
            out = Path(folder) / str(number)
            error, took = ran((f"device={device}", *given, *check.settings), out, max(1.0, ends - time.perf_counter()))
            wrong = held(check, out, error, cpu)
            failed += bool(wrong)
            there = not error and not wrong
            shown = [f"{100 * accuracy(out, arm):.1f}" if there else "" for arm in cpu]
            said = f"FAILED: {wrong}" if wrong else f"refused: {check.refused}" if check.refused else "ok"
            print(f"| {check.name} | {took:.1f} | {' | '.join(shown)} | {said} |", flush=True)
    return failed


def seconds(work: Callable[[], object], device: str) -> float:
    """Return the seconds that some work takes: of the clock on a GPU, of this process's CPU time on a busy machine."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    began = clock()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - began


def measure(name: str, epochs: int, *, device: str, sizes: tuple[int, ...], examples: int, repeats: int) -> None:
    """Print one line a cohort size; each is the least of interleaved repeats. Half of the clients hold a ticket."""
    torch.manual_seed(0)
    module = build(name, num_classes=10, input_shape=SHAPE, options={})
    layout = layout_of(module, prunable_names(module, None))
    start, model = read(module, layout), FlatModel(module, layout, device)
    rng = np.random.default_rng(0)
    recipe, most = TrainingRecipe(budget=Budget(epochs=epochs), batch_size=BATCH, lr=0.05), max(sizes)
    parts = [
        Examples(torch.randn(examples, *SHAPE, device=device), torch.randint(0, 10, (examples,), device=device))
        for _ in range(most)
    ]
    masks = [rng.random(layout.num_prunable) < DENSITY if k % 2 else None for k in range(most)]

    def client(k: int) -> TrainingResult:
        order = np.random.default_rng(k)
        return train(model, drawn_request(start, parts[k], recipe, order=order, torch_seed=0, active=masks[k]))

    def alone(count: int) -> None:
        for k in range(count):
            client(k)

    def together(count: int) -> None:
        side_by_side([partial(client, k) for k in range(count)], cohort.answer)

    few = min(4, most)
    best: dict[int, float] = {}
    memory: dict[int, int] = {}
    for turn in range(repeats + 1):  # the first warms up
        for size in (0, *sizes):
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            spent = seconds(partial(together, size) if size else partial(alone, few), device) / (size or few)
            if turn:
                best[size] = min(best.get(size, spent), spent)
            if device == "cuda":
                memory[size] = torch.cuda.max_memory_allocated() // 2**20
    unit = "clients/s" if device == "cuda" else "clients a CPU second"
    said = f"{name}, {epochs} epoch(s) of {examples} examples, {device}"
    print(f"{said}, one by one: {1 / best[0]:.2f} {unit}", flush=True)
    for size in sizes:
        held = f", {memory[size]} MiB" if memory else ""
        print(f"  cohort of {size}: {1 / best[size]:.2f} {unit}, {best[0] / best[size]:.2f} times one by one{held}")


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--on", choices=("cuda", "cpu"), default="cuda")
    asked.add_argument("--quick", action="store_true", help="a few checks and one cohort: does the script work?")
    asked.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    args = asked.parse_args()
    if args.on == "cuda" and not torch.cuda.is_available():
        print("gpu: torch sees no card here; --on cpu tries the script without one", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    print(torch.cuda.get_device_name() if args.on == "cuda" else "cpu", "torch", torch.__version__, flush=True)
    failed = check_all(args.on, args.settings, args.quick)
    for name, epochs in WORK[1:] if args.quick else WORK:
        if args.quick:
            measure(name, 1, device=args.on, sizes=(1, 2), examples=40, repeats=1)
        elif args.on == "cuda":
            measure(name, epochs, device="cuda", sizes=SIZES["cuda"], examples=600, repeats=3)
        else:  # the shape of the work, smaller
            measure(name, 1, device="cpu", sizes=SIZES["cpu"], examples=160, repeats=3)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
