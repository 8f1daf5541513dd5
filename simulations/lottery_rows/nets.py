"""A small convolutional network with BatchNorm, whose channels Early-Bird can rank: a user's own model."""

from __future__ import annotations

import torch
from torch import nn


class SlimNet(nn.Module):
    """Three 3 x 3 convolutions (16, 32, 32) with BatchNorm and ReLU, pooled twice, then a linear head."""

    def __init__(self, num_classes: int, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        widths = (input_shape[0], 16, 32, 32)
        layers: list[nn.Module] = []
        for place, (before, after) in enumerate(zip(widths, widths[1:], strict=False)):
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if place < 2 else []
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x).mean((2, 3)))
