"""LeNet-5 in the form that pruning papers use (LeCun, Bottou, Bengio, Haffner, Proc. IEEE 1998)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from fedlth.models.shape import image_shape


class LeNet5(nn.Module):
    """Two 5 x 5 convolutions (6, 16) with max pooling, then 120, 84 and the classes.

    61,706 parameters at 1 x 28 x 28 (padded to 32 x 32), 62,006 at 3 x 32 x 32, both with 10 classes.
    """

    def __init__(self, *, num_classes: int, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        channels, height, width = image_shape("lenet5", input_shape, least=12)
        padding = 2 if min(height, width) < 32 else 0
        self.conv1 = nn.Conv2d(channels, 6, 5, padding=padding)
        self.conv2 = nn.Conv2d(6, 16, 5)
        after = [((size + 2 * padding - 4) // 2 - 4) // 2 for size in (height, width)]
        self.fc1 = nn.Linear(16 * after[0] * after[1], 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x_BCHW)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        logits: torch.Tensor = self.fc3(F.relu(self.fc2(x)))
        return logits
