"""A network as the kernel sees it: a list of layers over the flat parameter vector. Needs neither torch nor numba."""

from __future__ import annotations

from dataclasses import dataclass

Shape = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Op:
    """One layer. `source`, `source_2` and `out` number the values that it reads and writes; `kind` is in columns.py.

    weight and bias: places in the flat vector, -1 for none; of a group normalisation they are gain and shift.
    window, stride and padding are (y, x); scale is a pool's factor or a norm's epsilon. picks: the features that a
    linear layer reads, empty for all; other layers must not read its source then. Of a choice of channels, the input
    channel of each output channel, or -1 where it is the bias alone.
    """

    kind: int
    source: int
    out: int
    source_2: int = -1
    relu: bool = False
    weight: int = -1
    bias: int = -1
    window: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    groups: int = 1
    scale: float = 1.0
    picks: tuple[int, ...] = ()

    @property
    def reads(self) -> tuple[int, ...]:
        return (self.source,) if self.source_2 < 0 else (self.source, self.source_2)


@dataclass(frozen=True, kw_only=True)
class LayerTable:
    """A whole network. `shapes` is (C, H, W) by value; value 0 is the input, `output` the logits (C, 1, 1).

    `frozen` holds the (start, end) slices of the flat vector that training must not move.
    """

    ops: tuple[Op, ...]
    shapes: tuple[Shape, ...]
    output: int
    num_floats: int
    num_params: int
    num_prunable: int
    frozen: tuple[tuple[int, int], ...] = ()

    @property
    def num_classes(self) -> int:
        return self.shapes[self.output][0]

    def describe(self) -> tuple[str, ...]:
        """Return one line a layer: what runs in the kernel."""
        names = "convolution", "linear", "max pool", "average pool", "global max", "group norm", "add", "copy", "choice"
        lines = []
        for op in self.ops:
            wide, out = "x".join(map(str, self.shapes[op.source])), "x".join(map(str, self.shapes[op.out]))
            lines.append(f"{names[op.kind]}{' + relu' if op.relu else ''}: {wide} -> {out}")
        return tuple(lines)
