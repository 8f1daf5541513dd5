"""Rules that bear hostile clients, for `federate.join`: under sparse masks they look at the holders of a coordinate.

Trimmed mean and median: Yin, Chen, Ramchandran, Bartlett. Byzantine-Robust Distributed Learning: Towards Optimal
Statistical Rates. ICML 2018, arXiv 1803.01498. Krum and multi-Krum: Blanchard, El Mhamdi, Guerraoui, Stainer. Machine
Learning with Adversaries: Byzantine Tolerant Gradient Descent. NeurIPS 2017, arXiv 1703.02757.
Both papers have dense updates. Here a coordinate is judged by those that hold it; one without a holder keeps its old
value (or is zero, where the method's own mean has it so). Bits are numbers, zero or one; of scores a weight that a
message leaves out is a zero. One or two holders have no middle: `few` says whether their plain mean counts, or the old
value stays. Examples do not weigh, or a client could claim any number of them. Counters are the lower median. All rules
hold a round's contributions at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any, ClassVar

import numpy as np

from fedlth.errors import StudyError, wrong
from fedlth.methods.aggregate import Aggregate, Contribution, CountMean, FedAvg, join, values_of
from fedlth.methods.mask_outliers import outliers
from fedlth.methods.method import Phase, loose_part
from fedlth.models.layout import Layout, Params
from fedlth.storage.server_state import ServerState
from fedlth.study.parts import make, options_of

COLUMNS = 1 << 16  # coordinates that are sorted at once
FEW = 3  # with fewer holders there is nothing to trim


@dataclass
class Held:
    """What came in a round, in the order of the clients."""

    state: ServerState
    layout: Layout
    came: list[Contribution] = field(default_factory=list)


def _counters(held: Held) -> np.ndarray:
    """Return the lower median of what each counter is: the largest would be whatever one client says."""
    ints = [c.content.ints for c in held.came if c.content.ints is not None]
    return np.sort(np.stack(ints), axis=0)[(len(ints) - 1) // 2] if ints else held.state.theta.ints


def _columns(held: Held) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Yield (where, values (clients, columns) float32 in rising order, holders (columns,)), a piece at a time.

    The values of clients that do not hold a coordinate are infinite, and so behind those that count.
    """
    size = held.layout.num_prunable
    for first in range(0, held.layout.num_floats, COLUMNS):
        where = slice(first, min(first + COLUMNS, held.layout.num_floats))
        values = np.stack([values_of(c.content)[where] for c in held.came])
        count = max(0, min(where.stop, size) - first)
        for row, c in zip(values, held.came, strict=True):
            row[:count][~c.content.mask[first : first + count]] = np.inf
        holders = np.count_nonzero(np.isfinite(values), axis=0)
        values.sort(axis=0)
        yield where, values, holders


def _by_coordinate(
    held: Held, middle: Callable[[np.ndarray, np.ndarray], np.ndarray], few: str, uncovered: str
) -> ServerState:
    """Return the state whose coordinates are the `middle` of their holders: (values, holders) -> (columns,) float64."""
    old = held.state.theta.floats
    new = old.copy() if uncovered == "keep" else np.zeros_like(old)
    for where, values, holders in _columns(held):
        found = middle(values, np.maximum(holders, 1))
        changed = holders > 0
        if few == "keep":
            new[where][(holders > 0) & (holders < FEW)] = old[where][(holders > 0) & (holders < FEW)]
            changed = holders >= FEW
        new[where][changed] = found[changed].astype(np.float32)
    return ServerState(Params(new, _counters(held)))


def _without(came: Sequence[Contribution], held: Held, least: int, uncovered: str) -> np.ndarray:
    """Return (num_floats,) bool: what keeps its old value, as fewer than `least` of those that came hold it."""
    holders = np.full(held.layout.num_floats, len(came))
    holders[: held.layout.num_prunable] = sum(c.content.mask.astype(np.int64) for c in came)
    found: np.ndarray = (holders < least) & ((holders > 0) | (uncovered == "keep"))
    return found


def _between(values: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return the mean of the values of rank low to high - 1, (columns,) float64; high > low."""
    rank = np.arange(len(values))[:, None]
    inside = (rank >= low) & (rank < high)
    mean: np.ndarray = np.sum(values, axis=0, where=inside, dtype=np.float64) / (high - low)
    return mean


def _check(few: str, uncovered: str) -> None:
    for name, value, known in (("few", few, ("mean", "keep")), ("uncovered", uncovered, ("keep", "zero"))):
        if value not in known:
            raise wrong(f"federate.join.{name}", " or ".join(known), value)


def num_hostile(share: float, count: int) -> int:
    """Return how many of `count` clients a share of hostile ones is, rounded up."""
    return math.ceil(share * count - 1e-9)


@dataclass(frozen=True)
class TrimmedMean:
    """Per coordinate, the mean of its holders without the `share` lowest and highest.

    Of h holders min(ceil(share x h), (h - 1) // 2) are left out at each end: one at least where three hold it.
    """

    share: float = 0.2
    few: str = "mean"
    uncovered: str = "keep"
    holds_round: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check(self.few, self.uncovered)
        if not 0 < self.share < 0.5:
            raise wrong("federate.join.share", "in (0, 0.5)", self.share)

    def init(self, state: ServerState, layout: Layout, /) -> Held:
        return Held(state, layout)

    def add(self, held: Held, c: Contribution, /) -> None:
        held.came.append(c)

    def result(self, held: Held, /) -> ServerState:
        return _by_coordinate(held, self._middle, self.few, self.uncovered)

    def unsent(self, held: Held, /) -> np.ndarray:
        return _without(held.came, held, FEW if self.few == "keep" else 1, self.uncovered)

    def _middle(self, values: np.ndarray, holders: np.ndarray) -> np.ndarray:
        cut = np.minimum(np.ceil(self.share * holders - 1e-9).astype(np.int64), (holders - 1) // 2)
        return _between(values, cut, holders - cut)


@dataclass(frozen=True)
class Median:
    """Per coordinate, the median of its holders; of an even number the mean of the middle two."""

    few: str = "mean"
    uncovered: str = "keep"
    holds_round: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check(self.few, self.uncovered)

    def init(self, state: ServerState, layout: Layout, /) -> Held:
        return Held(state, layout)

    def add(self, held: Held, c: Contribution, /) -> None:
        held.came.append(c)

    def result(self, held: Held, /) -> ServerState:
        return _by_coordinate(held, _median, self.few, self.uncovered)

    def unsent(self, held: Held, /) -> np.ndarray:
        return _without(held.came, held, FEW if self.few == "keep" else 1, self.uncovered)


def _median(values: np.ndarray, holders: np.ndarray) -> np.ndarray:
    return _between(values, (holders - 1) // 2, holders // 2 + 1)


@dataclass(frozen=True)
class MultiKrum:
    """The holders' mean of the `keep` updates that lie nearest to their nearest others (0: all but the hostile share).

    Of n updates, ceil(share x n) = f may be hostile; an update's score is the sum of its distances to the n - f - 2
    others (one at least) that lie nearest. Equal scores: the first client. The distance of two updates is the mean
    squared difference of the parameters that both hold (`over: shared`), which for dense updates is the paper's up to a
    factor, or of those that no mask covers (`over: dense`). The paper's guarantee needs n > 2 f + 2.
    """

    share: float = 0.2
    keep: int = 0
    over: str = "shared"
    uncovered: str = "keep"
    holds_round: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check("mean", self.uncovered)
        if not 0 < self.share < 0.5:
            raise wrong("federate.join.share", "in (0, 0.5)", self.share)
        if self.keep < 0:
            raise wrong("federate.join.keep", "at least 0", self.keep)
        if self.over not in ("shared", "dense"):
            raise wrong("federate.join.over", "shared or dense", self.over)

    def init(self, state: ServerState, layout: Layout, /) -> Held:
        if self.over == "dense" and layout.num_params == layout.num_prunable:
            raise wrong("federate.join.over", "shared where all that is joined is prunable", self.over)
        return Held(state, layout)

    def add(self, held: Held, c: Contribution, /) -> None:
        held.came.append(c)

    def result(self, held: Held, /) -> ServerState:
        return join(CountMean(self.uncovered), held.state, self._believed(held), held.layout)

    def unsent(self, held: Held, /) -> np.ndarray:
        return _without(self._believed(held), held, 1, self.uncovered)

    def doubt(self, count: int) -> str:
        """Say why `count` updates a round are too few for the paper's guarantee, "" where they are not."""
        bad = num_hostile(self.share, count)
        return "" if count > 2 * bad + 2 else f"{bad} hostile of {count} a round: Krum's guarantee needs n > 2 f + 2"

    def _believed(self, held: Held) -> list[Contribution]:
        count = len(held.came)
        wanted = min(self.keep, count) if self.keep else max(1, count - num_hostile(self.share, count))
        best = np.argsort(self._scores(held), kind="stable")[:wanted]
        return [held.came[place] for place in sorted(int(i) for i in best)]

    def _scores(self, held: Held) -> np.ndarray:
        """Return each update's score, (clients,) float64."""
        count = len(held.came)
        apart = np.zeros((count, count))
        for i, one in enumerate(held.came):
            for j in range(i):
                apart[i, j] = apart[j, i] = self._distance(one, held.came[j], held.layout)
        near = max(1, count - num_hostile(self.share, count) - 2)
        return np.array([np.sort(np.delete(row, i))[:near].sum() for i, row in enumerate(apart)])

    def _distance(self, one: Contribution, other: Contribution, layout: Layout) -> float:
        size = layout.num_prunable
        rest = np.subtract(*(values_of(c.content)[size : layout.num_params] for c in (one, other)), dtype=np.float64)
        if self.over == "dense":
            return float(np.mean(rest**2))
        both = one.content.mask & other.content.mask
        held = np.subtract(*(values_of(c.content)[:size][both] for c in (one, other)), dtype=np.float64)
        number = held.size + rest.size
        return float(held @ held + rest @ rest) / number if number else math.inf


def krum(share: float = 0.2, over: str = "shared", uncovered: str = "keep") -> MultiKrum:
    """The one update that lies nearest to its nearest others, where it holds a coordinate; else the old value."""
    return MultiKrum(share, 1, over, uncovered)


@dataclass(frozen=True)
class WithoutOutliers:
    """The holders' mean without the clients whose masks are outliers (see federate.mask_outliers)."""

    uncovered: str = "keep"
    holds_round: ClassVar[bool] = True
    by_masks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check("mean", self.uncovered)

    def init(self, state: ServerState, layout: Layout, /) -> Held:
        return Held(state, layout)

    def add(self, held: Held, c: Contribution, /) -> None:
        held.came.append(c)

    def result(self, held: Held, /) -> ServerState:
        return join(CountMean(self.uncovered), held.state, self._believed(held), held.layout)

    def unsent(self, held: Held, /) -> np.ndarray:
        return _without(self._believed(held), held, 1, self.uncovered)

    def _believed(self, held: Held) -> list[Contribution]:
        far = outliers({c.client: c.mask for c in held.came})
        return [c for c in held.came if c.client not in far]


JOINS: Mapping[str, Callable[..., Aggregate]] = {
    "trimmed_mean": TrimmedMean,
    "median": Median,
    "krum": krum,
    "multi_krum": MultiKrum,
    "without_outliers": WithoutOutliers,
}


def with_rule(phases: Sequence[Phase], spec: Mapping[str, Any] | None, name: str) -> list[Phase]:
    """Return the phases with the rule that `federate.join` names wherever a mean is taken: of scores and numbers too.

    Where clients send to one another it is the mean that each takes of its neighbours, and the consensus. Raises
    StudyError where a part of a phase is no mean that could be replaced, or the rule looks at masks and there are none.
    """
    if spec is None:
        return list(phases)
    rule = make(JOINS, spec, "federate.join", has="init(state, layout)")
    loose = loose_part(rule, "federate.join")
    if loose:
        raise wrong("federate.join", "a frozen dataclass whose fields are immutable", loose)
    kinds = {kind for phase in phases for _, kind in phase.update.sends}
    if kinds and kinds <= {"thresholds", "statistics"} and getattr(rule, "by_masks", False):
        raise StudyError(
            f"federate.join: must be another rule for method {name}, whose messages have no masks to compare"
        )
    return [_with(phase, rule, name) for phase in phases]


def _with(phase: Phase, rule: Any, name: str) -> Phase:
    if phase.join is None:
        return phase
    made = replace(phase, join=in_place_of(phase.join, rule, name))
    return made if phase.topology is None else replace(made, update=in_place_of(phase.update, rule, name))


def holds_round(rule: Any) -> bool:
    """Say whether a rule, or the mean that it goes on from, holds all updates of a round at once."""
    return bool(getattr(rule, "holds_round", False) or getattr(getattr(rule, "mean", None), "holds_round", False))


def in_place_of(own: Any, rule: Any, name: str) -> Any:
    """Return `rule` in the place of a phase's own mean, or of the field `mean` of a part that goes on from one.

    A mean that lets what nobody holds be zero hands that on. Raises StudyError where there is no mean to replace.
    """
    if isinstance(own, (FedAvg, CountMean)):
        if own.uncovered != "keep" and "uncovered" in options_of(type(rule)):
            return replace(rule, uncovered=own.uncovered)
        return rule
    mean = getattr(own, "mean", None)
    if is_dataclass(own) and not isinstance(own, type) and isinstance(mean, (FedAvg, CountMean)):
        return replace(own, mean=in_place_of(mean, rule, name))
    raise StudyError(
        f"federate.join: must be left out for method {name}: its part {type(own).__name__} is no mean, and has no "
        "field `mean` that could be replaced"
    )
