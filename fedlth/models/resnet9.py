"""ResNet-9 (Page, How to train your ResNet, 2018; the DAWNBench form), with GroupNorm for non-IID clients."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from fedlth.errors import wrong
from fedlth.models.shape import image_shape

GROUPS = 32


class ResNet9(nn.Module):
    """Four padded 3 x 3 convolutions (64, 128, 256, 512) and two residual blocks, then a global max pool.

    norm: `group` (32 groups; Hsieh et al., ICML 2020, arXiv 1910.00189, say why) or `batch`, whose buffers a method
    must have a policy for. 6,573,130 parameters at 3 channels and 10 classes, either way.
    """

    def __init__(self, *, num_classes: int, input_shape: tuple[int, ...], norm: str = "group") -> None:
        super().__init__()
        if norm not in ("group", "batch"):
            raise wrong("model.options.norm", "group or batch", norm)
        channels, _, _ = image_shape("resnet9", input_shape, least=8)
        self.stem = _convolution(channels, 64, norm)
        self.down1 = _convolution(64, 128, norm)
        self.residual1 = nn.Sequential(_convolution(128, 128, norm), _convolution(128, 128, norm))
        self.down2 = _convolution(128, 256, norm)
        self.down3 = _convolution(256, 512, norm)
        self.residual2 = nn.Sequential(_convolution(512, 512, norm), _convolution(512, 512, norm))
        self.head = nn.Linear(512, num_classes)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(self.down1(self.stem(x_BCHW)), 2)
        x = x + self.residual1(x)
        x = F.max_pool2d(self.down2(x), 2)
        x = F.max_pool2d(self.down3(x), 2)
        x = x + self.residual2(x)
        logits: torch.Tensor = self.head(x.amax((2, 3)))
        return logits


def _convolution(inputs: int, outputs: int, norm: str) -> nn.Sequential:
    layer = nn.GroupNorm(GROUPS, outputs) if norm == "group" else nn.BatchNorm2d(outputs)
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), layer, nn.ReLU())
