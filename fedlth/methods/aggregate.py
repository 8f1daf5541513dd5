"""How the server joins what clients sent. "Averaging the overlap" is several rules: `CountMean` has them as options."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import numpy as np

from fedlth.methods.space import chances
from fedlth.models.layout import Layout, Params
from fedlth.storage.server_state import ServerState
from fedlth.wire.payload import Content


@dataclass(frozen=True)
class Contribution:
    """One valid reply in client order: its number of training examples, and what it sent.

    `content` is the first of what its phase's update sends; `others` the rest, by name. `named` is the mask that came,
    where a rule has made other numbers of the content than what the client sent.
    """

    client: int
    num_examples: int
    content: Content
    others: Mapping[str, Content] = field(default_factory=dict)
    named: np.ndarray | None = None

    @property
    def mask(self) -> np.ndarray:
        """The mask that the client sent, whatever a rule has made of its numbers."""
        return self.content.mask if self.named is None else self.named

    def as_numbers(
        self, content: Content, floats: np.ndarray | None = None, mask: np.ndarray | None = None
    ) -> Contribution:
        """Return what a mean is to take of `content`, one of the messages: its numbers, or `floats`.

        Those in `mask` count, without one all: a coordinate that the message leaves out then counts as zero.
        """
        mask = np.ones(content.mask.size, bool) if mask is None else mask
        floats = content.floats if floats is None else floats
        return replace(self, content=replace(content, mask=mask, floats=floats), others={}, named=self.mask)


class Aggregate(Protocol):
    """A rule that joins contributions one by one, in client order, while clients are still at work.

    A rule is a frozen value: equal calls give equal results. What it must remember from round to round lies in the
    state's memory, which is checkpointed and comes back on resume. State and contents lie in `layout`; sums are
    float64, cast once. In a round without any contribution only `init` is called.

    An attribute `masks` that is True says that it may give everyone a mask; a method `of_task(task)` returns the rule
    that joins in its place, for one that asks the task (what a weight costs, the seed of the study). A mean whose
    `weighted` is True weighs clients by their examples; one with a method `unsent(accumulator)` says which coordinates,
    (num_floats,) bool, keep their old value because nobody that it believes has sent them.
    """

    def init(self, state: ServerState, layout: Layout, /) -> Any:
        """Return an accumulator over `state`, the one that this round's clients were sent; `state` is not changed."""
        ...

    def add(self, accumulator: Any, contribution: Contribution, /) -> None:
        """Take one contribution in and let it go: memory must not grow with the number of clients."""
        ...

    def result(self, accumulator: Any, /) -> ServerState:
        """Return the new state: the global state and the whole memory of the rule."""
        ...


def join(rule: Aggregate, state: ServerState, contributions: Iterable[Contribution], layout: Layout) -> ServerState:
    """Join at least one contribution."""
    accumulator = rule.init(state, layout)
    for contribution in contributions:
        rule.add(accumulator, contribution)
    return rule.result(accumulator)


def mean_of(rule: Aggregate, accumulator: Any) -> np.ndarray:
    """Return what a rule makes of numbers that are no state, (num_floats,) float64: not cast, where it can say so."""
    unrounded = getattr(rule, "unrounded", None)
    found: np.ndarray = rule.result(accumulator).theta.floats if unrounded is None else unrounded(accumulator)
    return found.astype(np.float64)


def unsent(rule: Aggregate, accumulator: Any, layout: Layout) -> np.ndarray:
    """Return (num_floats,) bool: the coordinates that keep their old value, as far as a rule says so."""
    says = getattr(rule, "unsent", None)
    return np.zeros(layout.num_floats, bool) if says is None else np.asarray(says(accumulator), bool)


def values_of(content: Content) -> np.ndarray:
    """Return what was sent as values; raise ValueError at a bare mask."""
    if content.floats is None:
        raise ValueError("a bare mask cannot be averaged as values")
    return content.floats


def _largest(ints: np.ndarray, content: Content) -> np.ndarray:
    """Counters (BatchNorm's num_batches_tracked) take the largest: a mean of counts counts nothing."""
    return ints if content.ints is None else np.maximum(ints, content.ints)


@dataclass
class _Sum:
    """Sums so far. `weight` is one number, or one a coordinate; `scratch` spares an array a contribution."""

    old: Params
    total: np.ndarray
    weight: Any
    ints: np.ndarray
    scratch: np.ndarray


@dataclass(frozen=True)
class FedAvg:
    """Mean weighted by examples; a weight outside a client's mask counts as zero.

    McMahan et al., AISTATS 2017, arXiv 1602.05629, where every client sends every weight.
    """

    uncovered: ClassVar[str] = "zero"
    weighted: ClassVar[bool] = True

    def init(self, state: ServerState, layout: Layout, /) -> _Sum:
        return _Sum(state.theta, np.zeros(layout.num_floats), 0, state.theta.ints, np.empty(layout.num_floats))

    def add(self, so_far: _Sum, c: Contribution, /) -> None:
        so_far.total += np.multiply(values_of(c.content), c.num_examples, out=so_far.scratch, dtype=np.float64)
        so_far.weight += c.num_examples
        so_far.ints = _largest(so_far.ints, c.content)

    def unrounded(self, so_far: _Sum, /) -> np.ndarray:
        """Return the mean before it is cast."""
        mean: np.ndarray = so_far.total / so_far.weight
        return mean

    def result(self, so_far: _Sum, /) -> ServerState:
        return ServerState(Params(self.unrounded(so_far).astype(np.float32), so_far.ints))


@dataclass(frozen=True)
class CountMean:
    """Mean over the clients that hold a coordinate.

    `uncovered` says what a coordinate without a holder becomes: "keep" the old value (LotteryFL, Sub-FedAvg) or
    "zero" (FedDST). `weighted` weighs holders by their examples.
    """

    uncovered: str = "keep"
    weighted: bool = False

    def init(self, state: ServerState, layout: Layout, /) -> _Sum:
        weight: np.ndarray = np.zeros(layout.num_floats, np.float64 if self.weighted else np.int32)
        return _Sum(state.theta, np.zeros(layout.num_floats), weight, state.theta.ints, np.empty(0))

    def add(self, so_far: _Sum, c: Contribution, /) -> None:
        mask, floats = c.content.mask, values_of(c.content)  # floats are zero where the mask is False
        share = c.num_examples if self.weighted else 1
        so_far.total += floats if share == 1 else floats.astype(np.float64) * share
        so_far.weight[: mask.size] += mask if share == 1 else mask * share
        so_far.weight[mask.size :] += share
        so_far.ints = _largest(so_far.ints, c.content)

    def unrounded(self, so_far: _Sum, /) -> np.ndarray:
        """Return the mean before it is cast."""
        old = so_far.old.floats
        rest = old.astype(np.float64) if self.uncovered == "keep" else np.zeros(old.size)
        mean: np.ndarray = np.divide(so_far.total, so_far.weight, out=rest, where=so_far.weight > 0)
        return mean

    def unsent(self, so_far: _Sum, /) -> np.ndarray:
        """Return (num_floats,) bool: what keeps its old value, as nobody holds it."""
        found: np.ndarray = (so_far.weight == 0) & (self.uncovered == "keep")
        return found

    def result(self, so_far: _Sum, /) -> ServerState:
        return ServerState(Params(self.unrounded(so_far).astype(np.float32), so_far.ints))


@dataclass(frozen=True)
class MaskMean:
    """Scores whose sigmoid is the mean of the clients' sampled masks, kept within [clamp, 1 - clamp].

    The Beta(1, 1) posterior mode of FedPM with the prior reset every round: (alpha - 1) / (alpha + beta - 2) = mean.
    """

    clamp: float = 0.01
    mean: Aggregate = field(default_factory=CountMean)

    def init(self, state: ServerState, layout: Layout, /) -> Any:
        return state, self.mean.init(as_chances(state), layout)

    def add(self, so_far: Any, c: Contribution, /) -> None:
        self.mean.add(so_far[1], c.as_numbers(c.content, c.content.mask.astype(np.float32)))

    def result(self, so_far: Any, /) -> ServerState:
        state, mean = so_far
        return ServerState(Params(logit(mean_of(self.mean, mean), self.clamp), state.theta.ints))


def as_chances(state: ServerState) -> ServerState:
    """Return a state of scores as how likely each weight is there: what bits are meant beside."""
    return ServerState(Params(chances(state.theta.floats).astype(np.float32), state.theta.ints))


def logit(chance: np.ndarray, clamp: float) -> np.ndarray:
    """Return the scores float32 whose sigmoids are `chance`, kept within [clamp, 1 - clamp]."""
    theta = np.clip(chance, clamp, 1 - clamp)
    scores: np.ndarray = np.log(theta / (1 - theta))
    return scores.astype(np.float32)
