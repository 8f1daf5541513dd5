"""Model weights as one flat float32 vector and a frozen Layout that says which slice is which tensor."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import nn

from fedlth.errors import StudyError

VARIANCE = "running_var"  # what torch calls it (nn.modules.batchnorm)
HEAD = "@head"  # among glob patterns of tensors: those of the network's last layer, whatever their names


@dataclass(frozen=True)
class Units:
    """Attention heads or feed-forward channels in a tensor: its dimension `dim` is `parts` x `count` x what each has.

    `of` names them, a layer's heads or its channels, and is the same in every tensor that holds them.
    """

    of: str
    count: int
    dim: int
    parts: int = 1

    def along(self, size: int) -> np.ndarray:
        """Return which unit each place of the dimension belongs to, (size,)."""
        part = size // self.parts
        return np.arange(size) % part // (part // self.count)


@dataclass(frozen=True)
class Entry:
    """One tensor of a model: where it lies in its flat vector and what may be done with it.

    `role` is "param" or "buffer"; integer and bool buffers live in the int64 vector (`is_int`).
    Tied names are one entry: `name` is the smallest, the others are `aliases`. `place` is the tensor's rank in the
    module's own order, which names do not tell ("10.weight" sorts before "2.weight"). `units` are the heads or channels
    that it holds, where the module says so. `transposed` is 0 where outputs lie along the first dimension, and how many
    groups there are where inputs do: transposed convolutions, GPT-2's Conv1D.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    offset: int
    is_int: bool = False
    prunable: bool = False
    trainable: bool = True
    norm: bool = False
    aliases: tuple[str, ...] = ()
    place: int = 0
    units: Units | None = None
    transposed: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def slice(self) -> slice:
        return slice(self.offset, self.offset + self.size)

    @property
    def outputs(self) -> int:
        """How many output units or filters the tensor leads into."""
        if self.transposed:
            return self.transposed * self.shape[1]
        return self.shape[0] if self.shape else 1

    @property
    def fan_in(self) -> int:
        """How many weights lead into one output."""
        return self.size // self.outputs

    def by_output(self, values: Any) -> Any:
        """Return the tensor's values, an array or a torch tensor, as a matrix (outputs, fan-in)."""
        if self.transposed:
            values = values.reshape(self.transposed, -1, self.shape[1], math.prod(self.shape[2:])).swapaxes(1, 2)
        return values.reshape(self.outputs, -1)

    def as_stored(self, matrix: Any) -> Any:
        """Return a matrix (outputs, fan-in) as the tensor holds it, flat."""
        if self.transposed:
            matrix = matrix.reshape(self.transposed, self.shape[1], -1, math.prod(self.shape[2:])).swapaxes(1, 2)
        return matrix.reshape(-1)


@dataclass(frozen=True)
class Layout:
    """The sorted entries of a model: prunable parameters, other parameters, those that nothing trains, buffers.

    Prunable entries come first so that a mask (num_prunable,) and the kept values of a payload are plain prefixes. The
    parameters that a training works on lie together: a prefix, or behind prunable weights that nothing trains.
    """

    entries: tuple[Entry, ...]

    @cached_property
    def floats(self) -> tuple[Entry, ...]:
        return tuple(e for e in self.entries if not e.is_int)

    @cached_property
    def ints(self) -> tuple[Entry, ...]:
        return tuple(e for e in self.entries if e.is_int)

    @cached_property
    def prunable(self) -> tuple[Entry, ...]:
        return tuple(e for e in self.entries if e.prunable)

    @cached_property
    def num_floats(self) -> int:
        return sum(e.size for e in self.floats)

    @cached_property
    def num_ints(self) -> int:
        return sum(e.size for e in self.ints)

    @cached_property
    def num_params(self) -> int:
        return sum(e.size for e in self.floats if e.role == "param")

    @cached_property
    def num_prunable(self) -> int:
        return sum(e.size for e in self.prunable)

    @cached_property
    def trained(self) -> slice:
        """Where the parameters lie that training can change: what is before or behind, an optimizer need not see."""
        found = [e.slice for e in self.floats if e.trainable]
        return slice(min((s.start for s in found), default=0), max((s.stop for s in found), default=0))

    @cached_property
    def moving(self) -> Layout:
        """What training can change: all buffers, and the parameters that it trains; this layout where that is all."""
        whole = all(e.trainable or e.role == "buffer" for e in self.entries)
        return self if whole else self.select(lambda e: e.trainable or e.role == "buffer")

    @cached_property
    def rows(self) -> Layout:
        """One number for each row (output unit or filter) of every prunable tensor, in order; none is prunable."""
        rows = [replace(e, shape=(e.outputs,), transposed=0, prunable=False, aliases=()) for e in self.prunable]
        return Layout(_number(rows))

    @cached_property
    def trainable(self) -> np.ndarray:
        """Which parameters training can change at all, (num_params,) bool."""
        found = np.ones(self.num_params, bool)
        for e in self.floats:
            if e.role == "param":
                found[e.slice] = e.trainable
        return found

    @cached_property
    def variances(self) -> np.ndarray:
        """Which floats are running variances, (num_floats,) bool: a negative one is NaN in the next forward pass."""
        found = np.zeros(self.num_floats, bool)
        for e in self.floats:
            if e.role == "buffer" and e.norm:
                found[e.slice] = any(n.rpartition(".")[2] == VARIANCE for n in (e.name, *e.aliases))
        return found

    @property
    def head(self) -> tuple[Entry, ...]:
        """The head: all tensors of the module that has the last trained matrix, in the module's own order.

        None where a model trains no tensor of two dimensions or more. Not by what is prunable, which a study may
        change without changing where the network ends.
        """
        matrices = [e for e in self.floats if e.trainable and not e.norm and len(e.shape) > 1]
        if not matrices:
            return ()
        last = max(matrices, key=lambda e: e.place)
        inside = last.name.rpartition(".")[0] + "."
        return tuple(e for e in self.entries if e is last or (inside != "." and e.name.startswith(inside)))

    def matching(self, globs: Iterable[str]) -> tuple[Entry, ...]:
        """Return the entries that any of the glob patterns names, `HEAD` among them, in the layout's order."""
        patterns = tuple(globs)
        head = {e.name for e in self.head} if HEAD in patterns else set()
        names = [(e, (e.name, *e.aliases)) for e in self.entries]
        return tuple(e for e, of in names if e.name in head or any(fnmatchcase(n, g) for n in of for g in patterns))

    def over_params(self, mask: np.ndarray) -> np.ndarray:
        """Return (num_params,) bool: `mask` (num_prunable,) over the prunable parameters, True for all others."""
        return np.concatenate([mask, np.ones(self.num_params - mask.size, bool)])

    def digest(self, kind: str) -> bytes:
        """Return the 8-byte schema id of messages of `kind` over this layout (names, shapes, roles)."""
        rows = [kind, *[[e.name, list(e.shape), e.is_int, e.prunable] for e in self.entries]]
        return hashlib.blake2b(json.dumps(rows).encode(), digest_size=8).digest()

    def select(self, keep: Callable[[Entry], bool]) -> Layout:
        """Return the layout of the entries that `keep` accepts, offsets renumbered."""
        return Layout(_number([e for e in self.entries if keep(e)]))

    def part_of(self, params: Params, whole: Layout) -> Params:
        """Return what this sub-layout holds of params in `whole`."""
        if self is whole:
            return params
        part = Params(np.empty(self.num_floats, np.float32), np.empty(self.num_ints, np.int64))
        for own, there in self._pairs(whole):
            (part.ints if own.is_int else part.floats)[own.slice] = _held(params, there)
        return part

    def put_into(self, params: Params, whole: Layout, part: Params) -> Params:
        """Return params in `whole` with what this sub-layout holds taken from `part`."""
        if self is whole:
            return part
        joined = Params(params.floats.copy(), params.ints.copy())
        for own, there in self._pairs(whole):
            (joined.ints if own.is_int else joined.floats)[there.slice] = _held(part, own)
        return joined

    def mask_of(self, mask: np.ndarray, whole: Layout) -> np.ndarray:
        """Return what this sub-layout holds of a mask (or any one number a weight) of `whole`: (num_prunable,)."""
        if self.num_prunable == whole.num_prunable:
            return mask
        pairs = [(e, there) for e, there in self._pairs(whole) if e.prunable]
        return np.concatenate([mask[:0], *(mask[there.slice] for _, there in pairs)])

    def mask_into(self, mask: np.ndarray, whole: Layout, part: np.ndarray) -> np.ndarray:
        """Return a mask (whole.num_prunable,) bool with what this sub-layout holds taken from `part`."""
        if self.num_prunable == whole.num_prunable:
            return part
        joined = mask.copy()
        for own, there in self._pairs(whole):
            if own.prunable:
                joined[there.slice] = part[own.slice]
        return joined

    def _pairs(self, whole: Layout) -> list[tuple[Entry, Entry]]:
        """Return each entry of this sub-layout beside the same tensor's entry in `whole`."""
        there = {e.name: e for e in whole.entries}
        return [(e, there[e.name]) for e in self.entries]


@dataclass(frozen=True)
class Params:
    """The state of one model: `floats` (num_floats,) float32 and `ints` (num_ints,) int64. Treat as immutable."""

    floats: np.ndarray
    ints: np.ndarray

    def digest(self) -> str:
        """Return the hex blake2b-128 of the exact bits."""
        state = hashlib.blake2b(self.floats.tobytes(), digest_size=16)
        state.update(self.ints.tobytes())
        return state.hexdigest()

    def within(self, mask: np.ndarray) -> bool:
        """Say whether every prunable value is zero where `mask` is False, to the bit."""
        return not ((self.floats[: mask.size].view(np.uint32) != 0) & ~mask).any()

    def masked(self, mask: np.ndarray) -> Params:
        """Return a copy whose prunable values are zero where `mask` (num_prunable,) bool is False; self if nowhere."""
        if mask.all():
            return self
        floats = np.empty_like(self.floats)
        # As whole numbers: a bit pattern times one or zero, where a negative float times zero would be -0.0.
        np.multiply(self.floats[: mask.size].view(np.uint32), mask, out=floats[: mask.size].view(np.uint32))
        floats[mask.size :] = self.floats[mask.size :]
        return replace(self, floats=floats)


def _held(params: Params, entry: Entry) -> np.ndarray:
    return (params.ints if entry.is_int else params.floats)[entry.slice]


def _number(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    """Give the entries their order and offsets."""

    def rank(e: Entry) -> tuple[bool, bool, bool, str]:
        return (not e.prunable, e.role != "param", e.role == "param" and not e.trainable, e.name)

    ends = {False: 0, True: 0}
    numbered = []
    for entry in sorted(entries, key=rank):
        numbered.append(replace(entry, offset=ends[entry.is_int]))
        ends[entry.is_int] += entry.size
    return tuple(numbered)


@runtime_checkable
class WithUnits(Protocol):
    """A module with heads and channels."""

    def units(self) -> Mapping[str, Units]: ...


def layout_of(module: nn.Module, prunable: Iterable[str]) -> Layout:
    """Read a module's layout; raise StudyError at a dtype that cannot be exchanged exactly.

    A module may say by `units()` which of its tensors hold heads or channels: name -> Units.
    """
    wanted = set(prunable)
    units: Mapping[str, Units] = module.units() if isinstance(module, WithUnits) else {}
    norms = {id(p) for m in module.modules() if _is_norm(m) for p in (*m.parameters(False), *m.buffers(False))}
    transposed = {id(m.weight): groups for m in module.modules() if (groups := _transposed(m))}
    tensors: dict[int, tuple[torch.Tensor, str, list[str]]] = {}
    persistent = set(module.state_dict(keep_vars=True))
    pairs: list[tuple[str, str, torch.Tensor]] = []
    pairs += [("param", n, p) for n, p in module.named_parameters(remove_duplicate=False)]
    pairs += [("buffer", n, b) for n, b in module.named_buffers(remove_duplicate=False) if n in persistent]
    for role, name, tensor in pairs:
        tensors.setdefault(id(tensor), (tensor, role, []))[2].append(name)
    entries = []
    for place, (tensor, role, names) in enumerate(tensors.values()):
        if tensor.dtype.is_complex or (tensor.is_floating_point() and tensor.dtype != torch.float32):
            raise StudyError(f"model: tensor {names[0]} must be float32 or an integer buffer, got {tensor.dtype}")
        first, *rest = sorted(names)
        entries.append(
            Entry(
                name=first,
                shape=tuple(tensor.shape),
                role=role,
                offset=0,
                is_int=not tensor.is_floating_point(),
                prunable=bool(wanted & set(names)),
                trainable=role == "param" and tensor.requires_grad,
                norm=id(tensor) in norms,
                aliases=tuple(rest),
                place=place,
                units=units.get(first),
                transposed=transposed.get(id(tensor), 0),
            )
        )
    return Layout(_number(entries))


def _is_norm(module: nn.Module) -> bool:
    """Say whether a module normalises; by its running statistics or its name, so that users' own count too."""
    return "norm" in type(module).__name__.lower()


def _transposed(module: nn.Module) -> int:
    """Return in how many groups a layer's weight has its inputs first; 0 where outputs are first, or no weight is."""
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return module.groups
    return int(type(module).__name__ == "Conv1D")


def read(module: nn.Module, layout: Layout) -> Params:
    """Copy a module's state out; rewinds need copies, since state_dict aliases the live tensors."""
    state = {n: t for n, t in (*module.named_parameters(remove_duplicate=False), *module.named_buffers())}
    floats = np.empty(layout.num_floats, np.float32)
    ints = np.empty(layout.num_ints, np.int64)
    for e in layout.entries:
        flat = state[e.name].detach().cpu().reshape(-1)
        (ints if e.is_int else floats)[e.slice] = flat.numpy()
    return Params(floats, ints)


def views(params: Params, layout: Layout) -> dict[str, np.ndarray]:
    """Return name -> array of the tensor's shape, tied names included; float entries are views."""
    out: dict[str, np.ndarray] = {}
    for e in layout.entries:
        array = (params.ints if e.is_int else params.floats)[e.slice].reshape(e.shape)
        for name in (e.name, *e.aliases):
            out[name] = array
    return out
