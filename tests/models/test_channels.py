"""A sub-model of the first channels, as a mask, computes exactly what a really smaller network does."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedlth.errors import StudyError
from fedlth.models.channels import Channels, Group, channels_of
from fedlth.models.layout import Layout, layout_of, read
from fedlth.models.lenet5 import LeNet5
from fedlth.models.prunable import prunable_names
from fedlth.models.resnet9 import ResNet9
from tests import tiny


def of(module: nn.Module, x: Tensor) -> tuple[Layout, Channels]:
    layout = layout_of(module, prunable_names(module, ("*",)))
    return layout, channels_of("it", copy.deepcopy(module), layout, x)


def scattered(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every tensor values that are not alike, norms and statistics too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.add_(0.3 * torch.rand(tensor.shape, generator=generator))
    return module


def loaded(module: nn.Module, layout: Layout, floats: np.ndarray) -> nn.Module:
    named = dict(module.named_parameters())
    with torch.no_grad():
        for e in layout.floats:
            if e.role == "param":
                named[e.name].copy_(torch.from_numpy(floats[e.slice].reshape(e.shape)))
    return module


def small_lenet() -> nn.Module:
    """LeNet-5 of 3, 8, 60 and 42 in place of 6, 16, 120 and 84, at 1 x 28 x 28."""
    net = LeNet5(num_classes=10, input_shape=(1, 28, 28))
    net.conv1, net.conv2 = nn.Conv2d(1, 3, 5, padding=2), nn.Conv2d(3, 8, 5)
    net.fc1, net.fc2, net.fc3 = nn.Linear(8 * 25, 60), nn.Linear(60, 42), nn.Linear(42, 10)
    return net


class Normed(nn.Module):
    """A convolution with a BatchNorm, a depthwise one, a residual addition, a GroupNorm of groups of 2."""

    def __init__(self, width: int, classes: int = 5) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.deep = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.body, self.groups = nn.Conv2d(width, width, 1, bias=False), nn.GroupNorm(width // 2, width)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, width, 1), nn.Sigmoid())
        self.flat = nn.BatchNorm1d(width * 16)
        self.head = nn.Linear(width * 16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + F.relu(self.groups(self.body(self.deep(x))))
        x = F.max_pool2d(x * self.gate(x), 2)
        return self.head(self.flat(x.view(x.size(0), -1)))


def small_resnet() -> nn.Module:
    """ResNet-9 of a quarter of the channels, in groups of the same size."""
    net = ResNet9(num_classes=10, input_shape=(3, 8, 8))

    def block(inputs: int, outputs: int, wide: int) -> nn.Module:
        norm = nn.GroupNorm(outputs // (wide // 32), outputs)
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), norm, nn.ReLU())

    net.stem, net.down1 = block(3, 16, 64), block(16, 32, 128)
    net.residual1 = nn.Sequential(block(32, 32, 128), block(32, 32, 128))
    net.down2, net.down3 = block(32, 64, 256), block(64, 128, 512)
    net.residual2 = nn.Sequential(block(128, 128, 512), block(128, 128, 512))
    net.head = nn.Linear(128, 10)
    return net


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], float, tuple[int, ...]]] = {
    "lenet5": (lambda: LeNet5(num_classes=10, input_shape=(1, 28, 28)), small_lenet, 0.5, (1, 28, 28)),
    "norms": (lambda: Normed(8), lambda: Normed(4), 0.4, (3, 8, 8)),  # 3.2 channels are 4: two groups of 2
    "resnet9": (lambda: ResNet9(num_classes=10, input_shape=(3, 8, 8)), small_resnet, 0.25, (3, 8, 8)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_mask_computes_what_the_smaller_network_does(name: str) -> None:
    make, make_small, width, shape = CASES[name]
    torch.manual_seed(0)
    net, small, x = scattered(make()), make_small(), torch.randn(4, *shape)
    layout, channels = of(net, x)
    mask = channels.prefix(layout, width)
    floats = read(net, layout).masked(mask).floats
    ours = dict(small.named_parameters())
    with torch.no_grad():
        for e in layout.prunable:
            kept = floats[e.slice][mask[e.slice]]
            assert kept.size == ours[e.name].numel(), e.name
            ours[e.name].copy_(torch.from_numpy(kept).view(ours[e.name].shape))
        for (_, there), (_, wide) in zip(small.named_buffers(), net.named_buffers(), strict=True):
            there.copy_(wide[: there.numel()] if wide.dim() else wide)
        wide_net = loaded(net, layout, floats).eval()
        found, wanted = wide_net(x), small.eval()(x)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max()))
    assert int(mask.sum()) == sum(p.numel() for p in small.parameters())


@pytest.mark.parametrize("name", CASES)
def test_nothing_reads_a_channel_that_is_not_kept(name: str) -> None:
    """Whatever dead channels hold, alive ones do not see it: the mask is closed."""
    make, _, width, shape = CASES[name]
    torch.manual_seed(0)
    net, x = scattered(make()), torch.randn(3, *shape)
    layout, channels = of(net, x)
    mask = channels.prefix(layout, width)
    noise = np.random.default_rng(0).normal(size=layout.num_prunable).astype(np.float32)
    rows = np.ones(layout.num_prunable, bool)  # what makes dead channels, from alive ones
    for e in layout.prunable:
        here = mask[e.slice].reshape(e.shape[0], -1)
        rows[e.slice] = np.repeat(here.any(1), here.shape[1])
    floats = read(net, layout).masked(mask).floats
    with torch.no_grad():
        wanted = loaded(net, layout, floats).eval()(x)
        loud = floats.copy()
        loud[: noise.size] += np.where(rows, 0, noise)
        found = loaded(net, layout, loud)(x)
    assert (loud != floats).any()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_masks_are_nested_and_of_all_at_width_1() -> None:
    layout, channels = of(Normed(8), torch.zeros(2, 3, 8, 8))
    masks = [channels.prefix(layout, width) for width in (0.1, 0.25, 0.5, 0.75, 1.0)]
    assert masks[-1].all()
    for narrow, wide in zip(masks, masks[1:], strict=False):
        assert not (narrow & ~wide).any() and narrow.any()


def test_a_width_is_the_ceiling_in_whole_groups() -> None:
    assert [Group(10).kept(w) for w in (0.01, 0.25, 0.3, 0.31, 1.0)] == [1, 3, 3, 4, 10]
    assert [Group(12, step=4).kept(w) for w in (0.01, 0.34, 0.5, 1.0)] == [4, 8, 8, 12]
    assert Group(10, whole=True).kept(0.1) == 10


def test_rows_of_classes_are_of_the_last_layer_alone() -> None:
    net = tiny.Small(4)
    layout, channels = of(net, torch.zeros(2, 1, 8, 8))
    mask = channels.rows(layout, (0, 2))
    for e in layout.prunable:
        here = mask[e.slice].reshape(e.shape)
        assert here[[0, 2]].all() and (here.all() if not e.name.startswith("head") else not here[[1, 3]].any())
    assert channels.sliced == ("conv.bias", "conv.weight")


class Odd(nn.Module):
    """A convolution, something between, a head."""

    def __init__(self, between: Callable[[Tensor], Tensor], part: nn.Module | None = None, after: int = 8) -> None:
        super().__init__()
        self.conv, self.part, self.between = nn.Conv2d(3, 8, 3, padding=1), part or nn.Identity(), between
        self.head = nn.Linear(after, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(self.part(self.conv(x))))


def mean(x: Tensor) -> Tensor:
    return x.mean((2, 3))


ODD: list[tuple[nn.Module, str]] = [
    (Odd(mean, nn.GroupNorm(1, 8)), "layer part mixes all channels of its input"),
    (Odd(mean, nn.LayerNorm((8, 4, 4))), "layer part mixes all channels of its input"),
    (Odd(mean, nn.Conv2d(8, 8, 3, padding=1, groups=2)), "layer part has 2 groups of channels"),
    (Odd(mean, nn.PixelShuffle(2), 2), "layer part is a PixelShuffle"),
    (Odd(lambda x: x.mean((1, 2)), after=4), "the step mean mixes all channels"),
    (Odd(lambda x: torch.cat((x, x), 1).mean((2, 3)), after=16), r"the step cat \(cat\) is not known"),
    (Odd(lambda x: x.reshape(x.size(0), 4, -1).mean(2), after=4), "the step reshape reshapes"),
    (Odd(lambda x: x.mean((2, 3)) if bool(x.sum() > 0) else x), "torch.fx cannot trace it"),
    (nn.Sequential(nn.Conv2d(3, 8, 4)), "its outputs are no scores of classes"),
]


@pytest.mark.parametrize(("net", "says"), ODD, ids=[says[:24] for _, says in ODD])
def test_a_model_that_cannot_be_sliced_is_refused_with_the_layer(net: nn.Module, says: str) -> None:
    with pytest.raises(StudyError, match=f"^model: it cannot be sliced by width: {says}") as caught:
        of(net, torch.zeros(2, 3, 4, 4))
    assert "\n" not in str(caught.value)


def test_shared_weights_join_the_channels_of_both_uses() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.again, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.again(self.again(self.first(x))))

    layout, channels = of(Twice(), torch.zeros(2, 6))
    kept = {e.name: int(channels.prefix(layout, 0.5)[e.slice].sum()) for e in layout.prunable}
    assert kept["again.weight"] == 9 and kept["first.weight"] == 18 and kept["head.weight"] == 9
