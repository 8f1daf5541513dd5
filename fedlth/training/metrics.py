"""What a model is judged by: one frozen value a metric, filled batch by batch, and the table that names them.

A metric sees outputs (n, C) with classes (n,), one row a class to be told (positions laid out, ignored ones left out),
or real numbers (n,) or (n, k) of one shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from fedlth.data.examples import Examples
from fedlth.data.factory import told
from fedlth.errors import StudyError, wrong
from fedlth.study.parts import imported
from fedlth.training.class_metrics import CLASSES, HITS, Accuracy, BalancedAccuracy, MacroF1, Majority, Perplexity
from fedlth.training.loss import IGNORED, Loss, takes_logits
from fedlth.training.number_metrics import NUMBERS, Determination, MeanError, Pearson


class Metric(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def higher_is_better(self) -> bool: ...
    @property
    def percent(self) -> bool:
        """Whether people read it as a percentage."""
        ...

    @property
    def range(self) -> tuple[float, float]:
        """The least and the most that it can be: what a client reports outside is refused."""
        ...

    @property
    def fits(self) -> frozenset[str]:
        """Return which targets it can judge: "classes", "positions", "numbers"."""
        ...

    def add(self, state: Any, outputs: Tensor, y: Tensor, /) -> Any:
        """Return the state (None at first) with a batch added."""
        ...

    def value(self, state: Any, /) -> float: ...

    def chance(self, num_classes: int, /) -> float | None:
        """Return what guessing reaches; None: what it reaches for constant outputs."""
        ...


@dataclass(frozen=True)
class MeanLoss:
    """The mean loss of the study, as it is evaluated."""

    name: ClassVar[str] = "loss"
    higher_is_better: ClassVar[bool] = False
    percent: ClassVar[bool] = False
    range: ClassVar[tuple[float, float]] = (-math.inf, math.inf)
    fits: ClassVar[frozenset[str]] = CLASSES | NUMBERS

    def add(self, state: None, outputs: Tensor, y: Tensor, /) -> None:
        """Add nothing: an evaluation has the loss anyway."""

    def value(self, state: None, /) -> float:
        raise AssertionError("an evaluation fills in its loss")

    def chance(self, num_classes: int, /) -> float | None:
        return None


class MetricFails(ValueError):
    """Say which metric of a user's has raised, or has returned no number."""


@dataclass(frozen=True)
class OfAll:
    """A user's own function of all outputs and all targets of a part."""

    name: str
    function: Callable[[Tensor, Tensor], Any]
    higher_is_better: bool
    percent: bool
    range: ClassVar[tuple[float, float]] = (-math.inf, math.inf)
    fits: ClassVar[frozenset[str]] = CLASSES | NUMBERS

    def add(
        self, state: tuple[tuple[Tensor, Tensor], ...] | None, outputs: Tensor, y: Tensor, /
    ) -> tuple[tuple[Tensor, Tensor], ...]:
        return (*(state or ()), (outputs.cpu(), y.cpu()))

    def tried(self, outputs: Tensor, y: Tensor, /) -> str:
        """Call it on a few rows; say what it raised, which may be for want of examples, or "".

        Raises TypeError or ValueError where what it returns is no number.
        """
        try:
            found = self.function(outputs, y)
        except Exception as error:  # the user's code may raise anything
            return told(error)
        float(found)
        return ""

    def value(self, state: tuple[tuple[Tensor, Tensor], ...], /) -> float:
        outputs, y = (torch.cat(parts) for parts in zip(*state, strict=True))
        try:
            found = float(self.function(outputs, y))
        except Exception as error:  # the user's code may raise anything
            raise MetricFails(f"metric {self.name} fails: {told(error)}") from error
        if not math.isfinite(found):
            raise MetricFails(f"metric {self.name} must be a finite number, got {found}")
        return found

    def chance(self, num_classes: int, /) -> float | None:
        return None


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Accuracy(), MeanLoss(), BalancedAccuracy(), MacroF1(), Majority(), Perplexity(), MeanError("mse", 2),
        MeanError("rmse", 2, root=True), MeanError("mae", 1), Determination(), Pearson(),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Judged:
    """The metrics of a task: `main` decides, `all` are evaluated; of classes accuracy is always among them."""

    main: Metric
    all: tuple[Metric, ...]

    @property
    def has_accuracy(self) -> bool:
        return any(metric.name == "accuracy" for metric in self.all)

    @property
    def named(self) -> tuple[str, ...]:
        """The names beside accuracy and loss, which records have fields for."""
        return tuple(metric.name for metric in self.all if metric.name not in ("accuracy", "loss"))

    def score(self, value: float) -> float:
        """Return a value of the main metric so that more is better."""
        return value if self.main.higher_is_better else -value


def judged(metric: str | None, others: tuple[str, ...], targets: str) -> Judged:
    """Return the metrics that a study names, for targets that are "classes", "positions" or "numbers".

    Raises StudyError for an unknown name, and for a metric that cannot judge such targets, or any model.
    """
    main = metric_of(metric or ("mse" if targets == "numbers" else "accuracy"), "metric", targets)
    if isinstance(main, Majority):
        raise wrong("metric", "what a model decides; metrics: [majority] is told beside it", metric)
    found = [main, *(metric_of(name, f"metrics.{i}", targets) for i, name in enumerate(others))]
    if targets != "numbers":
        found = [METRICS["accuracy"], *found]
    return Judged(main, tuple({one.name: one for one in found}.values()))


def metric_of(name: str, place: str, targets: str) -> Metric:
    """Return the metric called `name`; raises StudyError naming the place."""
    if ":" in name:
        return _own(name, place)
    if name not in METRICS:
        raise StudyError(f"{place}: must be one of {', '.join(METRICS)} or package.module:metric, got {name!r}")
    if targets not in METRICS[name].fits:
        fitting = ", ".join(key for key, one in METRICS.items() if targets in one.fits)
        kind = {"numbers": "real numbers", "positions": "a class a position"}.get(targets, targets)
        raise StudyError(f"{place}: must be one of {fitting} where the targets are {kind}, got {name!r}")
    return METRICS[name]


def _own(name: str, place: str) -> Metric:
    function = imported(name, place)
    if isinstance(function, type):
        try:
            function = function()
        except Exception as error:  # the user's code may raise anything
            raise StudyError(f"{place}: {name} must be made without arguments: {told(error)}") from error
    if not callable(function):
        raise StudyError(f"{place}: {name} must be called as (outputs, y), got {type(function).__name__}")
    if len(name) > 100 or not name.isprintable():
        raise StudyError(f"{place}: must be a printable name of at most 100 characters, got {name!r}")
    higher, unit = getattr(function, "higher_is_better", True), getattr(function, "unit", "")
    if not isinstance(higher, bool) or unit not in ("", "percent"):
        raise StudyError(
            f"{place}: {name} must have higher_is_better True or False, and unit '' or 'percent', got {higher!r} and "
            f"{unit!r}"
        )
    return OfAll(name, function, higher, unit == "percent")


def rows(outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return outputs and targets as a metric sees them: positions laid out, ignored ones left out, numbers alike."""
    if y.is_floating_point():
        return outputs.reshape(y.shape), y
    if y.dim() == 1:
        return outputs, y
    flat = y.reshape(-1)
    there = flat != IGNORED
    if outputs.dim() == y.dim():  # of the positions that count alone
        return outputs, flat[there]
    return outputs.reshape(-1, outputs.shape[-1])[there], flat[there]


def counted(y: Tensor) -> Tensor:
    """Return (N,) int64: how many targets each example has, 1 or its positions with a class."""
    if y.is_floating_point() or y.dim() == 1:
        return torch.ones(len(y), dtype=torch.int64, device=y.device)
    return (y != IGNORED).sum(1)


def num_counted(y: Tensor) -> int:
    """Return how many targets there are in all: over these a batch's loss is a mean."""
    return len(y) if y.is_floating_point() or y.dim() == 1 else int(counted(y).sum())


@dataclass(frozen=True)
class Scores:
    """What an evaluation found: the mean loss, and each metric's value by name."""

    loss: float
    metrics: Mapping[str, float]

    @property
    def accuracy(self) -> float:
        return self.metrics["accuracy"]


def scored(states: Mapping[Metric, Any], loss: float) -> Scores:
    """Return the scores of filled metrics; where the loss is no number only of those that count hits."""
    kept = states if math.isfinite(loss) else {m: s for m, s in states.items() if isinstance(m, HITS)}
    return Scores(loss, {m.name: loss if m.name == "loss" else m.value(state) for m, state in kept.items()})


def constant_outputs(y: Tensor, loss: Loss) -> Tensor:
    """Return () or (k,): the outputs of a model that knows real targets y (N,) or (N, k) by their mean alone.

    Under a loss that takes logits that is the mean's log-odds, where all or none count as half an example less or more.
    """
    mean = y.mean(0)
    return torch.logit(mean, eps=0.5 / len(y)) if takes_logits(loss, y) else mean


def guessed(data: Examples, metrics: Sequence[Metric], num_classes: int, mean: Tensor | None, loss: Loss) -> Scores:
    """Return what one guess for every example reaches: equal outputs for all classes, or `mean` of real numbers.

    `mean` are outputs, logits under a loss that takes them, as metrics see any model's. A metric that says what chance
    is has that. The loss of classes is that of a uniform guess, ln of their number.
    """
    usual = math.log(num_classes) if mean is None else float(loss(mean.expand(data.y.shape), data.y))
    found: dict[str, float] = {}
    for metric in metrics:
        chance = metric.chance(num_classes)
        if metric.name == "loss":
            chance = usual
        elif chance is None:
            outputs = data.y.new_zeros((*data.y.shape, num_classes), dtype=torch.float32) if mean is None else mean
            outputs = outputs if mean is None else mean.expand(data.y.shape)
            chance = metric.value(metric.add(None, *rows(outputs, data.y)))
        found[metric.name] = chance
    return Scores(usual, found)
