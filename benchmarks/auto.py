"""What `compute: auto` costs for ten networks, against the best of the backends: python benchmarks/auto.py [NAME ...]

Four of the networks are fedlth's own, six are in networks.py. A row is a network at a density: CPU milliseconds of a
training step (batches of 32, SGD) as each backend and `auto` do it, in turns, the least of each, until turns find
nothing less; then what `auto` costs over the best of them. It ends with 1 where that is above LIMIT anywhere. `auto`
measures here first, unless it has before; what it measured and chose stands above a network's rows.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from fedlth.errors import StudyError
from fedlth.experiment.resolve import resolve
from fedlth.study.schema import build
from fedlth.training.budget import Budget
from fedlth.training.recipe import TrainingRecipe
from fedlth.training.request import drawn_request
from fedlth.training.task import Task
from fedlth.training.train import train

LIMIT = 1.03
BACKENDS = ("reference", "tuned", "sparse", "auto")
DENSITIES = (1.0, 0.5, 0.2, 0.05)
BATCH, STEPS = 32, 6
TURNS, MOST, LESS = 5, 25, 0.995  # turns behind the last that found less than this share of before; at most
IMAGES, COLOURS, TOKENS = [1, 28, 28], [3, 32, 32], [32]
NETWORKS: dict[str, tuple[str, list[int]]] = {
    "leaf_cnn": ("leaf_cnn", IMAGES), "lenet5": ("lenet5", IMAGES), "mlp": ("mlp", IMAGES),
    "resnet9": ("resnet9", COLOURS), "vgg": ("networks:vgg", COLOURS), "mobile": ("networks:mobile", COLOURS),
    "batch_norm": ("networks:batch_norm", COLOURS), "wide": ("networks:wide", IMAGES),
    "encoder": ("networks:Encoder", TOKENS), "recurrent": ("networks:Recurrent", TOKENS),
}  # fmt: skip


def study(name: str, compute: str) -> Any:
    """Return a study of two clients that trains a network with a backend."""
    model, shape = NETWORKS[name]
    options: dict[str, Any] = {"shape": shape, "clients": 2, "each": STEPS * BATCH}
    if shape is TOKENS:
        options["tokens"] = 1000
    return build({
        "data": {"name": "networks:data", "options": options}, "model": model, "compute": compute,
        "partition": "natural", "clients": {"count": 2, "validation": 0.0, "test_samples": 8},
        "train": {"epochs": 1, "batch_size": BATCH, "lr": 0.01}, "workers": 1,
        "method": "fedavg", "federate": {"rounds": 1, "clients_per_round": 2},
        "finder": {"densities": [density for density in DENSITIES if density < 1]},
    })  # fmt: skip


def epoch(task: Task, density: float) -> Callable[[], object]:
    """Return an epoch of client 0, under a random mask of each layer where the density is below 1."""
    rng, mask = np.random.default_rng(0), None
    if density < 1:
        mask = np.zeros(task.layout.num_prunable, bool)
        for entry in task.layout.prunable:
            mask[entry.offset + rng.permutation(entry.size)[: max(1, round(density * entry.size))]] = True
    recipe = TrainingRecipe(budget=Budget(epochs=1), batch_size=BATCH, lr=0.01, loss=task.loss)
    request = drawn_request(
        task.theta_0, task.part(0, "train"), recipe, order=np.random.default_rng(1), torch_seed=0, active=mask
    )
    return partial(train, task.flat_model, request)


def seconds(work: Callable[[], object]) -> float:
    began = time.thread_time()
    work()
    return time.thread_time() - began


def row(name: str, tasks: dict[str, Task], density: float) -> float:
    """Print a network at a density; return what `auto` costs over the best backend."""
    runs = {backend: epoch(task, density) for backend, task in tasks.items()}
    best, lessened = dict.fromkeys(runs, float("inf")), 0
    for turn in range(MOST + 1):
        order = [*runs][turn % len(runs) :] + [*runs][: turn % len(runs)]  # nobody always follows the same one
        for backend in order:
            took = seconds(runs[backend])
            if turn:  # the first compiles and touches memory
                lessened = turn if took < LESS * best[backend] else lessened
                best[backend] = min(best[backend], took)
        if turn >= lessened + TURNS:
            break
    ratio = best["auto"] / min(took for backend, took in best.items() if backend != "auto")
    shown = " | ".join(f"{1e3 * best[b] / STEPS:.2f}" if b in best else "" for b in BACKENDS)
    print(f"| {name} | {density} | {shown} | {ratio:.3f}{'' if ratio <= LIMIT else ' MISSED'} |", flush=True)
    return ratio


def main() -> int:
    torch.set_num_threads(1)
    print(f"| network | density | {' | '.join(BACKENDS)} | over the best |\n|---|---:|---:|---:|---:|---:|---:|")
    worst = 0.0
    for name in [name for name in NETWORKS if name in sys.argv[1:]] or NETWORKS:
        tasks: dict[str, Task] = {}
        for backend in BACKENDS:
            try:
                began = time.thread_time()
                made, notes = resolve(study(name, backend))
                tasks[backend] = made.task
            except StudyError as error:
                if "compute: must be" not in str(error):
                    raise
        said = next(note for note in notes if note.startswith("compute"))
        print(f"{name}, resolved in {time.thread_time() - began:.1f} CPU s: {said}")
        worst = max([worst, *(row(name, tasks, density) for density in DENSITIES)])
    print(f"worst: {worst:.3f} of the best backend, the limit is {LIMIT}")
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
