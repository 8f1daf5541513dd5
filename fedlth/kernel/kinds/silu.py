"""SiLU, also called Swish (Elfwing et al., arXiv 1702.03118): x times its sigmoid."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn import functional as F

from fedlth.kernel.kind import Kind, Loop
from fedlth.kernel.reader import Reader, Value


def silu(reader: Reader, x: Value, inplace: bool = False) -> Value:
    return reader.layer(SILU, x)


def loops() -> tuple[Loop, Loop]:
    from fedlth.kernel.arithmetic import (
        add,
        divide,
        exponential,
        multiply,
        multiply_add,
        ones_1x16,
        subtract,
        zeros_1x16,
    )
    from fedlth.kernel.jit import inlined
    from fedlth.kernel.pointwise import value_by_value

    @inlined
    def sigmoid(x: Any) -> Any:
        return divide(ones_1x16(), add(ones_1x16(), exponential(subtract(zeros_1x16(), x))))

    @inlined
    def value(x: Any, option: Any) -> Any:
        return multiply(x, sigmoid(x))

    @inlined
    def slope(x: Any, dy: Any, option: Any) -> Any:
        share = sigmoid(x)
        return multiply(dy, multiply(share, multiply_add(x, subtract(ones_1x16(), share), ones_1x16())))

    return value_by_value(value, slope)


SILU = Kind(
    number=10,
    name="silu",
    modules={nn.SiLU: lambda reader, name, part, x: silu(reader, x)},
    functions={F.silu: silu},
    loops=loops,
    channels="apart",
)
