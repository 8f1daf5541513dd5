"""Turn a ticket that drops whole channels into a smaller network: dense layers over what is left, and equal results.

- A channel that no kept weight reads goes, with all that leads to it: its weights have no gradient.
- A channel that is read though its own weights are all dead has its bias everywhere. Such constants become one channel
  of ones; a layer's weights on it are the sums over the constants, which constants.py renews at every step.
- A linear layer leaves out single features that it does not read.

Channels keep their number through pools and relu. Around additions, group norms and grouped convolutions, and of the
input and the logits, all channels stay: what is one channel there depends on others, or must keep its place.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from fedlth.compute import columns as col
from fedlth.compute.places import check_folds
from fedlth.compute.table import LayerTable, Op

_WORTH = 0.9  # of the multiply-adds at most; above, arranging the smaller network costs what it gains
_WEIGHTED = col.CONVOLUTION, col.LINEAR


@dataclass(frozen=True)
class _Fold:
    """A layer's weights on constants, as places in the small vector; see the columns of these names."""

    layer: int
    block: int
    total: int
    values: int
    ones: np.ndarray
    biases: np.ndarray
    relu: bool


@dataclass(frozen=True)
class Shrunk:
    """The smaller network; places (num_params,): its parameters in the vector of the larger, then a zero and a one.

    kept: the mask over its prunable parameters.
    """

    table: LayerTable
    places: np.ndarray
    kept: np.ndarray
    folds: tuple[_Fold, ...]

    def folded(self, rows: np.ndarray, lists: np.ndarray, keep: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Return rows and lists with the folds, whose places are those among the parameters of `keep`."""
        rows, parts, listed = rows.copy(), [lists], len(lists)
        for fold in self.folds:
            starts = np.array([fold.block, fold.total, fold.values])
            ones, biases = fold.ones, fold.biases
            if keep is not None:
                starts, ones, biases = (np.searchsorted(keep, places) for places in (starts, ones, biases))
            row = rows[fold.layer]
            row[[col.FOLD_BLOCK, col.FOLD_TOTAL, col.FOLD_VALUES]] = starts
            row[[col.CONSTANTS, col.FOLD_COUNT, col.FOLD_RELU]] = biases.size, ones.size, fold.relu
            row[[col.FOLD_SIZE, col.FOLD_PLACES]] = _sixteens(ones.size), listed
            row[col.FOLD_BIASES] = listed + ones.size
            parts += [ones.astype(np.int32), biases.astype(np.int32)]
            listed += ones.size + biases.size
        lists = np.concatenate(parts)
        check_folds(rows, lists, len(self.places) if keep is None else len(keep))
        return rows, lists


@dataclass(frozen=True)
class _Channels:
    """What is left of the channels of a value: those computed, and those that are read but constant."""

    computed: np.ndarray
    constant: np.ndarray

    @property
    def count(self) -> int:
        return len(self.computed) + bool(len(self.constant))


@dataclass(frozen=True)
class _Layer:
    """One weighted layer: its matrix of kept weights (outputs, taps), and the part of it that is left."""

    op: Op
    kept: np.ndarray
    area: int  # taps a channel pair
    source: _Channels
    out: _Channels
    columns: np.ndarray
    picks: tuple[int, ...]

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


def _sixteens(count: int) -> int:
    return -(-count // 16) * 16


def _block(kept: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    some = kept if len(rows) == kept.shape[0] else kept[rows]
    return some if len(columns) == kept.shape[1] else some[:, columns]


def shrink(table: LayerTable, kept: np.ndarray, sparse_below: Mapping[int, float]) -> Shrunk | None:
    """Return the smaller network, None where it would not be worth it.

    kept: bool over the first parameters, the prunable ones or all; the others are kept. sparse_below: densities from
    which a dense layer beats one of single weights, by kind.
    """
    places = Counter(place for op in table.ops for place in (op.weight, op.bias) if place >= 0)
    if max(places.values()) > 1:
        return None  # two layers share their weights, and may keep different channels
    layers = _layers(table, kept)
    before, after = costs(table, kept, sparse_below, layers)
    return _built(table, kept, layers) if after < _WORTH * before else None


def costs(
    table: LayerTable, kept: np.ndarray, sparse_below: Mapping[int, float], layers: list[_Layer] | None = None
) -> tuple[float, float]:
    """Return the multiply-adds of an example's forward before and after; one on a list costs more, by its kind."""
    before = after = 0.0
    for layer in _layers(table, kept) if layers is None else layers:
        pixels, below = math.prod(table.shapes[layer.op.out][1:]), sparse_below[layer.op.kind]
        before += pixels * min(layer.kept.size, int(np.count_nonzero(layer.kept)) / below)
        size, alive = layer.size()
        after += pixels * min(size, alive / below)
    return before, after


def _layers(table: LayerTable, kept: np.ndarray) -> list[_Layer]:
    """Find what is left of every weighted layer."""
    owner, whole = _owners(table)
    matrices: dict[int, tuple[np.ndarray, int]] = {}
    read = {at: np.full(table.shapes[at][0], at in whole) for at in set(owner.values())}
    alive: dict[int, np.ndarray] = {}
    for op in reversed(table.ops):
        if op.kind not in _WEIGHTED:
            continue
        shape = table.shapes[op.source]
        area = math.prod(op.window if op.kind == col.CONVOLUTION else shape[1:])
        outputs, taps = table.shapes[op.out][0], shape[0] // op.groups * area
        mine = kept[op.weight : op.weight + outputs * taps]
        matrix = mine if len(mine) == outputs * taps else np.ones(outputs * taps, bool)
        matrix = matrix.reshape(outputs, taps)
        matrices[op.out] = matrix, area
        alive[op.out] = matrix.any(axis=1)
        if owner[op.source] not in whole:
            rows = np.flatnonzero(alive[op.out] & read[owner[op.out]])
            found = _block(matrix, rows, np.arange(taps)).any(axis=0).reshape(-1, area).any(axis=1)
            read[owner[op.source]][np.flatnonzero(found)] = True
    makers = {op.out: op for op in table.ops}
    channels = {
        at: _Channels(np.arange(len(wanted)), np.zeros(0, np.int64))
        if at in whole
        else _left(wanted, alive[at], makers[at])
        for at, wanted in read.items()
    }
    readers = Counter(value for op in table.ops for value in op.reads)
    return [
        _layer(op, *matrices[op.out], channels[owner[op.source]], channels[owner[op.out]], readers[op.source] == 1)
        for op in table.ops
        if op.kind in _WEIGHTED
    ]


def _owners(table: LayerTable) -> tuple[dict[int, int], set[int]]:
    """Return for each value the one whose channels it has, and those of which all channels stay."""
    owner, whole = {0: 0}, {0}
    for op in table.ops:
        through = op.kind in (col.MAX_POOL, col.AVERAGE_POOL, col.GLOBAL_MAX, col.COPY)
        owner[op.out] = owner[op.source] if through else op.out
        if op.kind in (col.ADD, col.GROUP_NORM) or op.groups > 1:
            whole.update(owner[value] for value in (*op.reads, op.out))
    return owner, whole | {owner[table.output]}


def _left(read: np.ndarray, alive: np.ndarray, maker: Op) -> _Channels:
    computed, constant = np.flatnonzero(read & alive), np.flatnonzero(read & ~alive)
    if maker.bias < 0:  # constants of zero do nothing
        constant = constant[:0]
    return _Channels(computed if len(computed) or len(constant) else np.arange(1), constant)


def _layer(op: Op, kept: np.ndarray, area: int, source: _Channels, out: _Channels, alone: bool) -> _Layer:
    if op.groups > 1:
        return _Layer(op, kept, area, source, out, np.arange(kept.shape[1]), ())
    columns = (source.computed[:, None] * area + np.arange(area)).reshape(-1)
    if op.kind == col.LINEAR and alone:
        live = np.flatnonzero(_block(kept, out.computed, columns).any(axis=0))
        if len(live) < len(columns):
            live = live if len(live) or len(source.constant) else np.arange(1)
            ones = np.arange(area if len(source.constant) else 0) + len(columns)
            return _Layer(op, kept, area, source, out, columns[live], tuple(np.append(live, ones).tolist()))
    return _Layer(op, kept, area, source, out, columns, ())


class _Vector:
    """The small network's parameters, part by part."""

    def __init__(self, zero: int) -> None:
        self.zero, self.parts, self.size = zero, list[np.ndarray](), 0

    def add(self, places: np.ndarray) -> int:
        self.parts.append(places.reshape(-1))
        self.size += places.size
        return self.size - places.size

    def zeros(self, count: int) -> int:
        return self.add(np.full(count, self.zero))


def _built(table: LayerTable, kept: np.ndarray, layers: list[_Layer]) -> Shrunk:
    vector, zero, one = _Vector(table.num_params), table.num_params, table.num_params + 1
    masks, weights, ops = [], {}, []
    for layer in layers:
        op, rows = layer.op, layer.out.computed
        wide = np.full((layer.out.count, len(layer.columns) + layer.ones), zero)
        wide[: len(rows), : len(layer.columns)] = op.weight + rows[:, None] * layer.kept.shape[1] + layer.columns
        mask = np.zeros(wide.shape, bool)
        mask[: len(rows), : len(layer.columns)] = layer.block
        mask[: len(rows), len(layer.columns) :] = True
        weights[op.out] = vector.add(wide), wide.shape[1]
        masks.append(mask.reshape(-1))
    num_prunable = vector.size
    by_out = {layer.op.out: layer for layer in layers}
    shapes, biases = list(table.shapes), {}
    owner, _ = _owners(table)
    for op in table.ops:
        made = by_out.get(owner[op.out])
        if made is not None:
            shapes[op.out] = (made.out.count, *table.shapes[op.out][1:])
        if op.out not in by_out:
            bias = op.bias if op.bias < 0 else vector.add(op.bias + np.arange(shapes[op.out][0]))
            weight = op.weight if op.weight < 0 else vector.add(op.weight + np.arange(shapes[op.out][0]))
            ops.append(replace(op, weight=weight, bias=bias))
            continue
        layer = by_out[op.out]
        ones = np.full(layer.out.count - len(layer.out.computed), one)
        bias = op.bias if op.bias < 0 else vector.add(np.append(op.bias + layer.out.computed, ones))
        biases[op.out] = vector.add(op.bias + layer.out.constant)
        ops.append(replace(op, weight=weights[op.out][0], bias=bias, picks=layer.picks))
    folds = tuple(
        _folded(at, by_out[op.out], vector, *weights[op.out], biases[owner[op.source]], _clipped(table, op.source))
        for at, op in enumerate(table.ops)
        if op.out in by_out and by_out[op.out].ones
    )
    idle = np.ones(table.num_params + 2, bool)
    idle[: len(kept)] = kept
    idle[np.concatenate(vector.parts)] = False
    vector.add(np.flatnonzero(idle[: table.num_params]))  # only weight decay changes these
    small = LayerTable(
        ops=tuple(ops),
        shapes=tuple(shapes),
        output=table.output,
        num_floats=vector.size,
        num_params=vector.size,
        num_prunable=num_prunable,
    )
    return Shrunk(small, np.concatenate(vector.parts), np.concatenate(masks), folds)


def _folded(at: int, layer: _Layer, vector: _Vector, weight: int, taps: int, bias: int, relu: bool) -> _Fold:
    """Give a layer's weights on constants their places in the small vector."""
    rows, constant, area = layer.out.computed[:, None], layer.source.constant, layer.area
    block = np.full((len(constant), _sixteens(len(rows) * area)), vector.zero)
    for one, channel in zip(block, constant, strict=True):
        one[: len(rows) * area] = (
            layer.op.weight + rows * layer.kept.shape[1] + channel * area + np.arange(area)
        ).reshape(-1)
    ones = weight + np.arange(len(rows))[:, None] * taps + len(layer.columns) + np.arange(area)
    start = vector.add(block)
    total, values = vector.zeros(block.shape[1]), vector.zeros(len(constant))
    return _Fold(at, start, total, values, ones.reshape(-1), bias + np.arange(len(constant)), relu)


def _clipped(table: LayerTable, value: int) -> bool:
    """Return whether a value has been clipped since the layer that made its channels."""
    makers = {op.out: op for op in table.ops}
    op = makers[value]
    return op.relu or (op.kind not in _WEIGHTED and _clipped(table, op.source))
