"""What a client of a cohort asks for, a training or an evaluation, and how it asks."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any

from fedlth.data.examples import Examples
from fedlth.models.layout import Params
from fedlth.training.flat_model import FlatModel
from fedlth.training.lockstep import ASK
from fedlth.training.loss import CrossEntropy, MaskedLm, MeanSquaredError, restricts
from fedlth.training.metrics import Metric, Scores
from fedlth.training.optimizer import Adam, AdamW, Sgd
from fedlth.training.pull import L1, Correction, Proximal
from fedlth.training.request import TrainingRequest, TrainingResult

# A batch is as long as its own longest example, and what a network makes of padding is its own affair.
RAGGED = "its examples are ragged, and each client's batches have lengths of their own"
OPTIMIZERS = (Sgd, Adam, AdamW)  # elementwise, so that they work on many clients' vectors as on one
LOSSES = (CrossEntropy, MeanSquaredError, MaskedLm)


class _Shares(threading.local):
    """The CPU seconds that others spent on what this thread has asked for."""

    cpu_s = 0.0


_shares = _Shares()


def cpu_seconds() -> float:
    """Return this thread's CPU seconds so far, with its share of what its cohort did for it while it waited."""
    return time.thread_time() + _shares.cpu_s


@dataclass(frozen=True, eq=False)
class Training:
    """One client's training. Whoever does the work notes this client's share of its CPU seconds in `cpu_s`."""

    model: FlatModel
    request: TrainingRequest
    cpu_s: list[float] = field(default_factory=list)

    @property
    def params(self) -> Params:
        return self.request.start

    @property
    def data(self) -> Examples:
        return self.request.data

    @property
    def num_examples(self) -> int:
        return self.request.num_examples


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One client's evaluation, on a part that is not empty; `cpu_s` as in a training."""

    model: FlatModel
    params: Params
    data: Examples
    metrics: tuple[Metric, ...]
    cpu_s: list[float] = field(default_factory=list)

    @property
    def num_examples(self) -> int:
        return len(self.data)


def obstacle(request: TrainingRequest) -> str:
    """Say why a training does not go to the cohort that this call is in; "" where it does."""
    return "no cohort" if ASK.get() is None else lacks(request)


def lacks(request: TrainingRequest) -> str:
    """Say what a cohort cannot do of a training; "" where it can do all of it."""
    recipe = request.recipe
    if restricts(recipe.loss):
        return "a cohort has no classes: own"
    pulls = (Proximal, Correction, L1)
    for part, known in ((recipe.optimizer, OPTIMIZERS), (recipe.loss, LOSSES), (recipe.pull, pulls)):
        if type(part) not in known:
            return f"a cohort has no {type(part).__name__}"
    if recipe.dp is not None:
        return "a cohort has no privacy.dp"
    if recipe.views:
        return f"a cohort has no view {type(recipe.view).__name__}"
    if request.data.lengths:
        return RAGGED
    if recipe.dropout is not None:
        return "a cohort has no dropout"
    return "" if recipe.precision == "float32" else f"a cohort has no {recipe.precision}"


def train(model: FlatModel, request: TrainingRequest) -> TrainingResult:
    """Ask for a training with those of the cohort that this call is in."""
    result: TrainingResult = _answer(Training(model, request))
    return result


def evaluated(model: FlatModel, params: Params, data: Examples, metrics: tuple[Metric, ...]) -> Scores | None:
    """Ask for an evaluation with those of the cohort that this call is in; None outside one, and where it has none.

    It has none of ragged data, and none of a loss of the user's.
    """
    if ASK.get() is None or data.lengths or type(model.loss) not in LOSSES:
        return None
    found: Scores = _answer(Evaluation(model, params, data, metrics))
    return found


def _answer(asked: Training | Evaluation) -> Any:
    ask = ASK.get()
    assert ask is not None
    try:
        return ask(asked)
    finally:
        _shares.cpu_s += sum(asked.cpu_s)
