"""Training recipes against torch.optim, lr_scheduler and clip_grad_norm_, step by step, and the laws of their parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import lr_scheduler as torch_lr

from fedlth.data.examples import Examples
from fedlth.models.layout import Params, layout_of, read, views
from fedlth.rng import stream
from fedlth.tickets.evidence import Lesson
from fedlth.training import batch_requests, cohort, kernel_backend, masked_training, mixture, torch_backend
from fedlth.training.augment import Crop, Flip
from fedlth.training.batch_requests import Training
from fedlth.training.budget import Budget
from fedlth.training.dropout import at_rate, places
from fedlth.training.flat_model import FlatModel
from fedlth.training.local_client import LocalClient
from fedlth.training.loss import IGNORED, CrossEntropy, MaskedLm, MeanSquaredError, OfBatch, Restricted, examined
from fedlth.training.optimizer import Adam, AdamW, Memory, Sgd
from fedlth.training.pull import L1, NO_PULL, Correction, Proximal, Pull
from fedlth.training.rate_schedule import Cosine, Linear
from fedlth.training.recipe import TrainingRecipe
from fedlth.training.request import TrainingRequest, drawn_request
from fedlth.training.torch_backend import train
from tests import tiny
from tests.training.recipe_nets import CLASSES, NETS, STEPS, TOKENS, Attention, drawn, images, schedules, tokens

RECIPES = 20


def made(factory: Callable[[], nn.Module], prunable: tuple[str, ...]) -> tuple[FlatModel, Params]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        module = factory()
    layout = layout_of(module, prunable)
    start = read(module, layout)
    return FlatModel(module, layout, "cpu"), start


def every_step(request: TrainingRequest) -> TrainingRequest:
    """Return the request with an epoch a step, so that every step's weights are told."""
    parts = [[part] for epoch in request.batches for part in epoch]
    return replace(request, batches=parts, snapshots=tuple(range(1, len(parts) + 1)))


def asked(recipe: TrainingRecipe, start: Params, data: tuple[Tensor, Tensor], **more: Any) -> TrainingRequest:
    return drawn_request(start, Examples(*data), recipe, order=stream(0, "order"), torch_seed=5, **more)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("seed", range(RECIPES))
def test_a_random_recipe_equals_torch_step_by_step(seed: int, masked: bool) -> None:
    twin = drawn(seed)
    factory, data, prunable = NETS[list(NETS)[seed % len(NETS)]]
    model, start = made(factory, prunable)
    x, y = data(45)
    mask = np.random.default_rng(1).random(model.layout.num_prunable) < 0.4 if masked else None
    request = every_step(asked(twin.recipe, start, (x, y), active=mask))
    found = train(model, request)
    assert len(found.snapshots) == STEPS

    recipe, layout = twin.recipe, model.layout
    module = factory()
    module.load_state_dict({n: torch.from_numpy(a.copy()) for n, a in views(start, layout).items()})
    named = dict(module.named_parameters())
    keep = {} if mask is None else {
        e.name: torch.from_numpy(mask[e.slice].reshape(e.shape)) for e in layout.prunable
    }  # fmt: skip
    for name, alive in keep.items():
        named[name].data.mul_(alive)
    first = {n: p.detach().clone() for n, p in named.items()}
    optimizer = twin.optimizer(module.parameters())
    scheduler = twin.scheduler(optimizer)
    loss = recipe.loss
    assert isinstance(loss, CrossEntropy) and isinstance(recipe.pull, Proximal)
    for step, (part,) in enumerate(request.batches, 1):
        optimizer.zero_grad()
        near = sum(((p - first[n]) ** 2).sum() for n, p in named.items())
        value = functional.cross_entropy(module(x[part]), y[part], label_smoothing=loss.label_smoothing)
        (value + recipe.pull.mu / 2 * near).backward()
        for name, alive in keep.items():
            named[name].grad.mul_(alive)
        if recipe.clip_norm is not None:
            nn.utils.clip_grad_norm_(module.parameters(), recipe.clip_norm)
        optimizer.step()
        scheduler.step()
        got = views(Params(found.snapshots[step], start.ints), layout)
        for name, value in named.items():
            np.testing.assert_allclose(
                got[name], value.detach().numpy(), rtol=2e-4, atol=2e-6, err_msg=f"{name} {step}"
            )
        if mask is not None:
            assert not found.snapshots[step][: mask.size][~mask].any(), (
                "a pruned weight is exactly zero after each step"
            )


def test_every_schedule_equals_torchs_to_the_last_digits() -> None:
    for schedule, scheduler in schedules(0.3):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.3)
        theirs, rates = scheduler(optimizer), []
        for _ in range(STEPS):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            theirs.step()
        np.testing.assert_allclose(
            [0.3 * schedule(s, STEPS) for s in range(STEPS)], rates, rtol=1e-12, err_msg=repr(schedule)
        )


@pytest.mark.parametrize("warm", [1, 3, 7])
@pytest.mark.parametrize("steps", [12, 40])
def test_a_warm_up_of_so_many_steps_equals_torchs(warm: int, steps: int) -> None:
    lr, left = 0.3, steps - warm
    for schedule, after in (
        (Linear(final=0.2, warmup=warm), lambda o: torch_lr.LinearLR(o, 1.0, 0.2, total_iters=left)),
        (
            Cosine(final=0.1, warmup=warm, final_at="after"),
            lambda o: torch_lr.CosineAnnealingLR(o, left, eta_min=0.1 * lr),
        ),
    ):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr)
        up = torch_lr.LinearLR(optimizer, start_factor=1 / (warm + 1), total_iters=warm)
        theirs, rates = torch_lr.SequentialLR(optimizer, [up, after(optimizer)], [warm]), []
        for _ in range(steps):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            theirs.step()
        np.testing.assert_allclose([lr * schedule(s, steps) for s in range(steps)], rates, rtol=1e-12)
    assert Linear(warmup=1.0)(11, 12) == 12 / 13 and Linear(warmup=1)(1, 12) == 1.0, "1 is one step, 1.0 is all"
    assert Linear(warmup=5)(2, 3) == 0.5, "a training may be shorter than its warm-up"


@dataclass(frozen=True)
class Careless:
    """A user's optimizer that moves whatever it is given: signs, and a constant drift."""

    def memory(self, like: Tensor, /) -> Memory:
        return (torch.zeros_like(like),)

    def __call__(self, grad: Tensor, weights: Tensor, memory: Memory, step: int, free: Tensor | None, /) -> Tensor:
        return grad.sign() + 0.5


@dataclass(frozen=True, kw_only=True)
class Drift(Adam):
    """A user's subclass of one of ours, which leaves nothing alone and looks at the whole vector."""

    def __call__(self, grad: Tensor, weights: Tensor, memory: Memory, step: int, free: Tensor | None, /) -> Tensor:
        direction = super().__call__(grad, weights, memory, step, free)
        return direction / direction.norm() + 0.5


OPTIMIZERS = [
    Sgd(momentum=0.9, weight_decay=0.1, nesterov=True),
    Adam(weight_decay=0.1),
    AdamW(weight_decay=0.5),
    Careless(),
    Drift(),
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: type(o).__name__)
def test_what_is_pruned_stays_zero_and_what_is_frozen_stays_as_it_is(optimizer: Any) -> None:
    model, start = made(*NETS["conv"][::2])
    size, draw = model.layout.num_prunable, np.random.default_rng(0)
    mask, trainable = draw.random(size) < 0.5, draw.random(model.layout.num_params) < 0.5
    recipe = TrainingRecipe(
        budget=Budget(epochs=2), batch_size=8, lr=0.05, optimizer=optimizer, clip_norm=0.5, pull=Proximal(mu=0.3)
    )
    anchor = Params(start.floats + 1, start.ints)
    request = every_step(asked(recipe, start, images(30), active=mask, trainable=trainable, anchor=anchor))
    found, begun = train(model, request), start.masked(mask).floats
    for floats in found.snapshots.values():
        assert not floats[:size][~mask].any()
        np.testing.assert_array_equal(floats[: trainable.size][~trainable], begun[: trainable.size][~trainable])
    moved = trainable.copy()
    moved[:size] &= mask
    assert (found.params.floats[: trainable.size][moved] != begun[: trainable.size][moved]).mean() > 0.9


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: type(o).__name__)
def test_a_step_in_pieces_is_the_step(optimizer: Any, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    factory, data, prunable = NETS[next(iter(NETS))]
    model, start = made(factory, prunable)
    mask = np.random.default_rng(1).random(model.layout.num_prunable) < 0.4 if masked else None
    recipe = TrainingRecipe(budget=Budget(epochs=2), batch_size=8, lr=0.05, optimizer=optimizer, clip_norm=0.5)
    request = asked(recipe, start, data(45), active=mask)
    whole = train(model, request)
    sizes = list[int]()
    real = type(optimizer).__call__

    def noted(self: Any, grad: Tensor, *more: Any) -> Tensor:
        sizes.append(len(grad))
        return real(self, grad, *more)

    monkeypatch.setattr(type(optimizer), "__call__", noted)
    monkeypatch.setattr(torch_backend, "PIECE", 64)
    assert train(model, request).params.digest() == whole.params.digest()
    own = type(optimizer) not in torch_backend.EXACT
    assert set(sizes) == {model.layout.num_params} if own else max(sizes) == 64 < model.layout.num_params


@dataclass(frozen=True)
class Normalised:
    """A user's optimizer of signs, as 0 / 0 where a gradient is zero."""

    def memory(self, like: Tensor, /) -> Memory:
        return ()

    def __call__(self, grad: Tensor, weights: Tensor, memory: Memory, step: int, free: Tensor | None, /) -> Tensor:
        return grad / grad.abs()


@dataclass(frozen=True)
class Nearing:
    """A user's pull of a strength that does not fall with the distance: 0 / 0 where there is none."""

    def __call__(self, grad: Tensor, weights: Tensor, anchor: Tensor, /) -> None:
        grad.add_((weights - anchor) / (weights - anchor).abs(), alpha=0.1)


@pytest.mark.parametrize("parts", [{"optimizer": Normalised()}, {"pull": Nearing()}], ids=["optimizer", "pull"])
def test_what_is_no_number_at_a_pruned_weight_stays_zero(parts: dict[str, Any]) -> None:
    model, start = made(*NETS["conv"][::2])
    mask = np.random.default_rng(0).random(model.layout.num_prunable) < 0.5
    far = Params(start.masked(mask).floats + np.float32(1.0), start.ints).masked(mask)
    recipe = replace(BASE, clip_norm=1.0, **parts)
    request = asked(recipe, start, images(30), active=mask, anchor=far)
    still = replace(request, recipe=replace(recipe, pull=NO_PULL))
    ended = [train(model, request).params, mixture.train_mixed(model, still, start, 0.5, adapts=True)[1]]
    for params in ended:
        assert np.isfinite(params.floats).all() and not params.floats[: mask.size][~mask].any()


@dataclass(frozen=True)
class Everything:
    """A mask that keeps all."""

    def mask(self, weights: Tensor, extra: Tensor, batch: Examples, layout: Any, /) -> Tensor:
        return torch.ones(layout.num_prunable)

    def penalty(self, extra: Tensor, /) -> Tensor:
        return extra.sum()


def test_a_training_of_masks_leaves_frozen_weights_alone_whatever_the_optimizer() -> None:
    model, start = made(*NETS["conv"][::2])
    moves = np.random.default_rng(0).random(model.layout.num_params) < 0.5
    request = asked(replace(BASE, optimizer=Normalised()), start, images(30), trainable=moves)
    found = masked_training.train(model, request, Everything(), np.zeros(1, np.float32)).params
    np.testing.assert_array_equal(found.floats[: moves.size][~moves], start.floats[: moves.size][~moves])
    plain = train(model, request).params
    np.testing.assert_array_equal(found.floats, plain.floats)


@pytest.mark.parametrize("optimizer", OPTIMIZERS[:3], ids=lambda o: type(o).__name__)
def test_the_memory_of_a_pruned_weight_is_zero(optimizer: Any) -> None:
    free, weights = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, -2.0])
    memory = optimizer.memory(weights)
    for step in range(1, 4):
        direction = optimizer(torch.tensor([0.3, 5.0, -1.0]), weights, memory, step, free)
        assert direction[1] == 0 and all(float(part[1]) == 0 for part in memory)


def ended(recipe: TrainingRecipe, net: str = "conv", size: int = 30, **more: Any) -> np.ndarray:
    factory, data, prunable = NETS[net]
    model, start = made(factory, prunable)
    return train(model, asked(recipe, start, data(size), **more)).params.floats


BASE = TrainingRecipe(budget=Budget(epochs=2), batch_size=8, lr=0.05)


def test_parts_that_say_nothing_change_no_bit() -> None:
    plain = ended(BASE)
    for same in (
        replace(BASE, pull=Proximal(mu=0.0)), replace(BASE, loss=CrossEntropy(label_smoothing=0.0)),
        replace(BASE, clip_norm=1e9), replace(BASE, budget=Budget(steps=8)),
        replace(BASE, loss=CrossEntropy(classes="own").own(images(30)[1], CLASSES)),
    ):  # fmt: skip
        np.testing.assert_array_equal(ended(same), plain, err_msg=repr(same))
    for other in (
        replace(BASE, pull=Proximal(mu=0.1)), replace(BASE, loss=CrossEntropy(label_smoothing=0.1)),
        replace(BASE, clip_norm=0.01), replace(BASE, budget=Budget(steps=7)), replace(BASE, augment=(Flip(),)),
    ):  # fmt: skip
        assert (ended(other) != plain).any(), other


def test_a_budget_counts_steps() -> None:
    assert Budget(epochs=2).times(3) + Budget(steps=5) == Budget(epochs=6, steps=5)
    assert Budget(epochs=1, steps=5).total(30, 8) == 9 and Budget(steps=5).passes(30, 8) == 2
    assert not Budget() and Budget(steps=1)
    parts = Budget(steps=6)(30, 8, stream(0, "order"))
    whole = Budget(epochs=2)(30, 8, stream(0, "order"))
    assert [len(p) for p in parts] == [4, 2]
    for one, other in zip(sum(parts, []), sum(whole, []), strict=False):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("size", [1, 8, 30, 33, 41])
@pytest.mark.parametrize("budget", [Budget(epochs=2), Budget(steps=1), Budget(epochs=1, steps=3), Budget(steps=7)])
@pytest.mark.parametrize("repeats", [1, 3])
def test_a_budget_counts_the_examples_that_its_batches_hold(budget: Budget, size: int, repeats: int) -> None:
    """A last batch is smaller, or one larger: a share of the pass would be another number."""
    budget = replace(budget, repeats=repeats)
    drawn = budget(size, 8, stream(0, "order"))
    assert budget.examples(size, 8) == sum(len(part) for parts in drawn for part in parts)


def test_a_learnt_mask_costs_the_examples_that_it_saw() -> None:
    task = tiny.task(train={"epochs": None, "steps": 1, "batch_size": 20})
    local = LocalClient(task, 0, 1, "step1", rounds=1)
    assert local.num_train % 20, "else a share of the pass is the same number"
    held = local.full
    lesson = Lesson(rule="threshold", alive=held, density=1.0, epochs=0, steps=1, lr=0.1)
    local.learn(task.theta_0, np.zeros(held.size, np.float32), lesson)
    assert local.log[-1].flops == local.flops(held, 20, masks=True)[0]


@pytest.mark.parametrize("size", [30, 33, 1000])
def test_batches_by_length_hold_every_example_once_and_pad_less(size: int) -> None:
    lengths = stream(0, "lengths").integers(1, 30, size)

    def padded(parts: list[np.ndarray]) -> int:
        return sum(len(part) * int(lengths[part].max()) for part in parts)

    (plain,), (grouped,) = (
        Budget(epochs=1)(size, 8, stream(0, "order")),
        Budget(epochs=1)(size, 8, stream(0, "order"), lengths),
    )
    assert sorted(np.concatenate(grouped)) == list(range(size))
    assert sorted(map(len, grouped)) == sorted(map(len, plain))
    assert padded(grouped) < 0.8 * padded(plain)
    longest = [int(lengths[part].max()) for part in grouped]
    assert longest not in (sorted(longest), sorted(longest, reverse=True)), "batches come in random order"
    first, second = Budget(epochs=2)(size, 8, stream(0, "order"), lengths)
    assert [list(part) for part in first] != [list(part) for part in second]


def test_a_recipe_groups_by_the_longest_field() -> None:
    x = {"a": torch.zeros(40, 9), "b": torch.zeros(40, 9)}
    lengths = {"a": torch.ones(40, dtype=torch.int64), "b": torch.arange(40) % 9 + 1}
    data = Examples(x, torch.zeros(40, dtype=torch.int64), lengths)
    start = Params(np.zeros(1, np.float32), np.zeros(0, np.int64))

    def widths(**how: Any) -> list[int]:
        recipe = replace(BASE, budget=Budget(epochs=1), batch_size=4, **how)
        request = drawn_request(start, data, recipe, order=stream(0, "order"), torch_seed=0)
        return [int(lengths["b"][part].max()) for part in request.batches[0]]

    assert sum(widths(group_by_length=True)) < sum(widths())


def test_a_pull_is_to_the_anchor_that_is_given() -> None:
    model, start = made(*NETS["conv"][::2])
    far = Params(start.floats + 3, start.ints)
    recipe = replace(BASE, pull=Proximal(mu=1.0), lr=0.3, budget=Budget(epochs=10))
    size = model.layout.num_params

    def off(anchor: Params | None) -> float:
        floats = train(model, asked(recipe, start, images(30), anchor=anchor)).params.floats
        return float(np.abs(floats[:size] - far.floats[:size]).mean())

    assert off(far) < 0.5 < 2.5 < off(None)


def test_an_l1_pull_is_the_gradient_of_its_term_and_leaves_other_spans_alone() -> None:
    weights = torch.tensor([-2.0, 0.5, 0.0, 3.0], requires_grad=True)
    (0.1 * weights.abs().sum()).backward()
    found = torch.ones(4)
    L1(strength=0.1)(found, weights.detach(), weights.detach())
    torch.testing.assert_close(found, 1 + weights.grad)
    found = torch.zeros(2, 4)
    L1(strength=0.1, spans=((0, 1), (3, 4)))(found, weights.detach().expand(2, 4), weights.detach())
    torch.testing.assert_close(found, torch.tensor([-0.1, 0, 0, 0.1]).expand(2, 4))
    model, start = made(*NETS["conv"][::2])
    pulled, plain = (
        train(model, asked(replace(BASE, pull=pull), start, images(30))).params.floats
        for pull in (L1(strength=0.1), NO_PULL)
    )
    size = model.layout.num_params
    assert np.abs(pulled[:size]).sum() < np.abs(plain[:size]).sum()
    with pytest.raises(ValueError, match="strength must be at least 0"):
        L1(strength=-1.0)


def test_own_classes_train_as_if_the_others_were_minus_infinity() -> None:
    logits, y = torch.randn(5, 4, requires_grad=True), torch.tensor([1, 3, 3, 1, 1])
    loss = CrossEntropy(classes="own", label_smoothing=0.1).own(y, 4)
    assert loss == Restricted(CrossEntropy(label_smoothing=0.1), (1, 3))
    hidden = logits.detach().clone().requires_grad_()
    shut = torch.tensor([True, False, True, False])
    plain = Restricted(CrossEntropy(), (1, 3))
    expected = functional.cross_entropy(hidden.masked_fill(shut, float("-inf")), y)
    found = plain(logits, y)
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    torch.testing.assert_close(logits.grad, hidden.grad)
    assert torch.isfinite(plain(logits, torch.tensor([0, 1, 3, 1, IGNORED]))), "a class outside does not count"
    torch.testing.assert_close(loss.examples(logits, y).mean(), loss(logits, y))
    assert CrossEntropy(classes="own", label_smoothing=0.1).plain() == CrossEntropy()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_labels_of_minus_100_do_not_count(smoothing: float) -> None:
    logits, y = torch.randn(3, 5, 4), torch.tensor([[0, 1, -100, -100, 2], [3, 3, 3, 3, 3], [-100, 0, 1, 2, 3]])
    loss = CrossEntropy(label_smoothing=smoothing)
    expected = functional.cross_entropy(logits[y != -100], y[y != -100], label_smoothing=smoothing)
    torch.testing.assert_close(loss(logits, y), expected)
    counts = (y != -100).sum(1)
    torch.testing.assert_close((loss.examples(logits, y) * counts).sum() / counts.sum(), expected)


def test_mean_squared_error_takes_its_shapes() -> None:
    loss, y = MeanSquaredError(), torch.randn(6)
    out = torch.randn(6, 1)
    torch.testing.assert_close(loss(out, y), functional.mse_loss(out[:, 0], y))
    torch.testing.assert_close(loss.examples(out, y).mean(), loss(out, y))
    wide = torch.randn(6, 3), torch.randn(6, 3)
    torch.testing.assert_close(loss(*wide), functional.mse_loss(*wide))
    with pytest.raises(ValueError, match="mse: outputs"):
        loss(torch.randn(6, 2), y)


def test_a_batch_of_special_tokens_alone_asks_for_nothing() -> None:
    loss, logits = MaskedLm(num_classes=5, mask_token=4, special=(0,)), torch.zeros(2, 3, 5, requires_grad=True)
    nothing = torch.full((2, 3), IGNORED)
    found = loss(logits, nothing)
    found.backward()
    assert found == loss.examples(logits, nothing).sum() == 0 and (logits.grad == 0).all()


def test_masked_tokens_are_as_bert_draws_them() -> None:
    x = torch.from_numpy(np.random.default_rng(0).integers(2, 50, (400, 50)))
    x[:, 0] = 1  # special
    loss = MaskedLm(num_classes=50, mask_token=0, special=(1,))
    data = Examples(x, x)
    posed = loss.posed(data, stream(0, "a"))
    shown, labels = posed.tensor, posed.y
    asked = labels != IGNORED
    assert (labels[asked] == x[asked]).all() and (shown[~asked] == x[~asked]).all() and not asked[:, 0].any()
    assert 0.13 < float(asked[:, 1:].double().mean()) < 0.17 and asked.any(1).all()
    assert 0.78 < float((shown[asked] == 0).double().mean()) < 0.82
    assert 0.07 < float(((shown != x) & (shown != 0))[asked].double().mean()) < 0.13
    again = examined(loss, data).tensor
    assert (again == examined(loss, data).tensor).all() and (again != shown).any()
    special = torch.full((1, 3), 1)
    assert (loss.posed(Examples(special, special), stream(0, "a")).y == IGNORED).all()


def test_padding_is_never_asked_for() -> None:
    ids = torch.randint(2, 50, (40, 9), generator=torch.Generator().manual_seed(0))
    lengths = torch.arange(40) % 8 + 1
    there = torch.arange(9) < lengths[:, None]
    loss = MaskedLm(num_classes=50, mask_token=0, rate=0.5)
    masked = loss.posed(Examples({"input_ids": ids, "attention_mask": there.long()}, ids), stream(0, "a"))
    ragged = loss.posed(Examples(ids, ids, {"x": lengths}), stream(0, "a"))
    for found in (masked, ragged):
        assert (found.y[~there] == IGNORED).all() and (found.y[there] != IGNORED).any(), "padding is no token"
    assert (masked.x["attention_mask"] == there).all() and ragged.lengths["y"] is lengths


def test_augmentation_is_drawn_by_step_and_cuts_true_windows() -> None:
    x, y = torch.arange(2 * 1 * 4 * 4.0).reshape(2, 1, 4, 4) + 1, torch.zeros(2)
    padded = functional.pad(x, (2,) * 4)
    cut = Crop(pad=2)(x, stream(0, "crop"))
    at = stream(0, "crop").integers(0, 5, (2, 2))
    for n in range(2):
        np.testing.assert_array_equal(cut[n], padded[n, :, at[0, n] : at[0, n] + 4, at[1, n] : at[1, n] + 4])
    flipped = Flip(rate=1.0)(x, stream(0, "flip"))
    np.testing.assert_array_equal(flipped, x.flip(-1))
    recipe = replace(BASE, augment=(Crop(pad=2), Flip()))
    model, start = made(*NETS["conv"][::2])
    request = asked(recipe, start, images(30))
    data = Examples(x, y)
    first, second = (request.shown(step, data).tensor for step in (0, 1))
    assert (first != second).any() and (first == request.shown(0, data).tensor).all()
    piece = replace(request, recipe=replace(recipe, first_step=1))
    assert (piece.shown(0, data).tensor == second).all(), "a piece of a run sees what the run sees"
    with pytest.raises(ValueError, match="flip needs images"):
        Flip()(tokens(3)[0], stream(0, "flip"))


def test_dropout_is_set_for_the_training_and_put_back() -> None:
    module = nn.ModuleList(
        [nn.Dropout(0.5), nn.LSTM(2, 2, 2, dropout=0.1), nn.LSTM(2, 2), Attention(0.3), nn.Dropout2d()]
    )
    before = [getattr(part, name) for part, name in places(module)]
    assert before == [0.5, 0.1, 0.3, 0.3, 0.3, 0.3, 0.5]
    with at_rate(module, 0.2):
        assert {getattr(part, name) for part, name in places(module)} == {0.2}
    assert [getattr(part, name) for part, name in places(module)] == before
    assert not places(nn.LSTM(2, 2)) and not places(nn.Linear(2, 2))
    recipe = replace(BASE, dropout=0.5)
    assert (ended(recipe, "attention") != ended(BASE, "attention")).any()
    np.testing.assert_array_equal(ended(replace(BASE, dropout=0.0), "attention"), ended(BASE, "attention"))


TOGETHER = {
    "adamw, clip, pull, smoothing": replace(
        BASE, optimizer=AdamW(eps=1e-3), clip_norm=0.3, pull=Proximal(mu=0.2), loss=CrossEntropy(label_smoothing=0.1)
    ),
    "nesterov, warm-up": replace(BASE, optimizer=Sgd(momentum=0.9, nesterov=True), schedule=Linear(warmup=0.3)),
    "adam, crop and flip": replace(BASE, optimizer=Adam(eps=1e-3), augment=(Crop(pad=1), Flip()), schedule=Cosine()),
}


@pytest.mark.parametrize("name", TOGETHER)
@pytest.mark.parametrize("masked", [False, True])
def test_a_cohort_equals_its_members_one_by_one(name: str, masked: bool) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 3, 3), nn.Linear(3 * 36, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.conv(x)).flatten(1))

    model, start = made(Plain, ("conv.weight", "head.weight"))
    requests = []
    for k, size in enumerate((30, 17, 22)):
        mask = np.random.default_rng(k).random(model.layout.num_prunable) < 0.4 if masked else None
        request = asked(TOGETHER[name], start, images(size), active=mask, examples_seed=k)
        assert not batch_requests.lacks(request)
        requests.append(request)
    together = cohort.train_together([Training(model, request) for request in requests])
    for request, found in zip(requests, together, strict=True):
        alone = train(model, request)
        np.testing.assert_allclose(found.params.floats, alone.params.floats, rtol=2e-3, atol=2e-5)
        assert found.loss == pytest.approx(alone.loss, rel=1e-3)
        if request.active is not None:
            assert not found.params.floats[: request.active.size][~request.active].any()


def test_a_cohort_masks_tokens_as_each_member_does_alone() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(TOKENS, 8), nn.Linear(8, TOKENS)

        def forward(self, x: Tensor) -> Tensor:
            e = self.embedding(x)
            return self.head(e + e.mean(1, keepdim=True))

    model, start = made(Tagger, ("head.weight",))
    recipe = replace(BASE, loss=MaskedLm(num_classes=TOKENS, mask_token=0))
    requests = [asked(recipe, start, (tokens(n)[0],) * 2, examples_seed=n) for n in (30, 17)]
    for request, found in zip(requests, cohort.train_together([Training(model, r) for r in requests]), strict=True):
        alone = train(model, request)
        np.testing.assert_allclose(found.params.floats, alone.params.floats, rtol=1e-3, atol=1e-5)
        assert found.loss == pytest.approx(alone.loss, rel=1e-5), "a mean over the tokens asked for, not over examples"


def test_the_kernel_trains_augmented_images_as_torch_does() -> None:
    task = tiny.task(compute="sparse")
    model, data = task.flat_model, (images(30)[0], images(30)[1])
    recipe = replace(BASE, optimizer=Sgd(momentum=0.9), augment=(Crop(pad=2), Flip()), schedule=Linear(warmup=0.2))
    for mask in (None, np.random.default_rng(0).random(task.layout.num_prunable) < 0.2):
        request = asked(recipe, task.theta_0, data, active=mask, snapshots=(1,))
        assert not kernel_backend.obstacle(model, request)
        fast, slow = kernel_backend.train(model, request), train(model, request)
        np.testing.assert_allclose(fast.params.floats, slow.params.floats, rtol=2e-3, atol=2e-5)
        np.testing.assert_allclose(fast.snapshots[1], slow.snapshots[1], rtol=2e-3, atol=2e-5)
        assert fast.loss == pytest.approx(slow.loss, rel=1e-4)


@pytest.mark.parametrize("density", [None, 0.5, 0.03])
@pytest.mark.parametrize("pull", [Proximal(mu=2.0), Correction()], ids=["proximal", "correction"])
def test_the_kernel_pulls_as_torch_does(pull: Pull, density: float | None) -> None:
    task, rng = tiny.task(compute="sparse"), np.random.default_rng(0)
    model, layout = task.flat_model, task.layout
    mask = None if density is None else rng.random(layout.num_prunable) < density
    drawn = rng.standard_normal(layout.num_floats).astype(np.float32)
    recipe = replace(BASE, optimizer=Sgd(momentum=0.9, weight_decay=0.01), pull=pull)
    far = replace(task.theta_0, floats=0.1 * drawn)
    for anchor in (None, far):
        for trainable in (None, drawn[: layout.num_params] > 0):
            request = asked(
                recipe, task.theta_0, images(30), active=mask, trainable=trainable, anchor=anchor, snapshots=(1,)
            )
            assert not kernel_backend.obstacle(model, request)
            fast, slow = kernel_backend.train(model, request), train(model, request)
            np.testing.assert_allclose(fast.params.floats, slow.params.floats, rtol=2e-3, atol=2e-5)
            np.testing.assert_allclose(fast.snapshots[1], slow.snapshots[1], rtol=2e-3, atol=2e-5)
            assert fast.loss == pytest.approx(slow.loss, rel=1e-4)
            if mask is not None:
                assert not fast.params.floats[: mask.size][~mask].any()
    without = kernel_backend.train(model, replace(request, recipe=replace(recipe, pull=NO_PULL)))
    assert np.abs(without.params.floats - fast.params.floats).max() > 1e-3


def test_what_the_kernel_and_a_cohort_lack_is_said() -> None:
    assert [
        kernel_backend.lacks(recipe)
        for recipe in (
            BASE,
            replace(BASE, optimizer=AdamW()),
            replace(BASE, optimizer=Sgd(momentum=0.5, nesterov=True)),
            replace(BASE, loss=MeanSquaredError()),
            replace(BASE, loss=CrossEntropy(label_smoothing=0.1)),
            replace(BASE, loss=Restricted(CrossEntropy(), (0, 1))),
            replace(BASE, clip_norm=1.0),
            replace(BASE, pull=Proximal(mu=1.0)),
            replace(BASE, pull=L1(strength=1.0)),
            replace(BASE, dropout=0.1),
            replace(BASE, precision="bf16"),
        )
    ] == [
        "",
        "AdamW",
        "Nesterov momentum",
        "MeanSquaredError",
        "label smoothing",
        "classes: own",
        "clip_norm",
        "",
        "pull L1",
        "dropout",
        "bf16",
    ]
    _, start = made(*NETS["conv"][::2])
    for recipe, why in (
        (replace(BASE, optimizer=Careless()), "a cohort has no Careless"),
        (replace(BASE, loss=OfBatch(functional.cross_entropy)), "a cohort has no OfBatch"),
        (replace(BASE, dropout=0.1), "a cohort has no dropout"),
        (replace(BASE, precision="bf16"), "a cohort has no bf16"),
    ):  # fmt: skip
        assert batch_requests.lacks(asked(recipe, start, images(30))) == why


def test_bf16_casts_the_forward_pass_alone() -> None:
    exact, rounded = ended(BASE), ended(replace(BASE, precision="bf16"))
    assert rounded.dtype == np.float32 and 0 < np.abs(exact - rounded).max() < 0.05
    assert (rounded.view(np.uint32) & 0xFFFF).any(), "weights keep their float32 digits"


def test_a_client_trains_towards_the_anchor_that_its_method_gives() -> None:
    local = LocalClient(tiny.task(train={"pull": {"name": "proximal", "mu": 1.0}}), 0, 1, "federate")
    far = Params(local.task.theta_0.floats + 1, local.task.theta_0.ints)
    mask = np.random.default_rng(0).random(local.full.size) < 0.5
    given, anchors = {"recipe": local.recipe, "active": mask}, (None, far, local.task.theta_0)
    ends = [local.train(far, **given, anchor=anchor).params.floats for anchor in anchors]
    np.testing.assert_array_equal(ends[0][: mask.size][mask], ends[1][: mask.size][mask])
    assert (ends[2] != ends[0]).any() and not any(end[: mask.size][~mask].any() for end in ends)
