"""A network as the kernel sees it: a list of layers over the flat parameter vector. Needs neither torch nor numba."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from fedlth.kernel import columns as col

Shape = tuple[int, int, int]

# Below these densities the lists of kept weights beat the dense layer where nothing has been measured: `python
# benchmarks/kernel.py --crossover` (5 x 5 and 3 x 3 convolutions .5 to .7, linear layers .4, over two or three sizes
# each, on several days, with AVX2).
SPARSE_BELOW = {col.CONVOLUTION: 0.6, col.LINEAR: 0.4}


@dataclass(frozen=True, kw_only=True)
class Op:
    """One layer. `source`, `source_2` and `out` number the values that it reads and writes; `kind` is in columns.py, or
    in the file of its kind, and `name` is for people.

    weight and bias: places in the flat vector, -1 for none; of a kind without a matrix of weights, one a channel each.
    window, stride and padding are (y, x); scale is a number that its kind wants: a pool's factor, a norm's epsilon.
    picks: the features that a linear layer reads, empty for all; other layers must not read its source then. Of a
    choice of channels, the input channel of each output channel, or -1 where it is the bias alone. measured_below: the
    density below which a list of kept weights was measured to beat the dense layer, None where it was not measured.
    """

    kind: int
    source: int
    out: int
    name: str = ""
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
    measured_below: float | None = field(default=None, compare=False)

    @property
    def weighted(self) -> bool:
        """Say whether it has a matrix of weights, of which a ticket keeps some."""
        return self.kind in SPARSE_BELOW

    @property
    def sparse_below(self) -> float:
        """The density below which a weighted layer's kept weights are a list."""
        return SPARSE_BELOW[self.kind] if self.measured_below is None else self.measured_below

    @property
    def reads(self) -> tuple[int, ...]:
        return (self.source,) if self.source_2 < 0 else (self.source, self.source_2)


@dataclass(frozen=True, kw_only=True)
class LayerTable:
    """A whole network. `shapes` is (C, H, W) by value; value 0 is the input, `output` the logits (C, 1, 1).

    `frozen` holds the (start, end) slices of the flat vector that training must not move. torch_above: the share of
    the dense multiply-adds from which on torch is the faster; narrow_below: the density below which 16 examples go side
    by side. Both None where they were not measured. Networks that differ only in what was measured are equal, since
    they lie alike in memory.
    """

    ops: tuple[Op, ...]
    shapes: tuple[Shape, ...]
    output: int
    num_floats: int
    num_params: int
    num_prunable: int
    frozen: tuple[tuple[int, int], ...] = ()
    torch_above: float | None = field(default=None, compare=False)
    narrow_below: float | None = field(default=None, compare=False)

    def with_lists_below(self, densities: tuple[float, ...]) -> LayerTable:
        """Return the network with these measured densities, one a weighted layer in their order."""
        left = iter(densities)
        ops = (replace(op, measured_below=next(left)) if op.weighted else op for op in self.ops)
        return replace(self, ops=tuple(ops))

    @property
    def num_classes(self) -> int:
        return self.shapes[self.output][0]

    def describe(self) -> tuple[str, ...]:
        """Return one line a layer: what runs in the kernel."""
        lines = []
        for op in self.ops:
            wide, out = "x".join(map(str, self.shapes[op.source])), "x".join(map(str, self.shapes[op.out]))
            below = op.measured_below
            listed = "" if below is None else f", a list of kept weights below density {below:g}"
            lines.append(f"{op.name}{' + relu' if op.relu else ''}: {wide} -> {out}{listed}")
        return tuple(lines)
