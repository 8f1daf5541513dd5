"""Which examples a training sees in which step."""

from __future__ import annotations

import numpy as np

STRETCH = 50  # batches that are sorted by length at a time: long enough to be alike, short enough to stay random


def batches(
    size: int, batch_size: int, order: np.random.Generator, lengths: np.ndarray | None = None
) -> list[np.ndarray]:
    """Shuffle `size` examples into batches; a last batch of one joins the one before (BatchNorm cannot train on it).

    With `lengths` (size,) the examples of a batch are of about one length, and the batches come in random order: each
    stretch of shuffled batches is sorted, cut again, and shuffled by batch. Less padding, the same examples in a pass.
    """
    shuffled = order.permutation(size)
    cuts = list(range(batch_size, size, batch_size))
    if cuts and size - cuts[-1] == 1:
        cuts.pop()
    parts = np.split(shuffled, cuts)
    if lengths is None:
        return parts
    found = []
    for at in range(0, len(parts), STRETCH):
        stretch = parts[at : at + STRETCH]
        together = np.concatenate(stretch)
        alike = np.split(
            together[np.argsort(lengths[together], kind="stable")], np.cumsum([len(part) for part in stretch[:-1]])
        )
        found += [alike[i] for i in order.permutation(len(alike))]
    return found


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
