"""What a ticket leaves of every layer: the outputs that have weights and are read, and the taps that they read."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from fedlth.kernel import columns as col
from fedlth.kernel.kinds import KINDS
from fedlth.kernel.table import LayerTable, Op

_FEWER = 0.8  # of the channels at most, where choosing some costs a copy
_COPY = 10  # multiply-adds that copying a value forward costs, at most


@dataclass(frozen=True)
class Channels:
    """What is left of the channels of a value: those computed, and those that are read but constant."""

    computed: np.ndarray
    constant: np.ndarray

    @property
    def count(self) -> int:
        return len(self.computed) + bool(len(self.constant))


@dataclass(frozen=True)
class Layer:
    """One weighted layer: its matrix of kept weights (outputs, taps), and the part of it that is left.

    gathers, scatters: all channels of its input and of its output stay, and it chooses among them.
    """

    op: Op
    kept: np.ndarray
    area: int  # taps a channel pair
    source: Channels
    out: Channels
    columns: np.ndarray
    picks: tuple[int, ...] = ()
    gathers: bool = False
    scatters: bool = False

    @property
    def ones(self) -> int:
        return self.area if len(self.source.constant) else 0

    @property
    def block(self) -> np.ndarray:
        return _block(self.kept, self.out.computed, self.columns)

    def size(self) -> tuple[int, int]:
        """Return how many weights the smaller layer has, and how many of them are kept."""
        outputs = len(self.out.computed)
        whole = self.out.count * (len(self.columns) + self.ones)
        return whole, int(np.count_nonzero(self.block)) + outputs * self.ones


def _block(kept: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    some = kept if len(rows) == kept.shape[0] else kept[rows]
    return some if len(columns) == kept.shape[1] else some[:, columns]


def costs(table: LayerTable, kept: np.ndarray, layers: list[Layer] | None = None) -> tuple[float, float]:
    """Return the multiply-adds of an example's forward before and after; one on a list costs more, by its kind."""
    before = after = 0.0
    for layer in live_layers(table, kept) if layers is None else layers:
        pixels, below = math.prod(table.shapes[layer.op.out][1:]), layer.op.sparse_below
        before += pixels * _cost(layer.kept.size, int(np.count_nonzero(layer.kept)), below)
        after += pixels * _cost(*layer.size(), below)
        after += _COPY * pixels * (layer.gathers * layer.source.count + layer.scatters * layer.kept.shape[0])
    return before, after


def _cost(size: int, alive: int, below: float) -> float:
    return size if alive >= below * size else alive / below


def live_layers(table: LayerTable, kept: np.ndarray) -> list[Layer]:
    """Find what is left of every weighted layer."""
    owner, whole = owners(table)
    matrices: dict[int, tuple[np.ndarray, int]] = {}
    read = {at: np.full(table.shapes[at][0], at in whole) for at in set(owner.values())}
    alive: dict[int, np.ndarray] = {}
    for op in reversed(table.ops):
        if not op.weighted:
            continue
        shape = table.shapes[op.source]
        area = math.prod(op.window if op.kind == col.CONVOLUTION else shape[1:])
        outputs, taps = table.shapes[op.out][0], shape[0] // op.groups * area
        mine = kept[op.weight : op.weight + outputs * taps]
        matrix = mine if len(mine) == outputs * taps else np.ones(outputs * taps, bool)
        matrix = matrix.reshape(outputs, taps)
        matrices[op.out] = matrix, area
        alive[op.out] = np.asarray(matrix.any(axis=1))
        if owner[op.source] not in whole:
            rows = np.flatnonzero(alive[op.out] & read[owner[op.out]])
            found = _block(matrix, rows, np.arange(taps)).any(axis=0).reshape(-1, area).any(axis=1)
            read[owner[op.source]][np.flatnonzero(found)] = True
    makers = {op.out: op for op in table.ops}
    unfolded = {owner[op.out] for op in table.ops if not op.weighted and KINDS[op.kind].channels == "apart"}
    channels = {
        at: Channels(np.arange(len(wanted)), np.zeros(0, np.int64))
        if at in whole
        else _live(wanted, alive[at] | (at in unfolded), makers[at])
        for at, wanted in read.items()
    }
    readers = Counter(value for op in table.ops for value in op.reads)
    layers = []
    for op in table.ops:
        if op.weighted:
            ends, (matrix, area) = (channels[owner[op.source]], channels[owner[op.out]]), matrices[op.out]
            one = _one(op, matrix, area, *ends, readers[op.source] == 1)
            fixed = owner[op.source] in whole, owner[op.out] in whole
            layers.append(_choosing(one, *fixed, op.sparse_below))
    return layers


def _choosing(layer: Layer, source: bool, out: bool, below: float) -> Layer:
    """Let a convolution between maps of which all channels stay choose among these, where its dense part is smaller."""
    if layer.op.kind != col.CONVOLUTION or layer.op.groups > 1:
        return layer
    none, found = np.zeros(0, np.int64), layer
    rows = np.flatnonzero(layer.kept.any(axis=1)) if out else none
    if out and len(rows) <= _FEWER * layer.out.count:
        found = replace(found, out=Channels(rows if len(rows) else np.arange(1), none), scatters=True)
    inputs = np.flatnonzero(layer.kept.reshape(len(layer.kept), -1, layer.area).any(axis=(0, 2))) if source else none
    if source and len(inputs) <= _FEWER * layer.source.count:
        inputs = inputs if len(inputs) else np.arange(1)
        columns = (inputs[:, None] * layer.area + np.arange(layer.area)).reshape(-1)
        found = replace(found, source=Channels(inputs, none), columns=columns, gathers=True)
    size, alive = found.size()
    return found if alive >= below * size else layer  # a list passes over dead channels at no cost


def owners(table: LayerTable) -> tuple[dict[int, int], set[int]]:
    """Return for each value the one whose channels it has, and those of which all channels stay."""
    owner, whole = {0: 0}, {0}
    for op in table.ops:
        channels = "" if op.weighted else KINDS[op.kind].channels
        owner[op.out] = owner[op.source] if channels in ("kept", "apart") else op.out
        if channels == "joint" or op.groups > 1:
            whole.update(owner[value] for value in (*op.reads, op.out))
    return owner, whole | {owner[table.output]}


def _live(read: np.ndarray, alive: np.ndarray, maker: Op) -> Channels:
    computed, constant = np.flatnonzero(read & alive), np.flatnonzero(read & ~alive)
    if maker.bias < 0:  # constants of zero do nothing
        constant = constant[:0]
    return Channels(computed if len(computed) or len(constant) else np.arange(1), constant)


def _one(op: Op, kept: np.ndarray, area: int, source: Channels, out: Channels, alone: bool) -> Layer:
    if op.groups > 1:
        return Layer(op, kept, area, source, out, np.arange(kept.shape[1]))
    columns = (source.computed[:, None] * area + np.arange(area)).reshape(-1)
    if op.kind == col.LINEAR and alone:
        live = np.flatnonzero(_block(kept, out.computed, columns).any(axis=0))
        if len(live) < len(columns):
            live = live if len(live) or len(source.constant) else np.arange(1)
            ones = np.arange(area if len(source.constant) else 0) + len(columns)
            return Layer(op, kept, area, source, out, columns[live], tuple(np.append(live, ones).tolist()))
    return Layer(op, kept, area, source, out, columns)
