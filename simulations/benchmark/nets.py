"""LeNet-5 with batch norm after its convolutions, for the method that is about norms (fedbn) and its rival."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


class Normed(nn.Sequential):
    """LeNet-5 as in fedlth/models/lenet5.py, each convolution followed by BatchNorm.

    61,750 parameters at 1 x 28 x 28 (padded to 32 x 32, as there), 62,050 at 3 x 32 x 32: LeNet-5's, and 44 of norms.
    """

    def __init__(self, *, num_classes: int, input_shape: Sequence[int]) -> None:
        channels, height, width = input_shape
        padding = 2 if min(height, width) < 32 else 0
        rows, columns = (((side + 2 * padding - 4) // 2 - 4) // 2 for side in (height, width))
        super().__init__(
            nn.Conv2d(channels, 6, 5, padding=padding), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(16 * rows * columns, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, num_classes),
        )  # fmt: skip
