"""A probe of neurons at equilibrium: what may rest, epoch by epoch, and what that costs and saves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedlth.lab import neq
from fedlth.lab.bench import Bench, few
from fedlth.training.budget import Budget
from fedlth.training.evaluation import evaluate
from fedlth.training.optimizer import Sgd
from fedlth.training.recipe import TrainingRecipe
from fedlth.training.request import drawn_request
from fedlth.training.train import train


@dataclass(frozen=True)
class NeuronsAtEquilibrium:
    """Train with settled neurons frozen, and the same training without. Bragagnolo et al., NeurIPS 2022, 2207.09455.

    `moved` counts frozen parameters that changed in the epoch, which must be 0; `upload_bytes` are four a parameter
    that may move. Both trainings see the same batches.
    """

    epochs: int = 10
    examples: int = 5000
    held_out: int = 200
    lr: float = 0.05
    momentum: float = 0.0
    epsilon: float = 1e-3

    def __call__(self, bench: Bench, /) -> Iterator[dict[str, Any]]:
        data, test = few(bench.parts["train"], self.examples), bench.parts["test"]
        recipe = TrainingRecipe(
            budget=Budget(epochs=self.epochs), batch_size=bench.study.train.batch_size, lr=self.lr,
            optimizer=Sgd(momentum=self.momentum),
        )  # fmt: skip
        epochs = neq.train(
            bench.flat_model, bench.theta_0, data=data, held_out=few(bench.parts["validation"], self.held_out).tensor,
            recipe=recipe, gate=neq.UpdateGate(epsilon=self.epsilon), order=bench.rng("neq"), torch_seed=0,
        )  # fmt: skip
        request = drawn_request(
            bench.theta_0, data, recipe, order=bench.rng("neq"), torch_seed=0,
            snapshots=tuple(range(1, self.epochs + 1)),
        )  # fmt: skip
        plain = train(bench.flat_model, request)
        before, size = bench.theta_0.floats, bench.layout.num_params
        for number, one in enumerate(epochs, 1):
            rested = ~one.moves
            moved = np.count_nonzero(before[:size][rested] != one.params.floats[:size][rested])
            baseline = type(one.params)(plain.snapshots[number], one.params.ints)
            yield {
                "epoch": number, "parameters": size, "frozen": one.frozen, "moved": float(moved),
                "upload_bytes": float(4 * np.count_nonzero(one.moves)),
                "accuracy": evaluate(bench.flat_model, one.params, test).accuracy,
                "baseline": evaluate(bench.flat_model, baseline, test).accuracy,
            }  # fmt: skip
            before = one.params.floats
