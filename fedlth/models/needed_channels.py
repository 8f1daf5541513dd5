"""Which channels of a masked network its outputs need: unread ones go, and constant ones are folded into their reader.

Two passes over a torch.fx trace. Forwards: which channels are one number everywhere, in every example (what leads to
them is zero, so that they hold a bias, or what norms and activations make of it). Backwards: which ones the outputs
depend on. Channels that additions join stay together: all of them as far as any of their readers needs one.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fedlth.models.channels import (
    CHANNEL_NORMS,
    CONVOLUTIONS,
    FLATTENED,
    FLATTENED_METHODS,
    TOGETHER,
    TOGETHER_METHODS,
    TRANSPOSED,
    Axis,
    Reader,
    Unsliceable,
)  # fmt: skip
from fedlth.models.layout import Layout

WEIGHTED = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)
LAYERS = (*WEIGHTED, *CHANNEL_NORMS, nn.GroupNorm, nn.Embedding)
AVERAGES = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.ZeroPad2d)
AVERAGE_FUNCTIONS = {F.avg_pool1d, F.avg_pool2d}
PRODUCTS = {torch.mul, operator.mul, operator.imul, "mul", "mul_"}
STEADY = 1e-6  # that values of a constant channel differ by at most, relative to the largest: rounding


@dataclass(frozen=True)
class Merge:
    """Where a layer pads with zeros: the constant channels `gone` are `ratio` times the channel `into`, which stays."""

    into: int
    gone: np.ndarray
    ratio: np.ndarray


@dataclass(frozen=True)
class Weighted:
    """What a convolution or linear layer must read and make, in its own numbers of inputs and outputs.

    `reads` (inputs,) bool stay. `constant` (inputs,) float64: what an input that is not asked for holds everywhere, 0
    where that is of no account. `asked` (inputs,) bool: those that `rows` read. `rows` (outputs,) bool: those that must
    be computed; every other one is `level` (outputs,) float64 everywhere, or not needed. `alone`: no other layer has
    its tensors.
    """

    reads: np.ndarray
    constant: np.ndarray
    asked: np.ndarray
    rows: np.ndarray
    level: np.ndarray
    alone: bool
    merge: Merge | None = None


@dataclass(frozen=True)
class Layer:
    """Which outputs (outputs,) bool stay of a layer; `weighted` where it makes channels of others."""

    makes: np.ndarray
    weighted: Weighted | None = None


def needed(module: nn.Module, layout: Layout, x: Tensor) -> dict[str, Layer]:
    """Return every layer that has channels, by its name in `module`; x: examples (N, ...).

    Raises Unsliceable where channels cannot be followed.
    """
    reader = _Needs(module, layout)
    reader.follow(x)
    return reader.by_layer()


def matrix(part: Any) -> np.ndarray | None:
    """Return which outputs read which inputs, (outputs, inputs) bool; None where each channel is treated alone."""
    if getattr(part, "groups", 1) > 1:
        return None
    found = (part.weight.detach() != 0).flatten(2).any(2) if part.weight.dim() > 2 else part.weight.detach() != 0
    there: np.ndarray = found.cpu().numpy()
    return there.T if isinstance(part, TRANSPOSED) else there


def _pads(part: Any) -> bool:
    """Say whether a layer sees zeros, or fewer taps, at the rim: a constant is then no constant to it."""
    if isinstance(part, nn.Linear):
        return False
    if isinstance(part, TRANSPOSED):
        return True
    same = part.padding == "same" and any(size > 1 for size in part.kernel_size)
    wide = not isinstance(part.padding, str) and any(part.padding)
    return part.padding_mode == "zeros" and (same or wide)


def _blocks(values: np.ndarray, count: int) -> np.ndarray:
    """Return whether any of each of `count` equal blocks is True."""
    return np.asarray(values.reshape(count, -1).any(1))


def _spread(values: np.ndarray, size: int) -> np.ndarray:
    return np.repeat(values, size // values.size)


class _Needs(Reader):
    """Follows channels, and which are constant; `constant` and `level` have one entry a place of the dimension."""

    def __init__(self, module: nn.Module, layout: Layout) -> None:
        super().__init__(module, layout)
        self.constant: dict[fx.Node, np.ndarray] = {}
        self.level: dict[fx.Node, np.ndarray] = {}
        self.uses: list[str] = []
        tied = {e.name for e in layout.floats if e.aliases}
        self.tied = {alias.rpartition(".")[0] for alias, name in self.names.items() if name in tied}

    def run_node(self, n: fx.Node) -> Any:
        value, axis = super().run_node(n), self.axes.get(n)
        if n.op == "call_module":
            self.uses.append(str(n.target))
        if axis is not None and n.op != "output" and isinstance(value, Tensor):
            rows = value.detach().movedim(axis.dim, 0).reshape(value.shape[axis.dim], -1).double()
            steady = (rows.amax(1) - rows.amin(1)) <= STEADY * rows.abs().amax(1)
            self.level[n] = rows[:, 0].numpy()
            self.constant[n] = _spread(self._constant(n), len(rows)) & steady.numpy()
            kinds = FLATTENED if n.op == "call_function" else FLATTENED_METHODS if n.op == "call_method" else ()
            if n.target in kinds and len(rows) in fx.node.map_arg(tuple(n.args[1:]), lambda node: -1):
                # The forward has this number written out.
                self.groups.narrow(axis.place.group, whole=True)
        return value

    def _given(self, n: fx.Node) -> list[fx.Node]:
        return [node for node in n.all_input_nodes if node in self.constant]

    def _part(self, n: fx.Node) -> nn.Module | None:
        return self.module.get_submodule(str(n.target)) if n.op == "call_module" else None

    def _constant(self, n: fx.Node) -> np.ndarray:
        """Return which of a step's results are constant; a flatten's, in fewer entries."""
        given, part = self._given(n), self._part(n)
        if not given:
            return np.zeros(1, bool)
        fixed, zero = self.constant[given[0]], self.constant[given[0]] & (self.level[given[0]] == 0)
        if part is not None:
            return _of_layer(part, fixed, zero)
        if n.target in TOGETHER or (n.op == "call_method" and n.target in TOGETHER_METHODS):
            both = np.asarray(np.all([self.constant[node] for node in given], axis=0))
            if n.target in PRODUCTS:
                both |= np.any([self.constant[node] & (self.level[node] == 0) for node in given], axis=0)
            return both
        pads = n.target in AVERAGE_FUNCTIONS and (len(n.args) > 3 or "padding" in n.kwargs)
        return zero if pads else fixed

    def by_layer(self) -> dict[str, Layer]:
        """Return what must stay of every layer."""
        if self.outputs is None:
            raise Unsliceable("its outputs have no channels that lead to them")
        self.groups.narrow(self.outputs, whole=True)
        for name, group in self.mixed:
            if isinstance(self.module.get_submodule(name), nn.LayerNorm):
                self.groups.narrow(group, whole=True)
        needs = self._needs()
        readers = [self._read(n, needs[n]) for n in needs if _of_others(self._part(n))]
        stay = self._stay(needs, readers)
        found: dict[str, Layer] = {}
        for n in needs:
            if isinstance(self._part(n), LAYERS):
                found[str(n.target)] = Layer(self._over(n, stay))
        for own in readers:
            found[own.name] = Layer(self._over(own.node, stay), self._settled(own, stay))
        return found

    def _needs(self) -> dict[fx.Node, np.ndarray]:
        """Return which entries of each step's result the outputs depend on."""
        need = {n: np.zeros(level.size, bool) for n, level in self.level.items()}
        for n in reversed(list(self.graph.nodes)):
            for node in self._given(n):
                if n.op == "output":
                    need[node][:] = True
                elif n in need:
                    need[node] |= self._asked(n, need[node].size, need[n] & self._computed(n))
                    if not _of_others(self._part(n)):  # a constant that is made of constants alone is asked of them
                        need[node] |= self._asked(n, need[node].size, need[n]) & self.constant[node]
        return need

    def _alone(self, n: fx.Node) -> bool:
        """Say whether no other layer, and no other step, has the tensors of a step's layer."""
        return self.uses.count(str(n.target)) == 1 and n.target not in self.tied

    def _computed(self, n: fx.Node) -> np.ndarray:
        """Return which entries of a step's result are not constant, or are by what it reads: a layer of two steps has
        one bias for both."""
        return ~self.constant[n] | (_of_others(self._part(n)) and not self._alone(n))

    def _asked(self, n: fx.Node, size: int, wanted: np.ndarray) -> np.ndarray:
        """Return which entries (size,) of its input a step reads to make those that are `wanted`."""
        part: Any = self._part(n)
        if isinstance(part, WEIGHTED):
            reads = matrix(part)
            if reads is not None:
                return np.asarray(reads[wanted].any(0))
            return np.asarray(wanted & (part.weight.detach().flatten(1) != 0).any(1).numpy())
        if isinstance(part, nn.GroupNorm):  # statistics of a group are of all its channels
            return _spread(_blocks(wanted, part.num_groups), size)
        if isinstance(part, nn.LayerNorm):
            return np.full(size, wanted.any())
        return _blocks(wanted, size)

    def _read(self, n: fx.Node, need: np.ndarray) -> _Reads:
        part: Any = self._part(n)
        name, source = str(n.target), self._given(n)[0]
        reads, rows = matrix(part), need & self._computed(n)
        assert reads is not None
        asked, constant = reads[rows].any(0), self.constant[source]
        # What holds no zero is folded into this layer's bias, or, behind a rim of zeros, into another constant.
        alone, pads = self._alone(n), _pads(part)
        folds = constant & ((self.level[source] == 0) | alone)
        rim = asked & folds & (self.level[source] != 0) & pads
        return _Reads(n, source, name, rows, asked, asked & ~folds, rim, alone, pads)

    def _stay(self, needs: Mapping[fx.Node, np.ndarray], readers: Sequence[_Reads]) -> dict[int, np.ndarray]:
        """Return which channels of each group stay."""
        stay = {root: np.full(self.groups.all[root].size, self.groups.all[root].whole) for root in self._roots()}
        for own in readers:
            stay[self._root(own.source)] |= self._channels(own.source, own.asked & own.hard)
        for n in needs:
            if isinstance(self._part(n), nn.GroupNorm):
                source = self._given(n)[0]
                asked = self._asked(n, needs[source].size, needs[n] & ~self.constant[n])
                stay[self._root(source)] |= self._channels(source, asked)
        for root, kept in stay.items():
            rims = [own for own in readers if self._root(own.source) == root and own.rim.any()]
            self._close(root, kept)
            if rims and not all((own.rim <= kept).all() for own in rims):
                kept |= self._one_for_all(kept, rims)
                self._close(root, kept)
            if not kept.any():
                kept[0] = True
                self._close(root, kept)
        return stay

    def _one_for_all(self, kept: np.ndarray, rims: Sequence[_Reads]) -> np.ndarray:
        """Return which channels have to stay so that readers with a rim can have the other constants of them."""
        soft = np.any([own.rim for own in rims], axis=0) & ~kept
        values = [np.where(self.constant[own.source], abs(self.level[own.source]), 0) for own in rims]
        least = np.min(values, axis=0)
        best = int(np.argmax(np.where(soft, least, 0)))
        if not least[best] > 0:
            return np.asarray(soft)
        for own in rims:
            own.into = best
        return np.asarray(np.arange(kept.size) == best)

    def _settled(self, own: _Reads, stay: Mapping[int, np.ndarray]) -> Weighted:
        reads, level = self._over(own.source, stay), self.level[own.source]
        asked, merge = own.asked & reads, None
        gone = np.flatnonzero(own.rim & ~reads)
        if gone.size:
            merge = Merge(own.into, gone, level[gone] / level[own.into])
            asked[own.into] = True
        folded = self.constant[own.source] & ~asked & own.alone & (not own.pads)
        return Weighted(reads, np.where(folded, level, 0), asked, own.rows, self.level[own.node], own.alone, merge)

    def _roots(self) -> set[int]:
        return {self.groups.root(group) for group in range(len(self.groups.all))}

    def _root(self, n: fx.Node) -> int:
        return self.groups.root(self._axis_of(n).place.group)

    def _axis_of(self, n: fx.Node) -> Axis:
        axis = self.axes[n]
        assert axis is not None
        return axis

    def _channels(self, n: fx.Node, entries: np.ndarray) -> np.ndarray:
        return _blocks(entries, self.groups.of(self._root(n)).size)

    def _over(self, n: fx.Node, stay: Mapping[int, np.ndarray]) -> np.ndarray:
        return np.repeat(stay[self._root(n)], self._axis_of(n).place.repeat)

    def _close(self, root: int, kept: np.ndarray) -> None:
        """Let channels that a group norm treats together stay together."""
        kept |= _spread(_blocks(kept, kept.size // self.groups.all[root].step), kept.size)


@dataclass
class _Reads:
    """A layer that makes channels of others: which inputs it asks for, of these those that must stay as they are."""

    node: fx.Node
    source: fx.Node
    name: str
    rows: np.ndarray
    asked: np.ndarray
    hard: np.ndarray
    rim: np.ndarray  # constants that it cannot fold into a bias
    alone: bool
    pads: bool
    into: int = -1


def _of_others(part: nn.Module | None) -> bool:
    return isinstance(part, WEIGHTED) and matrix(part) is not None


def _of_layer(part: Any, fixed: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """Return which outputs of a layer are constant, where its inputs are `fixed`, of these those that are `zero`."""
    if isinstance(part, WEIGHTED):
        plain, reads = zero if _pads(part) else fixed, matrix(part)
        if reads is None:
            return np.asarray(plain | (part.weight.detach().flatten(1) == 0).all(1).numpy())
        return np.asarray(~reads[:, ~plain].any(1))
    if isinstance(part, (nn.Embedding, nn.LayerNorm)):
        return np.zeros(1, bool)
    if isinstance(part, (*CHANNEL_NORMS, nn.GroupNorm)):
        groups = part.num_groups if isinstance(part, nn.GroupNorm) else fixed.size
        still = _spread(np.asarray(fixed.reshape(groups, -1).all(1)), fixed.size)
        return still if part.weight is None else np.asarray(still | (part.weight.detach() == 0).numpy())
    if isinstance(part, AVERAGES) and any(np.ravel(part.padding)):
        return zero
    return fixed
