"""The CNN of FedAvg (McMahan et al., AISTATS 2017, arXiv 1602.05629) and LEAF (Caldas et al., arXiv 1812.01097)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from fedlth.models.shape import image_shape


class LeafCnn(nn.Module):
    """Two padded 5 x 5 convolutions (32, 64) with max pooling, then 512 and the classes.

    1,663,370 parameters at 1 x 28 x 28 with 10 classes.
    """

    def __init__(self, *, num_classes: int, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        channels, height, width = image_shape("leaf_cnn", input_shape, least=4)
        self.conv1 = nn.Conv2d(channels, 32, 5, padding=2)
        self.conv2 = nn.Conv2d(32, 64, 5, padding=2)
        self.fc1 = nn.Linear(64 * (height // 4) * (width // 4), 512)
        self.fc2 = nn.Linear(512, num_classes)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x_BCHW)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        logits: torch.Tensor = self.fc2(F.relu(self.fc1(x.flatten(1))))
        return logits
