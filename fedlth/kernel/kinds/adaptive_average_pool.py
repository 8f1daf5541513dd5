"""Adaptive average pooling to any size: windows of which some are larger than others, and which may overlap."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn import functional as F

from fedlth.kernel import columns as col
from fedlth.kernel.kind import Kind, Loop
from fedlth.kernel.kinds.average_pool import mean_of_windows
from fedlth.kernel.reach import Reach
from fedlth.kernel.reader import Reader, Value, adaptive_size


def adaptive(reader: Reader, x: Value, output_size: Any) -> Value:
    shape = reader.image(x, "pooling")
    size = adaptive_size(shape, output_size)
    if shape[1] % size[0] or shape[2] % size[1]:
        return reader.layer(ADAPTIVE_AVERAGE_POOL, x, (shape[0], *size))
    window = shape[1] // size[0], shape[2] // size[1]
    return mean_of_windows(reader, x, window, window)


def check(layer: Reach) -> None:
    layer.want(layer.row[col.OUT_CHANNELS] == layer.row[col.CHANNELS], "channels")


def loops() -> tuple[Loop, Loop]:
    from fedlth.kernel.arithmetic import add, multiply, zeros_1x16
    from fedlth.kernel.jit import inlined, part
    from fedlth.kernel.pointwise import clear, get
    from fedlth.kernel.vectors import spread, store

    @inlined
    def seen(at: int, outputs: int, size: int) -> tuple[int, int]:
        """Return the first and the end of the input positions that output position `at` sees."""
        return at * size // outputs, ((at + 1) * size + outputs - 1) // outputs

    @part
    def forward(work: Any, w: Any, scale: Any, row: Any, lanes: int) -> None:
        for y in range(row[col.OUT_HEIGHT]):
            top, bottom = seen(y, row[col.OUT_HEIGHT], row[col.HEIGHT])
            for x in range(row[col.OUT_WIDTH]):
                left, right = seen(x, row[col.OUT_WIDTH], row[col.WIDTH])
                work[row[col.PACK]] = 1.0 / ((bottom - top) * (right - left))
                share = spread(zeros_1x16(), work, row[col.PACK], 0)
                for c in range(row[col.CHANNELS]):
                    at, out = row[col.X] + c * row[col.X_PLANE], row[col.Y] + c * row[col.Y_PLANE] + y * row[col.Y_ROW]
                    for p in range(0, lanes, 16):
                        total = zeros_1x16()
                        for i in range(top, bottom):
                            for j in range(left, right):
                                total = add(total, get(work, at + i * row[col.X_ROW] + j * lanes + p))
                        store(multiply(total, share), work, out + x * lanes + p, 0)

    @part
    def backward(work: Any, w: Any, grad: Any, scale: Any, row: Any, lanes: int) -> None:
        if not row[col.ACCUMULATE]:
            clear(work, row, lanes)
        for y in range(row[col.OUT_HEIGHT]):
            top, bottom = seen(y, row[col.OUT_HEIGHT], row[col.HEIGHT])
            for x in range(row[col.OUT_WIDTH]):
                left, right = seen(x, row[col.OUT_WIDTH], row[col.WIDTH])
                work[row[col.PACK]] = 1.0 / ((bottom - top) * (right - left))
                share = spread(zeros_1x16(), work, row[col.PACK], 0)
                for c in range(row[col.CHANNELS]):
                    at = row[col.DY] + c * row[col.DY_PLANE] + y * row[col.DY_ROW] + x * lanes
                    to = row[col.DX] + c * row[col.DX_PLANE]
                    for p in range(0, lanes, 16):
                        passed = multiply(get(work, at + p), share)
                        for i in range(top, bottom):
                            for j in range(left, right):
                                place = to + i * row[col.DX_ROW] + j * lanes + p
                                store(add(passed, get(work, place)), work, place, 0)

    return forward, backward


ADAPTIVE_AVERAGE_POOL = Kind(
    number=11,
    name="adaptive average pool",
    modules={nn.AdaptiveAvgPool2d: lambda reader, name, part, x: adaptive(reader, x, part.output_size)},
    functions={F.adaptive_avg_pool2d: adaptive},
    loops=loops,
    check=check,
    channels="kept",
)
