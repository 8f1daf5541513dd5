"""How many noisy steps a visit took (privacy.dp): told by the client, checked at the door, kept in rounds.jsonl."""

from __future__ import annotations

import reprlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

from fedlth.storage.records import NoisySteps
from fedlth.training.local_client import LocalClient

NOISY = "noisy_steps"  # the key of a visit's record
MOST = 2**31  # steps of one visit: more is no count


def noisy_steps(local: LocalClient) -> dict[str, Any]:
    """Return what a client adds to its record: the steps of all its trainings in this visit, by batch size."""
    found: Counter[int] = Counter()
    for batch_size, steps in local.noisy:
        found[batch_size] += steps
    return {NOISY: {str(size): found[size] for size in sorted(found)}}


def split_off(record: Mapping[str, Any], client: int) -> tuple[dict[str, Any], tuple[NoisySteps, ...]]:
    """Return a record without its noisy steps, and these; raise ValueError where they are not told, or no counts."""
    told = record.get(NOISY)
    if not isinstance(told, dict):
        raise ValueError(f"{NOISY} must be a record of step counts by batch size, got {reprlib.repr(told)}")
    for size, steps in told.items():
        if not (size.isascii() and size.isdecimal() and int(size[:10]) and type(steps) is int and 0 < steps < MOST):
            raise ValueError(f"{NOISY} must be whole numbers above 0 by batch size, got {reprlib.repr(told)}")
    found = tuple(NoisySteps(client, int(size), steps) for size, steps in told.items())
    return {key: value for key, value in record.items() if key != NOISY}, found
