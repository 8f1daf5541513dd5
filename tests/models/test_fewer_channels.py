"""The network that is left without channels that are pruned as a whole computes what the masked one does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedlth.models.channels import Unsliceable
from fedlth.models.fewer_channels import Chosen, Fit, cut, fit
from fedlth.models.layout import layout_of
from fedlth.models.needed_channels import needed
from fedlth.models.prunable import prunable_names
from fedlth.models.registry import build
from fedlth.tickets.granularity import GRANULARITIES
from tests.models.test_channels import Normed, scattered


class Residual(nn.Module):
    """Batch norms with running statistics, a shortcut that is a convolution, constants on both sides of an addition."""

    def __init__(self, wide: int = 16) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, wide, 3, padding=1), nn.BatchNorm2d(wide)
        self.up, self.again = nn.Conv2d(wide, 2 * wide, 3, padding=1, bias=False), nn.BatchNorm2d(2 * wide)
        self.down, self.short = nn.Conv2d(2 * wide, wide, 3), nn.Conv2d(wide, wide, 3)
        self.head = nn.Linear(wide * 9, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.down(F.relu(self.again(self.up(x)))) + self.short(x))
        return self.head(F.max_pool2d(x, 2).flatten(1))


class Twice(nn.Module):
    """A layer that is used twice, and an average with a rim of zeros: neither can have a constant folded in."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pool = nn.Conv2d(3, 8, 3), nn.AvgPool2d(3, 1, padding=1)
        self.mid, self.act, self.head = nn.Conv2d(8, 8, 1), nn.SiLU(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.act(self.stem(x)))
        return self.head(self.mid(self.act(self.mid(x))).mean((2, 3)))


def registered(name: str, shape: tuple[int, ...], **options: Any) -> Callable[[], nn.Module]:
    return lambda: build(name, num_classes=6, input_shape=shape, options=options)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (registered("mlp", (1, 8, 8), hidden=[20, 12]), (1, 8, 8)),
    "lenet5": (registered("lenet5", (1, 16, 16)), (1, 16, 16)),
    "conv4": (registered("conv4", (3, 4, 4)), (3, 4, 4)),  # a rim of zeros before every layer
    "group norms": (lambda: Normed(8), (3, 8, 8)),
    "batch norms": (Residual, (3, 8, 8)),
    "resnet9": (registered("resnet9", (3, 8, 8)), (3, 8, 8)),
    "resnet9, batch norms": (registered("resnet9", (3, 8, 8), norm="batch"), (3, 8, 8)),
    "used twice": (Twice, (3, 8, 8)),
}


LEFT_OUT = {("resnet9", "channel"), ("resnet9, batch norms", "row")}  # a second each


def masked(module: nn.Module, granularity: str, density: float = 0.4, patterns: tuple[str, ...] | None = None) -> Any:
    """Prune whole rows, or columns, at random, but none of the outputs; return the layout."""
    layout = layout_of(module, prunable_names(module, patterns))
    groups = GRANULARITIES[granularity]().groups(layout)
    draw = np.random.default_rng(0).random(groups.layout.num_prunable) < density
    last = layout.head[0].name.rpartition(".")[0]
    with torch.no_grad():
        for e in layout.prunable:
            if granularity == "channel" or not e.name.startswith(last):
                module.get_parameter(e.name).mul_(torch.from_numpy(groups.spread(draw)[e.slice].reshape(e.shape)))
    return layout


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape = CASES[name]
    net = scattered(make()).eval()
    with torch.no_grad():
        for parameter, tensor in net.named_parameters():
            if parameter.endswith("bias"):
                tensor.sub_(0.1)  # of both signs: behind a ReLU some constants are zero
    return net, torch.randn(8, *shape)


def count(module: nn.Module) -> int:
    return sum(tensor.numel() for tensor in module.parameters())


@torch.no_grad()
def differ(one: nn.Module, other: nn.Module, x: Tensor) -> float:
    wanted = one(x)
    return float((other(x) - wanted).abs().max() / wanted.abs().max().clamp(min=1))


@pytest.mark.parametrize(
    ("name", "granularity"),
    [(name, kind) for name in CASES for kind in ("row", "channel") if (name, kind) not in LEFT_OUT],
)
def test_the_smaller_network_computes_what_the_masked_one_does(name: str, granularity: str) -> None:
    net, x = made(name)
    layout = masked(net, granularity)
    before = copy.deepcopy(net.state_dict())
    small, fits = cut(net, needed(copy.deepcopy(net), layout, x[:2]))
    assert differ(net, small, x) <= 3e-6
    assert count(small) < 0.9 * count(net)
    assert all(tensor.equal(before[key]) for key, tensor in net.state_dict().items()), "the ticket itself stays"
    again = CASES[name][0]()
    fit(again, fits, small.state_dict())
    assert differ(small, again.eval(), x) == 0
    assert [type(part) for part in again.modules()] == [type(part) for part in small.modules()]


def test_what_is_pruned_entirely_is_gone() -> None:
    """Rows of both sides of an addition, with what norms add: masks over everything, as methods of sub-models make."""
    net, x = made("batch norms")
    layout = layout_of(net, prunable_names(net, ("*",)))
    with torch.no_grad():
        for name, tensor in net.named_parameters():
            if name.partition(".")[0] in ("stem", "norm", "down", "short"):
                tensor[5:] = 0
    small, fits = cut(net, needed(copy.deepcopy(net), layout, x[:2]))
    assert differ(net, small, x) <= 3e-6
    outputs = {name: own.outputs for name, own in fits.items()}
    assert outputs == {"stem": 5, "norm": 5, "up": 32, "again": 32, "down": 5, "short": 5, "head": 7}
    assert (fits["head"].inputs, fits["up"].inputs) == (5 * 9, 5)
    assert small.get_submodule("norm").num_features == 5 and len(small.get_buffer("norm.running_mean")) == 5


def test_channels_of_a_group_norm_go_in_whole_groups() -> None:
    net, x = made("group norms")
    layout = layout_of(net, prunable_names(net, ("*",)))
    with torch.no_grad():
        for name, tensor in net.named_parameters():  # groups of 2; channel 4 goes alone and must stay
            if not name.startswith(("head", "flat")):
                tensor[[4, 6, 7]] = 0
    small, fits = cut(net, needed(copy.deepcopy(net), layout, x[:2]))
    assert differ(net, small, x) <= 3e-6
    assert fits["groups"] == Fit(6, 8, groups=3) and fits["deep"] == Fit(6, 8)


def test_constants_behind_a_rim_of_zeros_are_one_channel() -> None:
    net = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 2, 3, padding=1), nn.Flatten())
    net.append(nn.Linear(2 * 16, 3))
    with torch.no_grad():
        net[0].weight[1:] = 0
        net[0].bias.copy_(torch.tensor([0.1, 0.2, 0.5, 0.3, -0.4, 0.1]))
    layout = layout_of(net, prunable_names(net, None))
    small, fits = cut(net, needed(copy.deepcopy(net), layout, torch.randn(2, 1, 4, 4)))
    assert differ(net, small, torch.randn(5, 1, 4, 4)) <= 1e-6
    # The one that is computed, and the largest constant for four; the negative one is nothing behind the ReLU.
    assert fits["2"].inputs == 2 and small[0].layer.out_channels == 1
    plain = copy.deepcopy(net)
    plain[2].padding_mode = "circular"  # without a rim of zeros they are a bias
    small, fits = cut(plain, needed(copy.deepcopy(plain), layout, torch.randn(2, 1, 4, 4)))
    assert differ(plain, small, torch.randn(5, 1, 4, 4)) <= 1e-6 and fits["2"].inputs == 1


def test_a_sparse_ticket_without_whole_channels_stays_as_it_is() -> None:
    net, x = made("conv4")
    layout = layout_of(net, prunable_names(net, None))
    dice = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for e in layout.prunable:
            if e.name != "15.weight":  # of so few outputs some input would be read by none
                net.get_parameter(e.name).mul_(torch.rand(e.shape, generator=dice) < 0.5)
    small, _ = cut(net, needed(copy.deepcopy(net), layout, x[:2]))
    assert count(small) == count(net) and not any(isinstance(part, Chosen) for part in small.modules())
    assert differ(net, small, x) == 0


class Written(nn.Module):
    """A forward that has a number of channels written out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4 * 36, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).view(-1, 144))


def test_a_size_that_the_forward_has_written_out_keeps_its_channels() -> None:
    net, x = Written().eval(), torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        net.conv.weight[:2] = 0
    small, fits = cut(net, needed(copy.deepcopy(net), layout_of(net, prunable_names(net, None)), x))
    assert differ(net, small, x) <= 1e-6 and fits["head"].inputs == 144


def test_what_cannot_be_followed_is_refused_with_the_layer() -> None:
    net = build("char_lstm", num_classes=6, input_shape=(4,), options={"hidden": 4})
    with pytest.raises(Unsliceable, match="layer lstm is a LSTM"):
        needed(net, layout_of(net, prunable_names(net, None)), torch.zeros(2, 4, dtype=torch.int64))


def test_tensors_that_do_not_fit_are_refused() -> None:
    net = build("mlp", num_classes=3, input_shape=(4,), options={})
    state = dict(net.state_dict())
    with pytest.raises(ValueError, match="no layer has the tensor 9.weight"):
        fit(copy.deepcopy(net), {}, {**state, "9.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="no tensor 1.bias"):
        fit(copy.deepcopy(net), {}, {name: tensor for name, tensor in state.items() if name != "1.bias"})


class TwiceOverConstants(nn.Module):
    """A layer that is used twice, on channels that are constant; `rim`: what reads it sees zeros around them."""

    def __init__(self, *, rim: bool) -> None:
        super().__init__()
        self.stem, self.mid = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.each: Any = nn.Conv2d(4, 4, 3, padding=1, groups=4) if rim else nn.Identity()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(F.silu(self.mid(self.stem(x))))
        return self.head(self.each(x).mean((2, 3)))


@pytest.mark.parametrize("rim", [False, True])
def test_constants_of_a_layer_that_is_used_twice_are_computed(rim: bool) -> None:
    """Found by random networks: its inputs went, as constants that nobody read, and no bias had them."""
    torch.manual_seed(0)
    module = TwiceOverConstants(rim=rim).eval()
    with torch.no_grad():
        module.stem.weight.zero_()
        if rim:
            module.each.weight[3] = 0  # nobody but the layer itself reads that channel
    x = torch.randn(5, 3, 6, 6)
    made, _ = cut(module, needed(module, layout_of(module, prunable_names(module, None)), x))
    with torch.inference_mode():
        torch.testing.assert_close(made(x), module(x), rtol=1e-5, atol=1e-6)
