"""Tuned torch equals fedlth.training.train to float32 rounding, and leaves alone what it would change."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedlth.data.examples import Examples
from fedlth.models.layout import Params, layout_of, read
from fedlth.training.evaluation import evaluate, gradient
from fedlth.training.flat_model import FlatModel
from fedlth.training.request import drawn_request
from fedlth.training.train import train
from fedlth.training.tuned import Tuned, tune
from tests import tiny
from tests.tiny import Small


class Net(nn.Module):
    """Convolutions, norms and pools written the usual ways; `way` picks how the maps are flattened."""

    def __init__(self, way: str = "flatten") -> None:
        super().__init__()
        self.way = way
        self.a, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.b = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.relu, self.pool = nn.ReLU(), nn.MaxPool2d(2)
        self.head = nn.Linear(6 * 2 * 3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.relu(self.norm(self.a(x))))
        x = F.max_pool2d(F.relu(self.b(x), inplace=True), 2)
        x = F.dropout(x.flatten(1) if self.way == "flatten" else x.view(x.size(0), -1), 0.3, self.training)
        logits: torch.Tensor = self.head(x)
        return logits


def images(size: int = 21) -> Examples:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, 3, 8, 12, generator=generator)
    return Examples(x, torch.randint(0, 4, (size,), generator=generator))


def seeded(factory: object) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module: nn.Module = factory()  # type: ignore[operator]
        return module


def two(module: nn.Module, x: torch.Tensor) -> tuple[FlatModel, FlatModel, Params, Tuned]:
    layout = layout_of(module, [n for n, p in module.named_parameters() if p.dim() > 1])
    start, other = read(module, layout), copy.deepcopy(module)
    tuned = tune(other, x[:3])
    return FlatModel(module, layout, "cpu"), FlatModel(other, layout, "cpu", None, tuned), start, tuned


@pytest.mark.parametrize("way", ["flatten", "view"])
@pytest.mark.parametrize("masked", [False, True])
def test_training_evaluation_and_gradient_equal_the_reference(way: str, masked: bool) -> None:
    data = images()
    plain, quick, start, tuned = two(seeded(lambda: Net(way)), data.tensor)
    assert tuned.note == "channels_last, 2 max pools before relu"
    assert quick.module.a.weight.is_contiguous(memory_format=torch.channels_last)
    draw = np.random.default_rng(0)
    mask = draw.random(plain.layout.num_prunable) < 0.5 if masked else None
    update = draw.random(plain.layout.num_prunable) < 0.5 if masked else None
    recipe, found = tiny.recipe(epochs=2, batch_size=8, lr=0.05, momentum=0.9, weight_decay=0.01), []
    trainable = None if update is None else plain.layout.over_params(update)
    request = drawn_request(
        start, data, recipe, order=np.random.default_rng(1), torch_seed=3, active=mask, trainable=trainable,
        snapshots=(1,),
    )  # fmt: skip
    for model in (plain, quick):
        with torch.random.fork_rng(devices=[]):
            done = train(model, request)
            part = gradient(model, done.params, data)
            found.append((done, evaluate(model, done.params, data), part))
    (a, seen, slope), (b, seen_2, slope_2) = found
    assert np.abs(a.params.floats - b.params.floats).max() < 1e-5 and (a.params.ints == b.params.ints).all()
    assert np.abs(a.snapshots[1] - b.snapshots[1]).max() < 1e-5
    assert a.loss == pytest.approx(b.loss, rel=1e-4) and seen.loss == pytest.approx(seen_2.loss, rel=1e-4)
    assert seen.accuracy == pytest.approx(seen_2.accuracy, rel=1e-4)
    assert np.abs(slope - slope_2).max() < 1e-4 * np.abs(slope).max()
    if mask is not None:
        assert not b.params.floats[: mask.size][~mask].any()


def test_loaded_values_come_back_in_order() -> None:
    _, quick, start, _ = two(seeded(Net), images().tensor)
    quick.load(start)
    assert (quick.save().floats == start.floats).all()
    named = dict(quick.module.named_parameters())
    for e in quick.layout.floats:
        if e.role == "param":
            assert (named[e.name].detach().numpy().reshape(-1) == start.floats[e.slice]).all()


class Viewed(nn.Module):
    """Asks for a view of a map under control flow: neither channels_last nor a trace can be used."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4 * 6 * 10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        if float(x.detach().sum()) > 1e9:
            x = x * 2
        logits: torch.Tensor = self.head(x.view(x.size(0), -1))
        return logits


class Fading(nn.Module):
    """Changes with every call, in Python: a trace would freeze it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.a, self.head = 1.0, nn.Conv2d(3, 4, 3), nn.Linear(4 * 3 * 5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = F.max_pool2d(F.relu(self.a(x) * self.calls), 2)
        logits: torch.Tensor = self.head(x.flatten(1))
        return logits


def hooked() -> nn.Module:
    net = Net()
    net.relu.register_forward_hook(lambda *_: None)
    return net


@pytest.mark.parametrize("factory", [Viewed, Fading, hooked])
def test_what_a_change_would_break_stays_as_it_is_written(factory: object) -> None:
    module = seeded(factory)
    module.eval()
    tuned = tune(module, images().tensor[:3])
    assert tuned.train.args == tuned.evaluate.args == (module,) and not module.training
    assert tuned.channels_last is (factory is hooked)


def test_relu_stays_where_others_read_it() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = F.relu(self.a(x))
            logits: torch.Tensor = self.head(F.max_pool2d(x, 2).amax((2, 3)) + x.amax((2, 3)))
            return logits

    assert tune(seeded(Twice), images().tensor[:3]).note == "channels_last"


def test_no_images_nothing_to_do() -> None:
    module = seeded(lambda: nn.Linear(4, 2))
    assert tune(module, torch.randn(3, 4)).train.args == (module,)
    assert tune(seeded(Small), torch.randn(3, 1, 8, 8)).channels_last


def test_tuning_leaves_no_trace() -> None:
    module = seeded(Net)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    before = torch.random.get_rng_state()
    tune(module, images().tensor[:3])
    assert (torch.random.get_rng_state() == before).all() and module.training
    assert all((module.state_dict()[name] == tensor).all() for name, tensor in state.items())


class Counts(nn.Module):
    """A forward that counts its training calls, and changes its answer at the third."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4 * 3 * 5, 4)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen += 1
        logits: torch.Tensor = self.head(F.max_pool2d(F.relu(self.a(x)), 2).flatten(1))
        return logits


def test_a_trace_that_would_stop_a_counter_is_not_taken() -> None:
    module = Counts()
    tuned = tune(module, images(3).tensor)
    assert int(module.seen) == 0 and "max pool" not in tuned.note
    module.train()
    tuned.train(images(3).tensor)
    assert int(module.seen) == 1
