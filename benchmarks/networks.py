"""Networks that a user might bring, and data of their shapes: what benchmarks/auto.py holds `compute: auto` against."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def data(*, shape: tuple[int, ...], clients: int, each: int, tokens: int = 0) -> dict[str, Any]:
    """Return `each` random examples a client, (N, *shape): float32, or tokens below `tokens`; ten classes."""
    rng = np.random.default_rng(0)
    size = clients * each
    drawn = rng.integers(0, tokens, (size, *shape)) if tokens else rng.normal(size=(size, *shape)).astype(np.float32)
    key, labels = np.repeat(np.arange(clients), each), rng.integers(0, 10, size)
    return {
        "x_train": drawn, "y_train": labels, "x_test": drawn, "y_test": labels, "num_classes": 10,
        "key_train": key, "key_test": key,
    }  # fmt: skip


def vgg(*, num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """Two convolutions a stage, three stages, each with a GroupNorm."""
    parts: list[nn.Module] = []
    before = input_shape[0]
    for width in (32, 64, 128):
        for _ in range(2):
            parts += [nn.Conv2d(before, width, 3, padding=1), nn.GroupNorm(8, width), nn.ReLU()]
            before = width
        parts.append(nn.MaxPool2d(2))
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(128 * (input_shape[1] // 8) ** 2, num_classes))


def mobile(*, num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """Depthwise and pointwise convolutions in turn."""
    parts: list[nn.Module] = [nn.Conv2d(input_shape[0], 32, 3, stride=2, padding=1), nn.ReLU()]
    for before, width in ((32, 64), (64, 64), (64, 128)):
        parts += [nn.Conv2d(before, before, 3, padding=1, groups=before), nn.ReLU()]
        parts += [nn.Conv2d(before, width, 1), nn.GroupNorm(8, width), nn.ReLU()]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, num_classes))


def batch_norm(*, num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """What the kernel does not take: BatchNorm and dropout."""
    parts: list[nn.Module] = []
    before = input_shape[0]
    for width in (32, 64):
        parts += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
        before = width
    side = input_shape[1] // 4
    return nn.Sequential(*parts, nn.Flatten(), nn.Dropout(0.2), nn.Linear(64 * side * side, num_classes))


def wide(*, num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """Linear layers alone, wider than a cache."""
    size = int(np.prod(input_shape))
    return nn.Sequential(
        nn.Flatten(), nn.Linear(size, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, num_classes)
    )


class Encoder(nn.Module):
    """A transformer encoder of two layers over tokens, their mean, a head."""

    def __init__(self, *, num_classes: int, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.embed = nn.Embedding(1000, 64)
        self.place = nn.Parameter(torch.zeros(input_shape[0], 64))
        layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(self.embed(x) + self.place).mean(1))
        return logits


class Recurrent(nn.Module):
    """An LSTM over tokens; the last state decides."""

    def __init__(self, *, num_classes: int, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(1000, 32), nn.LSTM(32, 128, batch_first=True)
        self.head = nn.Linear(128, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.lstm(self.embed(x))[0][:, -1])
        return logits


class Block(nn.Module):
    """Two convolutions with BatchNorm and a way around them, which is a convolution where the maps change."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, width, 3, stride=stride, padding=1, bias=False)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2))
        around = (nn.Conv2d(before, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width))
        self.around = nn.Sequential(*(() if before == width else around))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](self.first(x)).relu()
        return (self.norms[1](self.second(y)) + self.around(x)).relu()


class Residual(nn.Module):
    """A ResNet for small images: three stages of two blocks, their mean, a head."""

    def __init__(self, *, num_classes: int, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(input_shape[0], 32, 3, padding=1, bias=False), nn.BatchNorm2d(32))
        widths = (32, 32, 32, 64, 64, 128, 128)
        strides = (1, 1, 2, 1, 2, 1)
        pairs = zip(widths, widths[1:], strides, strict=False)
        self.blocks = nn.Sequential(*(Block(before, width, stride) for before, width, stride in pairs))
        self.head = nn.Linear(128, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.stem(x).relu()).mean((2, 3)))
        return logits
