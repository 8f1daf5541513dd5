"""ReLU: a copy that is clipped at zero. fuse.py joins it to the layer before it, where that clips its own output."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fedlth.kernel import columns as col
from fedlth.kernel.kind import Kind, Loop
from fedlth.kernel.reader import Reader, Value


def relu(reader: Reader, x: Value, inplace: bool = False) -> Value:
    return reader.layer(COPY, x, relu=True)


def loops() -> tuple[Loop, Loop]:
    from fedlth.kernel.arithmetic import relu
    from fedlth.kernel.jit import part
    from fedlth.kernel.pointwise import get, pass_gradient
    from fedlth.kernel.vectors import store

    @part
    def forward(work: Any, w: Any, scale: Any, row: Any, lanes: int) -> None:
        """Copy the input to the output."""
        for c in range(row[col.CHANNELS]):
            for y in range(row[col.HEIGHT]):
                at = row[col.X] + c * row[col.X_PLANE] + y * row[col.X_ROW]
                out = row[col.Y] + c * row[col.Y_PLANE] + y * row[col.Y_ROW]
                for p in range(0, row[col.WIDTH] * lanes, 16):
                    value = get(work, at + p)
                    if row[col.RELU]:
                        value = relu(value)
                    store(value, work, out + p, 0)

    @part
    def backward(work: Any, w: Any, grad: Any, scale: Any, row: Any, lanes: int) -> None:
        """Give the input the output's gradient, which has been clipped."""
        pass_gradient(work, row, lanes, row[col.DX], row[col.DX_PLANE], row[col.DX_ROW], row[col.ACCUMULATE])

    return forward, backward


COPY = Kind(
    number=col.COPY,
    name="copy",
    modules={nn.ReLU: lambda reader, name, part, x: relu(reader, x)},
    functions={F.relu: relu, torch.relu: relu},
    methods={"relu": relu, "relu_": relu},
    loops=loops,
    channels="kept",
    clips=True,
)
