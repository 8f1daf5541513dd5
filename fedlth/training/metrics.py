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
from torch.nn import functional

from fedlth.data.examples import Examples
from fedlth.errors import StudyError
from fedlth.study.parts import imported
from fedlth.training.loss import IGNORED, Loss

CLASSES, NUMBERS = frozenset({"classes", "positions"}), frozenset({"numbers"})
LARGEST = 1e30  # what stands in for an overflow: a record holds finite numbers


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
class Accuracy:
    """The share of examples, or positions, whose largest output is their class."""

    name: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    percent: ClassVar[bool] = True
    fits: ClassVar[frozenset[str]] = CLASSES

    def add(self, state: tuple[int, int] | None, outputs: Tensor, y: Tensor, /) -> tuple[int, int]:
        right, count = state or (0, 0)
        return right + int((outputs.argmax(-1) == y).sum()), count + y.numel()

    def value(self, state: tuple[int, int], /) -> float:
        return state[0] / state[1]

    def chance(self, num_classes: int, /) -> float | None:
        return 1 / num_classes


@dataclass(frozen=True)
class BalancedAccuracy:
    """The mean over the classes that are there of the share of each that is told right."""

    name: ClassVar[str] = "balanced_accuracy"
    higher_is_better: ClassVar[bool] = True
    percent: ClassVar[bool] = True
    fits: ClassVar[frozenset[str]] = CLASSES

    def add(self, state: Tensor | None, outputs: Tensor, y: Tensor, /) -> Tensor:
        return _counted(state, outputs, y)

    def value(self, state: Tensor, /) -> float:
        right, _, there = state
        return float((right[there > 0] / there[there > 0]).mean())

    def chance(self, num_classes: int, /) -> float | None:
        return 1 / num_classes


@dataclass(frozen=True)
class MacroF1:
    """The mean of the classes' F1 scores, over those that are there or are guessed; 2 right / (there + guessed)."""

    name: ClassVar[str] = "macro_f1"
    higher_is_better: ClassVar[bool] = True
    percent: ClassVar[bool] = True
    fits: ClassVar[frozenset[str]] = CLASSES

    def add(self, state: Tensor | None, outputs: Tensor, y: Tensor, /) -> Tensor:
        return _counted(state, outputs, y)

    def value(self, state: Tensor, /) -> float:
        right, guessed, there = state
        seen = (guessed + there) > 0
        return float((2 * right[seen] / (guessed + there)[seen]).mean())

    def chance(self, num_classes: int, /) -> float | None:
        return 1 / num_classes


HITS = (Accuracy, BalancedAccuracy, MacroF1)


def _counted(state: Tensor | None, outputs: Tensor, y: Tensor) -> Tensor:
    """Return (3, C) float64: of each class how many were told right, guessed, and there."""
    size, guess = outputs.shape[-1], outputs.argmax(-1)
    found = torch.stack([torch.bincount(part, minlength=size) for part in (y[guess == y], guess, y)]).double().cpu()
    return found if state is None else state + found


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean cross-entropy of the classes, at most 1e30."""

    name: ClassVar[str] = "perplexity"
    higher_is_better: ClassVar[bool] = False
    percent: ClassVar[bool] = False
    fits: ClassVar[frozenset[str]] = CLASSES

    def add(self, state: tuple[float, int] | None, outputs: Tensor, y: Tensor, /) -> tuple[float, int]:
        total, count = state or (0.0, 0)
        lost = float(functional.cross_entropy(outputs.double(), y, reduction="sum"))
        return total + lost, count + len(y)

    def value(self, state: tuple[float, int], /) -> float:
        return math.exp(min(state[0] / state[1], math.log(LARGEST)))

    def chance(self, num_classes: int, /) -> float | None:
        return float(num_classes)


@dataclass(frozen=True)
class MeanError:
    """The mean over examples and outputs of a power of the distance; `root`: its root."""

    name: str
    power: int
    root: bool = False
    higher_is_better: ClassVar[bool] = False
    percent: ClassVar[bool] = False
    fits: ClassVar[frozenset[str]] = NUMBERS

    def add(self, state: tuple[float, int] | None, outputs: Tensor, y: Tensor, /) -> tuple[float, int]:
        total, count = state or (0.0, 0)
        return total + float((outputs.double() - y.double()).abs().pow(self.power).sum()), count + y.numel()

    def value(self, state: tuple[float, int], /) -> float:
        mean = min(state[0] / state[1], LARGEST)
        return math.sqrt(mean) if self.root else mean

    def chance(self, num_classes: int, /) -> float | None:
        return None


@dataclass(frozen=True)
class Determination:
    """R^2, the mean over outputs of 1 - squared error / squared distance to the mean; at least -1e30.

    Of an output whose targets are all equal: 1 where every prediction is exact, else 0.
    """

    name: ClassVar[str] = "r2"
    higher_is_better: ClassVar[bool] = True
    percent: ClassVar[bool] = False
    fits: ClassVar[frozenset[str]] = NUMBERS

    def add(self, state: _Moments | None, outputs: Tensor, y: Tensor, /) -> _Moments:
        return _Moments.of(outputs, y).after(state)

    def value(self, state: _Moments, /) -> float:
        found = torch.where(state.error == 0, 1.0, 0.0).double()
        varied = state.low_y != state.high_y
        found[varied] = 1 - state.error[varied] / state.square_y[varied]
        return max(float(found.mean()), -LARGEST)

    def chance(self, num_classes: int, /) -> float | None:
        return None


@dataclass(frozen=True)
class Pearson:
    """The mean over outputs of the correlation of predictions and targets; 0 where either are all equal."""

    name: ClassVar[str] = "pearson"
    higher_is_better: ClassVar[bool] = True
    percent: ClassVar[bool] = False
    fits: ClassVar[frozenset[str]] = NUMBERS

    def add(self, state: _Moments | None, outputs: Tensor, y: Tensor, /) -> _Moments:
        return _Moments.of(outputs, y).after(state)

    def value(self, state: _Moments, /) -> float:
        found = torch.zeros_like(state.error)
        varied = (state.low_y != state.high_y) & (state.low_o != state.high_o)
        found[varied] = state.product[varied] / (state.square_o[varied].sqrt() * state.square_y[varied].sqrt())
        return float(found.clamp(-1, 1).mean())

    def chance(self, num_classes: int, /) -> float | None:
        return 0.0


@dataclass(frozen=True)
class _Moments:
    """Of outputs o and targets y, (k,) float64 each: means, squares and products about them, error, and extremes."""

    count: int
    mean_o: Tensor
    mean_y: Tensor
    square_o: Tensor
    square_y: Tensor
    product: Tensor
    error: Tensor
    low_o: Tensor
    high_o: Tensor
    low_y: Tensor
    high_y: Tensor

    @classmethod
    def of(cls, outputs: Tensor, y: Tensor) -> _Moments:
        o, y = (part.double().cpu().reshape(len(part), -1) for part in (outputs, y))
        off_o, off_y = o - o.mean(0), y - y.mean(0)
        return cls(
            len(y), o.mean(0), y.mean(0), off_o.square().sum(0), off_y.square().sum(0), (off_o * off_y).sum(0),
            (o - y).square().sum(0), o.amin(0), o.amax(0), y.amin(0), y.amax(0),
        )  # fmt: skip

    def after(self, first: _Moments | None) -> _Moments:
        """Return the moments of `first` and these together (Chan, Golub, LeVeque, 1979): no cancellation."""
        if first is None:
            return self
        count = first.count + self.count
        share = first.count * self.count / count
        apart_o, apart_y = self.mean_o - first.mean_o, self.mean_y - first.mean_y
        return _Moments(
            count, first.mean_o + apart_o * (self.count / count), first.mean_y + apart_y * (self.count / count),
            first.square_o + self.square_o + share * apart_o.square(),
            first.square_y + self.square_y + share * apart_y.square(),
            first.product + self.product + share * apart_o * apart_y, first.error + self.error,
            torch.minimum(first.low_o, self.low_o), torch.maximum(first.high_o, self.high_o),
            torch.minimum(first.low_y, self.low_y), torch.maximum(first.high_y, self.high_y),
        )  # fmt: skip


@dataclass(frozen=True)
class MeanLoss:
    """The mean loss of the study, as it is evaluated."""

    name: ClassVar[str] = "loss"
    higher_is_better: ClassVar[bool] = False
    percent: ClassVar[bool] = False
    fits: ClassVar[frozenset[str]] = CLASSES | NUMBERS

    def add(self, state: None, outputs: Tensor, y: Tensor, /) -> None:
        """Add nothing: an evaluation has the loss anyway."""

    def value(self, state: None, /) -> float:
        raise AssertionError("an evaluation fills in its loss")

    def chance(self, num_classes: int, /) -> float | None:
        return None


@dataclass(frozen=True)
class OfAll:
    """A user's own function of all outputs and all targets of a part."""

    name: str
    function: Callable[[Tensor, Tensor], Any]
    higher_is_better: bool
    percent: bool
    fits: ClassVar[frozenset[str]] = CLASSES | NUMBERS

    def add(
        self, state: tuple[tuple[Tensor, Tensor], ...] | None, outputs: Tensor, y: Tensor, /
    ) -> tuple[tuple[Tensor, Tensor], ...]:
        return (*(state or ()), (outputs.cpu(), y.cpu()))

    def value(self, state: tuple[tuple[Tensor, Tensor], ...], /) -> float:
        outputs, y = (torch.cat(parts) for parts in zip(*state, strict=True))
        found = float(self.function(outputs, y))
        if not math.isfinite(found):
            raise ValueError(f"metric {self.name} must be a finite number, got {found}")
        return found

    def chance(self, num_classes: int, /) -> float | None:
        return None


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Accuracy(), MeanLoss(), BalancedAccuracy(), MacroF1(), Perplexity(), MeanError("mse", 2),
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

    Raises StudyError for an unknown name, and for a metric that cannot judge such targets.
    """
    main = metric_of(metric or ("mse" if targets == "numbers" else "accuracy"), "metric", targets)
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
            told = f"{type(error).__name__}: {error}"
            raise StudyError(f"{place}: {name} must be made without arguments: {told}") from error
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
    return outputs.reshape(-1, outputs.shape[-1])[there], flat[there]


def counted(y: Tensor) -> Tensor:
    """Return (N,) int64: how many targets each example has, 1 or its positions with a class."""
    if y.is_floating_point() or y.dim() == 1:
        return torch.ones(len(y), dtype=torch.int64, device=y.device)
    return (y != IGNORED).sum(1)


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


def guessed(data: Examples, metrics: Sequence[Metric], num_classes: int, mean: Tensor | None, loss: Loss) -> Scores:
    """Return what one guess for every example reaches: equal outputs for all classes, or `mean` of real numbers.

    A metric that says what chance is has that. The loss of classes is that of a uniform guess, ln of their number.
    """
    told = math.log(num_classes) if mean is None else float(loss(mean.expand(data.y.shape), data.y))
    found: dict[str, float] = {}
    for metric in metrics:
        chance = metric.chance(num_classes)
        if metric.name == "loss":
            chance = told
        elif chance is None:
            outputs = data.y.new_zeros((*data.y.shape, num_classes), dtype=torch.float32) if mean is None else mean
            outputs = outputs if mean is None else mean.expand(data.y.shape)
            chance = metric.value(metric.add(None, *rows(outputs, data.y)))
        found[metric.name] = chance
    return Scores(told, found)
