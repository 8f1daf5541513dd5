"""Some examples as tensors: what trainings, evaluations and probes are given, and how a batch is taken of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fedlth.errors import StudyError

Inputs = Tensor | dict[str, Tensor]
ASKED = (
    "asked"  # among several inputs: (N, T), 1 at the positions that a loss counts; for networks whose forward names it
)


@dataclass(frozen=True, eq=False)
class Examples:
    """Hold N inputs and their targets, all on one device.

    x: (N, ...), or name -> (N, ...) where a network has several inputs.
    y: (N,) or (N, T) int64 classes, -100 where a position has none; (N,) or (N, k) float32 real numbers.
    lengths: name of each ragged field ("y", the names of a mapping, or "x") -> (N,) int64; its rows are padded at the
    end, and a batch is cut to its own longest.
    """

    x: Inputs
    y: Tensor
    lengths: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.y)

    def batch(self, index: Tensor | slice) -> Examples:
        """Return the examples at `index`, positions or a slice; ragged fields are as long as their longest row here."""
        if not self.lengths:
            return Examples(each(self.x, lambda t: t[index]), self.y[index])
        lengths = {name: own[index] for name, own in self.lengths.items()}
        longest = {name: max(1, int(own.max())) if own.numel() else 1 for name, own in lengths.items()}

        def cut(name: str, t: Tensor) -> Tensor:
            return t[index][:, : longest[name]] if name in longest else t[index]

        x = {n: cut(n, t) for n, t in self.x.items()} if isinstance(self.x, dict) else cut("x", self.x)
        return Examples(x, cut("y", self.y), lengths)

    @property
    def longest(self) -> np.ndarray | None:
        """(N,) the length of each example's longest ragged field; None where no field is ragged."""
        if not self.lengths:
            return None
        found: np.ndarray = torch.stack(list(self.lengths.values())).amax(0).cpu().numpy()
        return found

    def to(self, device: str) -> Examples:
        lengths = {name: own.to(device) for name, own in self.lengths.items()}
        return Examples(each(self.x, lambda t: t.to(device)), self.y.to(device), lengths)

    @property
    def tensor(self) -> Tensor:
        """The inputs, where they are one tensor; StudyError where they are several."""
        if isinstance(self.x, dict):
            raise StudyError(f"data: needs inputs that are one tensor here, got a mapping of {', '.join(self.x)}")
        return self.x

    def double(self) -> Examples:
        """Return the same with what is float32 as float64."""
        return Examples(each(self.x, _doubled), _doubled(self.y), self.lengths)


def each(x: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """Return inputs with `change` made to the tensor, or to each of a mapping."""
    return {name: change(t) for name, t in x.items()} if isinstance(x, dict) else change(x)


def tensors(x: Inputs) -> list[Tensor]:
    """Return the tensors of inputs, one or several."""
    return list(x.values()) if isinstance(x, dict) else [x]


def shapes(x: Inputs) -> str:
    """Say in words what inputs are: their shape and dtype, by name where there are several."""
    named = x.items() if isinstance(x, dict) else [("", x)]
    return ", ".join(f"{name + ' ' if name else ''}{tuple(t.shape)} {t.dtype}" for name, t in named)


def joined(parts: Sequence[Examples], how: Callable[[list[Tensor]], Tensor] = torch.cat) -> Examples:
    """Return parts without ragged fields one after the other, or as `how` joins their tensors."""
    first = parts[0].x
    if isinstance(first, dict):
        x: Inputs = {name: how([p.x[name] for p in parts if isinstance(p.x, dict)]) for name in first}
    else:
        x = how([p.x for p in parts if isinstance(p.x, Tensor)])
    return Examples(x, how([p.y for p in parts]))


def _doubled(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t
