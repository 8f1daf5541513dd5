"""Group normalisation (Wu and He, ECCV 2018, arXiv 1803.08494) over channels of a map, example by example.

With a group for each channel it is instance normalisation, with one for all of them layer normalisation.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from fedlth.kernel import columns as col
from fedlth.kernel.kind import Kind, Loop
from fedlth.kernel.reach import Reach, same_shape
from fedlth.kernel.reader import Reader, Unsupported, Value
from fedlth.kernel.table import Op


def group_norm(reader: Reader, name: str, part: nn.GroupNorm, x: Value) -> Value:
    shape = x.shape if len(x.shape) == 1 else reader.image(x, "group normalisation")
    if shape[0] != part.num_channels or part.eps <= 0:
        raise Unsupported(f"{name} wants {part.num_channels} channels and eps above 0, got {shape} and {part.eps}")
    if len(x.shape) == 1 and reader.shapes[x.at][0] != shape[0]:
        raise Unsupported(f"group normalisation {name} of a flattened map")
    weight, bias = reader.place(f"{name}.weight", part.weight), reader.place(f"{name}.bias", part.bias)
    return reader.layer(GROUP_NORM, x, weight=weight, bias=bias, groups=part.num_groups, scale=part.eps)


def instance_norm(reader: Reader, name: str, part: nn.InstanceNorm2d, x: Value) -> Value:
    """A group for each channel."""
    shape = reader.image(x, "instance normalisation")
    if part.track_running_stats or shape[0] != part.num_features or part.eps <= 0:
        raise Unsupported(f"{name} has running statistics, another number of channels than {shape[0]}, or no eps")
    weight, bias = reader.place(f"{name}.weight", part.weight), reader.place(f"{name}.bias", part.bias)
    return reader.layer(GROUP_NORM, x, weight=weight, bias=bias, groups=shape[0], scale=part.eps)


def layer_norm(reader: Reader, name: str, part: nn.LayerNorm, x: Value) -> Value:
    """One group; a gain has a value for each feature, which is one for each channel in a vector alone."""
    if part.normalized_shape != x.shape or part.eps <= 0:
        raise Unsupported(f"{name} wants {part.normalized_shape} and eps above 0, got {x.shape} and {part.eps}")
    if part.elementwise_affine and reader.shapes[x.at] != (*x.shape, 1, 1):
        raise Unsupported(f"layer normalisation {name} of a map, with a gain")
    weight, bias = reader.place(f"{name}.weight", part.weight), reader.place(f"{name}.bias", part.bias)
    return reader.layer(GROUP_NORM, x, weight=weight, bias=bias, scale=part.eps)


def stats(op: Op) -> int:
    """Count the mean and the inverse deviation of each group."""
    return 2 * op.groups


def check(layer: Reach) -> None:
    same_shape(layer)
    groups = layer.row[col.GROUPS]
    layer.want(layer.row[col.CHANNELS] % groups == 0 and layer.row[col.STATS_COUNT] == 2 * groups, "groups")


def loops() -> tuple[Loop, Loop]:
    from fedlth.kernel.arithmetic import add, multiply, multiply_add, ones_1x16, relu, subtract, zeros_1x16, zeros_4x16
    from fedlth.kernel.jit import inlined, part
    from fedlth.kernel.pointwise import get
    from fedlth.kernel.reduce import fold, sums
    from fedlth.kernel.vectors import load, spread, store

    # Sums go pixel by pixel into a row's, row by row into a map's, map by map into a group's: short sums round less.

    @inlined
    def gain_of(w: Any, row: Any, channel: int) -> Any:
        gain = ones_1x16()
        if row[col.WEIGHT] >= 0:
            gain = spread(gain, w, row[col.WEIGHT] + channel, 0)
        return gain

    @inlined
    def map_sum(work: Any, row: Any, at: int, origin: int, lanes: int) -> Any:
        """Return the sum of a map's distances from the value at `origin`, four pixels side by side."""
        total, one, origins = zeros_1x16(), get(work, origin), load(zeros_4x16(), work, origin, 0)
        for y in range(row[col.HEIGHT]):
            line, x = at + y * row[col.X_ROW], 0
            four = zeros_4x16()
            while x + 4 <= row[col.WIDTH]:
                four = add(four, subtract(load(four, work, line + x * lanes, lanes), origins))
                x += 4
            total = add(total, fold(four))
            while x < row[col.WIDTH]:
                total = add(total, subtract(get(work, line + x * lanes), one))
                x += 1
        return total

    @inlined
    def map_squares(work: Any, row: Any, at: int, mean: int, lanes: int) -> Any:
        """Return the sum of the squared distances from the mean at `mean`."""
        total, one, centres = zeros_1x16(), get(work, mean), load(zeros_4x16(), work, mean, 0)
        for y in range(row[col.HEIGHT]):
            line, x = at + y * row[col.X_ROW], 0
            four = zeros_4x16()
            while x + 4 <= row[col.WIDTH]:
                far = subtract(load(four, work, line + x * lanes, lanes), centres)
                four = multiply_add(far, far, four)
                x += 4
            total = add(total, fold(four))
            while x < row[col.WIDTH]:
                rest = subtract(get(work, line + x * lanes), one)
                total = multiply_add(rest, rest, total)
                x += 1
        return total

    @part
    def forward(work: Any, w: Any, scale: Any, row: Any, lanes: int) -> None:
        """Normalise each group; its mean and the inverse of its deviation stay at STATS for the gradient."""
        channels = row[col.CHANNELS] // row[col.GROUPS]
        count = channels * row[col.HEIGHT] * row[col.WIDTH]
        for group in range(row[col.GROUPS]):
            mean = row[col.STATS] + 2 * group * lanes
            inverse = mean + lanes
            first = row[col.X] + group * channels * row[col.X_PLANE]
            for p in range(0, lanes, 16):
                # From the first value on: a group of equal values (a dead channel's) has exactly them as its mean.
                store(get(work, first + p), work, mean + p, 0)
                total = zeros_1x16()
                for c in range(channels):
                    total = add(total, map_sum(work, row, first + c * row[col.X_PLANE] + p, mean + p, lanes))
                store(total, work, inverse + p, 0)
                for lane in range(p, p + 16):
                    work[mean + lane] += work[inverse + lane] / count
                total = zeros_1x16()
                for c in range(channels):
                    total = add(total, map_squares(work, row, first + c * row[col.X_PLANE] + p, mean + p, lanes))
                store(total, work, inverse + p, 0)
                for lane in range(p, p + 16):
                    work[inverse + lane] = 1.0 / math.sqrt(float(work[inverse + lane]) / count + float(scale[0]))
                for c in range(group * channels, (group + 1) * channels):
                    slope = multiply(gain_of(w, row, c), get(work, inverse + p))
                    shift = zeros_1x16()
                    if row[col.BIAS] >= 0:
                        shift = spread(shift, w, row[col.BIAS] + c, 0)
                    centre = get(work, mean + p)
                    for y in range(row[col.HEIGHT]):
                        at = row[col.X] + c * row[col.X_PLANE] + y * row[col.X_ROW] + p
                        to = row[col.Y] + c * row[col.Y_PLANE] + y * row[col.Y_ROW] + p
                        for x in range(0, row[col.WIDTH] * lanes, lanes):
                            value = multiply_add(subtract(get(work, at + x), centre), slope, shift)
                            if row[col.RELU]:
                                value = relu(value)
                            store(value, work, to + x, 0)

    @part
    def backward(work: Any, w: Any, grad: Any, scale: Any, row: Any, lanes: int) -> None:
        """Add the gradients of gain and bias to `grad`, and write or add the input's."""
        channels = row[col.CHANNELS] // row[col.GROUPS]
        count = channels * row[col.HEIGHT] * row[col.WIDTH]
        for group in range(row[col.GROUPS]):
            mean = row[col.STATS] + 2 * group * lanes
            for p in range(0, lanes, 16):
                centre, inverse = get(work, mean + p), get(work, mean + lanes + p)
                # Sums over the group: of gain * dy, of gain * dy * (x - mean).
                plain, along = zeros_1x16(), zeros_1x16()
                for c in range(group * channels, (group + 1) * channels):
                    total, product = zeros_1x16(), zeros_1x16()
                    for y in range(row[col.HEIGHT]):
                        at = row[col.X] + c * row[col.X_PLANE] + y * row[col.X_ROW] + p
                        above = row[col.DY] + c * row[col.DY_PLANE] + y * row[col.DY_ROW] + p
                        line, line_product = zeros_1x16(), zeros_1x16()
                        for x in range(0, row[col.WIDTH] * lanes, lanes):
                            slope = get(work, above + x)
                            line = add(line, slope)
                            line_product = multiply_add(slope, subtract(get(work, at + x), centre), line_product)
                        total, product = add(total, line), add(product, line_product)
                    if row[col.BIAS] >= 0:
                        grad[row[col.BIAS] + c] += sums(total)[0]
                    if row[col.WEIGHT] >= 0:
                        grad[row[col.WEIGHT] + c] += sums(multiply(product, inverse))[0]
                    gain = gain_of(w, row, c)
                    plain, along = multiply_add(gain, total, plain), multiply_add(gain, product, along)
                if not row[col.NEEDS_DX]:
                    continue
                work[row[col.PACK]] = -1.0 / count
                share = multiply(inverse, spread(inverse, work, row[col.PACK], 0))
                shift = multiply(share, plain)
                bend = multiply(multiply(multiply(inverse, inverse), share), along)
                for c in range(group * channels, (group + 1) * channels):
                    gain = multiply(gain_of(w, row, c), inverse)
                    for y in range(row[col.HEIGHT]):
                        at = row[col.X] + c * row[col.X_PLANE] + y * row[col.X_ROW] + p
                        above = row[col.DY] + c * row[col.DY_PLANE] + y * row[col.DY_ROW] + p
                        to = row[col.DX] + c * row[col.DX_PLANE] + y * row[col.DX_ROW] + p
                        for x in range(0, row[col.WIDTH] * lanes, lanes):
                            far = subtract(get(work, at + x), centre)
                            value = multiply_add(bend, far, multiply_add(gain, get(work, above + x), shift))
                            if row[col.ACCUMULATE]:
                                value = add(value, get(work, to + x))
                            store(value, work, to + x, 0)

    return forward, backward


GROUP_NORM = Kind(
    number=col.GROUP_NORM,
    name="group norm",
    modules={nn.GroupNorm: group_norm, nn.InstanceNorm2d: instance_norm, nn.LayerNorm: layer_norm},
    loops=loops,
    check=check,
    stats=stats,
    channels="joint",
    clips=True,
)
