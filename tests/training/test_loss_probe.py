"""What scores ask a network, against explicit Hessians, finite differences, conservation and torch's own pruning."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.func import functional_call, hessian
from torch.nn.utils import prune

from fedlth import rng
from fedlth.data.examples import Examples
from fedlth.errors import StudyError
from fedlth.models.flops import layer_flops
from fedlth.models.layout import Layout, Params, layout_of, read
from fedlth.models.mlp import mlp
from fedlth.models.prunable import prunable_names
from fedlth.tickets.evidence import Evidence, Lesson
from fedlth.tickets.schedule import Rescore
from fedlth.tickets.scope import SCOPES, survivors
from fedlth.tickets.score import SCORES
from fedlth.training.flat_model import FlatModel
from fedlth.training.loss_probe import LossProbe
from tests import tiny


def network(
    module: nn.Module, data: Examples, *, prunable: tuple[str, ...] | None = None
) -> tuple[LossProbe, Layout, Params]:
    layout = layout_of(module, prunable_names(module, prunable))
    params = read(module, layout)
    made = LossProbe(
        model=FlatModel(module, layout, "cpu"), params=params, data=data,
        layer_flops=lambda: layer_flops(module, data.tensor[:2])[0], order=lambda: rng.stream(0, "order"), torch_seed=0,
        batch_size=16,
    )  # fmt: skip
    return made, layout, params


def data_of(shape: tuple[int, ...], size: int = 24, classes: int = 3, seed: int = 0) -> Examples:
    draw = torch.Generator().manual_seed(seed)
    return Examples(torch.randn((size, *shape), generator=draw), torch.randint(0, classes, (size,), generator=draw))


def at_init(net: LossProbe, layout: Layout, params: Params, *, mask: np.ndarray | None = None) -> Evidence:
    weights = params.floats[: layout.num_prunable]
    mask = np.ones(weights.size, bool) if mask is None else mask
    weights = weights * mask
    return Evidence(
        layout=layout, init=weights, start=weights, now=weights, mask=mask, gradient=net.gradient,
        rng=rng.stream(0, "score"), at_start=net, at_now=net,
    )  # fmt: skip


class Fifty(nn.Module):
    """50 weights: 5 inputs, 6 smooth units, 3 classes, and 2 that a bias would be."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 8, bias=False)
        self.two = nn.Linear(8, 2, bias=False)
        self.skip = nn.Linear(1, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(torch.tanh(self.one(x))) + self.skip(x[:, :1])
        return out


def fifty(seed: int = 0) -> tuple[LossProbe, Layout, Params]:
    torch.manual_seed(seed)
    return network(Fifty(), data_of((4,), classes=2, seed=seed))


def loss_at(net: LossProbe, layout: Layout) -> Callable[[Tensor], Tensor]:
    """Return the loss as a function of the flat prunable weights, in float64, written out anew."""
    module = net.model.module
    x, y = net.data.tensor.double(), net.data.y

    def loss(flat: Tensor, temperature: float = 1.0) -> Tensor:
        named = {e.name: flat[e.slice].view(e.shape) for e in layout.prunable}
        return nn.functional.cross_entropy(functional_call(module, named, x) / temperature, y)

    return loss


def removed(net: LossProbe, layout: Layout, params: Params, share: float) -> list[float]:
    """Return |L(m) - L(m - share e_i)| of every weight i."""
    flat = torch.from_numpy(params.floats.astype(np.float64))
    loss = loss_at(net, layout)
    whole = float(loss(flat))
    changes = []
    for i in range(flat.numel()):
        without = flat.clone()
        without[i] *= 1 - share
        changes.append(abs(float(loss(without)) - whole))
    return changes


def test_snip_ranks_weights_as_removing_each_does() -> None:
    small, whole = [], []
    for seed in range(6):
        net, layout, params = fifty(seed)
        assert layout.num_prunable == 50
        score = SCORES["snip"]()(at_init(net, layout, params))
        small.append(float(spearmanr(score, removed(net, layout, params, 1e-4)).statistic))
        whole.append(float(spearmanr(score, removed(net, layout, params, 1.0)).statistic))
    assert min(small) > 0.999 and np.median(whole) >= 0.9 and min(whole) > 0.8, (small, whole)


@pytest.mark.parametrize("temperature", [1.0, 200.0])
def test_grasp_equals_the_explicit_hessian(temperature: float) -> None:
    net, layout, params = fifty()
    flat = torch.from_numpy(params.floats.astype(np.float64))
    loss = loss_at(net, layout)
    matrix = hessian(lambda w: loss(w, temperature))(flat)
    slope = torch.func.grad(lambda w: loss(w, temperature))(flat)
    wanted = (flat * (matrix @ slope)).numpy()
    got = SCORES["grasp"](temperature=temperature)(at_init(net, layout, params))
    assert np.abs(got - wanted).max() / np.abs(wanted).max() < 1e-6


def test_grasp_keeps_what_the_gradient_flow_needs() -> None:
    net, layout, params = fifty()
    flat = torch.from_numpy(params.floats.astype(np.float64))
    loss = loss_at(net, layout)
    flow = lambda w: float(torch.func.grad(loss)(w).square().sum())  # noqa: E731
    score = SCORES["grasp"](temperature=1.0)(at_init(net, layout, params))
    step = 1e-5
    for i in (int(np.argmax(score)), int(np.argmin(score))):
        smaller = flat.clone()
        smaller[i] *= 1 - step
        # Shrinking weight i changes |g|^2 by -2 step x score: losing what is kept loses flow.
        assert (flow(smaller) - flow(flat)) / (-2 * step) == pytest.approx(score[i], rel=1e-3)


def test_squared_gradients_are_one_example_at_a_time() -> None:
    net, layout, params = fifty()
    total = np.zeros(50)
    for i in range(24):
        one = replace(net, data=net.data.batch(slice(i, i + 1)))
        total += one.gradient(params.floats[:50]).astype(float) ** 2
    np.testing.assert_allclose(net.squared_gradient(params.floats[:50]), total / 24, rtol=1e-4)


def test_a_recurrent_net_has_squared_gradients_too() -> None:
    task = tiny.open_task(
        tiny.study(
            data={"name": "tests.user_model:sentences"}, model={"name": "tests.user_model:reader", "options": {}}
        ).science()
    )
    from fedlth.training.local_client import LocalClient

    net = LocalClient(task, 0, 0, "test").network(task.theta_0)
    x, y = net.data.tensor, net.data.y
    net = replace(net, data=Examples(x[:3], y[:3]))
    weights = task.theta_0.floats[: task.layout.num_prunable]
    each = [
        replace(net, data=Examples(x[i : i + 1], y[i : i + 1])).gradient(weights).astype(float) ** 2 for i in range(3)
    ]
    np.testing.assert_allclose(net.squared_gradient(weights), np.mean(each, axis=0), rtol=1e-3, atol=1e-10)
    with pytest.raises(StudyError, match="synflow feeds ones in place of images"):
        net.flow(weights)


def test_fisher_divides_by_what_a_weight_costs() -> None:
    module = tiny.Small()
    net, layout, params = network(module, data_of((1, 8, 8), classes=4))
    at = at_init(net, layout, params)
    plain, per_cost = SCORES["fisher"](per_cost=False)(at), SCORES["fisher"]()(at)
    conv, head = layout.prunable
    ratio = plain / np.maximum(per_cost, 1e-300)
    assert np.unique(np.round(ratio[conv.slice][plain[conv.slice] > 0], 6)).tolist() == [2 * 6 * 6]
    assert np.unique(np.round(ratio[head.slice][plain[head.slice] > 0], 6)).tolist() == [2.0]


def test_gradient_weight_is_taken_where_training_ended() -> None:
    net, layout, params = fifty()
    at = at_init(net, layout, params)
    moved = replace(at, now=at.now + np.float32(0.3))
    wanted = np.abs(net.gradient(moved.now) * moved.now)
    np.testing.assert_array_equal(SCORES["gradient_weight"]()(moved), wanted)
    assert (SCORES["gradient_weight"]()(moved) != SCORES["snip"]()(moved)).any()


# SynFlow


def deep(seed: int = 0, *, size: int = 100) -> tuple[LossProbe, Layout, Params]:
    """The bias-free 784-300-100-100-100-10 of the maximal critical compression check."""
    torch.manual_seed(seed)
    widths = (784, 300, 100, 100, 100, 10)
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(before, after, bias=False), nn.ReLU()]
    data = data_of((1, 28, 28), size=size, classes=10, seed=seed)
    return network(
        nn.Sequential(*layers[:-1]), Examples(data.tensor.abs().clamp(max=1), data.y)
    )  # as positive as images are


def layer_sums(score: np.ndarray, layout: Layout) -> np.ndarray:
    return np.array([score[e.slice].sum(dtype=np.float64) for e in layout.prunable])


def pruned_at_init(
    score: str, steps: int, density: float, made: tuple[LossProbe, Layout, Params]
) -> tuple[np.ndarray, Layout]:
    net, layout, params = made
    mask = np.ones(layout.num_prunable, bool)
    part = SCORES[score]()
    for at in Rescore(steps)((density,))[0]:
        mask = SCOPES["global"]()(part(at_init(net, layout, params, mask=mask)), mask, layout, at)
    return mask, layout


def test_synflow_is_conserved_from_layer_to_layer() -> None:
    net, layout, params = deep()
    sums = layer_sums(SCORES["synflow"]()(at_init(net, layout, params)), layout)
    assert np.ptp(sums) / sums.mean() < 1e-12
    half = np.random.default_rng(0).random(layout.num_prunable) < 0.5
    sums = layer_sums(SCORES["synflow"]()(at_init(net, layout, params, mask=half)), layout)
    assert np.ptp(sums) / sums.mean() < 1e-12


def test_synflow_is_conserved_through_biases_norms_and_pooling() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3)
            self.norm = nn.BatchNorm2d(4)
            self.deep = nn.Conv2d(4, 5, 3)
            self.head = nn.Linear(5 * 2 * 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = nn.functional.max_pool2d(torch.relu(self.norm(self.conv(x))), 2)
            out: Tensor = self.head(torch.relu(self.deep(x)).flatten(1))
            return out

    torch.manual_seed(0)
    module = Net()
    with torch.no_grad():
        module.norm.running_mean.normal_()
        module.norm.weight.normal_()
        module.norm.bias.normal_()
    net, layout, params = network(module, data_of((1, 10, 10)))
    sums = layer_sums(SCORES["synflow"]()(at_init(net, layout, params)), layout)
    assert np.ptp(sums) / sums.mean() < 1e-6
    assert float(module.norm.running_mean.abs().sum()) > 0, "the net itself is untouched"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_synflow_empties_no_layer_where_one_shot_scores_do(seed: int) -> None:
    made = deep(seed)
    empty = lambda found: [not found[0][e.slice].any() for e in found[1].prunable]  # noqa: E731
    assert not any(empty(pruned_at_init("synflow", 100, 10**-4.5, made)))
    assert any(empty(pruned_at_init("snip", 1, 10**-2.25, made)))
    assert any(empty(pruned_at_init("synflow", 1, 10**-1.0, made))), "the schedule is the algorithm"
    assert any(empty(pruned_at_init("magnitude", 1, 10**-1.25, made)))


def test_synflow_sees_no_data() -> None:
    one, layout, params = deep(size=10)
    other = replace(one, data=data_of((1, 28, 28), size=30, classes=10, seed=7))
    masks = [pruned_at_init("synflow", 10, 0.01, (net, layout, params))[0] for net in (one, other)]
    np.testing.assert_array_equal(*masks)
    snip = [pruned_at_init("snip", 1, 0.01, (net, layout, params))[0] for net in (one, other)]
    assert (snip[0] != snip[1]).any()


# Norm scales


def test_gammas_are_of_the_norm_right_behind() -> None:
    module = tiny.Small()
    with torch.no_grad():
        module.norm.weight.copy_(torch.tensor([0.5, -2.0, 1.0]))
    net, layout, params = network(module, data_of((1, 8, 8), classes=4), prunable=("conv.weight",))
    assert net.gammas().reshape(3, 9)[:, 0].tolist() == [0.5, 2.0, 1.0]
    assert (net.gammas().reshape(3, 9).std(axis=1) == 0).all()
    whole, _, _ = network(tiny.Small(), data_of((1, 8, 8), classes=4))
    with pytest.raises(StudyError, match="gamma needs a norm layer with weights right behind head.weight"):
        whole.gammas()


def test_gammas_are_of_the_filters_of_a_transposed_convolution() -> None:
    module = nn.Sequential(nn.ConvTranspose2d(3, 3, 2), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 3))
    module[1].weight.data = torch.tensor([0.5, -2.0, 1.0])
    net, _, _ = network(module, data_of((3, 3, 3)), prunable=("0.weight",))
    assert net.gammas().reshape(3, 3, 4)[0, :, 0].tolist() == [0.5, 2.0, 1.0]
    assert (net.gammas().reshape(3, 3, 4).std(axis=(0, 2)) == 0).all()


# Learned masks


def digits(size: int = 120) -> Examples:
    """Two blobs a class, easy to tell apart."""
    draw = torch.Generator().manual_seed(0)
    y = torch.randint(0, 4, (size,), generator=draw)
    centre = torch.randn((4, 12), generator=draw)
    return Examples(centre[y] + 0.3 * torch.randn((size, 12), generator=draw), y)


@pytest.mark.parametrize("rule", ["edge_popup", "biprop", "bernoulli"])
def test_a_learned_mask_beats_its_untrained_net_and_leaves_weights_alone(rule: str) -> None:
    torch.manual_seed(0)
    net, layout, params = network(mlp(num_classes=4, input_shape=(12,), hidden=[64]), digits())
    score = SCORES[rule](**({"epochs": 30, "lr": 20.0} if rule == "bernoulli" else {"epochs": 30}))
    at = replace(at_init(net, layout, params), density=0.5)
    before = params.digest()
    learned = score(at)
    assert params.digest() == before and learned.shape == (layout.num_prunable,)
    np.testing.assert_array_equal(learned, score(at))
    mask = SCOPES["layerwise"]()(learned, at.mask, layout, 0.5)
    from fedlth.tickets.learned import frozen_values

    accuracy = {}
    for name, chosen in (("learned", mask), ("full", at.mask), ("random", np.random.default_rng(0).permutation(mask))):
        values = frozen_values(score.weights, at.init, chosen, layout) * chosen
        floats = params.floats.copy()
        floats[: mask.size] = values
        net.model.load(replace(params, floats=floats))
        with torch.no_grad():
            accuracy[name] = float((net.model.module(net.data.tensor).argmax(-1) == net.data.y).double().mean())
    assert accuracy["learned"] > 0.8 and accuracy["learned"] > max(accuracy["full"], accuracy["random"]) + 0.2, accuracy


def test_learning_tells_its_cost_and_respects_the_dead() -> None:
    told: list[tuple[float, int]] = []
    net, layout, params = network(mlp(num_classes=4, input_shape=(12,), hidden=[8]), digits())
    net = replace(net, learning=lambda one: nullcontext(told.append((float(one.alive.mean()), one.epochs))))
    alive = np.arange(layout.num_prunable) % 2 == 0
    lesson = Lesson(rule="edge_popup", alive=alive, density=0.25, epochs=3, lr=0.1)
    weights = params.floats[: layout.num_prunable] * alive
    scores = net.learn(weights, lesson)
    assert told == [(0.5, 3)]
    first = np.abs(rng.stream(0, "order").uniform(-1, 1, weights.size).astype(np.float32))
    for e in layout.prunable:
        first[e.slice] /= np.float32(np.sqrt(e.shape[1]))
    np.testing.assert_array_equal(scores[~alive], first[~alive])
    assert (scores[alive] != first[alive]).any()


def test_a_learning_that_diverges_says_so() -> None:
    net, layout, params = network(mlp(num_classes=4, input_shape=(12,), hidden=[8]), digits())
    lesson = Lesson(rule="bernoulli", alive=np.ones(layout.num_prunable, bool), density=0.5, epochs=1, lr=1.0)
    with pytest.raises(FloatingPointError, match="training diverged"):
        net.learn(np.full(layout.num_prunable, np.inf, np.float32), lesson)


# torch.nn.utils.prune as an oracle


def tensors(module: nn.Module, layout: Layout) -> dict[str, tuple[nn.Module, str]]:
    return {e.name: (module.get_submodule(e.name.rpartition(".")[0]), "weight") for e in layout.prunable}


@pytest.mark.parametrize("density", [0.9, 0.5, 0.2, 0.03])
def test_layerwise_and_global_select_what_torch_selects(density: float) -> None:
    torch.manual_seed(1)
    module = mlp(num_classes=5, input_shape=(11,), hidden=[13, 7])
    layout = layout_of(module, prunable_names(module, None))
    weights = read(module, layout).floats[: layout.num_prunable]
    assert np.unique(np.abs(weights)).size == weights.size, "no ties: torch breaks them its own way"
    whole = np.ones(weights.size, bool)
    ours = SCOPES["global"]()(np.abs(weights), whole, layout, density)
    places = tensors(module, layout)
    prune.global_unstructured(
        list(places.values()), pruning_method=prune.L1Unstructured, amount=weights.size - survivors(layout, density)
    )
    for e in layout.prunable:
        theirs = places[e.name][0].get_buffer("weight_mask").numpy().astype(bool).reshape(-1)
        np.testing.assert_array_equal(ours[e.slice], theirs)
    for part, name in places.values():
        prune.remove(part, name)
    with torch.no_grad():
        for e in layout.prunable:
            part = places[e.name][0]
            part.get_parameter("weight").copy_(torch.from_numpy(weights[e.slice].reshape(e.shape)))
    ours = SCOPES["layerwise"]()(np.abs(weights), whole, layout, density)
    for e in layout.prunable:
        part, name = places[e.name]
        prune.l1_unstructured(part, name, amount=e.size - int(ours[e.slice].sum()))
        theirs = part.get_buffer("weight_mask").numpy().astype(bool).reshape(-1)
        np.testing.assert_array_equal(ours[e.slice], theirs)


def test_any_score_selects_what_torch_selects_by_it() -> None:
    torch.manual_seed(2)
    module = mlp(num_classes=3, input_shape=(9,), hidden=[6])
    net, layout, params = network(module, data_of((9,)))
    score = SCORES["grasp"](temperature=1.0)(at_init(net, layout, params))
    ours = SCOPES["global"]()(score, np.ones(score.size, bool), layout, 0.4)
    places = tensors(module, layout)
    given: dict[Any, Tensor] = {
        places[e.name]: torch.from_numpy((score - score.min() + 1)[e.slice].reshape(e.shape)) for e in layout.prunable
    }
    prune.global_unstructured(
        list(places.values()), pruning_method=prune.L1Unstructured, importance_scores=given,
        amount=score.size - survivors(layout, 0.4),
    )  # fmt: skip
    for e in layout.prunable:
        theirs = places[e.name][0].get_buffer("weight_mask").numpy().astype(bool).reshape(-1)
        np.testing.assert_array_equal(ours[e.slice], theirs)


def test_rows_are_what_torch_prunes_as_structure() -> None:
    from tests.laws.fakes import finder

    torch.manual_seed(3)
    module = mlp(num_classes=4, input_shape=(9,), hidden=[10])
    layout = layout_of(module, prunable_names(module, None))
    weights = read(module, layout).floats[: layout.num_prunable]
    ours = finder(granularity="row").pick(np.abs(weights), np.ones(weights.size, bool), layout, 0.5)
    for name, (part, tensor) in tensors(module, layout).items():
        entry = next(e for e in layout.prunable if e.name == name)
        prune.ln_structured(part, tensor, amount=entry.shape[0] // 2, n=1, dim=0)
        theirs = part.get_buffer("weight_mask").numpy().astype(bool).reshape(-1)
        np.testing.assert_array_equal(ours[entry.slice], theirs)


def test_flow_of_a_chain_by_hand() -> None:
    module = nn.Sequential(nn.Linear(2, 1, bias=False), nn.ReLU(), nn.Linear(1, 2, bias=False))
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[2.0, -3.0]]))
        module[2].weight.copy_(torch.tensor([[-1.0], [4.0]]))
    net, layout, params = network(module, Examples(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)))
    score = SCORES["synflow"]()(at_init(net, layout, params))
    assert score.tolist() == [10.0, 15.0, 5.0, 20.0]
    assert math.isclose(score[:2].sum(), score[2:].sum())
