"""Which places of a model's tensors belong to which channels: what a sub-model of the first channels is made of."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fedlth.errors import StudyError
from fedlth.models.layout import Layout

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CHANNEL_NORMS = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
)  # fmt: skip
# What treats each channel alone, and keeps their number and their place.
ALONE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Hardtanh,
    nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.Upsample, nn.ZeroPad2d,
)  # fmt: skip
ALONE_FUNCTIONS = {
    F.relu, torch.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.hardswish, F.dropout, F.dropout2d,
    torch.sigmoid, torch.tanh, F.sigmoid, F.tanh, F.max_pool1d, F.max_pool2d, torch.max_pool2d, F.avg_pool1d,
    F.avg_pool2d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_max_pool1d, F.adaptive_max_pool2d,
}  # fmt: skip
ALONE_METHODS = {"relu", "relu_", "sigmoid", "tanh", "contiguous", "clone", "float"}
TOGETHER = {operator.add, operator.iadd, operator.sub, operator.mul, operator.imul, torch.add, torch.sub, torch.mul}
TOGETHER_METHODS = {"add", "add_", "sub", "mul", "mul_"}
REDUCED = {torch.mean, torch.amax, torch.sum}
REDUCED_METHODS = {"mean", "amax", "sum"}
FLATTENED = {torch.flatten, torch.reshape}
FLATTENED_METHODS = {"flatten", "view", "reshape"}


class Unsliceable(Exception):
    """Why a model has no sub-models of channels, as the user reads it."""


@dataclass(frozen=True)
class Group:
    """Channels that come and go together: how many, in what steps (a group norm's own groups), or always all."""

    size: int
    step: int = 1
    whole: bool = False

    def kept(self, width: float) -> int:
        """Return how many channels a share `width` of them is: the ceiling, in whole steps."""
        if self.whole:
            return self.size
        return min(self.size, self.step * max(1, math.ceil(width * self.size / self.step - 1e-9)))


@dataclass(frozen=True)
class Place:
    """A dimension of a tensor: which group its entries are of, and how many lie side by side for one channel."""

    group: int
    repeat: int = 1


@dataclass(frozen=True)
class Channels:
    """The channels of a model.

    `places` has for each parameter one Place a dimension, None for a dimension without channels. `outputs` is the group
    of the classes, `sliced` the weights and biases of layers whose outputs are fewer in a narrower sub-model
    (convolutions and linear layers, no norms).
    """

    groups: tuple[Group, ...]
    places: Mapping[str, tuple[Place | None, ...]]
    outputs: int
    sliced: tuple[str, ...]

    def prefix(self, layout: Layout, width: float) -> np.ndarray:
        """Return (num_prunable,) bool: what a network of the first `width` share of each group's channels has.

        Parameters without channels are held by everyone.
        """
        kept = [np.arange(group.size) < group.kept(width) for group in self.groups]
        return self._over(layout, kept)

    def rows(self, layout: Layout, classes: Sequence[int]) -> np.ndarray:
        """Return (num_prunable,) bool: all but what leads to the outputs of other classes alone."""
        kept = [np.ones(group.size, bool) for group in self.groups]
        kept[self.outputs] = np.isin(np.arange(self.groups[self.outputs].size), np.asarray(classes))
        return self._over(layout, kept)

    def _over(self, layout: Layout, kept: Sequence[np.ndarray]) -> np.ndarray:
        mask = np.ones(layout.num_prunable, bool)
        for e in layout.prunable:
            here = mask[e.slice].reshape(e.shape)
            for dim, place in enumerate(self.places.get(e.name, ())):
                if place is not None:
                    there = np.repeat(kept[place.group], place.repeat)
                    here &= there.reshape([-1 if d == dim else 1 for d in range(len(e.shape))])
        return mask


def channels_of(name: str, module: nn.Module, layout: Layout, x: Tensor) -> Channels:
    """Find a model's channels from its torch.fx trace on examples x (N, ...).

    Input channels of a layer are output channels of the one before it, through flatten (C x H x W), additions, norms
    and pools; input and classes always stay whole. Raises StudyError naming the layer where they cannot be followed.
    """
    with refused(name, "be sliced by width"):
        reader = Reader(module, layout)
        reader.follow(x)
        return reader.found()


@contextmanager
def refused(name: str, what: str) -> Iterator[None]:
    """Raise StudyError that names the model and what it `cannot` do, where its channels cannot be followed."""
    try:
        yield
    except Unsliceable as reason:
        raise StudyError(f"model: {name} cannot {what}: {reason}") from reason


@dataclass(frozen=True)
class Axis:
    """Where the channels of a value lie: its dimension `dim` holds, for each channel, `repeat` entries."""

    dim: int
    place: Place


@dataclass
class _Groups:
    """Groups that are joined as layers turn out to share channels (a union-find)."""

    all: list[Group] = field(default_factory=list)
    leads: list[int] = field(default_factory=list)

    def new(self, size: int, *, whole: bool = False) -> int:
        self.all.append(Group(size, whole=whole))
        self.leads.append(len(self.leads))
        return len(self.leads) - 1

    def root(self, group: int) -> int:
        while self.leads[group] != group:
            group = self.leads[group]
        return group

    def of(self, group: int) -> Group:
        return self.all[self.root(group)]

    def narrow(self, group: int, *, step: int = 1, whole: bool = False) -> None:
        old = self.of(group)
        self.all[self.root(group)] = replace(old, step=math.lcm(old.step, step), whole=old.whole or whole)

    def join(self, a: int, b: int) -> None:
        a, b = sorted((self.root(a), self.root(b)))
        if a != b:
            self.narrow(a, step=self.all[b].step, whole=self.all[b].whole)
            self.leads[b] = a


class Reader(fx.Interpreter):
    """Runs a network's trace and follows the channels of each value."""

    def __init__(self, module: nn.Module, layout: Layout) -> None:
        try:
            graph = fx.symbolic_trace(module.eval())
        except Exception as error:  # torch.fx runs the user's forward on proxies, which may raise anything
            told = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise Unsliceable(f"torch.fx cannot trace it: {told}") from error
        super().__init__(graph)
        self.extra_traceback = (
            False  # else a reason is followed by one of torch's own, for which it imports its compiler
        )
        self.names = {alias: e.name for e in layout.floats for alias in (e.name, *e.aliases)}
        self.groups = _Groups()
        self.axes: dict[fx.Node, Axis | None] = {}
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        self.inputs: dict[fx.Node, int] = {}
        self.places: dict[str, tuple[Place | None, ...]] = {}
        self.layers: list[tuple[str, int]] = []  # parameters of layers that make new channels, and their group
        self.mixed: list[tuple[str, int]] = []  # layers that need all channels of a group
        self.outputs: int | None = None

    def follow(self, x: Tensor) -> None:
        """Run on examples x (N, ...); raise Unsliceable where channels cannot be followed."""
        with torch.no_grad():
            self.run(x)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = tuple(value.shape)
            if n.op == "placeholder" and value.is_floating_point() and value.dim() > 1:
                self.inputs[n] = value.shape[1]
        self.axes[n] = self._axis(n)
        return value

    def found(self) -> Channels:
        """Return what was read, each group under its number among those that are left."""
        if self.outputs is None:
            raise Unsliceable("its outputs have no channels that lead to them")
        self.groups.narrow(self.outputs, whole=True)
        for layer, group in self.mixed:
            if not self.groups.of(group).whole:
                raise Unsliceable(f"layer {layer} mixes all channels of its input, which a narrower network lacks")
        roots = sorted({self.groups.root(group) for group in range(len(self.groups.all))})
        number = {root: at for at, root in enumerate(roots)}

        def settled(place: Place | None) -> Place | None:
            return None if place is None else replace(place, group=number[self.groups.root(place.group)])

        return Channels(
            tuple(self.groups.all[root] for root in roots),
            {name: tuple(map(settled, places)) for name, places in self.places.items()},
            number[self.groups.root(self.outputs)],
            tuple(sorted(name for name, group in self.layers if not self.groups.of(group).whole)),
        )

    def _axis(self, n: fx.Node) -> Axis | None:
        """Return where a node's channels lie; None for a value without any."""
        given = [node for node in n.all_input_nodes if node in self.shapes]
        if n.op == "placeholder":
            return Axis(1, Place(self.groups.new(self.inputs[n], whole=True))) if n in self.inputs else None
        if n.op == "output":
            axis = self.axes.get(n.args[0]) if isinstance(n.args[0], fx.Node) else None
            if axis is None or axis.dim != len(self.shapes[given[0]]) - 1 or axis.place.repeat != 1:
                raise Unsliceable("its outputs are no scores of classes in the last dimension")
            self.outputs = axis.place.group
            return axis
        if n.op == "get_attr":
            if n.target in self.names:
                raise Unsliceable(f"parameter {n.target} is used outside a layer")
            return None
        if n.op == "call_module":
            return self._layer(str(n.target), self.module.get_submodule(str(n.target)), given)
        if n not in self.shapes:  # sizes and the like
            return None
        if not any(self.axes.get(node) for node in given):
            return None
        kind = n.target
        if kind in ALONE_FUNCTIONS or (n.op == "call_method" and kind in ALONE_METHODS):
            return self.axes[given[0]]
        if kind in TOGETHER or (n.op == "call_method" and kind in TOGETHER_METHODS):
            return self._together(n, given)
        if kind in REDUCED or (n.op == "call_method" and kind in REDUCED_METHODS):
            return self._reduced(n, given[0])
        if kind in FLATTENED or (n.op == "call_method" and kind in FLATTENED_METHODS):
            return self._reshaped(n.name, given[0], self.shapes[n])
        raise Unsliceable(f"the step {n.name} ({getattr(kind, '__name__', kind)}) is not known")

    def _layer(self, name: str, part: nn.Module, given: list[fx.Node]) -> Axis | None:
        axis, shape = (self.axes.get(given[0]), self.shapes[given[0]]) if given else (None, ())
        if isinstance(part, nn.Embedding):
            group = self.groups.new(part.embedding_dim)
            self._note(name, "weight", (None, Place(group)))
            return Axis(len(shape), Place(group))
        if axis is None:
            raise Unsliceable(f"layer {name} ({type(part).__name__}) reads a value whose channels are not known")
        if isinstance(part, nn.Linear):
            if axis.dim != len(shape) - 1:
                raise Unsliceable(f"layer {name} (Linear) works along another dimension than its input's channels")
            return self._weighted(name, part.out_features, (axis.place, 0), len(shape) - 1)
        if isinstance(part, (*CONVOLUTIONS, *TRANSPOSED)):
            return self._convolution(name, part, axis)
        if isinstance(part, CHANNEL_NORMS):
            for tensor in ("weight", "bias"):
                self._note(name, tensor, (axis.place,))
            return axis
        if isinstance(part, nn.GroupNorm):
            return self._group_norm(name, part, axis)
        if isinstance(part, nn.LayerNorm):
            if axis.dim >= len(shape) - len(part.normalized_shape):
                self.mixed.append((name, axis.place.group))
            return axis
        if isinstance(part, nn.Flatten):
            flat = torch.empty(shape, device="meta").flatten(part.start_dim, part.end_dim)
            return self._reshaped(name, given[0], tuple(flat.shape))
        if isinstance(part, ALONE):
            return axis
        raise Unsliceable(f"layer {name} is a {type(part).__name__}, whose channels are not known")

    def _weighted(self, name: str, size: int, reads: tuple[Place, int], dim: int, more: int = 0) -> Axis:
        """Note a layer's weight, which reads along its dimension 1 (or 0, transposed), and its bias."""
        made = Place(self.groups.new(size))
        pair = (reads[0], made) if reads[1] else (made, reads[0])
        self._note(name, "weight", (*pair, *(None,) * more))
        self._note(name, "bias", (made,))
        self.layers += [
            (self.names[f"{name}.{tensor}"], made.group)
            for tensor in ("weight", "bias")
            if f"{name}.{tensor}" in self.names
        ]
        return Axis(dim, made)

    def _convolution(self, name: str, part: Any, axis: Axis) -> Axis:
        if axis.dim != 1 or axis.place.repeat != 1:
            raise Unsliceable(f"layer {name} reads channels that are not its input's second dimension")
        more, transposed = len(part.kernel_size), isinstance(part, TRANSPOSED)
        if part.groups == 1:
            return self._weighted(name, part.out_channels, (axis.place, int(transposed)), 1, more)
        if part.groups == part.in_channels == part.out_channels:  # depthwise: each channel alone
            self._note(name, "weight", (axis.place, None, *(None,) * more))
            self._note(name, "bias", (axis.place,))
            return axis
        raise Unsliceable(f"layer {name} has {part.groups} groups of channels; only 1, or one a channel, are known")

    def _group_norm(self, name: str, part: nn.GroupNorm, axis: Axis) -> Axis:
        if axis.dim != 1 or axis.place.repeat != 1:
            raise Unsliceable(f"layer {name} normalises channels that are not its input's second dimension")
        if part.num_groups == 1:
            self.mixed.append((name, axis.place.group))
        self.groups.narrow(axis.place.group, step=part.num_channels // part.num_groups)
        for tensor in ("weight", "bias"):
            self._note(name, tensor, (axis.place,))
        return axis

    def _together(self, n: fx.Node, given: list[fx.Node]) -> Axis | None:
        axes = [self.axes.get(node) for node in given]
        first = axes[0]
        for node, axis in zip(given[1:], axes[1:], strict=True):
            if first is None or axis is None:
                raise Unsliceable(f"the step {n.name} joins channels and a value that has none")
            same = len(self.shapes[node]) == len(self.shapes[given[0]]) and axis.dim == first.dim
            sizes = {self.groups.of(one.place.group).size for one in (axis, first)}
            if not same or axis.place.repeat != first.place.repeat or len(sizes) > 1:
                raise Unsliceable(f"the step {n.name} joins values whose channels lie in other places")
            self.groups.join(first.place.group, axis.place.group)
        return first

    def _reduced(self, n: fx.Node, source: fx.Node) -> Axis | None:
        axis, before, after = self.axes[source], self.shapes[source], self.shapes[n]
        dims = n.args[1] if len(n.args) > 1 else n.kwargs.get("dim")
        dims = [dims] if isinstance(dims, int) else dims
        if axis is None or not isinstance(dims, (tuple, list)) or not all(isinstance(d, int) for d in dims):
            raise Unsliceable(f"the step {n.name} reduces dimensions that are not known")
        gone = {int(d) % len(before) for d in dims if isinstance(d, int)}
        if axis.dim in gone:
            raise Unsliceable(f"the step {n.name} mixes all channels of its input, which a narrower network lacks")
        return axis if len(after) == len(before) else replace(axis, dim=axis.dim - sum(d < axis.dim for d in gone))

    def _reshaped(self, name: str, source: fx.Node, after: tuple[int, ...]) -> Axis | None:
        axis, before = self.axes[source], self.shapes[source]
        if axis is None or after == before:
            return axis
        if axis.dim == 1 and after == (before[0], math.prod(before[1:])):
            return Axis(1, replace(axis.place, repeat=axis.place.repeat * math.prod(before[2:])))
        raise Unsliceable(f"the step {name} reshapes {before} to {after}, only a flatten of all but the batch is known")

    def _note(self, layer: str, tensor: str, places: tuple[Place | None, ...]) -> None:
        """Note a parameter's places, where the layer has it; one that is used twice joins the channels of both uses."""
        name = self.names.get(f"{layer}.{tensor}")
        if name is None:
            return
        for old, new in zip(self.places.setdefault(name, places), places, strict=True):
            if (old is None) != (new is None) or (old and new and old.repeat != new.repeat):
                raise Unsliceable(f"parameter {name} is used twice, for channels in other places")
            if old and new:
                self.groups.join(old.group, new.group)
