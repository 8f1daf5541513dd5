"""How long a training is: epochs over the client's data, steps, or a sum of both."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fedlth.training.batches import batches, steps_an_epoch


@dataclass(frozen=True, kw_only=True)
class Budget:
    """So many passes over the data and so many steps more, each pass in an order of its own; the last may be cut.

    `repeats`: each batch is taken so many times in a row, which makes a step of it so many.
    """

    epochs: int = 0
    steps: int = 0
    repeats: int = 1

    def __add__(self, other: Budget) -> Budget:
        return replace(self, epochs=self.epochs + other.epochs, steps=self.steps + other.steps)

    def times(self, count: int) -> Budget:
        return replace(self, epochs=self.epochs * count, steps=self.steps * count)

    def __bool__(self) -> bool:
        return bool(self.epochs or self.steps)

    def __call__(
        self, size: int, batch_size: int, order: np.random.Generator, /, lengths: np.ndarray | None = None
    ) -> list[list[np.ndarray]]:
        """Draw the batches of `size` examples, by epoch; with `lengths` (size,) of examples of about one length."""
        found, left = [], self.total(size, batch_size) // self.repeats
        while left > 0:
            drawn = batches(size, batch_size, order, lengths)[:left]
            found.append([part for part in drawn for _ in range(self.repeats)])
            left -= len(drawn)
        return found

    def total(self, size: int, batch_size: int) -> int:
        """Return how many steps it is on `size` examples."""
        return (self.epochs * steps_an_epoch(size, batch_size) + self.steps) * self.repeats

    def passes(self, size: int, batch_size: int) -> int:
        """Return how many passes over `size` examples it begins."""
        return -(-self.total(size, batch_size) // (steps_an_epoch(size, batch_size) * self.repeats))

    def examples(self, size: int, batch_size: int) -> int:
        """Return how many examples it sees of `size`, each as often as it is seen: a pass sees them all.

        Exact but with batches grouped by length, among which the smaller last one may come at any step.
        """
        passes, steps = divmod(self.total(size, batch_size) // self.repeats, steps_an_epoch(size, batch_size))
        return (passes * size + steps * batch_size) * self.repeats

    def in_epochs(self, steps_an_epoch: float) -> float:
        """Return it in epochs of so many steps; an int where only epochs are asked for."""
        return self.epochs + self.steps / steps_an_epoch if self.steps else self.epochs
