"""Defences of a personal mask (`privacy.mask` of a study): what a client makes of it before anybody else sees it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from fedlth.errors import wrong
from fedlth.methods.client_update import Update
from fedlth.rng import secretly
from fedlth.training.local_client import LocalClient


class Defence(Protocol):
    """A frozen value: the mask that leaves in the place of the client's own.

    Two attributes may say more: `epsilon`, how much local differential privacy a single bit has, and
    `density(density)`, how much of a mask is kept afterwards.
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

    def density(self, density: float) -> float:
        return density + self.flip * (1 - 2 * density)

    def __call__(self, mask: np.ndarray, rng: np.random.Generator, /) -> np.ndarray:
        turned: np.ndarray = mask ^ (rng.random(mask.size) < self.flip)
        return turned


DEFENCES: Mapping[str, Callable[..., Defence]] = {"randomised_response": RandomisedResponse}


def defended(defence: Defence, local: LocalClient, update: Update, sends: tuple[tuple[str, str], ...]) -> Update:
    """Return an update with its bare masks defended, in the client's own stream of each message.

    That stream follows from the study, so that a simulation can be repeated. A device sets FEDLTH_MASK_SECRET, which
    nobody else knows, or else who knows the study takes the flips back.
    """
    sent = dict(update.contents)
    for name, kind in sends:
        if kind == "mask":
            own = sent[name].mask
            mask = defence(own, local.rng(secretly(f"defence of {name}")))
            if mask.dtype != bool or mask.shape != own.shape:
                raise ValueError(f"privacy.mask must return {own.size} truth values, got {mask.shape} {mask.dtype}")
            sent[name] = replace(sent[name], mask=mask)
    return replace(update, contents=sent)
