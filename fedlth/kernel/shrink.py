"""Turn a ticket that drops whole channels into a smaller network: dense layers over what is left, and equal results.

- A channel that no kept weight reads goes, with all that leads to it: its weights have no gradient.
- A channel that is read though its own weights are all dead has its bias everywhere. Such constants become one channel
  of ones; a layer's weights on it are the sums over the constants, which constants.py renews at every step.
- A linear layer leaves out single features that it does not read.

Channels keep their number through pools and activations; behind other activations than relu a constant is another one,
and is computed. Around additions, norms and grouped convolutions, and of the input and the logits, all channels stay:
what is one channel there depends on others, or must keep its place. A convolution between such maps is a dense one over
copies of the channels that it needs.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from fedlth.kernel import columns as col
from fedlth.kernel.bounds_check import check_folds
from fedlth.kernel.live_channels import Layer, costs, live_layers, owners
from fedlth.kernel.table import LayerTable, Op

# Of the multiply-adds at most. Arranging the smaller network takes 5 ms (LeNet-5) to 10 ms (LEAF CNN) a training, which
# a tenth of one does not always bring back: 19 steps of LeNet-5 are 20 ms.
_WORTH = 0.8


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


def _sixteens(count: int) -> int:
    return -(-count // 16) * 16


def shrink(table: LayerTable, kept: np.ndarray) -> Shrunk | None:
    """Return the smaller network, None where it would not be worth it.

    kept: bool over the first parameters, the prunable ones or all; the others are kept.
    """
    places = Counter(place for op in table.ops for place in (op.weight, op.bias) if place >= 0)
    if max(places.values()) > 1:
        return None  # two layers share their weights, and may keep different channels
    layers = live_layers(table, kept)
    before, after = costs(table, kept, layers)
    return _built(table, kept, layers) if after < _WORTH * before else None


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


def _built(table: LayerTable, kept: np.ndarray, layers: list[Layer]) -> Shrunk:
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
    shapes, biases, folds = list(table.shapes), {}, []
    owner, whole = owners(table)
    for op in table.ops:
        made = by_out.get(owner[op.out])
        if made is not None and owner[op.out] not in whole:
            shapes[op.out] = (made.out.count, *table.shapes[op.out][1:])
        if op.out not in by_out:
            bias = op.bias if op.bias < 0 else vector.add(op.bias + np.arange(shapes[op.out][0]))
            weight = op.weight if op.weight < 0 else vector.add(op.weight + np.arange(shapes[op.out][0]))
            ops.append(replace(op, weight=weight, bias=bias))
            continue
        layer, (weight, taps) = by_out[op.out], weights[op.out]
        ones = np.full(layer.out.count - len(layer.out.computed), one)
        bias = op.bias if op.bias < 0 else vector.add(np.append(op.bias + layer.out.computed, ones))
        biases[op.out] = vector.add(op.bias + layer.out.constant)
        small = replace(op, weight=weight, bias=bias, picks=layer.picks)
        if layer.gathers:
            shapes.append((layer.source.count, *table.shapes[op.source][1:]))
            small = replace(small, source=len(shapes) - 1)
            picks = tuple(layer.source.computed.tolist())
            ops.append(Op(kind=col.CHOOSE, source=op.source, out=small.source, picks=picks))
        if layer.ones:
            clipped = _clipped(table, op.source)
            folds.append(_folded(len(ops), layer, vector, weight, taps, biases[owner[op.source]], clipped))
        if layer.scatters:
            shapes.append((layer.out.count, *table.shapes[op.out][1:]))
            small = replace(small, out=len(shapes) - 1, relu=False)
        ops.append(small)
        if layer.scatters:
            ops.append(_scattered(layer, small.out, vector))
    idle = np.ones(table.num_params + 2, bool)
    idle[: len(kept)] = kept
    idle[np.concatenate(vector.parts)] = False
    vector.add(np.flatnonzero(idle[: table.num_params]))  # only weight decay changes these
    left = LayerTable(
        ops=tuple(ops),
        shapes=tuple(shapes),
        output=table.output,
        num_floats=vector.size,
        num_params=vector.size,
        num_prunable=num_prunable,
    )
    return Shrunk(left, np.concatenate(vector.parts), np.concatenate(masks), tuple(folds))


def _folded(at: int, layer: Layer, vector: _Vector, weight: int, taps: int, bias: int, relu: bool) -> _Fold:
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


def _scattered(layer: Layer, source: int, vector: _Vector) -> Op:
    """Return the layer that puts the computed channels among those that are constant."""
    op, rows, outputs = layer.op, layer.out.computed, layer.kept.shape[0]
    choice, bias = np.full(outputs, -1), op.bias + np.arange(outputs)
    choice[rows], bias[rows] = np.arange(len(rows)), vector.zero
    place = -1 if op.bias < 0 else vector.add(bias)
    return Op(kind=col.CHOOSE, source=source, out=op.out, bias=place, relu=op.relu, picks=tuple(choice.tolist()))


def _clipped(table: LayerTable, value: int) -> bool:
    """Return whether a value has been clipped since the layer that made its channels."""
    makers = {op.out: op for op in table.ops}
    op = makers[value]
    return op.relu or (not op.weighted and _clipped(table, op.source))
