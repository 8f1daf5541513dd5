"""Every place that the kernel may touch, checked once: the compiled loops themselves check nothing.

What a loop can reach follows from its layer's row and lists alone, so the extremes of all its sums of distances are
compared with the extent of the map that it means to read or write.
"""

from __future__ import annotations

import numpy as np

from fedlth.kernel import columns as col
from fedlth.kernel.kinds import KINDS
from fedlth.kernel.reach import MemoryLayout, Reach


def check_bounds(plan: MemoryLayout, lanes: int, num_params: int) -> None:
    """Raise ValueError where a layer could reach outside its maps, its lists, the scratch or the parameters."""
    for at in range(len(plan.rows)):
        layer = Reach(plan, at, lanes)
        row = layer.row
        weighted = row[col.KIND] in (col.CONVOLUTION, col.LINEAR)
        layer.want(row[col.GROUPS] > 0 and 32 * lanes <= plan.scratch, "sizes")
        layer.want(row[col.PACK] >= 16 and row[col.PACK] + plan.scratch <= plan.work_size, "scratch")
        layer.map(col.Y, col.OUT_CHANNELS)
        if row[col.DY] or weighted:  # a layer that no weight comes before has no gradient, and the loop leaves it out
            layer.map(col.DY, col.OUT_CHANNELS)
        if row[col.KIND] != col.LINEAR:  # whose input is a list of places
            layer.map(col.X, col.CHANNELS)
            if row[col.NEEDS_DX]:
                layer.map(col.DX, col.CHANNELS)
        if weighted:
            _check_sums(layer)
        elif row[col.KIND] == col.CHOOSE:
            layer.want(row[col.HEIGHT : col.WIDTH + 1] == row[col.OUT_HEIGHT : col.OUT_WIDTH + 1], "map")
            chosen = layer.list(col.CHOICE, row[col.OUT_CHANNELS])
            layer.want(bool(chosen.min() >= -1 and chosen.max() < row[col.CHANNELS]), "map")
        else:
            layer.want(row[col.KIND] in KINDS, "kinds")
            # A backward runs where there is an output's gradient, and does not ask for what.
            wanted = row[col.NEEDS_DX] or row[col.NEEDS_DX_2] or row[col.WEIGHT] >= 0
            layer.want(bool(wanted) or not row[col.DY], "gradients")
            KINDS[row[col.KIND]].check(layer)
        if row[col.STATS_COUNT]:
            end = row[col.STATS] + row[col.STATS_COUNT] * lanes
            layer.want(row[col.STATS] >= 16 and end <= plan.work_size, "statistics")
        size = row[col.OUT_CHANNELS] * (row[col.TAPS] if weighted else 1)
        for column, count in ((col.WEIGHT, size), (col.BIAS, row[col.OUT_CHANNELS])):
            least = 0 if weighted and column == col.WEIGHT else -1
            layer.want(least <= row[column] <= num_params - count, "parameters")


def _check_sums(layer: Reach) -> None:
    """Want everything that a convolution or linear layer sums over inside, forward and backward."""
    row, lanes = layer.row, layer.lanes
    taps, area, groups = row[col.TAPS], row[col.KERNEL_AREA], row[col.GROUPS]
    outputs, height, width = row[col.OUT_CHANNELS : col.OUT_WIDTH + 1]
    among, window = outputs // groups, row[col.WINDOW_Y : col.WINDOW_X + 1]
    layer.want(outputs == among * groups and area == window[0] * window[1] and taps % area == 0 < taps, "sizes")
    layer.want(row[col.KIND] == col.LINEAR or taps * groups == row[col.CHANNELS] * area, "sizes")
    layer.want(row[col.PIXELS] * row[col.SPAN] == width * lanes and row[col.SPAN] % lanes == 0, "pixels")
    layer.want(row[col.PIXELS] == width or row[col.TAP_STEP] == lanes, "pixels")
    layer.want(row[col.KIND] == col.LINEAR or outputs * taps <= layer.plan.scratch, "scratch")
    steps = (height - 1) * row[col.TAP_ROW], (width - 1) * row[col.TAP_STEP], (groups - 1) * row[col.TAP_GROUP]
    for places in (col.TAP_PLACES, col.FORWARD_PLACES):
        layer.reach(col.X, layer.list(places, taps), *steps)
    layer.numbers(col.FORWARD_WEIGHTS, taps, taps, "weights")
    layer.reach(col.Y, layer.list(col.OUT_PLACES, outputs), (height - 1) * row[col.Y_ROW], (width - 1) * lanes)
    layer.numbers(col.TOP, 2 * height, window[0] + 1, "kernel")
    layer.numbers(col.LEFT, 2 * width, window[1] + 1, "kernel")
    layer.numbers(col.REACH, 2 * window[0], height + 1, "rows")
    layer.want(row[col.FORWARD_CHUNK] > 0 and row[col.BACKWARD_CHUNK] > 0, "chunks")
    if not row[col.NEEDS_DX]:
        return
    size = row[col.HEIGHT], row[col.WIDTH]
    layer.want(
        row[col.BACK_TAPS] == among * area and size == (row[col.BACK_ROWS], row[col.BACK_SPAN] // lanes), "sizes"
    )
    steps = (size[0] - 1) * row[col.SPREAD_ROW], (size[1] - 1) * lanes, (groups - 1) * row[col.BACK_GROUP]
    for places in (col.BACK_PLACES, col.BACKWARD_PLACES):
        layer.reach(col.SPREAD, layer.list(places, among * area), *steps)
    inputs = row[col.CHANNELS] // groups
    layer.numbers(col.BACKWARD_WEIGHTS, among * area, among * taps - (inputs - 1) * area, "weights")
    layer.numbers(col.BACK_TOP, 2 * size[0], window[0] + 1, "kernel")
    layer.numbers(col.BACK_LEFT, 2 * size[1], window[1] + 1, "kernel")
    back = layer.list(col.BACK_OUT_PLACES, row[col.CHANNELS])
    layer.reach(col.DX, back, (size[0] - 1) * row[col.DX_ROW], (size[1] - 1) * lanes)
    far = (height - 1) * row[col.STRIDE_Y] * row[col.SPREAD_ROW], (width - 1) * row[col.STRIDE_X] * lanes
    layer.reach(col.SPREAD, (outputs - 1) * row[col.SPREAD_PLANE], *far)


def check_folds(rows: np.ndarray, lists: np.ndarray, num_weights: int) -> None:
    """Raise ValueError where folding constants could reach outside the lists or the compact weights."""
    for at, row in enumerate(rows.tolist()):
        constants, size, count = row[col.CONSTANTS], row[col.FOLD_SIZE], row[col.FOLD_COUNT]
        good = constants >= 0 and size % 16 == 0 and 0 <= count <= size
        for column, length in (
            (col.FOLD_BLOCK, constants * size), (col.FOLD_TOTAL, size), (col.FOLD_VALUES, constants)
        ):  # fmt: skip
            good = good and 0 <= row[column] <= num_weights - length
        for column, length in ((col.FOLD_PLACES, count), (col.FOLD_BIASES, constants)):
            good = good and 0 <= row[column] <= len(lists) - length
            named = lists[row[column] : row[column] + length] if good else lists[:0]
            good = good and (not named.size or (named.min() >= 0 and named.max() < num_weights))
        if not good:
            raise ValueError(f"kernel: layer {at} would reach outside its constants")


def stray_writes(plan: MemoryLayout, work: np.ndarray, lanes: int) -> int:
    """Return how many floats of the work array are not zero though no layer may write there: rims, and gaps."""
    rest = work != 0
    for row in [plan.inlet, *plan.rows]:
        for place, shape in ((col.X, col.CHANNELS), (col.Y, col.OUT_CHANNELS), (col.DY, col.OUT_CHANNELS)):
            if row[place] and row[col.KIND] == col.LINEAR and place == col.X and row is not plan.inlet:
                continue
            _clear(rest, row, place, [int(n) for n in row[shape : shape + 3]], lanes)
        if row[col.SPREAD] and row[col.SPREAD] != row[col.DY]:
            steps = [(int(row[col.OUT_HEIGHT + a]) - 1) * int(row[col.STRIDE_Y + a]) + 1 for a in (0, 1)]
            _clear(rest, row, col.SPREAD, [int(row[col.OUT_CHANNELS]), *steps], lanes)
        rest[row[col.STATS] : row[col.STATS] + row[col.STATS_COUNT] * lanes] = False
        if row is not plan.inlet:
            rest[row[col.PACK] : row[col.PACK] + plan.scratch] = False
    return int(np.count_nonzero(rest))


def _clear(rest: np.ndarray, row: np.ndarray, place: int, shape: list[int], lanes: int) -> None:
    at, plane, line = (int(n) for n in row[place : place + 3])
    for channel in range(shape[0] if at else 0):
        for y in range(shape[1]):
            start = at + channel * plane + y * line
            rest[start : start + shape[2] * lanes] = False
