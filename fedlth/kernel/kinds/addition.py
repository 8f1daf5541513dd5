"""Addition of two values of one shape, as around a residual block."""

from __future__ import annotations

import operator
from typing import Any

import torch

from fedlth.kernel import columns as col
from fedlth.kernel.kind import Kind, Loop
from fedlth.kernel.reach import Reach, same_shape
from fedlth.kernel.reader import Reader, Unsupported, Value


def addition(reader: Reader, x: Any, y: Any, alpha: Any = 1) -> Value:
    same = isinstance(x, Value) and isinstance(y, Value) and x.shape == y.shape
    if not same or reader.shapes[x.at] != reader.shapes[y.at] or alpha != 1:
        raise Unsupported("an addition of other than two values of one shape")
    return reader.layer(ADD, x, source_2=y.at)


def check(layer: Reach) -> None:
    same_shape(layer)
    layer.map(col.X2, col.CHANNELS)
    if layer.row[col.NEEDS_DX_2]:
        layer.map(col.DX2, col.CHANNELS)


def loops() -> tuple[Loop, Loop]:
    from fedlth.kernel.arithmetic import add, relu
    from fedlth.kernel.jit import part
    from fedlth.kernel.pointwise import get, pass_gradient
    from fedlth.kernel.vectors import store

    @part
    def forward(work: Any, w: Any, scale: Any, row: Any, lanes: int) -> None:
        """Add the two inputs."""
        for c in range(row[col.CHANNELS]):
            for y in range(row[col.HEIGHT]):
                a = row[col.X] + c * row[col.X_PLANE] + y * row[col.X_ROW]
                b = row[col.X2] + c * row[col.X2_PLANE] + y * row[col.X2_ROW]
                out = row[col.Y] + c * row[col.Y_PLANE] + y * row[col.Y_ROW]
                for p in range(0, row[col.WIDTH] * lanes, 16):
                    value = add(get(work, a + p), get(work, b + p))
                    if row[col.RELU]:
                        value = relu(value)
                    store(value, work, out + p, 0)

    @part
    def backward(work: Any, w: Any, grad: Any, scale: Any, row: Any, lanes: int) -> None:
        """Give both inputs the output's gradient."""
        if row[col.NEEDS_DX]:
            places = row[col.DX], row[col.DX_PLANE], row[col.DX_ROW]
            pass_gradient(work, row, lanes, *places, row[col.ACCUMULATE])
        if row[col.NEEDS_DX_2]:
            places = row[col.DX2], row[col.DX2_PLANE], row[col.DX2_ROW]
            pass_gradient(work, row, lanes, *places, row[col.ACCUMULATE_2])

    return forward, backward


ADD = Kind(
    number=col.ADD,
    name="add",
    functions={torch.add: addition, operator.add: addition, operator.iadd: addition},
    methods={"add": addition, "add_": addition},
    loops=loops,
    check=check,
    channels="joint",
    clips=True,
)
