"""The largest value of each map, whose gradient all that are equally large share, as torch.amax does."""

from __future__ import annotations

from typing import Any

import torch

from fedlth.kernel import columns as col
from fedlth.kernel.kind import Kind, Loop
from fedlth.kernel.reach import windows
from fedlth.kernel.reader import Reader, Value


def amax(reader: Reader, x: Value, dim: Any, keepdim: bool = False) -> Value:
    shape = reader.map_dimensions(x, dim)
    out = reader.windows(GLOBAL_MAX, x, shape[1:], (1, 1))
    return out if keepdim else Value(out.at, shape[:1])


def loops() -> tuple[Loop, Loop]:
    from fedlth.kernel.arithmetic import add, divide, keep_equal, maximum, ones_1x16, relu, zeros_1x16
    from fedlth.kernel.jit import part
    from fedlth.kernel.pointwise import clear, get
    from fedlth.kernel.vectors import store

    @part
    def forward(work: Any, w: Any, scale: Any, row: Any, lanes: int) -> None:
        """Take the largest value of each map."""
        for c in range(row[col.CHANNELS]):
            for p in range(0, lanes, 16):
                at = row[col.X] + c * row[col.X_PLANE] + p
                most = get(work, at)
                for y in range(row[col.HEIGHT]):
                    for x in range(row[col.WIDTH]):
                        most = maximum(most, get(work, at + y * row[col.X_ROW] + x * lanes))
                if row[col.RELU]:
                    most = relu(most)
                store(most, work, row[col.Y] + c * row[col.Y_PLANE] + p, 0)

    @part
    def backward(work: Any, w: Any, grad: Any, scale: Any, row: Any, lanes: int) -> None:
        """Share each gradient equally among all largest values of its map, as torch.amax does."""
        if not row[col.ACCUMULATE]:
            clear(work, row, lanes)
        for c in range(row[col.CHANNELS]):
            for p in range(0, lanes, 16):
                at, to = row[col.X] + c * row[col.X_PLANE] + p, row[col.DX] + c * row[col.DX_PLANE] + p
                most = get(work, row[col.Y] + c * row[col.Y_PLANE] + p)
                count = zeros_1x16()
                for y in range(row[col.HEIGHT]):
                    for x in range(row[col.WIDTH]):
                        count = add(
                            count, keep_equal(get(work, at + y * row[col.X_ROW] + x * lanes), most, ones_1x16())
                        )
                share = divide(get(work, row[col.DY] + c * row[col.DY_PLANE] + p), count)
                for y in range(row[col.HEIGHT]):
                    for x in range(row[col.WIDTH]):
                        place = to + y * row[col.DX_ROW] + x * lanes
                        mine = keep_equal(get(work, at + y * row[col.X_ROW] + x * lanes), most, share)
                        store(add(mine, get(work, place)), work, place, 0)

    return forward, backward


GLOBAL_MAX = Kind(
    number=col.GLOBAL_MAX,
    name="global max",
    functions={torch.amax: amax},
    methods={"amax": amax},
    loops=loops,
    check=windows,
    channels="kept",
    clips=True,
)
