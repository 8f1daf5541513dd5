"""Element by element arithmetic of tiles, and the tiles of zeros that start a sum."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from llvmlite import ir

from fedlth.kernel.jit import intrinsic
from fedlth.kernel.vectors import FUSE, INT, Code, Tile, made, same


def _pairwise(combine: Callable[[Any, list[Any]], Any]) -> Any:
    """Return the intrinsic that makes each row of its result from the same rows of its tiles."""

    def answer(*tiles: Any) -> Any:
        def body(c: Code) -> Any:
            columns = [c.rows(k) for k in range(len(tiles))]
            return c.tile([combine(c.builder, list(row)) for row in zip(*columns, strict=True)])

        return made(body, same)(*tiles)

    return answer


def _zero(vector: Any) -> Any:
    return ir.Constant(vector.type, None)


def _maximum(builder: Any, rows: list[Any]) -> Any:
    # A comparison with NaN is false, which keeps rows[1]: a diverged value passes through relu.
    return builder.select(builder.fcmp_ordered(">", rows[0], rows[1]), rows[0], rows[1])


# Cephes' expf: a polynomial on [-ln 2 / 2, ln 2 / 2], and ln 2 in two parts, the first of few digits.
_EXPONENTIAL = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_LN_2 = (0.693359375, -2.12194440e-4)
_ROUNDS = 1.5 * 2.0**23  # what is added to it is rounded to an integer, which its low bits then are


def _exponential(builder: Any, rows: list[Any]) -> Any:
    (given,), kind = rows, rows[0].type
    whole = ir.VectorType(INT, kind.count)

    def constant(value: float) -> Any:
        return ir.Constant(kind, [value] * kind.count)

    def fused(a: Any, b: Any, c: Any) -> Any:
        return builder.fadd(builder.fmul(a, b, flags=FUSE), c, flags=FUSE)

    x = given
    for sign, bound in ((">", constant(88.0)), ("<", constant(-87.0))):
        x = builder.select(builder.fcmp_ordered(sign, x, bound), bound, x)
    shifted = fused(x, constant(1.0 / math.log(2.0)), constant(_ROUNDS))
    power = builder.fsub(shifted, constant(_ROUNDS))
    for part in _LN_2:
        x = fused(power, constant(-part), x)
    total = constant(_EXPONENTIAL[0])
    for factor in _EXPONENTIAL[1:]:
        total = fused(total, x, constant(factor))
    total = builder.fadd(fused(total, builder.fmul(x, x), x), constant(1.0))
    exponent = builder.shl(builder.bitcast(shifted, whole), ir.Constant(whole, [23] * kind.count))
    found = builder.bitcast(builder.add(builder.bitcast(total, whole), exponent), kind)
    found = builder.select(builder.fcmp_ordered(">", given, constant(88.0)), constant(math.inf), found)
    return builder.select(builder.fcmp_unordered("uno", given, given), given, found)  # NaN stays NaN


def _keep(sign: str) -> Callable[[Any, list[Any]], Any]:
    def combine(builder: Any, rows: list[Any]) -> Any:
        return builder.select(builder.fcmp_ordered(sign, rows[0], rows[1]), rows[2], _zero(rows[2]))

    return combine


@intrinsic
def maximum(typing, a, b):  # type: ignore[no-untyped-def]
    """Return a where a > b, else b."""
    return _pairwise(_maximum)(a, b)


@intrinsic
def relu(typing, a):  # type: ignore[no-untyped-def]
    """Return 0 where a < 0, else a (NaN stays NaN)."""
    return _pairwise(lambda builder, rows: _maximum(builder, [_zero(rows[0]), rows[0]]))(a)


@intrinsic
def add(typing, a, b):  # type: ignore[no-untyped-def]
    """Return a + b."""
    return _pairwise(lambda builder, rows: builder.fadd(*rows))(a, b)


@intrinsic
def subtract(typing, a, b):  # type: ignore[no-untyped-def]
    """Return a - b."""
    return _pairwise(lambda builder, rows: builder.fsub(*rows))(a, b)


@intrinsic
def multiply(typing, a, b):  # type: ignore[no-untyped-def]
    """Return a * b."""
    return _pairwise(lambda builder, rows: builder.fmul(*rows))(a, b)


@intrinsic
def divide(typing, a, b):  # type: ignore[no-untyped-def]
    """Return a / b."""
    return _pairwise(lambda builder, rows: builder.fdiv(*rows))(a, b)


@intrinsic
def exponential(typing, a):  # type: ignore[no-untyped-def]
    """Return e to the power of a, to two parts in ten million; above 88 infinity, below -87 what it is there."""
    return _pairwise(_exponential)(a)


@intrinsic
def multiply_add(typing, a, b, c):  # type: ignore[no-untyped-def]
    """Return a * b + c, in one rounding where the machine can."""

    def combine(builder: Any, rows: list[Any]) -> Any:
        return builder.fadd(builder.fmul(rows[0], rows[1], flags=FUSE), rows[2], flags=FUSE)

    return _pairwise(combine)(a, b, c)


@intrinsic
def keep_positive(typing, a, g):  # type: ignore[no-untyped-def]
    """Return g where a > 0, else 0."""
    combine = _keep(">")
    return _pairwise(lambda builder, rows: combine(builder, [rows[0], _zero(rows[0]), rows[1]]))(a, g)


@intrinsic
def keep_equal(typing, a, b, g):  # type: ignore[no-untyped-def]
    """Return g where a == b, else 0."""
    return _pairwise(_keep("=="))(a, b, g)


def filled(rows: int, width: int, value: float = 0.0) -> Any:
    """Return the intrinsic of the tile of `rows` vectors of `width` equal values."""

    @intrinsic
    def constant(typing):  # type: ignore[no-untyped-def]
        tile = Tile(rows, width)

        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            row = ir.Constant(ir.VectorType(ir.FloatType(), width), [value] * width)
            return ir.Constant(context.get_value_type(tile), [row] * rows)

        return tile(), code

    return constant


zeros_4x16, zeros_2x16, zeros_1x16 = (filled(rows, 16) for rows in (4, 2, 1))
zeros_10x8, zeros_8x8, zeros_5x8 = (filled(rows, 8) for rows in (10, 8, 5))
ones_1x16 = filled(1, 16, 1.0)
