"""Defences of a personal mask: what a client makes of its mask before anybody else sees it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedlth.errors import wrong


class Defence(Protocol):
    """A frozen value: the mask that leaves in the place of the client's own.

    An attribute `epsilon` may say of how much local differential privacy a single bit has.
    """

    def __call__(self, mask: np.ndarray, rng: np.random.Generator, /) -> np.ndarray:
        """Return (num_prunable,) bool; `rng` is the client's own stream of this message."""
        ...


@dataclass(frozen=True)
class RandomisedResponse:
    """Flip each bit with probability `flip`. Warner, JASA 1965; each bit alone is ln((1 - flip) / flip)-private.

    A mask has many bits, and they depend on each other: the sum over all of them is no small epsilon.
    """

    flip: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.flip < 0.5:
            raise wrong("privacy.mask.flip", "in (0, 0.5)", self.flip)

    @property
    def epsilon(self) -> float:
        return math.log((1 - self.flip) / self.flip)

    def __call__(self, mask: np.ndarray, rng: np.random.Generator, /) -> np.ndarray:
        turned: np.ndarray = mask ^ (rng.random(mask.size) < self.flip)
        return turned


DEFENCES: Mapping[str, Callable[..., Defence]] = {"randomised_response": RandomisedResponse}
