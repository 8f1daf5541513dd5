"""LeakyReLU (Maas et al., 2013): below zero a line of small slope."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn import functional as F

from fedlth.kernel.kind import Kind, Loop
from fedlth.kernel.reader import Reader, Value


def leaky_relu(reader: Reader, x: Value, negative_slope: float = 0.01, inplace: bool = False) -> Value:
    return reader.layer(LEAKY_RELU, x, scale=negative_slope)


def loops() -> tuple[Loop, Loop]:
    from fedlth.kernel.arithmetic import keep_positive, multiply_add, relu, subtract, zeros_1x16
    from fedlth.kernel.jit import inlined
    from fedlth.kernel.pointwise import value_by_value

    @inlined
    def value(x: Any, option: Any) -> Any:
        below = subtract(zeros_1x16(), relu(subtract(zeros_1x16(), x)))
        return multiply_add(option, below, keep_positive(x, x))

    @inlined
    def slope(x: Any, dy: Any, option: Any) -> Any:
        above = keep_positive(x, dy)
        return multiply_add(option, subtract(dy, above), above)

    return value_by_value(value, slope)


LEAKY_RELU = Kind(
    number=9,
    name="leaky relu",
    modules={nn.LeakyReLU: lambda reader, name, part, x: leaky_relu(reader, x, part.negative_slope)},
    functions={F.leaky_relu: leaky_relu},
    loops=loops,
    channels="apart",
)
