"""Convolutions of a torch module that go over their kept weights alone while it trains inside a ticket."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedlth.data.examples import Examples
from fedlth.kernel.kept_matrix import Scratch
from fedlth.models.layout import layout_of, read
from fedlth.models.prunable import prunable_names
from fedlth.rng import stream
from fedlth.training import torch_backend
from fedlth.training.budget import Budget
from fedlth.training.flat_model import FlatModel
from fedlth.training.kept_forward import KeptForward, form_of, kept_forward
from fedlth.training.kept_layers import exchangeable, exchanged
from fedlth.training.optimizer import AdamW, Optimizer, Sgd
from fedlth.training.recipe import TrainingRecipe
from fedlth.training.request import TrainingResult, drawn_request
from fedlth.training.tuned import tune
from fedlth.training.view import IDENTITY, View, elementwise

# examples, inputs, outputs, size, and the options of the layer: a whole panel and parts of one, rims, gaps, groups
LAYERS: list[tuple[int, int, int, tuple[int, int], dict[str, Any]]] = [
    (1, 1, 1, (1, 1), {"kernel_size": 1}),
    (5, 3, 4, (7, 6), {"kernel_size": 3, "padding": 1}),
    (33, 4, 6, (8, 8), {"kernel_size": 3, "padding": 1, "stride": 2, "groups": 2}),
    (20, 8, 8, (9, 7), {"kernel_size": (3, 2), "stride": (2, 3), "padding": (0, 1), "dilation": (2, 1), "groups": 4}),
    (16, 16, 40, (4, 4), {"kernel_size": 1}),
    (4, 2, 3, (4, 4), {"kernel_size": 5, "padding": 6}),  # wider than the window
    (17, 3, 5, (6, 8), {"kernel_size": (3, 1), "padding": "same"}),
    (3, 6, 6, (10, 11), {"kernel_size": 1, "stride": 2, "groups": 6, "padding": "valid"}),
    (2, 40, 33, (9, 9), {"kernel_size": 3, "dilation": 2, "padding": 2}),
]
LAST = torch.channels_last
ADAM = AdamW(eps=1e-3)  # a bias before a BatchNorm has a gradient of rounding alone, which a small eps blows up


def wanted(layer: nn.Conv2d, x: Tensor, slope: Tensor, kept: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return a dense layer's output and gradients, of the weights that are kept, at a precision."""
    exact = nn.Conv2d(**options(layer)).to(dtype)
    exact.load_state_dict(layer.state_dict())
    x = x.detach().to(dtype).requires_grad_()
    y = exact(x)
    y.backward(slope.to(dtype))
    return [y.detach(), x.grad, exact.weight.grad * kept, exact.bias.grad]


def options(layer: nn.Conv2d) -> dict[str, Any]:
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
    return {name: getattr(layer, name) for name in names}


def gradient(kept: KeptForward) -> Tensor:
    """Return the gradient that a layer has left of its kept weights, as its weights."""
    weight = kept.layer.weight
    assert weight.grad is None
    found = torch.zeros_like(weight).detach()
    found.as_strided((weight.numel(),), (1,))[torch.from_numpy(kept.matrix.kept).long()] = torch.from_numpy(kept.slopes)
    return found


@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", LAYERS)
def test_they_equal_the_dense_ones_of_float64(case: Any, channels_last: bool, density: float) -> None:
    examples, inputs, outputs, size, given = case
    torch.manual_seed(0)
    layer = nn.Conv2d(inputs, outputs, **given)
    mask = np.random.Generator(np.random.PCG64(1)).random(layer.weight.shape) < density
    kept = torch.from_numpy(mask)
    layer.weight.data *= kept
    x = torch.randn(examples, inputs, *size)
    if channels_last:
        layer, x = layer.to(memory_format=LAST), x.contiguous(memory_format=LAST)
    x.requires_grad_()
    forward = kept_forward(layer, mask, Scratch())
    y, like = forward(x), layer(x)
    assert y.is_contiguous() == like.is_contiguous() and y.is_contiguous(memory_format=LAST) == like.is_contiguous(
        memory_format=LAST
    )
    slope = torch.randn(y.shape)
    y.backward(slope)
    assert len(forward.slopes) == mask.sum()
    found = [one.detach() for one in (y, x.grad, gradient(forward), layer.bias.grad)]
    single, exact = (wanted(layer, x, slope, kept, dtype) for dtype in (torch.float32, torch.float64))
    for ours, torchs, right in zip(found, single, exact, strict=True):
        most = 2 * float((torchs - right).abs().max()) + 2e-6 * max(1.0, float(right.abs().max()))
        assert float((ours - right).abs().max()) <= most


def test_what_is_no_batch_of_maps_goes_the_dense_way() -> None:
    layer = nn.Conv2d(2, 3, 3)
    kept = kept_forward(layer, np.ones(layer.weight.shape, bool), Scratch())
    x = torch.randn(4, 2, 5, 6)
    torch.testing.assert_close(kept(x[0]), layer(x[0]))
    assert kept(x[:0]).shape == (0, 3, 3, 4)
    torch.testing.assert_close(kept(x[:, :, ::2, 1:].transpose(2, 3)), layer(x[:, :, ::2, 1:].transpose(2, 3)))
    torch.testing.assert_close(torch.func.vmap(kept)(x), layer(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert kept(x).dtype == torch.bfloat16
    for wrong in (x[:, :1], x[..., :2]):  # too few channels, smaller than the window
        with pytest.raises(RuntimeError):
            kept(wrong)
    layer(x).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(1, 1, 2, padding="same"),
        nn.Conv1d(1, 1, 3),
        nn.ConvTranspose2d(1, 1, 3),
        nn.LazyConv2d(1, 3),
    ],
)
def test_other_layers_stay_dense(layer: nn.Module) -> None:
    assert form_of(layer) is None


class Block(nn.Module):
    """Convolutions with BatchNorm and a way around them, one with groups and a stride, one whose weights are read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.deep, self.by_two = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2)
        self.again, self.skipped = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.head, self.steps = nn.Linear(8, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.deep(x) + F.conv2d(x, self.deep.weight.transpose(0, 1).contiguous(), padding=1)
        self.steps += self.training
        if self.steps % 2:  # a layer that not every step uses
            x = x + self.skipped(x)
        return self.head(self.again(self.by_two(x)).relu().mean((2, 3)))


def flat(tuned: bool = False, kept: float | None = None) -> FlatModel:
    torch.manual_seed(0)
    module = Block()
    layout, how = layout_of(module, prunable_names(module, None)), None
    if tuned:
        how = tune(module, torch.randn(3, 1, 6, 6))
        assert how.channels_last
        module.steps = 0
    start = read(module, layout)
    made = FlatModel(module, layout, "cpu", None, how)  # whose memory begins as zeros
    made.load(start)
    made.kept = None if kept is None else dict.fromkeys(exchangeable(module, layout), kept)
    return made


def trained(
    made: FlatModel, density: float, optimizer: Optimizer, view: View = IDENTITY, **more: Any
) -> TrainingResult:
    rng = np.random.Generator(np.random.PCG64(1))
    data = Examples(torch.from_numpy(rng.standard_normal((40, 1, 6, 6), np.float32)), torch.arange(40) % 3)
    recipe = TrainingRecipe(
        budget=Budget(steps=5), batch_size=16, lr=0.01, optimizer=optimizer, clip_norm=1.0, view=view
    )
    mask = rng.random(made.layout.num_prunable) < density
    if "trainable" in more:
        more["trainable"] = more["trainable"](made, rng)
    start = read(made.module, made.layout)
    order = stream(0, "kept")
    return torch_backend.train(made, drawn_request(start, data, recipe, order=order, torch_seed=3, active=mask, **more))


@pytest.mark.parametrize("optimizer", [Sgd(momentum=0.9, weight_decay=0.01), ADAM])
@pytest.mark.parametrize("density", [0.0, 0.2, 0.7])
@pytest.mark.parametrize("tuned", [False, True])
def test_a_training_equals_the_dense_one(tuned: bool, density: float, optimizer: Optimizer) -> None:
    made = flat(tuned, 1.1)
    assert set(made.kept or ()) == {f"{n}.weight" for n in ("stem", "deep", "by_two", "skipped", "head")}
    found, dense = trained(made, density, optimizer), trained(flat(tuned), density, optimizer)
    np.testing.assert_allclose(found.params.floats, dense.params.floats, rtol=0, atol=3e-5)
    assert found.loss == pytest.approx(dense.loss, abs=1e-5)
    again = trained(flat(tuned, 1.1), density, optimizer)
    assert again.params.floats.tobytes() == found.params.floats.tobytes() and again.loss == found.loss


def some(made: FlatModel, rng: np.random.Generator) -> np.ndarray:
    return rng.random(made.layout.num_params) < 0.5


def head(made: FlatModel, rng: np.random.Generator) -> np.ndarray:
    found = np.zeros(made.layout.num_params, bool)
    for e in made.layout.floats:
        if e.name.startswith("head"):
            found[e.slice] = True
    return found


def all_but_the_norms(made: FlatModel, rng: np.random.Generator) -> np.ndarray:
    found = np.ones(made.layout.num_params, bool)
    for e in made.layout.floats:
        if e.norm:
            found[e.slice] = False
    return found


@pytest.mark.parametrize("trainable", [some, head, all_but_the_norms])
@pytest.mark.parametrize("density", [0.2, 0.9])
def test_what_must_stay_stays_and_the_rest_moves_as_dense(trainable: Any, density: float) -> None:
    found, dense = (trained(flat(kept=kept), density, ADAM, trainable=trainable) for kept in (1.1, None))
    np.testing.assert_allclose(found.params.floats, dense.params.floats, rtol=0, atol=3e-5)


class Doubled:
    """What the network sees is twice the trained weights."""

    def opened(self, model: FlatModel, request: Any) -> Any:
        return nullcontext(elementwise(lambda v: 2 * v, lambda v: torch.full_like(v, 2.0)))

    def used(self, alive: np.ndarray, request: Any) -> Any:
        yield alive, request.num_examples


def test_a_view_trains_its_own_weights() -> None:
    found, dense = (trained(flat(kept=kept), 0.2, ADAM, Doubled()) for kept in (1.1, None))
    np.testing.assert_allclose(found.params.floats, dense.params.floats, rtol=0, atol=3e-5)


def test_layers_that_nothing_trains_leave_no_gradient() -> None:
    made = flat(kept=1.1)
    free = head(made, np.random.default_rng(0))
    with exchanged(made, made.kept or {}, np.ones(made.layout.num_prunable, bool), free) as exchange:
        assert len(exchange.all) == 5 and len(exchange.trained) == 1 and exchange.whole
