"""Subset sums, the tangent space, neurons at equilibrium, the spectral gap: each against what it must satisfy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from fedlth import rng
from fedlth.data.examples import Examples
from fedlth.errors import StudyError
from fedlth.lab import imc, neq, subset_sum, tangent
from fedlth.models.layout import Params, layout_of, read
from fedlth.models.mlp import mlp
from fedlth.models.prunable import prunable_names
from fedlth.training.evaluation import evaluate
from fedlth.training.flat_model import FlatModel
from fedlth.training.request import drawn_request
from fedlth.training.train import train
from tests import tiny

# Random fixed-size subset sum


def test_the_counts_of_the_brute_force_and_its_bound() -> None:
    found = {(k, e): subset_sum.needed(k, e) for k, e in ((3, 0.01), (3, 0.001), (5, 0.01))}
    assert 13 <= found[3, 0.01].median <= 24
    assert found[3, 0.001].median > found[3, 0.01].median
    for one in found.values():
        assert one.median >= one.bound


def test_subset_sums_and_cover_by_hand() -> None:
    assert subset_sum.subset_sums(np.array([1.0, 2.0, 4.0]), 2).tolist() == [3, 5, 6]
    sums = np.array([0.0, 1.0])
    assert subset_sum.covered(sums, np.array([-0.05, 0.5, 1.05, 0.96]), 0.1) == 0.75
    assert subset_sum.covered(np.zeros(0), np.array([0.0]), 0.1) == 0
    assert subset_sum.entropy(0.5) == 1 and subset_sum.entropy(0.0) == 0
    draw = np.random.default_rng(0).uniform(-1, 1, 9)
    brute = [sum(c) for c in itertools.combinations(draw, 4)]
    np.testing.assert_allclose(subset_sum.subset_sums(draw, 4), np.sort(brute))
    with pytest.raises(StudyError, match="subset_sum.k must be at least 1"):
        subset_sum.needed(0, 0.1)


# Data and nets


def blobs(size: int = 160, classes: int = 4, seed: int = 0) -> Examples:
    draw = torch.Generator().manual_seed(seed)
    y = torch.randint(0, classes, (size,), generator=draw)
    centre = torch.randn((classes, 8), generator=torch.Generator().manual_seed(99))
    return Examples(centre[y] + 0.6 * torch.randn((size, 8), generator=draw), y)


def model_of(module: nn.Module) -> tuple[FlatModel, Params]:
    layout = layout_of(module, prunable_names(module, None))
    params = read(module, layout)
    return FlatModel(module, layout, "cpu"), params


def relu_net(seed: int = 0, hidden: tuple[int, ...] = (16, 16)) -> tuple[FlatModel, Params]:
    torch.manual_seed(seed)
    return model_of(mlp(num_classes=4, input_shape=(8,), hidden=hidden))


def smooth_net(seed: int = 0) -> tuple[FlatModel, Params]:
    torch.manual_seed(seed)
    return model_of(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)))


# The tangent space


@pytest.mark.parametrize(("net", "least"), [(relu_net, 2.3), (smooth_net, 3.5)])
def test_the_remainder_falls_faster_than_the_step(net: object, least: float) -> None:
    model, params = net()  # type: ignore[operator]
    view = tangent.Tangent(model, params, double=True)
    x = blobs().tensor.double()
    ratios = []
    for seed in range(5):
        delta = torch.from_numpy(np.random.default_rng(seed).normal(0, 0.1, view.zero().shape))
        left = tangent.remainders(view, delta, x, 2)
        ratios += [a / b for a, b in itertools.pairwise(left)]
    assert np.median(ratios) >= least
    assert view.remainder(view.zero(), x) == 0, "exact where it stands"


def test_the_linearised_logits_are_those_of_the_jacobian() -> None:
    model, params = smooth_net()
    view, x = tangent.Tangent(model, params, double=True), blobs(6).tensor.double()
    delta = torch.from_numpy(np.random.default_rng(0).normal(size=view.zero().shape))
    rows = torch.autograd.functional.jacobian(lambda w: view._call(w, {}, x), view._split()[0])
    np.testing.assert_allclose(view.logits(delta, x), view.exact(view.zero(), x) + rows @ delta, rtol=1e-9)
    base = view.logits(view.zero(), x)
    np.testing.assert_allclose(view.logits(2 * delta, x) - base, 2 * (view.logits(delta, x) - base), rtol=1e-9)


def test_linearised_fine_tuning_learns_and_holds_what_is_masked() -> None:
    model, params = relu_net()
    view, data = tangent.Tangent(model, params), blobs()
    mask = np.arange(model.layout.num_prunable) % 2 == 0
    recipe = tiny.recipe(epochs=4, batch_size=16, lr=0.1, momentum=0.5)
    delta = tangent.fine_tune(view, data, recipe=recipe, order=rng.stream(0, "order"), mask=mask)
    assert not delta[: mask.size][torch.from_numpy(~mask)].any() and delta[: mask.size].any()
    before = tangent.accuracy(view, view.zero(), data, linear=True)
    after = tangent.accuracy(view, delta, data, linear=True)
    assert after > before + 0.2 and after > 0.8
    assert tangent.accuracy(view, delta, data, linear=False) > before, "reported beside it"
    again = tangent.fine_tune(view, data, recipe=recipe, order=rng.stream(0, "order"), mask=mask)
    assert torch.equal(delta, again)


# Neurons at equilibrium


def test_the_gate_follows_its_formula_and_changes_nothing_when_asked_twice() -> None:
    gate = neq.UpdateGate(mu=0.5, epsilon=0.05)
    looks = [np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([[1.0, 1.0], [1.0, 0.0]]), np.array([[0.0, 1.0], [1.0, 0.0]])]
    state, similar = neq.Equilibrium(), []
    for number, y in enumerate(looks):
        before = state
        state, frozen = gate(before, {"fc": y})
        again, same = gate(before, {"fc": y})
        np.testing.assert_array_equal(frozen["fc"], same["fc"])
        if number:
            similar.append(state.similarity["fc"])
        assert not frozen["fc"].any() or number == 2
    np.testing.assert_allclose(similar[0], [math.sqrt(0.5), 1])
    np.testing.assert_allclose(similar[1], [math.sqrt(0.5), 1])
    assert frozen["fc"].tolist() == [True, True], "neither unit's similarity changed"
    state, frozen = gate(state, {"fc": np.array([[1.0, -9.0], [1.0, 0.0]])})
    assert frozen["fc"].tolist() == [False, True]


def test_a_dead_unit_is_at_equilibrium() -> None:
    assert neq._cosine(np.zeros((1, 3)), np.zeros((1, 3))).tolist() == [1]
    assert neq._cosine(np.zeros((1, 3)), np.ones((1, 3))).tolist() == [0]


def test_frozen_units_are_frozen_whole_and_byte_for_byte() -> None:
    model, params = relu_net()
    data = blobs()
    recipe = tiny.recipe(epochs=8, batch_size=16, lr=0.1, momentum=0.9, weight_decay=1e-3)
    epochs = neq.train(
        model, params, data=data, held_out=data.tensor[:20], recipe=recipe, gate=neq.UpdateGate(epsilon=2e-2),
        order=rng.stream(0, "order"), torch_seed=0,
    )  # fmt: skip
    assert [e.frozen for e in epochs[:2]] == [0, 0] and max(e.frozen for e in epochs) > 0.3
    before = params
    for epoch in epochs:
        size = epoch.moves.size
        stayed = ~epoch.moves
        assert epoch.params.floats[:size][stayed].tobytes() == before.floats[:size][stayed].tobytes()
        moved = epoch.params.floats[:size] != before.floats[:size]
        assert moved.sum() > 0.5 * epoch.moves.sum()
        before = epoch.params
    plain = train(model, drawn_request(params, data, recipe, order=rng.stream(0, "order"), torch_seed=0)).params
    held_out = blobs(400, seed=5)
    assert evaluate(model, epochs[-1].params, held_out).accuracy >= evaluate(model, plain, held_out).accuracy - 0.05


def test_a_gate_that_never_freezes_is_plain_training() -> None:
    model, params = relu_net()
    data = blobs()
    recipe = tiny.recipe(epochs=1, batch_size=16, lr=0.1, momentum=0.9)
    (epoch,) = neq.train(
        model, params, data=data, held_out=data.tensor[:20], recipe=recipe, gate=neq.UpdateGate(),
        order=rng.stream(0, "order"), torch_seed=0,
    )  # fmt: skip
    plain = train(model, drawn_request(params, data, recipe, order=rng.stream(0, "order"), torch_seed=0))
    np.testing.assert_allclose(epoch.params.floats, plain.params.floats, atol=1e-6)


def test_what_may_move_is_everything_but_the_frozen_units_rows_and_biases() -> None:
    model, _ = relu_net(hidden=(3,))
    moves = neq.moving(model.layout, {"1": np.array([True, False, False]), "3": np.zeros(4, bool)})
    at = {e.name: moves[e.slice].reshape(e.shape) for e in model.layout.floats}
    assert not at["1.weight"][0].any() and at["1.weight"][1:].all()
    assert at["1.bias"].tolist() == [False, True, True] and at["3.weight"].all() and at["3.bias"].all()


# The spectral gap


def test_the_spectrum_is_the_hessians() -> None:
    model, params = smooth_net()
    data = blobs(40)
    values, vectors = imc.spectrum(model, params, data)
    assert (np.diff(values) >= 0).all()
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(values.size), atol=1e-10)
    size = values.size
    direction = vectors[:, -1]
    from fedlth.training.evaluation import gradient

    def slope(share: float) -> np.ndarray:
        floats = params.floats.copy()
        floats[:size] += (share * direction).astype(np.float32)
        return gradient(model, Params(floats, params.ints), data).astype(float)

    np.testing.assert_allclose((slope(0.01) - slope(-0.01)) / 0.02, values[-1] * direction, atol=0.01 * values[-1])


def test_the_cut_lies_at_the_largest_gap_allowed_and_keeps_what_curves() -> None:
    values = np.array([0.0, 0.1, 0.2, 5.0, 5.1, 5.2, 5.3, 5.4, 5.5, 90.0])
    weights = np.ones(10, np.float32)
    cut = imc.split(values, np.eye(10), weights)
    assert cut.dropped == 9 and cut.mask.tolist() == [False] * 9 + [True] and cut.gap == 84.5
    cut = imc.split(values, np.eye(10), weights, least=0.3)
    assert cut.dropped == 3 and cut.mask.tolist() == [False] * 3 + [True] * 7
    weights[9] = 0
    assert not imc.split(values, np.eye(10), weights).mask[9], "a weight of zero is worth nothing"


def test_too_large_a_net_is_refused() -> None:
    model, params = relu_net(hidden=(200, 100))
    with pytest.raises(StudyError, match="imc: the full Hessian needs at most 2000 prunable weights, got 22000"):
        imc.spectrum(model, params, blobs(10))


def test_the_spectral_ticket_beats_a_random_one_of_its_size() -> None:
    data, held_out = blobs(), blobs(400, seed=5)
    better = []
    for seed in range(3):
        model, params = smooth_net(seed)
        few = tiny.recipe(epochs=1, batch_size=16, lr=0.1)
        near = train(model, drawn_request(params, data, few, order=rng.stream(seed, "few"), torch_seed=0)).params
        cut = imc.split(*imc.spectrum(model, near, data), near.floats[: model.layout.num_prunable], most=0.3)
        other = np.random.default_rng(seed).permutation(cut.mask)
        recipe = tiny.recipe(epochs=3, batch_size=16, lr=0.1)
        accuracy = [
            evaluate(
                model,
                train(
                    model, drawn_request(near, data, recipe, order=rng.stream(seed, "o"), torch_seed=0, active=m)
                ).params,
                held_out,
            ).accuracy
            for m in (cut.mask, other)
        ]
        assert cut.mask.sum() == other.sum() == model.layout.num_prunable - cut.dropped
        better.append(accuracy[0] - accuracy[1])
    assert np.median(better) >= 0, better
