"""What a score may look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedlth.params import Layout


@dataclass(frozen=True)
class Evidence:
    """All arrays are (num_prunable,) float32 over the prunable prefix of `layout`.

    `init` is theta_0, `start` is where this training began, `now` is where it ended, `mask` says what is alive.
    `gradient` returns the loss gradient at given weights on the client's own training data.
    """

    layout: Layout
    init: np.ndarray
    start: np.ndarray
    now: np.ndarray
    mask: np.ndarray
    gradient: Callable[[np.ndarray], np.ndarray]
    rng: np.random.Generator
