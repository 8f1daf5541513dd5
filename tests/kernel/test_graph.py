"""Modules become layer tables, or a line that says why not."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedlth.kernel.columns import CONVOLUTION, LINEAR, MAX_POOL
from fedlth.kernel.graph import compile_layers
from fedlth.kernel.table import LayerTable
from fedlth.models.layout import layout_of
from fedlth.models.prunable import prunable_names
from fedlth.models.registry import build


def compiled(module: nn.Module, shape: tuple[int, ...]) -> LayerTable | str:
    return compile_layers(module, layout_of(module, prunable_names(module, None)), shape)


@pytest.mark.parametrize("name", ["lenet5", "leaf_cnn", "conv2", "mlp"])
def test_built_in_models_run_in_the_kernel(name: str) -> None:
    table = compiled(build(name, num_classes=10, input_shape=(1, 28, 28), options={}), (1, 28, 28))
    assert isinstance(table, LayerTable)
    assert table.num_classes == 10
    assert len(table.describe()) == len(table.ops)


def test_relu_moves_behind_the_max_pool() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(18, 2))
    table = compiled(module, (1, 8, 8))
    assert isinstance(table, LayerTable)
    assert [(op.kind, op.relu) for op in table.ops] == [(CONVOLUTION, False), (MAX_POOL, True), (LINEAR, False)]


class _Twice(nn.Module):
    """A value that is changed in place and read again."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        return F.relu(y, inplace=True) + y


class _Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.a(x)
        return y if y.sum() > 0 else -y


def _hooked() -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 2))
    module[0].register_forward_hook(lambda *_: None)
    return module


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2)), "Dropout"),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), "BatchNorm1d"),
        (nn.Sequential(nn.Linear(4, 4), nn.Sigmoid()), "Sigmoid"),
        (nn.Sequential(nn.Linear(5, 2)), "wants"),
        (_Twice(), "in place"),
        (_Branch(), "control flow"),
        (_hooked(), "hooks"),
    ],
)
def test_unsupported_modules_say_why(module: nn.Module, reason: str) -> None:
    answer = compiled(module, (4,))
    assert isinstance(answer, str) and reason in answer and "\n" not in answer


class Odd(nn.Module):
    """Forwards that a trace sees otherwise than they run; `way` picks one."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(1, 4, 3, padding=1)
        self.same, self.pool, self.head = nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Linear(4 * 36, 4)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        if self.way == "identity":
            other = self.same(h)
            other += self.b(x)
            h = other + h
        elif self.way == "view":
            return self.head(h.flatten(1).relu_()) + self.pool(h).flatten(1)
        elif self.way == "input":
            F.relu(x.flatten(1), inplace=True)
            h = self.a(x)
        elif self.way == "counter" and self.training:
            self.seen += 1
        elif self.way == "no_grad":
            with torch.no_grad():
                h = F.relu(self.b(x))
        elif self.way == "dice" and random.random() < 0.5:
            h = h + self.b(x)
        logits: torch.Tensor = self.head(h.flatten(1))
        return F.relu(logits) if self.way == "mode" and not self.training else logits


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("identity", "not the same function"),  # torch.fx takes += for +
        ("view", "in place"),
        ("input", "in place"),
        ("counter", "changes a buffer"),
        ("mode", "not the same function"),
        ("no_grad", "not the same function"),
    ],
)
def test_a_forward_that_a_trace_would_freeze_is_refused_and_left_as_it_was(way: str, reason: str) -> None:
    module = Odd(way).eval()
    answer = compiled(module, (1, 6, 6))
    assert isinstance(answer, str) and reason in answer
    assert int(module.seen) == 0 and not module.training and not module.a.training


def test_a_forward_that_throws_dice_is_refused_nearly_always() -> None:
    random.seed(0)
    answers = [compiled(Odd("dice"), (1, 6, 6)) for _ in range(30)]
    assert sum(isinstance(answer, str) for answer in answers) >= 24  # it escapes where five throws fall alike


def test_a_hook_on_a_parameter_is_refused() -> None:
    module = Odd("plain")
    module.a.weight.register_hook(lambda gradient: 2 * gradient)
    assert compiled(module, (1, 6, 6)) == "a parameter has hooks"


def test_a_plain_forward_of_the_same_class_is_taken() -> None:
    assert isinstance(compiled(Odd("plain"), (1, 6, 6)), LayerTable)


def test_maps_beyond_all_bounds_are_a_reason_not_a_crash() -> None:
    module = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1),
                           nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 2))  # fmt: skip
    answer = compiled(module, (3, 512, 512))
    assert isinstance(answer, str) and "must fit" in answer


def test_control_flow_and_other_layers_say_why() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3, dilation=2), nn.Flatten(), nn.Linear(32, 2))
    answer = compiled(module, (1, 8, 8))
    assert isinstance(answer, str) and "dilation" in answer
    lstm = build("char_lstm", num_classes=10, input_shape=(20,), options={})
    assert isinstance(compiled(lstm, (20,)), str)
