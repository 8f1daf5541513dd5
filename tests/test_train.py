"""Masked local training against torch.optim.SGD and its own promises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedlth.models.layout import Params, layout_of, read, views
from fedlth.rng import stream
from fedlth.training import train as training
from fedlth.training.train import Bound, Plan, batches, evaluate, gradient, loss_of
from tests.tiny import Small


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def made(factory: Any = Small, prunable: tuple[str, ...] = ("conv.weight", "head.weight")) -> tuple[Bound, Params]:
    with seeded():
        module = factory()
    layout = layout_of(module, prunable)
    start = read(module, layout)
    return Bound(module, layout, "cpu"), start


def data(size: int = 40, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    with seeded(seed):
        return torch.randn(size, 1, 8, 8), torch.randint(0, 4, (size,))


def mask_of(bound: Bound, density: float = 0.4) -> np.ndarray:
    return np.random.default_rng(1).random(bound.layout.num_prunable) < density


def run(bound: Bound, start: Params, *, plan: Plan, part: Any = None, **more: Any) -> training.Trained:
    with seeded():
        return training.train(
            bound, start, data=part or data(), plan=plan, order=stream(0, "order"), torch_seed=7, **more
        )


def sgd(factory: Any, start: Params, plan: Plan, mask: np.ndarray | None, part: Any) -> dict[str, np.ndarray]:
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
    optimiser = torch.optim.SGD(module.parameters(), lr=plan.lr, momentum=plan.momentum, weight_decay=plan.weight_decay)
    x, y = part
    order = stream(0, "order")
    with seeded():
        torch.manual_seed(7)
        for parts in [batches(len(y), plan.batch_size, order) for _ in range(plan.epochs)]:
            for index in parts:
                optimiser.zero_grad()
                loss_of(module(x[index]), y[index]).backward()
                optimiser.step()
                apply()
    return {n: t.detach().numpy() for n, t in module.state_dict().items()}


@pytest.mark.parametrize("density", [None, 0.4])
@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_equals_sgd(momentum: float, decay: float, density: float | None) -> None:
    bound, start = made()
    plan = Plan(epochs=3, batch_size=8, lr=0.05, momentum=momentum, weight_decay=decay)
    mask = None if density is None else mask_of(bound, density)
    got = views(run(bound, start, plan=plan, mask=mask).params, bound.layout)
    expected = sgd(Small, start, plan, mask, data())
    for name, array in expected.items():
        # The conv bias before a BatchNorm has no gradient but rounding: absolute, not relative, closeness.
        np.testing.assert_allclose(got[name], array, rtol=2e-4, atol=2e-6, err_msg=name)


def test_equals_sgd_to_the_last_bit_where_nothing_is_masked() -> None:
    bound, start = made()
    plan = Plan(epochs=2, batch_size=8, lr=0.05)
    got = views(run(bound, start, plan=plan).params, bound.layout)
    for name, array in sgd(Small, start, plan, None, data()).items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)


class Spy(Small):
    """Looks at its own weights in every forward, which is before every step."""

    seen: list[np.ndarray]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = torch.cat([self.conv.weight.detach().flatten(), self.head.weight.detach().flatten()])
        self.seen.append(flat.clone().numpy())
        return super().forward(x)


def test_dead_weights_are_zero_in_every_forward_and_carry_no_momentum() -> None:
    bound, start = made(Spy)
    bound.module.seen = []
    mask = mask_of(bound)
    plan = Plan(epochs=3, batch_size=8, lr=0.1, momentum=0.9, weight_decay=0.01)
    got = run(bound, start, plan=plan, mask=mask).params
    assert len(bound.module.seen) == 15
    for weights in bound.module.seen:
        assert not weights[~mask].any()
    assert not got.floats[: mask.size][~mask].any() and got.floats[: mask.size][mask].all()
    grown = run(bound, got, plan=plan).params
    assert grown.floats[: mask.size][~mask].any(), "without the mask they do move"


def test_the_start_is_never_touched_and_training_is_pure() -> None:
    bound, start = made()
    before = start.digest()
    plan = Plan(epochs=1, batch_size=8, lr=0.1, momentum=0.9)
    one = run(bound, start, plan=plan, mask=mask_of(bound))
    evaluate(bound, one.params, data(seed=3))
    two = run(bound, start, plan=plan, mask=mask_of(bound))
    assert start.digest() == before and one.params.digest() == two.params.digest() and one.loss == two.loss


def test_update_freezes_the_rest() -> None:
    bound, start = made()
    update = mask_of(bound)
    plan = Plan(epochs=1, batch_size=8, lr=0.1, momentum=0.9, weight_decay=0.1)
    got = run(bound, start, plan=plan, update=update).params
    size = update.size
    np.testing.assert_array_equal(got.floats[:size][~update], start.floats[:size][~update])
    assert (got.floats[:size][update] != start.floats[:size][update]).all()


class Frozen(Small):
    def __init__(self) -> None:
        super().__init__()
        self.conv.requires_grad_(False)


def test_a_frozen_part_does_not_move_under_weight_decay() -> None:
    bound, start = made(Frozen, ("head.weight",))
    plan = Plan(epochs=2, batch_size=8, lr=0.1, momentum=0.9, weight_decay=0.1)
    got = views(run(bound, start, plan=plan).params, bound.layout)
    was = views(start, bound.layout)
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
    bound, start = made(Tied, ("first.weight", "head.weight"))
    entry = next(e for e in bound.layout.prunable if e.name == "first.weight")
    assert entry.aliases == ("second.weight",) and bound.layout.num_params == 64 * 64 + 2 * 64 + 64 * 4 + 4
    mask = mask_of(bound)
    got = run(bound, start, plan=Plan(epochs=1, batch_size=8, lr=0.1), mask=mask).params
    named = views(got, bound.layout)
    np.testing.assert_array_equal(named["first.weight"], named["second.weight"])
    assert bound.module.first.weight is bound.module.second.weight
    assert not bound.module.second.weight.detach().flatten().numpy()[~mask[entry.slice]].any()


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
    bound, start = made()
    got = run(bound, start, plan=Plan(epochs=2, batch_size=8, lr=0.1), part=data(9))
    assert np.isfinite(got.params.floats).all()
    assert got.params.ints.tolist() == [2], "two epochs of one joined batch"


class Dropping(Small):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.nn.functional.dropout(x, 0.5, self.training))


def test_dropout_draws_from_the_jobs_own_seed() -> None:
    bound, start = made(Dropping)
    plan = Plan(epochs=1, batch_size=8, lr=0.1)

    def digest(seed: int, disturb: int) -> str:
        with seeded(disturb):
            return training.train(
                bound, start, data=data(), plan=plan, order=stream(0, "order"), torch_seed=seed
            ).params.digest()  # fmt: skip

    assert digest(1, 0) == digest(1, 99) != digest(2, 0)


def test_snapshots_are_the_weights_after_an_epoch() -> None:
    bound, start = made()
    plan = Plan(epochs=3, batch_size=8, lr=0.1)
    got = run(bound, start, plan=plan, snapshots=(1, 3))
    assert set(got.snapshots) == {1, 3}
    one = run(bound, start, plan=Plan(epochs=1, batch_size=8, lr=0.1))
    np.testing.assert_array_equal(got.snapshots[1], one.params.floats)
    np.testing.assert_array_equal(got.snapshots[3], got.params.floats)


def test_the_cosine_schedule() -> None:
    plan = Plan(epochs=1, batch_size=1, lr=2.0, schedule="cosine")
    assert [plan.rate(s, 5) for s in range(5)] == pytest.approx([2.0, 1.7100, 1.01, 0.3100, 0.02], abs=1e-4)
    assert plan.rate(0, 1) == 2.0
    stay = Plan(epochs=1, batch_size=1, lr=2.0, schedule="cosine", replay_lr=False)
    assert [stay.rate(s, 5) for s in range(5)] == pytest.approx([0.02] * 5)
    constant = Plan(epochs=1, batch_size=1, lr=2.0)
    assert {constant.rate(s, 5) for s in range(5)} == {2.0}


def test_divergence_is_an_error() -> None:
    bound, start = made()
    with pytest.raises(FloatingPointError, match="diverged.*learning rate 1e"):
        run(bound, start, plan=Plan(epochs=4, batch_size=4, lr=1e38, momentum=0.9))


def test_evaluate_and_gradient_leave_the_model_alone() -> None:
    bound, start = made()
    x, y = data(300)
    accuracy, loss = evaluate(bound, start, (x, y))
    module = bound.module.eval()
    with torch.no_grad():
        logits = module(x)
    assert accuracy == float((logits.argmax(1) == y).float().mean().double()) or accuracy == pytest.approx(
        float((logits.argmax(1) == y).sum()) / 300
    )
    assert loss == pytest.approx(float(loss_of(logits, y)), rel=1e-5)
    assert evaluate(bound, start, (x[:0], y[:0])) == (0.0, 0.0)
    got = gradient(bound, start, (x, y))
    loss_of(module(x), y).backward()  # adds to what gradient() left
    np.testing.assert_allclose(2 * got, bound.grad[: got.size].numpy(), rtol=1e-3, atol=1e-6)
    assert read(module, bound.layout).digest() == start.digest(), "no buffer moved"


def test_sequences_have_a_loss_a_position() -> None:
    logits, y = torch.randn(3, 5, 4), torch.randint(0, 4, (3, 5))
    expected = nn.functional.cross_entropy(logits.permute(0, 2, 1), y)
    assert float(loss_of(logits, y)) == pytest.approx(float(expected), rel=1e-5)
