"""Granularities: what is kept or dropped as one. Scores of a group are averaged; densities then count groups."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import numpy as np

from fedlth.errors import wrong
from fedlth.models.layout import Entry, Layout


@dataclass(frozen=True, eq=False)
class Groups:
    """A layout's weights in groups. `layout` has an entry of groups for each prunable tensor, same names and order.

    `of` (num_prunable,) int64 says which group each weight is in; None where every weight is its own group.
    """

    layout: Layout
    of: np.ndarray | None

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
        return numbered(layout, lambda shape: np.indices(shape)[0])


@dataclass(frozen=True)
class Channel:
    """All that one input unit or channel leads into. He, Zhang, Sun, ICCV 2017, arXiv 1707.06168."""

    rows: ClassVar[tuple[int, ...]] = (18,)

    def groups(self, layout: Layout, /) -> Groups:
        return numbered(layout, lambda shape: np.indices(shape)[min(1, len(shape) - 1)])


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
        def tile(shape: tuple[int, ...]) -> np.ndarray:
            outputs = shape[0] if shape else 1
            inputs = int(np.prod(shape[1:], dtype=np.int64))
            i, j = np.indices((outputs, inputs))
            return np.asarray(i // self.height * -(-inputs // self.width) + j // self.width)

        return numbered(layout, tile)


def numbered(layout: Layout, number: Numbering) -> Groups:
    """Number the groups of every prunable tensor after those of the one before."""
    entries: list[Entry] = []
    of = np.zeros(layout.num_prunable, np.int64)
    before = 0
    for e in layout.prunable:
        local = number(e.shape).reshape(-1)
        count = int(local.max()) + 1
        of[e.slice] = local + before
        entries.append(replace(e, shape=(count,), offset=before))
        before += count
    return Groups(Layout(tuple(entries)), of)


class Numbering(Protocol):
    def __call__(self, shape: tuple[int, ...], /) -> np.ndarray: ...


GRANULARITIES = {"element": Element, "row": Row, "channel": Channel, "block": Block}
