"""Which examples a training sees in which step."""

from __future__ import annotations

import numpy as np


def batches(size: int, batch_size: int, order: np.random.Generator) -> list[np.ndarray]:
    """Shuffle `size` examples into batches; a last batch of one joins the one before (BatchNorm cannot train on it)."""
    shuffled = order.permutation(size)
    cuts = list(range(batch_size, size, batch_size))
    if cuts and size - cuts[-1] == 1:
        cuts.pop()
    return np.split(shuffled, cuts)


def steps_an_epoch(size: int, batch_size: int) -> int:
    """Return how many batches `batches` makes of `size` examples."""
    whole = -(-size // batch_size)
    return whole - (whole > 1 and size - (whole - 1) * batch_size == 1)


def window(epochs: list[list[np.ndarray]], first_step: int, last_step: int | None) -> list[list[np.ndarray]]:
    """Return the batches of the steps first_step, ..., last_step - 1 of a run, by epoch, without empty epochs."""
    found, step = [], 0
    for parts in epochs:
        stop = len(parts) if last_step is None else max(0, last_step - step)
        found.append(parts[max(0, first_step - step) : stop])
        step += len(parts)
    return [parts for parts in found if parts]
