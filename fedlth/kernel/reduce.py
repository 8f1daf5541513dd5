"""Sums over the lanes of register vectors: of each row, of a tile's rows together, and added to memory."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from fedlth.kernel.jit import intrinsic
from fedlth.kernel.vectors import INT, Code, Tile, made, nothing


def _halves(c: Code, vector: Any) -> Any:
    while vector.type.count > 4:
        half = vector.type.count // 2
        empty = ir.Constant(vector.type, ir.Undefined)
        parts = [
            c.builder.shuffle_vector(vector, empty, ir.Constant(ir.VectorType(INT, half), list(range(o, o + half))))
            for o in (0, half)
        ]
        vector = c.builder.fadd(*parts)
    return vector


def _total(c: Code, vector: Any) -> Any:
    four = _halves(c, vector)
    parts = [c.builder.extract_element(four, ir.Constant(INT, k)) for k in range(4)]
    return c.builder.fadd(c.builder.fadd(parts[0], parts[1]), c.builder.fadd(parts[2], parts[3]))


@intrinsic
def sums(typing, tile):  # type: ignore[no-untyped-def]
    """Return the tuple of each row's sum, added in a fixed order."""

    def body(c: Code) -> Any:
        values = [_total(c, row) for row in c.rows(0)]
        kind = types.UniTuple(types.float32, len(values))  # type: ignore[no-untyped-call]
        return c.context.make_tuple(c.builder, kind, values)

    def result(given: Any) -> Any:
        return types.UniTuple(types.float32, given[0].rows)  # type: ignore[no-untyped-call]

    return made(body, result)(tile)


@intrinsic
def add_paired_sums(typing, tile, out, at, step, places):  # type: ignore[no-untyped-def]
    """Add a tile of `paired_dots` over its lanes, in the order of `sums`, to out[at + j * step + k]; k: of places."""

    def body(c: Code) -> Any:
        count, at, rows = c.types[4].count, c.args[2], c.rows(0)
        half = c.types[0].width // 2
        for first in range(0, len(rows), count):
            for low in (0, half):
                kind = ir.Constant(ir.VectorType(INT, half), list(range(low, low + half)))
                for k, row in enumerate(rows[first : first + count]):
                    total = _total(c, c.builder.shuffle_vector(row, ir.Constant(row.type, ir.Undefined), kind))
                    place = c.at(1, c.plus(at, k))
                    c.builder.store(c.builder.fadd(c.builder.load(place), total), place)
                at = c.builder.add(at, c.args[3])

    return made(body, nothing)(tile, out, at, step, places)


@intrinsic
def add_sums(typing, tile, out, at):  # type: ignore[no-untyped-def]
    """Add the sums of a tile's four rows to out[at : at + 4]; the transposed adds cost a third of four sums."""

    def body(c: Code) -> Any:
        def mix(a: Any, b: Any, places: list[int]) -> Any:
            return c.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(INT, 4), places))

        a, b, d, e = (_halves(c, row) for row in c.rows(0))
        left = c.builder.fadd(mix(a, b, [0, 4, 2, 6]), mix(a, b, [1, 5, 3, 7]))
        right = c.builder.fadd(mix(d, e, [0, 4, 2, 6]), mix(d, e, [1, 5, 3, 7]))
        total = c.builder.fadd(mix(left, right, [0, 1, 4, 5]), mix(left, right, [2, 3, 6, 7]))
        c.store(1, c.args[2], c.builder.fadd(c.load(1, c.args[2], 4), total))

    return made(body, nothing)(tile, out, at)


@intrinsic
def add_eight(typing, tile, out, at):  # type: ignore[no-untyped-def]
    """Add the sums of a tile's eight rows of eight to out[at : at + 8]."""

    def body(c: Code) -> Any:
        rows = c.rows(0)
        for near in (1, 2, 4):
            low = [k // near % 2 * 8 + k % near + k // (2 * near) * 2 * near for k in range(8)]
            kinds = [ir.Constant(ir.VectorType(INT, 8), [k + far for k in low]) for far in (0, near)]
            rows = [
                c.builder.fadd(*[c.builder.shuffle_vector(a, b, kind) for kind in kinds])
                for a, b in zip(rows[::2], rows[1::2], strict=True)
            ]
        c.store(1, c.args[2], c.builder.fadd(c.load(1, c.args[2], 8), rows[0]))

    return made(body, nothing)(tile, out, at)


@intrinsic
def fold(typing, tile):  # type: ignore[no-untyped-def]
    """Return the one-row tile of the sums over the rows, added in pairs."""

    def body(c: Code) -> Any:
        rows = c.rows(0)
        while len(rows) > 1:
            rows = [c.builder.fadd(*pair) for pair in zip(rows[::2], rows[1::2], strict=True)]
        return c.tile(rows)

    return made(body, lambda given: Tile(1, given[0].width))(tile)
