"""Fully connected networks: LeNet-300-100 and one of any widths."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from fedlth.errors import wrong


def lenet300(*, num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """LeNet-300-100 (LeCun, Bottou, Bengio, Haffner, Proc. IEEE 1998): 266,610 parameters at 28 x 28 and 10 classes."""
    return mlp(num_classes=num_classes, input_shape=input_shape, hidden=(300, 100))


def mlp(*, num_classes: int, input_shape: tuple[int, ...], hidden: Sequence[int] = (32,)) -> nn.Module:
    """Flatten, then linear layers of the widths `hidden` with ReLU between; () is logistic regression."""
    is_list = isinstance(hidden, Sequence) and not isinstance(hidden, str)
    if not is_list or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in hidden):
        raise wrong("model.options.hidden", "a list of integers of at least 1", hidden)
    widths = [math.prod(input_shape), *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], num_classes))
