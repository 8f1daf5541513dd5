"""Conv-2 and Conv-4 (Frankle, Carbin, The Lottery Ticket Hypothesis, ICLR 2019, arXiv 1803.03635, figure 2)."""

from __future__ import annotations

from torch import nn

from fedlth.models.shape import image_shape


def conv2(*, num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """Conv-2: one block of 64 filters; 4,301,642 parameters at 3 x 32 x 32 and 10 classes."""
    return _conv_k("conv2", (64,), num_classes, input_shape)


def conv4(*, num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """Conv-4: blocks of 64 and 128 filters; 2,425,930 parameters at 3 x 32 x 32 and 10 classes."""
    return _conv_k("conv4", (64, 128), num_classes, input_shape)


def _conv_k(model: str, blocks: tuple[int, ...], num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """Blocks of two padded 3 x 3 convolutions and a max pool, then 256, 256 and the classes."""
    channels, height, width = image_shape(model, input_shape, least=2 ** len(blocks))
    layers: list[nn.Module] = []
    for filters in blocks:
        layers += [nn.Conv2d(channels, filters, 3, padding=1), nn.ReLU()]
        layers += [nn.Conv2d(filters, filters, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        channels, height, width = filters, height // 2, width // 2
    layers += [nn.Flatten(), nn.Linear(channels * height * width, 256), nn.ReLU()]
    layers += [nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, num_classes)]
    return nn.Sequential(*layers)
