"""Probes of three theories of tickets: the tangent space, the spectral gap, subset sums."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fedlth.errors import wrong
from fedlth.lab import imc, subset_sum, tangent
from fedlth.lab.bench import Bench, few
from fedlth.lab.controls import Shuffle
from fedlth.lab.pooled import pooled
from fedlth.training.budget import Budget
from fedlth.training.evaluation import evaluate
from fedlth.training.recipe import TrainingRecipe
from fedlth.training.request import drawn_request
from fedlth.training.train import train


@dataclass(frozen=True)
class TangentSpace:
    """How well the linearised network stands for the real one: the remainder as a training's path is halved.

    The direction is where `iterations` of training led. A `ratio` of 4 is a smooth function, 2 would be a first-order
    miss; `at_zero` must be 0. Then both are fine-tuned alike from there. Wentworth, LessWrong, 2021.
    """

    iterations: int = 100
    halvings: int = 4
    examples: int = 200
    lr: float = 0.01

    def __call__(self, bench: Bench, /) -> Iterator[dict[str, Any]]:
        config = replace(bench.train_config(), last=self.iterations)
        moved = bench.trained(bench.theta_0, bench.full, config).final
        size = bench.layout.num_params
        delta = torch.from_numpy(moved.floats[:size].astype(np.float64) - bench.theta_0.floats[:size])
        x = few(bench.parts["test"], self.examples).tensor.double()
        path = tangent.Tangent(bench.flat_model, bench.theta_0, double=True)
        missed = tangent.remainders(path, delta, x, self.halvings)
        zero = path.remainder(torch.zeros_like(delta), x)
        for i, (before, after) in enumerate(zip(missed, missed[1:], strict=False)):
            yield {
                "step": f"1/{2**i} to 1/{2 ** (i + 1)}",
                "remainder": before,
                "ratio": before / after,
                "at_zero": zero,
            }
        recipe = TrainingRecipe(budget=Budget(epochs=1), batch_size=config.train.batch_size, lr=self.lr)
        there = tangent.Tangent(bench.flat_model, moved)
        data, test = bench.parts["train"], few(bench.parts["test"], 2000)
        learned = tangent.fine_tune(there, data, recipe=recipe, order=bench.rng("tangent"))
        request = drawn_request(moved, data, recipe, order=bench.rng("tangent"), torch_seed=0)
        real = train(bench.flat_model, request).params
        yield {
            "step": "fine-tuned", "before": evaluate(bench.flat_model, moved, test).accuracy,
            "linear": tangent.accuracy(there, learned, test, linear=True),
            "linear_weights_in_the_network": tangent.accuracy(there, learned, test, linear=False),
            "network": evaluate(bench.flat_model, real, test).accuracy,
        }  # fmt: skip


@dataclass(frozen=True)
class SpectralGap:
    """Prune once at the gap of the Hessian's spectrum, on a net of a few hundred weights; a labelled reconstruction.

    `kept`, at most a share `most`, is random's count too (mean of `draws` masks with the same count a layer). See
    fedlth.lab.imc.
    """

    side: int = 5
    hidden: int = 12
    steps: int = 10
    examples: int = 1000
    draws: int = 5
    most: float = 0.9

    def __call__(self, bench: Bench, /) -> Iterator[dict[str, Any]]:
        small = pooled(bench, side=self.side, hidden=self.hidden)
        config, size = small.train_config(), small.layout.num_prunable
        near = small.trained(small.theta_0, small.full, replace(config, last=self.steps)).final
        values, vectors = imc.spectrum(small.flat_model, near, few(small.parts["train"], self.examples))
        cut = imc.split(values, vectors, near.floats[:size], most=self.most)
        rng = small.rng("spectral gap")
        masks = [Shuffle()(cut.mask, small.layout, rng) for _ in range(self.draws)]
        random = [small.trained(near.masked(mask), mask, config).test for mask in masks]
        yield {
            "weights": size, "kept": float(cut.mask.sum()), "ascending": str(bool((np.diff(values) >= 0).all())),
            "gap": cut.gap, "dense": small.trained(near, small.full, config).test,
            "ticket": small.trained(near.masked(cut.mask), cut.mask, config).test, "random": float(np.mean(random)),
        }  # fmt: skip


@dataclass(frozen=True)
class SubsetSums:
    """How many random numbers it takes until some k of them sum to any target. Natale et al., arXiv 2410.14754."""

    k: tuple[int, ...] = (3, 3, 5)
    errors: tuple[float, ...] = (0.01, 0.001, 0.01)
    draws: int = 5

    def __post_init__(self) -> None:
        if len(self.k) != len(self.errors):
            raise wrong("probes.subset_sums.errors", f"{len(self.k)} numbers, one a k", self.errors)
        if self.draws < 1:
            raise wrong("probes.subset_sums.draws", "at least 1", self.draws)

    def __call__(self, bench: Bench, /) -> Iterator[dict[str, Any]]:
        for k, error in zip(self.k, self.errors, strict=True):
            found = subset_sum.needed(k, error, draws=self.draws, seed=bench.seed)
            yield {"k": k, "error": f"{error:g}", "needed": float(found.median), "bound": found.bound}
