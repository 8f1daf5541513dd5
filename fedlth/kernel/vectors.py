"""Register vectors for numba: small types over LLVM vectors, so that accumulators stay in registers.

Plain numba loops spill their accumulators (2-12 GFLOP/s against 47-85). A Tile is `rows` vectors of `width` float32;
the same source lowers to AVX2, AVX-512 or NEON. Every address is an element index into a one-dimensional float32
array; memory_layout.py, which lays the arrays out, keeps the indices inside them, nothing is checked here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import models, register_model

from fedlth.kernel.jit import intrinsic

_FLOAT, INT = ir.FloatType(), ir.IntType(32)
FUSE = ("contract",)  # lets a multiply and an add become one instruction, and nothing else


class Tile(types.Type):
    """`rows` vectors of `width` float32."""

    def __init__(self, rows: int, width: int) -> None:
        self.rows, self.width = rows, width
        super().__init__(name=f"Tile({rows}x{width})")


@register_model(Tile)
class _TileModel(models.PrimitiveModel):
    def __init__(self, manager: Any, tile: Tile) -> None:
        super().__init__(  # type: ignore[no-untyped-call]
            manager, tile, ir.LiteralStructType([_vector(tile.width)] * tile.rows)
        )


def _vector(width: int) -> ir.VectorType:
    return ir.VectorType(_FLOAT, width)


def _splat(builder: Any, scalar: Any, width: int) -> Any:
    empty = ir.Constant(_vector(width), ir.Undefined)
    first = builder.insert_element(empty, scalar, ir.Constant(INT, 0))
    return builder.shuffle_vector(first, empty, ir.Constant(ir.VectorType(INT, width), [0] * width))


class Code:
    """What the bodies below share: typed access to the arguments of one intrinsic call."""

    def __init__(self, context: Any, builder: Any, signature: Any, args: Any) -> None:
        self.context, self.builder, self.types, self.args = context, builder, signature.args, args

    def at(self, array: int, index: Any) -> Any:
        data = self.context.make_array(self.types[array])(self.context, self.builder, self.args[array]).data
        return self.builder.gep(data, [index])

    def load(self, array: int, index: Any, width: int) -> Any:
        kind = _vector(width)
        found = self.builder.load(self.builder.bitcast(self.at(array, index), kind.as_pointer()), typ=kind)
        found.align = 4
        return found

    def store(self, array: int, index: Any, value: Any) -> None:
        place = self.builder.bitcast(self.at(array, index), value.type.as_pointer())
        self.builder.store(value, place).align = 4

    def scalar(self, array: int, index: Any) -> Any:
        return self.builder.load(self.at(array, index))

    def spread(self, array: int, index: Any, width: int) -> Any:
        return _splat(self.builder, self.scalar(array, index), width)

    def plus(self, index: Any, step: int) -> Any:
        return self.builder.add(index, ir.Constant(index.type, step))

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        return self.builder.fadd(self.builder.fmul(a, b, flags=FUSE), c, flags=FUSE)

    def rows(self, tile: int) -> list[Any]:
        return [self.builder.extract_value(self.args[tile], j) for j in range(self.types[tile].rows)]

    def tile(self, rows: list[Any]) -> Any:
        value = ir.Constant(ir.LiteralStructType([r.type for r in rows]), ir.Undefined)
        for j, row in enumerate(rows):
            value = self.builder.insert_value(value, row, j)
        return value


def made(body: Callable[[Code], Any], result: Callable[[Any], Any]) -> Callable[..., Any]:
    """Return a typing function's answer: arguments as they are, indices as int64."""

    def answer(*given: Any) -> Any:
        for one in given:
            if isinstance(one, types.Array) and (one.ndim != 1 or one.layout != "C"):
                raise TypeError(f"vectors: arrays must be one-dimensional and contiguous, got {one}")
        wanted = [types.int64 if isinstance(one, types.Integer) else one for one in given]

        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            value = body(Code(context, builder, signature, args))
            return context.get_dummy_value() if value is None else value

        return result(wanted)(*wanted), code

    return answer


def same(given: Any) -> Any:
    return given[0]


def nothing(given: Any) -> Any:
    return types.void


@intrinsic
def outer(typing, tile, w, at, step, x, start):  # type: ignore[no-untyped-def]
    """Return tile[j] + w[at + j * step] * x[start : start + width]."""

    def body(c: Code) -> Any:
        width = c.types[0].width
        vector = c.load(4, c.args[5], width)
        rows, at = [], c.args[2]
        for row in c.rows(0):
            rows.append(c.fma(c.spread(1, at, width), vector, row))
            at = c.builder.add(at, c.args[3])
        return c.tile(rows)

    return made(body, same)(tile, w, at, step, x, start)


@intrinsic
def along(typing, tile, w, at, x, start):  # type: ignore[no-untyped-def]
    """Return tile[j] + w[at] * x[start + j * width : ...]."""

    def body(c: Code) -> Any:
        width = c.types[0].width
        scalar = c.spread(1, c.args[2], width)
        rows = c.rows(0)
        return c.tile([c.fma(scalar, c.load(3, c.plus(c.args[4], j * width), width), r) for j, r in enumerate(rows)])

    return made(body, same)(tile, w, at, x, start)


@intrinsic
def dots(typing, tile, g, starts, start, x, places, place):  # type: ignore[no-untyped-def]
    """Return tile[i * b + k] + g[starts[i] + start : ...] * x[places[k] + place : ...], for tuples of a and of b."""

    def body(c: Code) -> Any:
        width, extract = c.types[0].width, c.builder.extract_value

        def vectors(array: int, places: int, by: int) -> list[Any]:
            found = (extract(c.args[places], i) for i in range(c.types[places].count))
            return [c.load(array, c.builder.add(one, c.args[by]), width) for one in found]

        lefts, rights, rows = vectors(1, 2, 3), vectors(4, 5, 6), c.rows(0)
        return c.tile(
            [c.fma(a, b, rows[i * len(rights) + k]) for i, a in enumerate(lefts) for k, b in enumerate(rights)]
        )

    return made(body, same)(tile, g, starts, start, x, places, place)


@intrinsic
def paired_dots(typing, tile, g, start, plane, x, places, place):  # type: ignore[no-untyped-def]
    """As `dots` of vectors half as wide, for the starts `start + 0, 1, 2, ... * plane`, two of them to a row.

    The halves of row i * b + k are tile rows 2 * i * b + k and (2 * i + 1) * b + k of `dots`, summed in the same order.
    """

    def body(c: Code) -> Any:
        half, count = c.types[0].width // 2, c.types[5].count
        both = ir.Constant(ir.VectorType(INT, 2 * half), list(range(2 * half)))

        def beside(a: Any, b: Any) -> Any:
            return c.builder.shuffle_vector(a, b, both)

        lefts, at = [], c.args[2]
        for _ in range(2 * c.types[0].rows // count):
            lefts.append(c.load(1, at, half))
            at = c.builder.add(at, c.args[3])
        pairs = [beside(a, b) for a, b in zip(lefts[::2], lefts[1::2], strict=True)]
        found = (c.builder.extract_value(c.args[5], k) for k in range(count))
        rights = [c.load(4, c.builder.add(one, c.args[6]), half) for one in found]
        rights, rows = [beside(one, one) for one in rights], c.rows(0)
        return c.tile([c.fma(a, b, rows[i * count + k]) for i, a in enumerate(pairs) for k, b in enumerate(rights)])

    return made(body, same)(tile, g, start, plane, x, places, place)


@intrinsic
def spread(typing, tile, w, at, step):  # type: ignore[no-untyped-def]
    """Return the tile whose row j is w[at + j * step] everywhere (step 0: all rows the same)."""

    def body(c: Code) -> Any:
        rows, at = [], c.args[2]
        for _ in c.rows(0):
            rows.append(c.spread(1, at, c.types[0].width))
            at = c.builder.add(at, c.args[3])
        return c.tile(rows)

    return made(body, same)(tile, w, at, step)


@intrinsic
def scatter(typing, tile, out, index, at, base):  # type: ignore[no-untyped-def]
    """Store row j at out[base + index[at + j] : ...]."""

    def body(c: Code) -> Any:
        for j, row in enumerate(c.rows(0)):
            place = c.builder.sext(c.scalar(2, c.plus(c.args[3], j)), ir.IntType(64))
            c.store(1, c.builder.add(c.args[4], place), row)

    return made(body, nothing)(tile, out, index, at, base)


@intrinsic
def collect(typing, tile, out, index, at, base):  # type: ignore[no-untyped-def]
    """Return tile[j] + out[base + index[at + j] : ...]."""

    def body(c: Code) -> Any:
        rows = []
        for j, row in enumerate(c.rows(0)):
            place = c.builder.sext(c.scalar(2, c.plus(c.args[3], j)), ir.IntType(64))
            rows.append(c.builder.fadd(row, c.load(1, c.builder.add(c.args[4], place), c.types[0].width)))
        return c.tile(rows)

    return made(body, same)(tile, out, index, at, base)


@intrinsic
def load(typing, tile, x, start, step):  # type: ignore[no-untyped-def]
    """Return the tile of rows x[start + j * step : ...]; the argument `tile` only says the shape."""

    def body(c: Code) -> Any:
        rows, at = [], c.args[2]
        for _ in range(c.types[0].rows):
            rows.append(c.load(1, at, c.types[0].width))
            at = c.builder.add(at, c.args[3])
        return c.tile(rows)

    return made(body, same)(tile, x, start, step)


@intrinsic
def store(typing, tile, out, start, step):  # type: ignore[no-untyped-def]
    """Store row j at out[start + j * step : ...]."""

    def body(c: Code) -> Any:
        at = c.args[2]
        for row in c.rows(0):
            c.store(1, at, row)
            at = c.builder.add(at, c.args[3])

    return made(body, nothing)(tile, out, start, step)


@intrinsic
def number(typing, index, at):  # type: ignore[no-untyped-def]
    """Return index[at] of an int32 array as int64, without numba's test for a negative `at`."""

    def body(c: Code) -> Any:
        return c.builder.sext(c.scalar(0, c.args[1]), ir.IntType(64))

    return made(body, lambda given: types.int64)(index, at)
