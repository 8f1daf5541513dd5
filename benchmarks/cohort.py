"""Clients a second trained as cohorts against one by one: python benchmarks/cohort.py (a GPU where there is one)."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from fedlth.data.examples import Examples
from fedlth.models.layout import layout_of, read
from fedlth.models.prunable import prunable_names
from fedlth.models.registry import build
from fedlth.training import cohort
from fedlth.training.budget import Budget
from fedlth.training.flat_model import FlatModel
from fedlth.training.lockstep import side_by_side
from fedlth.training.recipe import TrainingRecipe
from fedlth.training.request import TrainingResult, drawn_request
from fedlth.training.train import train

SIZES = {"cuda": (1, 2, 4, 8, 16, 32, 64), "cpu": (1, 4, 16)}
SHAPE, BATCH, DENSITY = (1, 28, 28), 32, 0.2
WORK = (("leaf_cnn", 1), ("lenet5", 5))  # W1 and W2: a model, epochs a client


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


if __name__ == "__main__":
    torch.set_num_threads(1)
    quick = "--quick" in sys.argv
    gpu = torch.cuda.is_available() and not quick
    print(torch.cuda.get_device_name() if gpu else "cpu", "torch", torch.__version__)
    for name, epochs in WORK[1:] if quick else WORK:
        if quick:
            measure(name, 1, device="cpu", sizes=(1, 2), examples=40, repeats=1)
        elif gpu:
            measure(name, epochs, device="cuda", sizes=SIZES["cuda"], examples=600, repeats=3)
        else:  # the shape of the work, smaller
            measure(name, 1, device="cpu", sizes=SIZES["cpu"], examples=160, repeats=3)
