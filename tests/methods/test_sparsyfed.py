"""SparsyFed: powers of weights, pruned activations, exact targets; with beta 1 and density 1 it is FedAvg."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedlth.errors import StudyError
from fedlth.experiment.resolve import resolve
from fedlth.methods.aggregate import Contribution, join
from fedlth.methods.global_mask import UnionMean
from fedlth.methods.sparsyfed import Power, pruned_activations
from fedlth.models.layout import Layout, Params, layout_of
from fedlth.storage.run_folder import RunFolder
from fedlth.storage.server_state import ServerState
from fedlth.training.local_client import LocalClient
from fedlth.training.request import drawn_request
from fedlth.wire.payload import Content
from tests import tiny
from tests.test_methods import final_theta, manual_fedavg

STILL = {"rounds": 3, "clients_per_round": 2}
SIZES = {"name": "dirichlet", "alpha": 1.0}


def local_of(made: Any, client: int = 1) -> LocalClient:
    return LocalClient(tiny.experiment(made).task, client, 1, "federate")


@pytest.mark.parametrize("activations", [True, False])
def test_with_beta_1_and_density_1_it_is_fedavg_to_the_bit(activations: bool, tmp_path: Path) -> None:
    method = {"name": "sparsyfed", "beta": 1.0, "density": 1.0, "activations": activations}
    made = tiny.study(method=method, federate=STILL, partition=SIZES, wire="raw")
    plain = tiny.study(method="fedavg", federate=STILL, partition=SIZES, wire="raw")
    tiny.run(made, tmp_path / "r")
    tiny.run(plain, tmp_path / "plain")
    assert final_theta(tmp_path / "r") == manual_fedavg(plain, weighted=True).digest()
    rows = [[r for r in tiny.rows(tmp_path / n, "ledger") if r["phase"] == "federate"] for n in ("r", "plain")]
    assert [r["payload_bytes"] for r in rows[0]] == [r["payload_bytes"] for r in rows[1]]


def test_a_power_of_1_in_the_view_changes_nothing() -> None:
    local = local_of(tiny.study(compute="reference", train={"epochs": 2, "momentum": 0.9}))
    plain = local.train(local.task.theta_0, recipe=local.recipe)
    for activations in (True, False):  # at density 1 there is nothing to prune of an input
        recipe = replace(local.recipe, view=Power(1.0, activations))
        assert local.train(local.task.theta_0, recipe=recipe).params.digest() == plain.params.digest()


def test_a_power_on_four_elements() -> None:
    """w = sign(v) |v|^2: 0, 1, 4, -9 of 0, 1, 2, -3; the gradient is 2 |v| times the network's."""
    local = local_of(tiny.study())
    task, model = local.task, local.task.flat_model
    floats = task.theta_0.floats.copy()
    floats[:4] = 0.0, 1.0, 2.0, -3.0
    request = drawn_request(task.theta_0, local.train_part, local.recipe, order=local.rng("order"), torch_seed=0)
    weights, asked = torch.from_numpy(floats[: task.layout.num_params]), list[Tensor]()

    class Ones:
        def __init__(self, seen: Tensor) -> None:
            asked.append(seen.clone())
            self.gradient, self.loss = torch.ones_like(seen), 0.0

    with Power(2.0, False).opened(model, request) as gradient:
        found, _ = gradient(weights, 0, Ones)  # type: ignore[arg-type]
    assert asked[0][:4].tolist() == [0.0, 1.0, 4.0, -9.0] and found[:4].tolist() == [0.0, 2.0, 4.0, 6.0]
    size = task.layout.num_prunable
    assert (found[size:] == 1).all() and torch.equal(asked[0][size:], weights[size:])
    view = Power(2.0, False)
    there = view.power(Params(floats, task.theta_0.ints), size)
    np.testing.assert_array_equal(there.floats[:4], [0.0, 1.0, 4.0, -9.0])
    np.testing.assert_allclose(view.root(there, size).floats, floats, rtol=1e-6, atol=1e-7)


def test_the_gradient_is_that_of_the_power() -> None:
    """Held against autograd through the re-parameterised network itself."""
    local = local_of(tiny.study(compute="reference", train={"steps": 1, "momentum": 0.0, "lr": 0.1}))
    task, beta = local.task, 1.25
    size = task.layout.num_prunable
    request = drawn_request(task.theta_0, local.train_part, local.recipe, order=local.rng("order"), torch_seed=0)
    batch = local.train_part.batch(torch.from_numpy(request.batches[0][0]))
    v = torch.from_numpy(task.theta_0.floats.copy()).requires_grad_()
    w = torch.cat((v[:size].sign() * v[:size].abs().pow(beta), v[size:]))
    named = {e.name: w[e.slice].view(e.shape) for e in task.layout.floats}
    logits = torch.func.functional_call(task.model.module(), named, (batch.tensor,))
    F.cross_entropy(logits, batch.y).backward()
    moved = local.train(task.theta_0, recipe=replace(local.recipe, view=Power(beta, False))).params.floats
    assert v.grad is not None
    np.testing.assert_allclose(moved, task.theta_0.floats - 0.1 * v.grad.numpy(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Conv2d(2, 4, 3, padding=1)], ids=["linear", "convolution"])
def test_activations_are_pruned_as_they_are_kept_for_the_backward_pass(layer: nn.Module) -> None:
    """The forward pass and the gradient to the input are exact; that to the weights is of the largest inputs."""
    torch.manual_seed(0)
    shape = (5, 6) if isinstance(layer, nn.Linear) else (5, 2, 4, 4)
    net, x = nn.Sequential(layer), torch.randn(shape)
    weight: Any = layer.weight
    with torch.no_grad():
        weight.view(-1)[: weight.numel() // 4 * 3] = 0.0
    layout = layout_of(net, ("0.weight",))
    share = float((weight != 0).float().mean())
    kept = x.reshape(-1).abs().topk(round(share * x.numel())).indices
    sparse = torch.zeros(x.numel()).index_copy_(0, kept, x.reshape(-1)[kept]).view(shape)

    def gradients(call: Callable[[Tensor], Tensor], at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        at = at.clone().requires_grad_()
        out = call(at)
        to_input, to_weight = torch.autograd.grad(
            (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum(), (at, weight)
        )
        return out.detach(), to_input, to_weight

    out, to_input, to_weight = gradients(net, x)
    with pruned_activations(net, layout):
        found = gradients(net, x)
    torch.testing.assert_close(found[0], out, rtol=0, atol=0)
    torch.testing.assert_close(found[1], to_input)
    torch.testing.assert_close(found[2], gradients(net, sparse)[2])
    assert not torch.allclose(found[2], to_weight)
    assert all(torch.equal(a, b) for a, b in zip(gradients(net, x), (out, to_input, to_weight), strict=True))


def visited(made: Any, visits: int = 1) -> tuple[list[Content], LocalClient]:
    """Let one client visit by itself; return what it sent each time."""
    experiment, local = tiny.experiment(made), local_of(made)
    start, state, sent = experiment.initial(), experiment.first_state(1), list[Content]()
    update: Any = experiment.method.own
    for _ in range(visits):
        made_of = update(local, {"theta_g": sent[-1] if sent else Content(local.full, start.floats, start.ints)}, state)
        state = made_of.state
        sent.append(made_of.contents["update"])
    return sent, local


def test_what_comes_up_is_exactly_the_target_and_the_largest() -> None:
    (content,), local = visited(tiny.of_method("sparsyfed"))
    assert content.floats is not None
    assert content.mask.sum() == round(0.3 * local.full.size)
    sizes = np.abs(content.floats[: local.full.size])
    assert (sizes[~content.mask] == 0).all() and (sizes[content.mask] > 0).all()


def test_the_options_change_what_they_say() -> None:
    found = {
        str(options): visited(tiny.study(method={"name": "sparsyfed", "density": 0.3, **options}), 2)[0][-1]
        for options in ({}, {"activations": False}, {"beta": 1.5}, {"density": 0.1})
    }
    plain = found.pop("{}")
    for options, content in found.items():
        assert (content.floats != plain.floats).any(), options
    assert found["{'density': 0.1}"].mask.sum() < plain.mask.sum()
    for options in ({"beta": 0.9}, {"density": 0.0}, {"density": 1.5}):
        with pytest.raises(StudyError, match=f"method.{next(iter(options))}"):
            resolve(tiny.study(method={"name": "sparsyfed", **options}))
    note = "method sparsyfed: trains in torch, client by client, since the kernel has no view Power of weights"
    assert note in resolve(tiny.of_method("sparsyfed", compute="sparse"))[1]


def test_under_a_power_pruned_weights_do_not_grow_back_and_cost_nothing() -> None:
    for beta, grows in ((1.25, False), (1.0, True)):
        method = {"name": "sparsyfed", "density": 0.02, "beta": beta}
        made = tiny.study(method=method, compute="reference", train={"lr": 1.0, "epochs": 3})
        (first, second), local = visited(made, 2)
        assert bool((second.mask & ~first.mask).any()) == grows
        share = local.log[-1].alive_flops / local.log[-1].flops
        assert (share < 0.5) != grows


def test_the_mean_counts_zeros_and_its_mask_is_the_union() -> None:
    layout = Layout(tuple(e for e in tiny.small_layout().prunable if e.name == "conv.weight"))
    size = layout.num_prunable
    masks = np.zeros((2, size), bool)
    masks[0, [0, 1]] = masks[1, [1, 2]] = True
    ints = np.zeros(0, np.int64)
    came = [
        Contribution(k, 1 + 2 * k, Content(masks[k], (4.0 * masks[k]).astype(np.float32), ints)) for k in (0, 1)
    ]  # fmt: skip
    state = join(UnionMean(masks=False), ServerState(Params(np.ones(size, np.float32), ints)), came, layout)
    assert state.theta.floats[:4].tolist() == [1.0, 4.0, 3.0, 0.0]
    assert state.mask is not None and state.mask[:4].tolist() == [True, True, True, False]


def test_a_round_down_holds_what_came_up_and_no_more(tmp_path: Path) -> None:
    made = tiny.study(
        method={"name": "sparsyfed", "density": 0.05}, federate={"rounds": 4, "clients_per_round": 2}, wire="raw"
    )
    tiny.run(made, tmp_path / "r")
    rows = [r for r in tiny.rows(tmp_path / "r", "ledger") if r["phase"] == "federate" and r["kind"] != "metrics"]
    size = tiny.experiment(RunFolder(tmp_path / "r").study()).layout.num_prunable
    up = {r["density"] for r in rows if r["receiver"] == "server"}
    down = [r["density"] for r in rows if r["sender"] == "server"]
    assert up == {round(0.05 * size) / size}
    assert down[:2] == [1.0, 1.0] and all(0.05 <= d <= 0.1 for d in down[2:])
    assert down[-1] <= down[2], "no weight grows back: the union only shrinks"
