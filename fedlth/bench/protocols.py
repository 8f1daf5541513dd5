"""What published protocols need beside the package: their networks, and Fashion-MNIST in their normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from fedlth.data.dataset import Dataset
from fedlth.data.idx import fashion_mnist as plain


class Cnn(nn.Module):
    """Two 5 x 5 convolutions without padding, each with ReLU and 2 x 2 max pooling, a hidden layer, and the classes."""

    def __init__(self, *, num_classes: int, input_shape: Sequence[int], widths: Sequence[int], hidden: int) -> None:
        super().__init__()
        channels, height, width = input_shape
        first, second = widths
        self.conv1 = nn.Conv2d(channels, first, 5)
        self.conv2 = nn.Conv2d(first, second, 5)
        rows, columns = (((side - 4) // 2 - 4) // 2 for side in (height, width))
        self.fc1 = nn.Linear(second * rows * columns, hidden)
        self.fc2 = nn.Linear(hidden, num_classes)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x_BCHW)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        logits: torch.Tensor = self.fc2(F.relu(self.fc1(x.flatten(1))))
        return logits


def fashion_mnist(root: str | None, mean: float, std: float) -> Dataset:
    """Return Fashion-MNIST, normalised with a table's own constants."""
    return replace(plain(root), mean=(mean,), std=(std,))
