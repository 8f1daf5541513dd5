"""Granularities: what is kept or dropped as one. Scores of a group are averaged; densities then count groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import numpy as np

from fedlth.errors import StudyError, wrong
from fedlth.models.heads import living
from fedlth.models.layout import Entry, Layout, Params
from fedlth.tickets.select import keep_top

Choose = Callable[[np.ndarray, np.ndarray, Layout], np.ndarray]  # a scope at a density: (score, alive, layout) -> mask


@dataclass(frozen=True, eq=False)
class Groups:
    """A layout's weights in groups. `layout` has an entry of groups for each prunable tensor, same names and order.

    `of` (num_prunable,) says which group each weight is in; None where every weight is its own group. `weights` is
    given where groups are of unequal size and lie across tensors: the layout of the weights themselves, which a density
    then counts in place of groups. `layout` has an entry for each layer's groups of one kind.
    """

    layout: Layout
    of: np.ndarray | None
    weights: Layout | None = None

    def reduced(self, values: np.ndarray) -> np.ndarray:
        """Return the mean (num_groups,) of each group's values; the values themselves where groups are weights."""
        if self.of is None:
            return values
        count = np.bincount(self.of, minlength=self.layout.num_prunable)
        return np.bincount(self.of, weights=values.astype(np.float64), minlength=count.size) / count

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Return what each weight's group has, (num_prunable,)."""
        return values if self.of is None else values[self.of]


class Granularity(Protocol):
    def groups(self, layout: Layout, /) -> Groups: ...


@dataclass(frozen=True)
class Element:
    """Every weight for itself."""

    rows: ClassVar[tuple[int, ...]] = (1,)

    def groups(self, layout: Layout, /) -> Groups:
        return Groups(layout, None)


@dataclass(frozen=True)
class Row:
    """All that leads into one output unit or filter. Li et al., ICLR 2017, arXiv 1608.08710; Early-Bird's channels."""

    rows: ClassVar[tuple[int, ...]] = (18,)

    def groups(self, layout: Layout, /) -> Groups:
        return numbered(layout, outputs_of)


@dataclass(frozen=True)
class Channel:
    """All that one input unit or channel leads into. He, Zhang, Sun, ICCV 2017, arXiv 1707.06168."""

    rows: ClassVar[tuple[int, ...]] = (18,)

    def groups(self, layout: Layout, /) -> Groups:
        return numbered(layout, inputs_of)


@dataclass(frozen=True)
class Block:
    """Tiles of `height` x `width` of the matrix (outputs, inputs); edges are smaller. Gray et al., OpenAI, 2017."""

    height: int = 4
    width: int = 4
    rows: ClassVar[tuple[int, ...]] = ()

    def __post_init__(self) -> None:
        for name, value in (("height", self.height), ("width", self.width)):
            if value < 1:
                raise wrong(f"finder.granularity.{name}", "at least 1", value)

    def groups(self, layout: Layout, /) -> Groups:
        def tile(e: Entry) -> np.ndarray:
            i, j = np.indices((e.outputs, e.fan_in))
            return np.asarray(e.as_stored(i // self.height * -(-e.fan_in // self.width) + j // self.width))

        return numbered(layout, tile)


@dataclass(frozen=True)
class HeadsAndChannels:
    """Whole heads and feed-forward channels of a transformer. Prasanna et al., EMNLP 2020, arXiv 2005.00561.

    A head is its rows of queries, keys and values and its columns of the output projection, a channel its row of the
    first feed-forward layer and its column of the second; at least one of each stays in every layer. A density counts
    weights, to within half a channel of each layer. A unit's biases are zero once its weights are gone.
    """

    rows: ClassVar[tuple[int, ...]] = ()

    def groups(self, layout: Layout, /) -> Groups:
        if lacking := next((e.name for e in layout.prunable if e.units is None), ""):
            raise StudyError(
                "finder.granularity: heads_and_channels needs a transformer of the form of BERT, RoBERTa, DistilBERT "
                f"or GPT-2 (model: hf) without adapters, and nothing else prunable, got {lacking} (model.prunable)"
            )
        held = {e.units.of: e for e in reversed(layout.prunable) if e.units is not None}
        for e in layout.floats:
            if e.units is not None and e.units.of in held and len(e.shape) > 1 and not e.prunable:
                raise StudyError(
                    f"finder.granularity: heads_and_channels must prune all of {e.units.of}, got {e.name}, which "
                    "model.prunable leaves out"
                )
        entries, before = list[Entry](), 0
        for name in sorted(held):
            e = held[name]
            assert e.units is not None
            entries.append(
                replace(e, name=name, shape=(e.units.count,), offset=before, aliases=(), units=None, transposed=0)
            )
            before += e.units.count
        first = {e.name: e.offset for e in entries}
        of = np.empty(layout.num_prunable, np.int32)
        for e in layout.prunable:
            assert e.units is not None
            along = first[e.units.of] + e.units.along(e.shape[e.units.dim])
            whole = of[e.slice].reshape(e.shape)
            whole[:] = along.reshape([-1 if dim == e.units.dim else 1 for dim in range(len(e.shape))])
        return Groups(Layout(tuple(entries)), of, layout)

    def cleared(self, params: Params, mask: np.ndarray, layout: Layout, /) -> Params:
        """Return params with the biases of units that `mask` has nothing of at zero."""
        alive = {name: kept for name, kept in living(layout, mask).items() if not kept.all()}
        floats = params.floats.copy() if alive else params.floats
        for e in layout.floats if alive else ():
            if e.units is not None and e.units.of in alive and not e.prunable:
                floats[e.slice][~alive[e.units.of][e.units.along(e.size)]] = 0
        return replace(params, floats=floats)


def kept_units(groups: Groups, score: np.ndarray, alive: np.ndarray, choose: Choose) -> np.ndarray:
    """Return the groups (num_groups,) bool that stay where `choose` says how many weights each tensor keeps.

    Weights are chosen by their group's score, so that few groups are cut in two. In each layer heads are kept to the
    nearest whole one, and channels make up for the difference. The best of each kind in a layer come before all others.
    Raises StudyError where the weights chosen are fewer than these.
    """
    assert groups.of is not None and groups.weights is not None
    first = np.array(score, np.float64)
    for e in groups.layout.prunable:
        first[e.offset + np.argmax(np.where(alive[e.slice], first[e.slice], -np.inf))] = np.inf
    chosen = choose(groups.spread(first), groups.spread(alive), groups.weights)
    size = np.bincount(groups.of, minlength=alive.size)
    counts = np.bincount(groups.of, weights=chosen, minlength=alive.size)
    least = sum(int(size[e.offset]) for e in groups.layout.prunable)
    if np.count_nonzero(chosen) < least:
        raise StudyError(
            f"finder.densities: must be at least {least / chosen.size:.4g} under heads_and_channels, which keeps a "
            f"head and a channel in every layer, got {np.count_nonzero(chosen) / chosen.size:.4g}"
        )
    kept, spare = np.zeros(alive.size, bool), dict[str, float]()
    for e in sorted(groups.layout.prunable, key=lambda e: -size[e.offset]):
        layer, each = e.name.rpartition(".")[0], int(size[e.offset])
        budget = counts[e.slice].sum() + spare.get(layer, 0.0)
        stay = min(max(1, round(budget / each)), int(np.count_nonzero(alive[e.slice])))
        kept[e.slice] = keep_top(first[e.slice], alive[e.slice], stay)
        spare[layer] = budget - stay * each
    return kept


def numbered(layout: Layout, number: Numbering) -> Groups:
    """Number the groups of every prunable tensor after those of the one before."""
    entries: list[Entry] = []
    of = np.zeros(layout.num_prunable, np.int64)
    before = 0
    for e in layout.prunable:
        local = number(e).reshape(-1)
        count = int(local.max()) + 1
        of[e.slice] = local + before
        entries.append(replace(e, shape=(count,), offset=before, transposed=0))
        before += count
    return Groups(Layout(tuple(entries)), of)


def outputs_of(e: Entry, /) -> np.ndarray:
    """Return which output unit or filter each weight leads into."""
    return np.asarray(e.as_stored(np.repeat(np.arange(e.outputs), e.fan_in)))


def inputs_of(e: Entry, /) -> np.ndarray:
    """Return which input unit or channel each weight comes from."""
    inputs = 0 if e.transposed else min(1, len(e.shape) - 1)
    return np.asarray(np.indices(e.shape)[inputs])


class Numbering(Protocol):
    def __call__(self, e: Entry, /) -> np.ndarray: ...


GRANULARITIES = {
    "element": Element, "row": Row, "channel": Channel, "block": Block, "heads_and_channels": HeadsAndChannels,
}  # fmt: skip
