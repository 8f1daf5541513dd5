"""The compiled loops: forward, loss, backward and the step of every batch of a training; and prediction.

Compiled once for every network, since the layer table is data: about 45 s of CPU, then read from numba's disk cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fedlth.kernel import columns as col
from fedlth.kernel import constants, dense_forward, pointwise, sparse, weights
from fedlth.kernel.jit import entry, inlined, part, pasted, source_stamp
from fedlth.kernel.kind import Loop
from fedlth.kernel.kinds import KINDS
from fedlth.kernel.tile_choice import CHOSEN


@inlined
def forward_job(row: Any, lanes: int) -> dense_forward.TapSum:
    """Return a layer's sum over taps forward."""
    return dense_forward.TapSum(
        row[col.X],
        row[col.TAP_ROW],
        row[col.TAP_STEP],
        row[col.TAP_GROUP],
        row[col.TAPS] // row[col.KERNEL_AREA],
        row[col.FORWARD_CHUNK],
        row[col.WINDOW_Y],
        row[col.WINDOW_X],
        row[col.FORWARD_PLACES],
        row[col.TOP],
        row[col.LEFT],
        row[col.WEIGHT],
        row[col.TAPS],
        row[col.TAPS] * (row[col.OUT_CHANNELS] // row[col.GROUPS]),
        row[col.FORWARD_WEIGHTS],
        row[col.BIAS],
        row[col.GROUPS],
        row[col.OUT_CHANNELS] // row[col.GROUPS],
        row[col.Y],
        row[col.OUT_PLACES],
        row[col.Y_ROW],
        row[col.OUT_HEIGHT],
        row[col.OUT_WIDTH],
        lanes,
        row[col.RELU] != 0,
        False,
        row[col.PACK],
    )


@inlined
def backward_job(row: Any, lanes: int) -> dense_forward.TapSum:
    """Return the sum over taps of its input's gradient."""
    return dense_forward.TapSum(
        row[col.SPREAD],
        row[col.SPREAD_ROW],
        lanes,
        row[col.BACK_GROUP],
        row[col.OUT_CHANNELS] // row[col.GROUPS],
        row[col.BACKWARD_CHUNK],
        row[col.WINDOW_Y],
        row[col.WINDOW_X],
        row[col.BACKWARD_PLACES],
        row[col.BACK_TOP],
        row[col.BACK_LEFT],
        row[col.WEIGHT],
        row[col.KERNEL_AREA],
        row[col.TAPS] * (row[col.OUT_CHANNELS] // row[col.GROUPS]),
        row[col.BACKWARD_WEIGHTS],
        -1,
        row[col.GROUPS],
        row[col.CHANNELS] // row[col.GROUPS],
        row[col.DX],
        row[col.BACK_OUT_PLACES],
        row[col.DX_ROW],
        row[col.HEIGHT],
        row[col.WIDTH],
        lanes,
        False,
        row[col.ACCUMULATE] != 0,
        row[col.PACK],
    )


@inlined
def _sum_taps(work: Any, index: Any, w: Any, job: Any, kind: int) -> None:
    if kind == col.LINEAR:
        dense_forward.sum_taps_of_vector(work, index, w, job)
    else:
        dense_forward.sum_taps(work, index, w, job)


def _by_kind(loops: Sequence[tuple[int, Loop]]) -> Loop:
    """Return a compiled function (kind, given) that calls the loop of that kind, which must be one of them."""
    (number, loop), *rest = loops
    if not rest:

        @pasted
        def last(kind: int, given: Any) -> None:
            loop(*given)

        return last
    others = _by_kind(rest)

    @pasted
    def one(kind: int, given: Any) -> None:
        if kind == number:
            loop(*given)
        else:
            others(kind, given)

    return one


_LOOPS = [(kind.number, *kind.loops()) for kind in KINDS.values()]
_forward_of_kind = _by_kind([(number, forward) for number, forward, _ in _LOOPS])
_backward_of_kind = _by_kind([(number, backward) for number, _, backward in _LOOPS])


@part
def forward(rows: Any, index: Any, lists: Any, scales: Any, work: Any, w: Any, lanes: int) -> None:
    """Run the layers in order."""
    for at in range(len(rows)):
        row, kind = rows[at], rows[at, col.KIND]
        if kind == col.CONVOLUTION or kind == col.LINEAR:
            if row[col.SPARSE]:
                sparse.forward(work, index, lists, w, row, lanes)
            else:
                _sum_taps(work, index, w, forward_job(row, lanes), kind)
        elif kind == col.CHOOSE:
            pointwise.choose(work, index, w, row, lanes)
        else:
            _forward_of_kind(kind, (work, w, scales[at : at + 1], row, lanes))


@part
def backward(rows: Any, index: Any, lists: Any, scales: Any, work: Any, w: Any, grad: Any, lanes: int) -> None:
    """Run the layers backwards and add every weight's gradient to `grad`."""
    for at in range(len(rows) - 1, -1, -1):
        row, kind = rows[at], rows[at, col.KIND]
        if row[col.DY] == 0:  # no weight comes before it
            continue
        if row[col.RELU] and kind != col.MAX_POOL:
            pointwise.clip_gradient(work, row, lanes)
        if kind == col.CONVOLUTION or kind == col.LINEAR:
            if row[col.NEEDS_DX]:
                if row[col.SPREAD] != row[col.DY]:
                    pointwise.spread_gradient(work, row, lanes)
                if row[col.SPARSE] and kind == col.LINEAR:
                    sparse.linear_input_gradient(work, index, lists, w, row, lanes)
                elif row[col.SPARSE]:
                    sparse.input_gradient(work, index, lists, w, row, lanes)
                else:
                    _sum_taps(work, index, w, backward_job(row, lanes), kind)
            if row[col.BIAS] >= 0:
                weights.biases(work, grad, row, lanes)
            if row[col.SPARSE] and kind == col.LINEAR:
                sparse.linear_weights(work, lists, grad, row, lanes)
            elif row[col.SPARSE]:
                sparse.weights(work, lists, grad, row, lanes)
            elif kind == col.LINEAR:
                weights.linear_weights(work, index, grad, row, lanes)
            else:
                weights.convolution_weights(work, index, grad, row, lanes)
        elif kind == col.CHOOSE:
            pointwise.choose_gradient(work, index, grad, row, lanes)
        else:
            _backward_of_kind(kind, (work, w, grad, scales[at : at + 1], row, lanes))


@part
def load_batch(row: Any, work: Any, x: Any, order: Any, start: int, count: int, lanes: int) -> None:
    """Copy examples order[start : start + count] of x (N, C * H * W) to the network's input, one to a lane."""
    width = row[col.WIDTH]
    for c in range(row[col.CHANNELS]):
        for y in range(row[col.HEIGHT]):
            to = row[col.X] + c * row[col.X_PLANE] + y * row[col.X_ROW]
            first = (c * row[col.HEIGHT] + y) * width
            for lane in range(lanes):
                if lane < count:
                    example = order[start + lane]
                    for k in range(width):
                        work[to + k * lanes + lane] = x[example, first + k]
                else:
                    for k in range(width):
                        work[to + k * lanes + lane] = 0


@part
def cross_entropy(row: Any, work: Any, y: Any, order: Any, start: int, count: int, batch: int, lanes: int) -> float:
    """Write the gradient of the mean loss over `batch` to the last layer's; return these examples' summed loss."""
    classes, total = row[col.OUT_CHANNELS], 0.0
    for lane in range(lanes):
        out, at = row[col.Y] + lane, row[col.DY] + lane
        if lane >= count:
            for k in range(classes):
                work[at + k * row[col.DY_PLANE]] = 0
            continue
        most = work[out]
        for k in range(classes):
            most = max(most, work[out + k * row[col.Y_PLANE]])
        size = 0.0
        for k in range(classes):
            size += math.exp(float(work[out + k * row[col.Y_PLANE]]) - most)
        label = y[order[start + lane]]
        total += math.log(size) + most - work[out + label * row[col.Y_PLANE]]
        for k in range(classes):
            share = math.exp(float(work[out + k * row[col.Y_PLANE]]) - most) / size
            work[at + k * row[col.DY_PLANE]] = (share - (k == label)) / batch
    return total


@part
def pull(w: Any, grad: Any, slope: Any, strength: Any) -> None:
    """Add strength w + slope to the gradient: a proximal term's, a correction's. slope may be empty: nothing to add."""
    for k in range(len(slope)):
        grad[k] += strength * w[k] + slope[k]


@part
def step(w: Any, grad: Any, velocity: Any, moves: Any, rate: Any, momentum: Any, decay: Any) -> None:
    """Take one SGD step and clear the gradient. velocity and moves may be empty: no momentum, all weights move."""
    if len(moves) == 0 and len(velocity) == 0:
        for k in range(len(w)):
            w[k] -= rate * (grad[k] + decay * w[k])
            grad[k] = 0
    elif len(moves) == 0:
        for k in range(len(w)):
            velocity[k] = momentum * velocity[k] + (grad[k] + decay * w[k])
            w[k] -= rate * velocity[k]
            grad[k] = 0
    elif len(velocity) == 0:
        for k in range(len(w)):
            w[k] -= rate * ((grad[k] + decay * w[k]) * moves[k])
            grad[k] = 0
    else:
        for k in range(len(w)):
            velocity[k] = momentum * velocity[k] + (grad[k] + decay * w[k]) * moves[k]
            w[k] -= rate * velocity[k]
            grad[k] = 0


def _make_entries(stamp: int) -> tuple[Any, Any]:
    def list_layers(rows: Any, index: Any, lists: Any, kept: Any) -> int:
        """Write the lists of the kept weights of the sparse layers; kept: their places, layer after layer."""
        for at in range(len(rows)):
            if rows[at, col.SPARSE]:
                sparse.list_kept(index, lists, kept, rows[at])
        return stamp

    def run(
        rows: Any,
        inlet: Any,
        index: Any,
        lists: Any,
        scales: Any,
        work: Any,
        w: Any,
        grad: Any,
        velocity: Any,
        moves: Any,
        slope: Any,
        strength: Any,
        x: Any,
        y: Any,
        order: Any,
        starts: Any,
        losses: Any,
        rates: Any,
        momentum: Any,
        decay: Any,
        logits: Any,
        lanes: int,
    ) -> int:
        """Train on batches order[starts[s] : starts[s + 1]]; losses: (steps,) float64, summed over each batch.

        Then, where logits (N, classes) has rows, write the last layer's output for each example of `order` to it. One
        function, since each that is compiled compiles the forward pass anew.
        """
        last = rows[len(rows) - 1]
        for s in range(len(starts) - 1):
            size, total = starts[s + 1] - starts[s], 0.0
            constants.fold(rows, lists, w)
            for start in range(starts[s], starts[s + 1], lanes):
                count = min(lanes, starts[s + 1] - start)
                load_batch(inlet, work, x, order, start, count, lanes)
                forward(rows, index, lists, scales, work, w, lanes)
                total += cross_entropy(last, work, y, order, start, count, size, lanes)
                backward(rows, index, lists, scales, work, w, grad, lanes)
            losses[s] = total
            constants.unfold(rows, lists, w, grad)
            pull(w, grad, slope, strength)
            step(w, grad, velocity, moves, rates[s], momentum, decay)
        if len(logits):
            constants.fold(rows, lists, w)
            for start in range(0, len(order), lanes):
                load_batch(inlet, work, x, order, start, min(lanes, len(order) - start), lanes)
                forward(rows, index, lists, scales, work, w, lanes)
                for lane in range(min(lanes, len(order) - start)):
                    for k in range(last[col.OUT_CHANNELS]):
                        logits[start + lane, k] = work[last[col.Y] + k * last[col.Y_PLANE] + lane]
        return stamp

    return entry(list_layers), entry(run)


list_layers, run = _make_entries(source_stamp(CHOSEN))
