"""Masked local training against torch.optim.SGD and its own promises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedlth.data.examples import Examples
from fedlth.models.layout import Params, layout_of, read, views
from fedlth.rng import stream
from fedlth.training.batches import batches
from fedlth.training.evaluation import evaluate, gradient
from fedlth.training.flat_model import FlatModel
from fedlth.training.loss import cross_entropy
from fedlth.training.metrics import Scores
from fedlth.training.recipe import TrainingRecipe
from fedlth.training.request import TrainingResult, drawn_request
from fedlth.training.train import train
from tests import tiny
from tests.tiny import Small


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def made(factory: Any = Small, prunable: tuple[str, ...] = ("conv.weight", "head.weight")) -> tuple[FlatModel, Params]:
    with seeded():
        module = factory()
    layout = layout_of(module, prunable)
    start = read(module, layout)
    return FlatModel(module, layout, "cpu"), start


def data(size: int = 40, seed: int = 0) -> Examples:
    with seeded(seed):
        return Examples(torch.randn(size, 1, 8, 8), torch.randint(0, 4, (size,)))


def mask_of(model: FlatModel, density: float = 0.4) -> np.ndarray:
    return np.random.default_rng(1).random(model.layout.num_prunable) < density


def run(
    model: FlatModel, start: Params, recipe: TrainingRecipe, *, part: Any = None, torch_seed: int = 7, **more: Any
) -> TrainingResult:
    request = drawn_request(start, part or data(), recipe, order=stream(0, "order"), torch_seed=torch_seed, **more)
    with seeded():
        return train(model, request)


def sgd(
    factory: Any, start: Params, recipe: TrainingRecipe, mask: np.ndarray | None, part: Any
) -> dict[str, np.ndarray]:
    """The same by torch.optim.SGD and p.mul_(mask) after load and after every step."""
    with seeded():
        module = factory()
    layout = layout_of(module, ("conv.weight", "head.weight"))
    module.load_state_dict({n: torch.from_numpy(a.copy()) for n, a in views(start, layout).items()})
    named = dict(module.named_parameters())
    masks = {}
    if mask is not None:
        masks = {e.name: torch.from_numpy(mask[e.slice].reshape(e.shape)) for e in layout.prunable}

    def apply() -> None:
        with torch.no_grad():
            for name, keep in masks.items():
                named[name].mul_(keep)

    apply()
    optimiser = torch.optim.SGD(module.parameters(), lr=recipe.lr, **vars(recipe.optimizer))
    x, y = part.tensor, part.y
    order = stream(0, "order")
    with seeded():
        torch.manual_seed(7)
        for parts in recipe.budget(len(y), recipe.batch_size, order):
            for index in parts:
                optimiser.zero_grad()
                cross_entropy(module(x[index]), y[index]).backward()
                optimiser.step()
                apply()
    return {n: t.detach().numpy() for n, t in module.state_dict().items()}


@pytest.mark.parametrize("density", [None, 0.4])
@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_equals_sgd(momentum: float, decay: float, density: float | None) -> None:
    model, start = made()
    recipe = tiny.recipe(epochs=3, batch_size=8, lr=0.05, momentum=momentum, weight_decay=decay)
    mask = None if density is None else mask_of(model, density)
    got = views(run(model, start, recipe, active=mask).params, model.layout)
    expected = sgd(Small, start, recipe, mask, data())
    for name, array in expected.items():
        # The conv bias before a BatchNorm has no gradient but rounding: absolute, not relative, closeness.
        np.testing.assert_allclose(got[name], array, rtol=2e-4, atol=2e-6, err_msg=name)


def test_equals_sgd_to_the_last_bit_where_nothing_is_masked() -> None:
    model, start = made()
    recipe = tiny.recipe(epochs=2, batch_size=8, lr=0.05)
    got = views(run(model, start, recipe).params, model.layout)
    for name, array in sgd(Small, start, recipe, None, data()).items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)


class Spy(Small):
    """Looks at its own weights in every forward, which is before every step."""

    seen: list[np.ndarray]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = torch.cat([self.conv.weight.detach().flatten(), self.head.weight.detach().flatten()])
        self.seen.append(flat.clone().numpy())
        return super().forward(x)


def test_dead_weights_are_zero_in_every_forward_and_carry_no_momentum() -> None:
    model, start = made(Spy)
    model.module.seen = []
    mask = mask_of(model)
    recipe = tiny.recipe(epochs=3, batch_size=8, lr=0.1, momentum=0.9, weight_decay=0.01)
    got = run(model, start, recipe, active=mask).params
    assert len(model.module.seen) == 15
    for weights in model.module.seen:
        assert not weights[~mask].any()
    assert not got.floats[: mask.size][~mask].any() and got.floats[: mask.size][mask].all()
    grown = run(model, got, recipe).params
    assert grown.floats[: mask.size][~mask].any(), "without the mask they do move"


def test_the_start_is_never_touched_and_training_is_pure() -> None:
    model, start = made()
    before = start.digest()
    recipe = tiny.recipe(epochs=1, batch_size=8, lr=0.1, momentum=0.9)
    one = run(model, start, recipe, active=mask_of(model))
    evaluate(model, one.params, data(seed=3))
    two = run(model, start, recipe, active=mask_of(model))
    assert start.digest() == before and one.params.digest() == two.params.digest() and one.loss == two.loss


def test_what_is_not_trainable_keeps_its_value() -> None:
    model, start = made()
    update = mask_of(model)
    trainable = np.arange(model.layout.num_params) % 3 > 0  # of biases and norms too
    trainable[: update.size] = update
    recipe = tiny.recipe(epochs=1, batch_size=8, lr=0.1, momentum=0.9, weight_decay=0.1)
    got = run(model, start, recipe, trainable=trainable).params
    size = trainable.size
    np.testing.assert_array_equal(got.floats[:size][~trainable], start.floats[:size][~trainable])
    assert (got.floats[: update.size][update] != start.floats[: update.size][update]).all()
    assert (
        got.floats[update.size : size][trainable[update.size :]]
        != start.floats[update.size : size][trainable[update.size :]]
    ).all()


class Frozen(Small):
    def __init__(self) -> None:
        super().__init__()
        self.conv.requires_grad_(False)


def test_a_frozen_part_does_not_move_under_weight_decay() -> None:
    model, start = made(Frozen, ("head.weight",))
    recipe = tiny.recipe(epochs=2, batch_size=8, lr=0.1, momentum=0.9, weight_decay=0.1)
    got = views(run(model, start, recipe).params, model.layout)
    was = views(start, model.layout)
    for name in ("conv.weight", "conv.bias"):
        np.testing.assert_array_equal(got[name], was[name])
    assert (got["head.weight"] != was["head.weight"]).any()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.second = nn.Linear(64, 64)
        self.second.weight = self.first.weight
        self.head = nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x.flatten(1))))))


def test_tied_weights_are_one_entry_and_stay_tied() -> None:
    model, start = made(Tied, ("first.weight", "head.weight"))
    entry = next(e for e in model.layout.prunable if e.name == "first.weight")
    assert entry.aliases == ("second.weight",) and model.layout.num_params == 64 * 64 + 2 * 64 + 64 * 4 + 4
    mask = mask_of(model)
    got = run(model, start, tiny.recipe(epochs=1, batch_size=8, lr=0.1), active=mask).params
    named = views(got, model.layout)
    np.testing.assert_array_equal(named["first.weight"], named["second.weight"])
    assert model.module.first.weight is model.module.second.weight
    assert not model.module.second.weight.detach().flatten().numpy()[~mask[entry.slice]].any()


@pytest.mark.parametrize(
    ("size", "batch", "expected"),
    [
        (9, 4, [4, 5]), (8, 4, [4, 4]), (10, 4, [4, 4, 2]), (1, 4, [1]), (5, 5, [5]), (6, 5, [6]), (3, 1, [1, 2]),
        (3, 9, [3]),
    ],
)  # fmt: skip
def test_a_last_batch_of_one_joins_the_one_before(size: int, batch: int, expected: list[int]) -> None:
    parts = batches(size, batch, stream(0, "x"))
    assert [len(p) for p in parts] == expected
    assert sorted(np.concatenate(parts)) == list(range(size))


def test_batchnorm_trains_where_one_example_is_left_over() -> None:
    model, start = made()
    got = run(model, start, tiny.recipe(epochs=2, batch_size=8, lr=0.1), part=data(9))
    assert np.isfinite(got.params.floats).all()
    assert got.params.ints.tolist() == [2], "two epochs of one joined batch"


class Dropping(Small):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.nn.functional.dropout(x, 0.5, self.training))


def test_dropout_draws_from_the_jobs_own_seed() -> None:
    model, start = made(Dropping)
    recipe = tiny.recipe(batch_size=8, lr=0.1)
    request = drawn_request(start, data(), recipe, order=stream(0, "order"), torch_seed=0)

    def digest(seed: int, disturb: int) -> str:
        with seeded(disturb):
            return train(model, replace(request, torch_seed=seed)).params.digest()

    assert digest(1, 0) == digest(1, 99) != digest(2, 0)


def test_snapshots_are_the_weights_after_an_epoch() -> None:
    model, start = made()
    recipe = tiny.recipe(epochs=3, batch_size=8, lr=0.1)
    got = run(model, start, recipe, snapshots=(1, 3))
    assert set(got.snapshots) == {1, 3}
    one = run(model, start, tiny.recipe(epochs=1, batch_size=8, lr=0.1))
    np.testing.assert_array_equal(got.snapshots[1], one.params.floats)
    np.testing.assert_array_equal(got.snapshots[3], got.params.floats)


def test_the_cosine_schedule() -> None:
    recipe = tiny.recipe(epochs=1, batch_size=1, lr=2.0, schedule="cosine")
    assert [recipe.rate(s, 5) for s in range(5)] == pytest.approx([2.0, 1.7100, 1.01, 0.3100, 0.02], abs=1e-4)
    assert recipe.rate(0, 1) == 2.0
    stay = tiny.recipe(epochs=1, batch_size=1, lr=2.0, schedule="cosine", replay_lr=False)
    assert [stay.rate(s, 5) for s in range(5)] == pytest.approx([0.02] * 5)
    constant = tiny.recipe(epochs=1, batch_size=1, lr=2.0)
    assert {constant.rate(s, 5) for s in range(5)} == {2.0}


def test_divergence_is_an_error() -> None:
    model, start = made()
    with pytest.raises(FloatingPointError, match="diverged.*learning rate 1e"):
        run(model, start, tiny.recipe(epochs=4, batch_size=4, lr=1e38, momentum=0.9))


def test_evaluate_and_gradient_leave_the_model_alone() -> None:
    model, start = made()
    whole = data(300)
    found = evaluate(model, start, whole)
    accuracy, loss = found.accuracy, found.loss
    module = model.module.eval()
    with torch.no_grad():
        logits = module(whole.tensor)
    assert accuracy == float((logits.argmax(1) == whole.y).float().mean().double()) or accuracy == pytest.approx(
        float((logits.argmax(1) == whole.y).sum()) / 300
    )
    assert loss == pytest.approx(float(cross_entropy(logits, whole.y)), rel=1e-5)
    assert evaluate(model, start, whole.batch(slice(0))) == Scores(0.0, {"accuracy": 0.0})
    got = gradient(model, start, whole)
    cross_entropy(module(whole.tensor), whole.y).backward()  # adds to what gradient() left
    np.testing.assert_allclose(2 * got, model.grad[: got.size].numpy(), rtol=1e-3, atol=1e-6)
    assert read(module, model.layout).digest() == start.digest(), "no buffer moved"


def test_sequences_have_a_loss_a_position() -> None:
    logits, y = torch.randn(3, 5, 4), torch.randint(0, 4, (3, 5))
    expected = nn.functional.cross_entropy(logits.permute(0, 2, 1), y)
    assert float(cross_entropy(logits, y)) == pytest.approx(float(expected), rel=1e-5)
