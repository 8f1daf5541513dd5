"""Images of eight classes, made up: enough of them that a guess at a client's two is seldom right."""

from __future__ import annotations

from typing import Any

import numpy as np

NUM_CLASSES = 8


def images(train: int = 480, test: int = 480) -> dict[str, Any]:
    """Return noisy prototypes, uint8 (N, 1, 8, 8)."""
    rng = np.random.default_rng(0)
    prototypes = rng.integers(0, 255, (NUM_CLASSES, 1, 8, 8))

    def part(size: int) -> tuple[np.ndarray, np.ndarray]:
        y = np.arange(size) % NUM_CLASSES
        return (0.6 * prototypes[y] + 0.4 * rng.integers(0, 255, (size, 1, 8, 8))).astype(np.uint8), y.astype(np.int64)

    (x_train, y_train), (x_test, y_test) = part(train), part(test)
    return {
        "name": "eight", "x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test,
        "num_classes": NUM_CLASSES, "mean": (0.5,), "std": (0.25,),
    }  # fmt: skip
