"""HeteroFL, FjORD and FIARSE: what each promises, against FedAvg, really smaller networks and the reference."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedlth.errors import StudyError
from fedlth.experiment.resolve import resolve
from fedlth.federation.forecast_bytes import forecast_bytes
from fedlth.methods.fiarse import Important, Largest
from fedlth.methods.fjord import Distilled, OrderedDropout
from fedlth.methods.heterofl import Scaled, ZeroFilled, own_classes
from fedlth.models.layout import Params, views
from fedlth.storage.run_folder import RunFolder
from fedlth.storage.server_state import ServerState
from fedlth.training.local_client import LocalClient
from fedlth.training.loss import CrossEntropy
from fedlth.training.recipe import TrainingRecipe
from fedlth.training.request import drawn_request
from fedlth.training.task import Task
from fedlth.training.view import IDENTITY
from tests import tiny
from tests.test_methods import final_theta, manual_fedavg

STILL = {"rounds": 3, "clients_per_round": 2}
SIZES = {"name": "dirichlet", "alpha": 1.0}  # sizes differ, so weighted would show
OFF = {"scaler": False, "masked_loss": False, "own_rows": False}


def theta_of(out: Path) -> Params:
    folder = RunFolder(out)
    return folder.load_params(folder.progress().theta)


def local_of(made: Any, client: int = 0, round: int = 1) -> LocalClient:
    experiment = tiny.experiment(made)
    return LocalClient(experiment.task_of(client), client, round, "federate")


@pytest.mark.parametrize(
    ("method", "weighted", "prunable"),
    [
        ({"name": "heterofl", **OFF}, False, ("*",)),
        ({"name": "fjord", "widths": [1.0]}, True, ("*",)),
        ({"name": "fiarse"}, False, None),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_where_everyone_carries_all_it_is_fedavg_to_the_bit(
    method: dict[str, Any], weighted: bool, prunable: tuple[str, ...] | None, tmp_path: Path
) -> None:
    """HeteroFL and FIARSE the unweighted one, FjORD that of McMahan et al., weighted by examples."""
    made = tiny.study(method=method, federate=STILL, partition=SIZES)
    plain = tiny.study(method="fedavg", federate=STILL, partition=SIZES, model={"prunable": prunable})
    tiny.run(made, tmp_path / "r")
    assert final_theta(tmp_path / "r") == manual_fedavg(plain, weighted=weighted).digest()
    assert final_theta(tmp_path / "r") != manual_fedavg(plain, weighted=not weighted).digest()


def test_with_all_labels_everywhere_heterofl_at_width_1_needs_nothing_switched_off(tmp_path: Path) -> None:
    for name, options in (("on", {}), ("off", OFF)):
        tiny.run(tiny.study(method={"name": "heterofl", **options}, federate=STILL), tmp_path / name)
    assert final_theta(tmp_path / "on") == final_theta(tmp_path / "off")


# The reference, in plain torch over really smaller networks

RATES = {0: 1.0, 1: 0.5, 2: 0.25, 3: 0.5}
TIERS = [{"clients": [1, 3], "width": 0.5}, {"clients": [2], "width": 0.25}]


def net(num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 9, 12), nn.ReLU(),
        nn.Linear(12, num_classes),
    )  # fmt: skip


class Scaler(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / self.rate


def small_net(rate: float, num_classes: int) -> nn.Module:
    channels, units = math.ceil(rate * 8), math.ceil(rate * 12)
    return nn.Sequential(
        nn.Conv2d(1, channels, 3), Scaler(rate), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(channels * 9, units), Scaler(rate), nn.ReLU(), nn.Linear(units, num_classes),
    )  # fmt: skip


NAMES = {"0.weight": "0.weight", "0.bias": "0.bias", "4.weight": "5.weight", "4.bias": "5.bias"} | {
    "6.weight": "8.weight", "6.bias": "8.bias",
}  # fmt: skip


def slices(name: str, rate: float) -> tuple[Any, ...]:
    """Return where the small tensor lies in the large one."""
    channels, units = math.ceil(rate * 8), math.ceil(rate * 12)
    return {
        "0.weight": (slice(channels),), "0.bias": (slice(channels),),
        "4.weight": (slice(units), slice(channels * 9)), "4.bias": (slice(units),),
        "6.weight": (slice(None), slice(units)), "6.bias": (slice(None),),
    }[name]  # fmt: skip


def reference(made: Any) -> dict[str, np.ndarray]:
    """HeteroFL as published: distribute slices, train small nets with a Scaler and masked loss, combine by counts."""
    experiment = tiny.experiment(made)
    task, classes = experiment.task, experiment.task.dataset.num_classes
    (phase,) = experiment.federated_phases
    theta = {name: value.astype(np.float64) for name, value in views(task.theta_0, task.layout).items()}
    for round in range(1, made.federate.rounds + 1):
        sums = {name: np.zeros_like(value) for name, value in theta.items()}
        counts = {name: np.zeros_like(value) for name, value in theta.items()}
        for client in experiment.clients(phase, round):
            local, rate = LocalClient(task, client, round, "federate"), RATES[client]
            small = small_net(rate, classes)
            given = dict(small.named_parameters())
            with torch.no_grad():
                for name, value in theta.items():
                    given[NAMES[name]].copy_(torch.from_numpy(value[slices(name, rate)]))
            request = drawn_request(
                task.theta_0, local.train_part, local.recipe, order=local.rng("order"), torch_seed=0
            )
            steps = [part for epoch in request.batches for part in epoch]
            labels = sorted({int(y) for y in local.train_part.y})
            optimizer = torch.optim.SGD(small.parameters(), lr=made.train.lr, momentum=made.train.momentum)
            for part in steps:
                batch = local.train_part.batch(torch.from_numpy(part))
                logits = small(batch.tensor)
                keep = torch.zeros(classes)
                keep[labels] = 1
                optimizer.zero_grad()
                F.cross_entropy(logits.masked_fill(keep == 0, 0), batch.y).backward()
                optimizer.step()
            for name in theta:
                there = slices(name, rate)
                at = np.zeros(theta[name].shape, bool)
                at[there] = True
                if name.startswith("6."):
                    at[[c for c in range(classes) if c not in labels]] = False
                whole = np.zeros(theta[name].shape)
                whole[there] = given[NAMES[name]].detach().numpy()
                sums[name] += np.where(at, whole, 0)
                counts[name] += at
        theta = {n: np.where(counts[n] > 0, sums[n] / np.maximum(counts[n], 1), theta[n]) for n in theta}
        theta = {n: value.astype(np.float32).astype(np.float64) for n, value in theta.items()}
    return theta


def test_heterofl_is_the_reference(tmp_path: Path) -> None:
    made = tiny.study(
        method="heterofl", model={"name": "tests.methods.test_submodels:net", "options": {}},
        partition={"name": "dirichlet", "alpha": 0.3},
        clients={"count": 4, "unseen": 0.0, "capacity": TIERS}, federate={"rounds": 3, "clients_per_round": 3},
        train={"epochs": 2, "lr": 0.1, "momentum": 0.9, "batch_size": 16},
    )  # fmt: skip
    tiny.run(made, tmp_path / "r")
    made = RunFolder(tmp_path / "r").study()
    lacking = [c for c in range(4) if len(own_classes(local_of(made, c))) < tiny.NUM_CLASSES]
    assert lacking, "the masked loss and the rows of the classifier must matter"
    found, wanted = views(theta_of(tmp_path / "r"), tiny.experiment(made).task.layout), reference(made)
    start = views(tiny.experiment(made).task.theta_0, tiny.experiment(made).task.layout)
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, atol=1e-5)
        assert np.abs(found[name] - start[name]).max() > 1e-3


# Bytes


@pytest.mark.parametrize("name", ["heterofl", "fjord"])
def test_what_a_narrow_client_is_sent_and_sends_is_as_long_as_its_network(name: str, tmp_path: Path) -> None:
    """The Flower port of FjORD sends the whole model up, and what it got once more among its metrics."""
    made = tiny.of_method(name, federate={"rounds": 4, "clients_per_round": 3}, wire="raw")
    tiny.run(made, tmp_path / "r")
    rows = [r for r in tiny.rows(tmp_path / "r", "ledger") if r["phase"] == "federate"]
    small, whole = (64 * n + n + 4 * n + 4 for n in (6, 12))
    for client, size in ((0, small), (1, small), (2, whole), (3, whole)):
        mine = [r for r in rows if f"client:{client}" in (r["sender"], r["receiver"])]
        if not mine:
            continue
        assert {r["value_bytes"] for r in mine if r["kind"] != "metrics"} == {4 * size}
        assert all(r["mask_bytes"] == 0 for r in mine if r["kind"] != "metrics")
        assert all(r["payload_bytes"] - 4 * size < 40 for r in mine if r["kind"] != "metrics")
        assert all(r["payload_bytes"] < 200 for r in mine if r["kind"] == "metrics"), "no model hides in the numbers"
    assert any(f"client:{c}" in r["sender"] for r in rows for c in (0, 1))


@pytest.mark.parametrize("name", ["heterofl", "fjord", "fiarse", "sparsyfed"])
@pytest.mark.parametrize("wire", ["raw", "lossless"])
def test_what_is_forecast_is_never_less_than_what_crosses(name: str, wire: str, tmp_path: Path) -> None:
    made = tiny.of_method(
        name, evaluate={"every": 1}, partition={"name": "dirichlet", "alpha": 0.1},
        federate={"rounds": 3, "clients_per_round": 2}, wire=wire,
    )  # fmt: skip
    tiny.run(made, tmp_path / "r")
    foreseen, rows = (
        forecast_bytes(tiny.experiment(RunFolder(tmp_path / "r").study()), 1.0),
        tiny.rows(tmp_path / "r", "ledger"),
    )
    assert foreseen.evaluation is not None
    for end, way in (("sender", "down"), ("receiver", "up")):
        for there, one in ((True, foreseen.evaluation), (False, foreseen)):
            mine = [r["payload_bytes"] for r in rows if r[end] == "server" and (r["phase"] == "evaluate") == there]
            assert sum(mine) <= getattr(one, way).size * 1.01 and getattr(foreseen, way).bounds


def test_absent_rows_stay_down_but_do_not_come_up(tmp_path: Path) -> None:
    made = tiny.of_method(
        "heterofl", partition={"name": "dirichlet", "alpha": 0.1}, federate={"rounds": 4, "clients_per_round": 3},
        wire="raw",
    )  # fmt: skip
    tiny.run(made, tmp_path / "r")
    rows = [r for r in tiny.rows(tmp_path / "r", "ledger") if r["phase"] == "federate"]
    shorter = 0
    for client in range(4):
        widths, labels = (
            (6 if client < 2 else 12),
            len(own_classes(local_of(RunFolder(tmp_path / "r").study(), client))),
        )
        down = {r["value_bytes"] for r in rows if r["receiver"] == f"client:{client}"}
        up = {r["value_bytes"] for r in rows if r["sender"] == f"client:{client}" and r["kind"] == "values"}
        if up:
            assert down == {4 * (65 * widths + 4 * (widths + 1))}, "in every round"
            assert up == {4 * (65 * widths + labels * (widths + 1))}
            shorter += up != down
    assert shorter


def test_flops_by_what_is_alive_are_those_of_the_narrow_network() -> None:
    made = tiny.of_method("heterofl")
    local = local_of(resolve(made)[0].study)
    mask = tiny.experiment(resolve(made)[0].study).first_mask(0)
    local.train(local.task.theta_0, recipe=local.recipe, active=mask)
    examples = local.num_train
    assert local.log[0].alive_flops == 3 * examples * 2 * (64 * 6 + 6 * 4)
    assert local.log[0].flops == 3 * examples * 2 * (64 * 12 + 12 * 4)


# What a study and a model must be


def test_a_method_says_what_is_prunable_and_the_study_records_it() -> None:
    study = resolve(tiny.of_method("heterofl"))[0].study
    assert study.model.prunable == ("*",) and study.model.buffers == "local_statistics"
    assert all(e.prunable for e in tiny.experiment(study).task.layout.floats if e.role == "param")
    assert resolve(tiny.of_method("heterofl", model={"buffers": "aggregate"}))[0].study.model.buffers == "aggregate"
    assert resolve(tiny.of_method("heterofl", model={"prunable": ["*"]}))[0].study.model.prunable == ("*",)
    with pytest.raises(StudyError, match=r"model.prunable must be \['\*'\] or left out for method heterofl"):
        resolve(tiny.of_method("heterofl", model={"prunable": ["*.weight"]}))


def lstm(num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    return Recurrent(num_classes)


class Recurrent(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.inner, self.head = nn.LSTM(8, 6, batch_first=True), nn.Linear(6, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(x[:, 0])[0][:, -1])


@pytest.mark.parametrize("name", ["heterofl", "fjord"])
def test_a_model_that_cannot_be_sliced_is_refused_before_the_run(name: str) -> None:
    made = tiny.of_method(name, model={"name": "tests.methods.test_submodels:lstm", "options": {}})
    with pytest.raises(StudyError, match="model: tests.methods.test_submodels:lstm cannot be sliced by width"):
        resolve(made)


def test_check_says_that_a_view_trains_in_torch() -> None:
    for name, view in (("heterofl", "Scaled"), ("fjord", "OrderedDropout"), ("fiarse", "Important")):
        note = f"method {name}: trains in torch, client by client, since the kernel has no view {view} of weights"
        assert note in resolve(tiny.of_method(name, compute="sparse", clients={"unseen": 0.0}))[1]
        assert note not in resolve(tiny.of_method(name, clients={"unseen": 0.0}))[1], "all trains in torch then"
        whole = resolve(tiny.of_method(name, compute="sparse", clients={"capacity": []}))[1]
        assert (note in whole) == (name == "fjord")
    assert not any("view" in note for note in resolve(tiny.of_method("fedavg", compute="sparse"))[1])


# HeteroFL's options


def recipe_of(made: Any, client: int = 0) -> TrainingRecipe:
    local = local_of(resolve(made)[0].study, client)
    update: Any = tiny.experiment(resolve(made)[0].study).method.own
    found: TrainingRecipe = update.recipe(local, local.recipe)
    return found


def test_the_scaler_is_a_view_of_the_layers_that_are_narrower() -> None:
    made = tiny.of_method("heterofl")
    assert recipe_of(made).view == Scaled(("1.bias", "1.weight"), 2.0)
    assert recipe_of(made, client=2).view == IDENTITY, "a whole device has nothing to make up for"
    off = made.model_copy(update={"method": {**made.method, "scaler": False}})
    assert recipe_of(off) == replace(recipe_of(made), view=IDENTITY)


def test_the_masked_loss_has_zeros_for_absent_labels() -> None:
    loss = ZeroFilled(CrossEntropy(), (0, 2))
    logits = torch.tensor([[1.0, 5.0, -1.0, 7.0]], requires_grad=True)
    found = loss(logits, torch.tensor([0]))
    assert float(found.detach()) == pytest.approx(-1 + math.log(math.e + 1 + math.exp(-1) + 1))
    found.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None and (logits.grad[0, [1, 3]] == 0).all() and (logits.grad[0, [0, 2]] != 0).all()
    made = tiny.of_method("heterofl", partition={"name": "dirichlet", "alpha": 0.1})
    lacking = [c for c in range(4) if len(own_classes(local_of(resolve(made)[0].study, c))) < tiny.NUM_CLASSES]
    assert isinstance(recipe_of(made, lacking[0]).loss, ZeroFilled)
    off = made.model_copy(update={"method": {**made.method, "masked_loss": False}})
    assert recipe_of(off, lacking[0]) == replace(recipe_of(made, lacking[0]), loss=CrossEntropy())


# FjORD


def test_each_step_moves_the_drawn_width_alone() -> None:
    made = resolve(tiny.of_method("fjord", train={"steps": 1, "momentum": 0.0}))[0].study
    local = local_of(made, 2)
    narrow, wide = (local.task.model.channels.prefix(local.task.layout, width) for width in (0.5, 1.0))
    bits = tuple(np.packbits(mask).tobytes() for mask in (narrow, wide))
    for step, mask in enumerate((narrow, wide)):
        recipe = replace(local.recipe, view=OrderedDropout(bits, (step,)))
        moved = local.train(local.task.theta_0, recipe=recipe).params.floats != local.task.theta_0.floats
        assert not moved[: mask.size][~mask].any() and moved[: mask.size][mask].mean() > 0.5
        assert local.log[-1].alive_flops == local.flops(mask, 16)[1]


def test_a_narrow_step_is_a_step_of_the_narrow_network() -> None:
    """The same as training under the mask, momentum and all, where every step draws the same width."""
    made = resolve(tiny.of_method("fjord", compute="reference"))[0].study
    local = local_of(made, 2)
    narrow = local.task.model.channels.prefix(local.task.layout, 0.5)
    steps = local.recipe.budget.total(local.num_train, local.recipe.batch_size)
    view = OrderedDropout((np.packbits(narrow).tobytes(), np.packbits(local.full).tobytes()), (0,) * steps)
    seen = local.train(local.task.theta_0, recipe=replace(local.recipe, view=view)).params.masked(narrow)
    under = local.train(local.task.theta_0.masked(narrow), recipe=local.recipe, active=narrow).params
    np.testing.assert_array_equal(seen.floats, under.floats)


def test_widths_are_drawn_up_to_what_a_client_carries() -> None:
    made = tiny.study(
        method={"name": "fjord"}, train={"steps": 40}, clients={"capacity": [{"clients": [0], "width": 0.65}]}
    )
    some, whole = recipe_of(made).view, recipe_of(made, client=1).view
    assert isinstance(some, OrderedDropout) and len(some.masks) == 3 and set(some.order) == {0, 1, 2}
    assert isinstance(whole, OrderedDropout) and len(whole.masks) == 5 and set(whole.order) == {0, 1, 2, 3, 4}
    assert some.masks == whole.masks[:3] and len(some.order) == 40
    with pytest.raises(StudyError, match=r"clients.capacity: width must be at least 0.2, the least of method.widths"):
        resolve(tiny.study(method={"name": "fjord"}, clients={"capacity": [{"clients": [0], "width": 0.1}]}))


@pytest.mark.parametrize("widths", [[], [0.5, 0.5], [0.0, 1.0], [1.5], "all", [True]])
def test_widths_that_are_none_are_refused(widths: Any) -> None:
    with pytest.raises(StudyError, match="method.widths"):
        resolve(tiny.study(method={"name": "fjord", "widths": widths}))


def test_distillation_adds_the_widest_pass_and_draws_the_drawn_one_to_its_outputs() -> None:
    made = resolve(tiny.of_method("fjord", train={"steps": 1, "momentum": 0.0}))[0].study
    local = local_of(made, 2)
    narrow = local.task.model.channels.prefix(local.task.layout, 0.5)
    bits = np.packbits(narrow).tobytes(), np.packbits(local.full).tobytes()
    moved = {}
    for share in (0.0, 0.5):
        recipe = replace(local.recipe, view=OrderedDropout(bits, (0,), share))
        moved[share] = local.train(local.task.theta_0, recipe=recipe).params.floats != local.task.theta_0.floats
    assert not moved[0.0][: narrow.size][~narrow].any() and moved[0.5][: narrow.size][~narrow].any()
    assert local.log[1].alive_flops == local.log[0].alive_flops + local.flops(local.full, 16)[1]
    teacher = torch.tensor([[1.0, 0.0]])
    y, same = torch.tensor([0]), torch.tensor([[1.0, 0.0]])
    assert float(Distilled(CrossEntropy(), teacher, 1.0)(same, y)) == pytest.approx(0, abs=1e-7)
    p, q = torch.tensor([0.8, 0.2]), torch.tensor([0.5, 0.5])
    found = Distilled(CrossEntropy(), p.log()[None], 0.25)(q.log()[None], y)
    assert float(found) == pytest.approx(0.75 * math.log(2) + 0.25 * float((p * (p / q).log()).sum()), rel=1e-5)


# FIARSE


def test_the_server_cuts_the_largest_and_sends_their_bits(tmp_path: Path) -> None:
    made = tiny.of_method(
        "fiarse", clients={"count": 4, "unseen": 0.0}, federate={"rounds": 4, "clients_per_round": 3}, wire="raw"
    )
    folder = tiny.run(made, tmp_path / "r")
    rows = [r for r in tiny.rows(tmp_path / "r", "ledger") if r["phase"] == "federate"]
    size = tiny.experiment(folder.study()).layout.num_prunable
    kept, rest = round(0.4 * size), 12 + 4
    tickets: dict[int, set[str]] = {}
    for client in (0, 1):
        down = [r for r in rows if r["receiver"] == f"client:{client}"]
        up = [r for r in rows if r["sender"] == f"client:{client}" and r["kind"] == "values"]
        assert {r["density"] for r in (*down, *up)} == {kept / size}
        assert {r["value_bytes"] for r in (*down, *up)} == {4 * (kept + rest)}
        assert {r["mask_bytes"] for r in down} == {math.ceil(size / 8)} and {r["mask_bytes"] for r in up} == {0}
        assert [r["ticket"] for r in down] == [r["ticket"] for r in up], "what was cut comes back"
        tickets[client] = {r["ticket"] for r in down}
    assert max(map(len, tickets.values())) > 1, "the largest weights are others as they move"


def test_the_cut_is_exact_and_by_magnitude() -> None:
    made = tiny.of_method("fiarse")
    experiment = tiny.experiment(made)
    task, state = experiment.task, ServerState(experiment.initial())
    size = np.abs(state.theta.floats[: task.exchange.num_prunable])
    mask = Largest("global")(task, state, 0)
    assert mask.sum() == round(0.4 * mask.size) and size[mask].min() >= size[~mask].max()
    layers = Largest("layerwise")(task, state, 0)
    shares = [float(layers[e.slice].mean()) for e in task.exchange.prunable]
    assert shares == pytest.approx([0.4] * len(shares), abs=0.02) and (layers != mask).any()
    assert Largest("global")(task, state, 2).all()
    with pytest.raises(StudyError, match="method.scope must be global or layerwise, got 'rows'"):
        resolve(tiny.study(method={"name": "fiarse", "scope": "rows"}))


def test_importance_on_four_elements() -> None:
    """t = 2: below it nothing is seen or moves; at it the gradient is half as large again, and far above as it was."""
    local = local_of(tiny.of_method("fiarse"))
    model = local.task.flat_model
    floats = local.task.theta_0.floats.copy()
    floats[:4] = 1.0, -2.0, 6.0, 0.0
    active = np.zeros(local.full.size, bool)
    active[1:3] = True
    request = drawn_request(
        Params(floats, local.task.theta_0.ints), local.train_part, local.recipe, order=local.rng("order"),
        torch_seed=0, active=active,
    )  # fmt: skip
    view = Important("global")
    assert view.thresholds(model, request)[:4].tolist() == [2.0] * 4
    weights, asked = torch.from_numpy(floats[: local.task.layout.num_params]), []

    class Ones:
        def __init__(self, seen: torch.Tensor) -> None:
            asked.append(seen.clone())
            self.gradient, self.loss = torch.ones_like(seen), 0.0

    with view.opened(model, request) as gradient:
        found, _ = gradient(weights, 0, Ones)  # type: ignore[arg-type]
    assert asked[0][:4].tolist() == [0.0, -2.0, 6.0, 0.0]
    assert found[:4].tolist() == pytest.approx([0.0, 1.5, 1 + 2 * 2 * 6 / 64, 0.0])
    assert (found[local.full.size :] == 1).all(), "what is not prunable is seen as it is"


def test_a_whole_tensor_has_no_threshold() -> None:
    local = local_of(tiny.of_method("fiarse"))
    layout, active = local.task.layout, local.full.copy()
    first = layout.prunable[0]
    active[first.slice] = np.arange(first.size) % 2 == 0
    request = drawn_request(
        local.task.theta_0, local.train_part, local.recipe, order=local.rng("order"), torch_seed=0, active=active
    )
    for scope in ("global", "layerwise"):
        found = Important(scope).thresholds(local.task.flat_model, request)
        assert (found[first.slice] > 0).all() and not found[layout.prunable[1].slice].any()


@pytest.mark.parametrize("name", ["heterofl", "fjord", "fiarse"])
def test_a_client_evaluates_the_sub_model_that_it_carries(name: str, tmp_path: Path) -> None:
    tiny.run(tiny.of_method(name), tmp_path / "r")
    rows = {(r["client"], r["arm"]): r for r in tiny.rows(tmp_path / "r", "metrics")}
    task: Task = tiny.experiment(RunFolder(tmp_path / "r").study()).task
    for client in range(4):
        whole = client > 1
        for arm in ("own", "own_tuned", "own_random"):
            assert (rows[client, arm]["density"] == 1) == whole
        assert rows[client, "global"]["density"] == 1
    wanted = 0.4 if name == "fiarse" else (65 * 6 + 4 * 7) / task.layout.num_prunable
    assert rows[0, "own"]["density"] == pytest.approx(wanted, abs=1e-3)
