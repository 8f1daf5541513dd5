"""Augmentations: what a training step does to its images, drawn anew for every example and step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


class Augment(Protocol):
    def __call__(self, x: Tensor, generator: np.random.Generator, /) -> Tensor:
        """Return a batch of the shape and type of x (N, C, H, W), which stays as it is; draw from `generator` alone."""
        ...


@dataclass(frozen=True, kw_only=True)
class Crop:
    """Pad by `pad` zeros (of the normalised image) on each side, then cut the image's size out at a random place."""

    pad: int = 4

    def __post_init__(self) -> None:
        if self.pad < 1:
            raise ValueError(f"pad must be at least 1, got {self.pad}")

    def __call__(self, x: Tensor, generator: np.random.Generator, /) -> Tensor:
        _check_images("crop", x)
        height, width = x.shape[2:]
        at = torch.from_numpy(generator.integers(0, 2 * self.pad + 1, (2, len(x)))).to(x.device)
        padded = functional.pad(x, (self.pad,) * 4)
        every = padded.unfold(2, height, 1).unfold(3, width, 1)  # (N, C, places, places, H, W), a view
        return every[torch.arange(len(x), device=x.device), :, at[0], at[1]]


@dataclass(frozen=True, kw_only=True)
class Flip:
    """Mirror left and right, each example with probability `rate`."""

    rate: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate must be in (0, 1], got {self.rate}")

    def __call__(self, x: Tensor, generator: np.random.Generator, /) -> Tensor:
        _check_images("flip", x)
        turned = torch.from_numpy(generator.random(len(x)) < self.rate).to(x.device)
        return torch.where(turned[:, None, None, None], x.flip(-1), x)


def _check_images(name: str, x: Tensor) -> None:
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"{name} needs images (N, C, H, W), got {tuple(x.shape)} {x.dtype}")
