"""Tanh, as in the first LeNet-5."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fedlth.kernel.kind import Kind, Loop
from fedlth.kernel.reader import Reader, Value

# Cephes' tanhf: where x^2 is below _NEAR, x + x^3 times a polynomial of x^2; 1 - 2 / (e^2x + 1) would lose digits.
_NEAR = 0.625**2
_POLYNOMIAL = (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)


def tanh(reader: Reader, x: Value) -> Value:
    return reader.layer(TANH, x)


def loops() -> tuple[Loop, Loop]:
    from fedlth.kernel.arithmetic import (
        add,
        divide,
        exponential,
        filled,
        keep_positive,
        multiply,
        multiply_add,
        ones_1x16,
        subtract,
    )
    from fedlth.kernel.jit import inlined
    from fedlth.kernel.pointwise import value_by_value

    near, two = filled(1, 16, _NEAR), filled(1, 16, 2.0)
    p_0, p_1, p_2, p_3, p_4 = (filled(1, 16, factor) for factor in _POLYNOMIAL)

    @inlined
    def value(x: Any, option: Any) -> Any:
        far = subtract(ones_1x16(), divide(two(), add(exponential(add(x, x)), ones_1x16())))
        z = multiply(x, x)
        total = multiply_add(multiply_add(multiply_add(multiply_add(p_0(), z, p_1()), z, p_2()), z, p_3()), z, p_4())
        close = multiply_add(multiply(total, z), x, x)
        return add(far, keep_positive(subtract(near(), z), subtract(close, far)))

    @inlined
    def slope(x: Any, dy: Any, option: Any) -> Any:
        y = value(x, option)
        return multiply(dy, subtract(ones_1x16(), multiply(y, y)))

    return value_by_value(value, slope)


TANH = Kind(
    number=12,
    name="tanh",
    modules={nn.Tanh: lambda reader, name, part, x: tanh(reader, x)},
    functions={torch.tanh: tanh},
    methods={"tanh": tanh, "tanh_": tanh},
    loops=loops,
    channels="apart",
)
