"""The defences that an audit compares, and the masks that they leave of a client's own."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedlth.methods.defence import Defence, RandomisedResponse
from fedlth.privacy.subject import Subject
from fedlth.rng import stream

FLIPS = (0.05, 0.1, 0.3, 0.45)


def defences(subject: Subject) -> Mapping[str, Defence]:
    """Return what changes the bits of a mask, by name: randomised response, and the run's own where it is another."""
    found: dict[str, Defence] = {flip_name(q): RandomisedResponse(q) for q in FLIPS}
    applied = subject.defence
    if applied is not None and applied not in found.values():
        name = flip_name(applied.flip) if isinstance(applied, RandomisedResponse) else subject.applied
        found[name] = applied
    return found


def flip_name(flip: float) -> str:
    return f"randomised response {flip:g}"


def flipped(defence: Defence, name: str, mask: np.ndarray, seed: int, kind: str, client: int) -> np.ndarray:
    """Return what a defence leaves of a mask, in the client's own stream."""
    return defence(mask, stream(seed, f"audit/{name}/{kind}", client=client))


def common_mask(subject: Subject) -> np.ndarray:
    """Return theta_g's own magnitude mask at the tickets' density: the same for every client."""
    local = subject.step(subject.task, next(iter(subject.states)), "audit/common")
    score = np.abs(local.theta_g.floats[: subject.task.layout.num_prunable])
    return subject.finder.pick(score, local.local.full, subject.task.layout, subject.density)
