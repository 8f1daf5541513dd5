"""Layers of a torch module that go over their kept weights alone while it trains inside a ticket."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedlth.data.examples import Examples
from fedlth.errors import StudyError
from fedlth.kernel.aligned import aligned
from fedlth.kernel.kept_form import Convolution
from fedlth.kernel.kept_matrix import KeptMatrix, Scratch
from fedlth.models.layout import layout_of, read
from fedlth.models.prunable import prunable_names
from fedlth.rng import stream
from fedlth.training import torch_backend
from fedlth.training.budget import Budget
from fedlth.training.flat_model import FlatModel
from fedlth.training.kept_forward import KeptForward, kept_forward
from fedlth.training.kept_layers import BELOW, exchangeable, exchanged, lists_below
from fedlth.training.optimizer import AdamW, Optimizer, Sgd
from fedlth.training.pull import Proximal
from fedlth.training.recipe import TrainingRecipe
from fedlth.training.request import TrainingRequest, TrainingResult, drawn_request

# positions, inputs, outputs: none, one and several panels, none of a whole number of tiles; one that is
FORMS = [(1, 1, 1), (7, 5, 3), (16, 16, 16), (129, 33, 17), (300, 210, 40)]

ADAM = AdamW(eps=1e-3)  # a bias before a BatchNorm has a gradient of rounding alone, which a small eps blows up


class Net(nn.Module):
    """What the kernel does not take: a norm over the batch, a dropout, a loop, a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.first, self.again, self.last = nn.Linear(4 * 16, 24, bias=False), nn.Linear(24, 24), nn.Linear(24, 3)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.first(self.norm(self.conv(x)).relu().flatten(1)))
        for _ in range(2):
            x = torch.tanh(self.again(x)) + x
        return self.last(x)


def model(module: nn.Module | None = None, kept: float | None = None) -> FlatModel:
    torch.manual_seed(0)
    module = module or Net()
    layout = layout_of(module, prunable_names(module, None))
    start = read(module, layout)
    made = FlatModel(module, layout, "cpu")  # whose memory begins as zeros
    made.load(start)
    made.kept = None if kept is None else dict.fromkeys(exchangeable(module, made.layout), kept)
    return made


def request(made: FlatModel, density: float, optimizer: Optimizer, **more: Any) -> TrainingRequest:
    rng = np.random.Generator(np.random.PCG64(1))
    data = Examples(torch.from_numpy(rng.standard_normal((40, 1, 4, 4), np.float32)), torch.arange(40) % 3)
    recipe = TrainingRecipe(budget=Budget(steps=6), batch_size=16, lr=0.01, optimizer=optimizer, **more)
    mask = rng.random(made.layout.num_prunable) < density
    start = read(made.module, made.layout)
    return drawn_request(start, data, recipe, order=stream(0, "kept"), torch_seed=3, active=mask)


def trained(kept: float | None, density: float, optimizer: Optimizer, **more: Any) -> TrainingResult:
    made = model(kept=kept)
    return torch_backend.train(made, request(made, density, optimizer, **more))


def gradient(kept: KeptForward) -> Tensor:
    """Return the gradient that a layer has left of its kept weights, as its weights; its own is none."""
    assert kept.layer.weight.grad is None
    found = torch.zeros(kept.layer.weight.numel())
    found[torch.from_numpy(kept.matrix.kept).long()] = torch.from_numpy(kept.slopes)
    return found.view(kept.layer.weight.shape)


def dense(x: Tensor, layer: nn.Linear, slope: Tensor, kept: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return a dense layer's output and gradients, of the weights that are kept, at a precision."""
    x, weight, bias = (t.detach().to(dtype, copy=True).requires_grad_() for t in (x, layer.weight, layer.bias))
    y = F.linear(x, weight, bias)
    y.backward(slope.detach().to(dtype))
    return [y.detach(), x.grad, weight.grad * kept, bias.grad]


@pytest.mark.parametrize("density", [0.0, 0.02, 0.3, 1.0])
@pytest.mark.parametrize("form", FORMS)
def test_products_equal_the_dense_ones_of_float64(form: tuple[int, int, int], density: float) -> None:
    positions, inputs, outputs = form
    rng = np.random.Generator(np.random.PCG64(positions))
    x, w, b, slope = (
        torch.from_numpy(rng.standard_normal(shape, np.float32)).requires_grad_()
        for shape in ((positions, inputs), (outputs, inputs), (outputs,), (positions, outputs))
    )
    mask = rng.random((outputs, inputs)) < density
    if density == 0.3:
        mask[0], mask[:, -1] = False, False
        mask[-1, 0] = True
    layer, kept = nn.Linear(inputs, outputs), torch.from_numpy(mask)
    with torch.no_grad():
        layer.weight.copy_(w * kept)
        layer.bias.copy_(b)
    given = kept_forward(layer, mask, Scratch())
    y = given(x)
    y.backward(slope)
    found = [one.detach() for one in (y, x.grad, gradient(given), layer.bias.grad)]
    single, exact = (dense(x, layer, slope, kept, dtype) for dtype in (torch.float32, torch.float64))
    for ours, torchs, wanted in zip(found, single, exact, strict=True):
        most = 2 * float((torchs - wanted).abs().max()) + 2e-6 * max(1.0, float(wanted.abs().max()))
        assert float((ours - wanted).abs().max()) <= most
    assert len(given.slopes) == mask.sum()


def test_inputs_may_have_more_dimensions_lie_otherwise_and_want_no_gradient() -> None:
    rng = np.random.Generator(np.random.PCG64(0))
    layer, mask = nn.Linear(10, 6), rng.random((6, 10)) < 0.5
    layer.weight.data *= torch.from_numpy(mask)
    kept = kept_forward(layer, mask, Scratch())
    x = torch.from_numpy(rng.standard_normal((10, 3, 5), np.float32)).permute(2, 1, 0)
    y = kept(x)
    torch.testing.assert_close(y, layer(x))
    y.sum(-1).t().sum().backward()  # a slope that is expanded
    wanted = x.reshape(-1, 10).sum(0).expand(6, 10) * torch.from_numpy(mask)
    torch.testing.assert_close(gradient(kept), wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert kept(x).dtype == torch.bfloat16
    assert kept(x[:0]).shape == (0, 3, 6) and kept(x.double().float()).dtype == torch.float32
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        kept(x[..., :5])  # two of which would make one input
    torch.testing.assert_close(torch.func.vmap(kept)(x), layer(x))
    frozen = layer.requires_grad_(False)
    given = x.clone().requires_grad_()
    kept(given).sum().backward()
    torch.testing.assert_close(given.grad, frozen.weight.sum(0).expand(5, 3, 10))


@pytest.mark.parametrize(
    ("optimizer", "more"),
    [(Sgd(momentum=0.9, weight_decay=0.01), {}), (ADAM, {"clip_norm": 0.5}), (Sgd(), {"pull": Proximal(mu=0.1)})],
)
@pytest.mark.parametrize("density", [0.0, 0.1, 0.6])
def test_a_training_equals_the_dense_one(density: float, optimizer: Optimizer, more: dict[str, Any]) -> None:
    wanted, found = (trained(kept, density, optimizer, **more) for kept in (None, 1.1))
    np.testing.assert_allclose(found.params.floats, wanted.params.floats, rtol=0, atol=3e-5)
    assert found.loss == pytest.approx(wanted.loss, abs=1e-5)
    assert (found.params.ints == wanted.params.ints).all()
    again = trained(1.1, density, optimizer, **more)
    assert again.params.floats.tobytes() == found.params.floats.tobytes() and again.loss == found.loss
    dense = trained(0.0, density, optimizer, **more)  # no layer is thin enough
    np.testing.assert_allclose(dense.params.floats, wanted.params.floats, rtol=0, atol=1e-6)


def test_panels_begin_at_a_cache_line() -> None:
    """A vector of 64 bytes across two lines takes twice as long, and numpy's arrays begin 16 bytes behind one."""
    for size in (1, 100, 10**5, 10**7):
        found = aligned(size)
        assert found.shape == (size,) and found.ctypes.data % 64 == 0
        assert aligned(size, zero=True).max() == 0
    matrix = KeptMatrix(np.ones((3, 20), bool), Scratch())
    y, panels = matrix.forward(np.ones((700, 20), np.float32), np.ones(60, np.float32), None)
    for one in (y, panels.x, *matrix.scratch.held.values()):
        assert one.ctypes.data % 64 == 0


def products() -> str:
    """Return a digest of what the products of a few forms give: tests/kernel/test_tiles.py holds variants by it."""
    digest, rng = hashlib.sha256(), np.random.Generator(np.random.PCG64(5))
    for positions, inputs, outputs in FORMS:
        matrix = KeptMatrix(rng.random((outputs, inputs)) < 0.4, Scratch())
        shapes = (positions, inputs), (positions, outputs), outputs * inputs
        x, slope, w = (rng.standard_normal(shape, np.float32) for shape in shapes)
        grad = np.zeros(len(matrix.kept), np.float32)
        y, panels = matrix.forward(x, w, w[:outputs].copy())
        for part in (y, matrix.backward(slope, panels, grad, wants_dx=True), grad):
            digest.update(part.tobytes())
    for stride, size in ((1, (9, 5)), (2, (4, 4)), (1, (16, 16))):
        layer = Convolution((3, 3), (stride, stride), (1, 1), groups=2)
        matrix = KeptMatrix(rng.random((12, 20, 3, 3)) < 0.4, Scratch(), layer)
        x, w = rng.standard_normal((35, 40 * size[0] * size[1]), np.float32), rng.standard_normal(12 * 180, np.float32)
        grad = np.zeros(len(matrix.kept), np.float32)
        y, panels = matrix.forward(x, w, None, size)
        for part in (y, matrix.backward(y, panels, grad, wants_dx=True), grad):
            digest.update(part.tobytes())
    return digest.hexdigest()


class Subclass(nn.Linear):
    """Another layer, whatever it computes."""


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))
        self.b.weight = self.a.weight
        self.sub, self.normed = Subclass(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.c.register_forward_hook(lambda *_: None)
        self.free = nn.Linear(4, 4)
        self.d.weight.register_hook(lambda grad: grad)


def test_what_must_not_be_exchanged_is_not() -> None:
    module = Tied()
    made = model(module)
    layout = made.layout
    assert set(exchangeable(module, layout)) == {"free.weight"}
    with exchanged(made, {"free.weight": 0.5}, np.zeros(layout.num_prunable, bool), None):
        assert isinstance(module.free.forward, KeptForward)
        assert not exchangeable(module, layout), "what is exchanged is not exchanged again"
    for below, kept in (({"free.weight": 0.5}, True), ({}, False), ({"free.weight": 0.0}, False)):
        with exchanged(made, below, np.full(layout.num_prunable, kept), None):
            assert "forward" not in vars(module.free)


def test_layers_are_as_they_were_after_an_exception() -> None:
    made = model(kept=1.1)
    given = request(made, 0.1, Sgd())
    broken = TrainingRequest(**{**vars(given), "batches": [[np.array([10**6])]]})
    with pytest.raises(IndexError):
        torch_backend.train(made, broken)
    assert not any("forward" in vars(layer) for layer in made.module.modules())
    assert all(one.grad is not None for one in made.module.parameters())


def test_a_network_without_such_a_layer_is_refused() -> None:
    odd = nn.Conv2d(1, 2, 2, padding="same"), nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")
    module = nn.Sequential(*odd, nn.BatchNorm2d(2), nn.Flatten(), Subclass(8, 2))
    layout = layout_of(module, prunable_names(module, None))
    with pytest.raises(
        StudyError, match="must be tuned or reference for this study.* BatchNorm2d; and it has no plain"
    ):
        lists_below(module, layout, None, "BatchNorm2d")
    made = model()
    names = {"conv.weight", "first.weight", "again.weight", "last.weight"}
    assert lists_below(made.module, made.layout, None, "") == dict.fromkeys(names, BELOW)
