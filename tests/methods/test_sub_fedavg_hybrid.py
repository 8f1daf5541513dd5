"""Sub-FedAvg's hybrid: channels by norm scales, other weights one by one, two gates, the pull; norms or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedlth.experiment.resolve import resolve
from fedlth.methods.sub_fedavg_hybrid import CutChannels, CutWeights, Filters, PruneBoth, scales_behind
from fedlth.models.layout import Params
from fedlth.tickets.controls import shuffled_mask
from fedlth.training.local_client import LocalClient
from fedlth.training.pull import L1, NO_PULL
from fedlth.training.request import TrainingResult
from tests import tiny
from tests.test_methods import final_theta, manual_fedavg

HERE = "tests.methods.test_sub_fedavg_hybrid"


class Net(nn.Module):
    """Two convolutions around an addition, their norms under names that say nothing."""

    def __init__(self, kinds: tuple[str, str]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.Conv2d(4, 6, 3)
        self.x, self.y = (_norm(kind, size) for kind, size in zip(kinds, (4, 6), strict=True))
        self.out = nn.Linear(6, tiny.NUM_CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = torch.relu(self.x(self.a(x))) + x
        logits: torch.Tensor = self.out(torch.relu(self.y(self.b(first))).amax((2, 3)))
        return logits


def _norm(kind: str, size: int) -> nn.Module:
    return {"batch": nn.BatchNorm2d(size), "group": nn.GroupNorm(2, size), "none": nn.Identity()}[kind]


def batch(num_classes: int) -> nn.Module:
    return Net(("batch", "batch"))


def group(num_classes: int) -> nn.Module:
    return Net(("group", "group"))


def half(num_classes: int) -> nn.Module:
    return Net(("batch", "none"))


def none(num_classes: int) -> nn.Module:
    return Net(("none", "none"))


def study(net: str = "batch", **method: Any) -> Any:
    return tiny.study(
        method={"name": "sub_fedavg_hybrid", **tiny.METHODS["sub_fedavg_hybrid"], **method},
        model={"name": f"{HERE}:{net}", "options": {}}, train={"epochs": 2},
    )  # fmt: skip


def client(net: str) -> LocalClient:
    return LocalClient(tiny.experiment(study(net)).task, 0, 1, "federate")


def scaled(local: LocalClient, **scales: list[float]) -> Params:
    floats = local.task.theta_0.floats.copy()
    for e in local.task.layout.floats:
        if e.name.partition(".")[0] in scales and e.name.endswith("weight"):
            floats[e.slice] = scales[e.name.partition(".")[0]]
    return Params(floats, local.task.theta_0.ints)


def rows(local: LocalClient, mask: np.ndarray) -> dict[str, list[bool]]:
    found = {}
    for e in local.task.layout.prunable:
        if len(e.shape) > 2:
            filters = mask[e.slice].reshape(e.shape[0], -1)
            assert (filters.all(1) | ~filters.any(1)).all(), "whole filters"
            found[e.name] = filters.any(1).tolist()
    return found


@pytest.mark.parametrize("net", ["batch", "group"])
def test_the_norm_behind_each_convolution_is_found_by_running_the_model(net: str) -> None:
    assert {name: e.name for name, e in scales_behind(client(net)).items()} == {
        "a.weight": "x.weight", "b.weight": "y.weight"
    }  # fmt: skip
    assert list(scales_behind(client("half"))) == ["a.weight"] and not scales_behind(client("none"))


@pytest.mark.parametrize("net", ["batch", "group"])
def test_the_smallest_scales_of_the_whole_network_leave(net: str) -> None:
    local = client(net)
    params = scaled(local, x=[-9, 1, 8, 7], y=[0.1, 5, 0.2, -6, 0.3, 4])
    cut = CutChannels(0.4, 0.5, 0.0)(local, params, local.full)
    assert rows(local, cut) == {"a.weight": [True, False, True, True], "b.weight": [0, 1, 0, 1, 0, 1]}
    head = local.task.layout.prunable[-1]
    assert cut[head.slice].all()
    again = CutChannels(0.4, 0.5, 0.0)(local, params, cut)
    assert sum(map(sum, rows(local, again).values())) == 5, "0.36 of ten is below the target"
    assert CutChannels(0.4, 0.5, 0.0)(local, params, again) is again
    tiny_scales = scaled(local, x=[0.1] * 4, y=[1.0] * 6)
    kept = rows(local, CutChannels(0.9, 0.1, 0.0)(local, tiny_scales, local.full))
    assert sum(map(sum, kept.values())) == 1, "fewer than one a layer are asked for"
    kept = rows(local, CutChannels(0.8, 0.2, 0.0)(local, tiny_scales, local.full))
    assert [sum(r) for r in kept.values()] == [1, 1], "a convolution keeps one channel"


@pytest.mark.parametrize("net", ["half", "none"])
def test_without_norms_the_filters_own_size_serves_within_their_convolution(net: str) -> None:
    local = client(net)
    cut = CutChannels(0.5, 0.5, 0.0)(local, scaled(local, x=[1, 2, 3, 4]), local.full)
    found = rows(local, cut)
    assert {name: sum(kept) for name, kept in found.items()} == {"a.weight": 2, "b.weight": 3}
    e = next(e for e in local.task.layout.prunable if e.name == "b.weight")
    size = np.abs(local.task.theta_0.floats[e.slice]).reshape(6, -1).mean(1)
    assert set(np.flatnonzero(found["b.weight"])) == set(np.argsort(-size)[:3])
    if net == "half":
        assert found["a.weight"] == [False, False, True, True]


def test_weights_outside_of_convolutions_leave_one_by_one() -> None:
    local = client("batch")
    cut = CutWeights(0.5, 0.3, 0.0)(local, local.task.theta_0, local.full)
    head = local.task.layout.prunable[-1]
    assert not (~cut)[: head.offset].any() and cut[head.slice].sum() == 12
    size = np.abs(local.task.theta_0.floats[head.slice])
    assert size[cut[head.slice]].min() >= size[~cut[head.slice]].max()


def test_each_gate_decides_on_its_own_cut() -> None:
    local = client("batch")
    params = scaled(local, x=[9, 1, 8, 7], y=[9, 8, 7, 6, 5, 4])
    head = local.task.layout.prunable[-1]
    other = scaled(local, x=[1, 9, 8, 7], y=[9, 8, 7, 6, 5, 4]).floats.copy()
    result = TrainingResult(params, 0.0, {1: other})  # the head is the same after both epochs, the scales are not

    def cut(channel_distance: float, distance: float, gate: float = -1.0) -> tuple[bool, bool]:
        cuts = (CutChannels(0.1, 0.5, channel_distance), CutWeights(0.5, 0.3, distance))
        kept, mask = PruneBoth(cuts, gate)(local, params, local.full, result)
        assert not kept.floats[: mask.size][~mask].any()
        return not mask[: head.offset].all(), not mask[head.slice].all()

    assert cut(-1, -1) == (True, True) and cut(0.01, 0.0005) == (True, False)
    assert cut(0.9, -1) == (False, True) and cut(0.9, 0.9) == (False, False)
    assert cut(-1, -1, gate=1.0) == (False, False), "no accuracy exceeds 1"


def test_the_pull_is_on_the_scales_behind_convolutions_alone() -> None:
    local = client("batch")
    update: Any = tiny.experiment(study("batch", pull=0.5)).method.own
    recipe = update.recipe(local, local.recipe)
    at = {e.name: (e.offset, e.offset + e.size) for e in local.task.layout.floats}
    assert recipe.pull == L1(strength=0.5, spans=tuple(sorted((at["x.weight"], at["y.weight"]))))
    grad, weights = torch.zeros(2, local.task.layout.num_params), torch.ones(2, local.task.layout.num_params)
    weights[1] = -1
    recipe.pull(grad, weights, weights)
    pulled = np.zeros(local.task.layout.num_params, np.float32)
    for name in ("x.weight", "y.weight"):
        pulled[slice(*at[name])] = 0.5
    np.testing.assert_array_equal(grad.numpy(), np.stack((pulled, -pulled)))
    assert update.recipe(client("none"), local.recipe).pull == NO_PULL
    off: Any = tiny.experiment(study("batch", pull=0)).method.own
    assert off.recipe(local, local.recipe) == local.recipe
    plain, drawn = (local.train(local.task.theta_0, recipe=r).params.floats for r in (local.recipe, recipe))
    scales = slice(*at["x.weight"])
    assert np.abs(drawn[scales]).sum() < np.abs(plain[scales]).sum()


@pytest.mark.parametrize(
    "method",
    [
        {"density": 1.0, "channel_density": 1.0}, {"val_accuracy": 1.0}, {"distance": 1.0, "channel_distance": 1.0},
    ],
    ids=str,
)  # fmt: skip
def test_without_a_prune_and_a_pull_it_is_unweighted_fedavg_to_the_bit(tmp_path: Path, method: dict[str, Any]) -> None:
    made = study("group", pull=0, **method)
    made = made.model_copy(update={"federate": made.federate.model_copy(update={"rounds": 2})})
    tiny.run(made, tmp_path / "r")
    assert final_theta(tmp_path / "r") == manual_fedavg(made, weighted=False).digest()


@pytest.mark.parametrize("net", ["batch", "half"])
def test_a_run_ends_at_both_densities_and_its_control_has_whole_filters(tmp_path: Path, net: str) -> None:
    made = study(net)
    made = made.model_copy(update={"federate": made.federate.model_copy(update={"rounds": 7, "clients_per_round": 3})})
    tiny.run(made, tmp_path / "r")
    own = [r for r in tiny.rows(tmp_path / "r", "metrics") if r["arm"] == "own" and not r["unseen"]]
    assert all(r["layer_density"]["out.weight"] == pytest.approx(0.3, abs=0.03) for r in own)
    local, mask = client(net), np.ones(0, bool)
    mask = CutChannels(0.5, 0.5, 0)(local, local.task.theta_0, local.full)
    mask = CutWeights(0.5, 0.5, 0)(local, local.task.theta_0, mask)
    control = shuffled_mask(mask, local.task.layout, np.random.default_rng(0), Filters())
    assert {n: sum(r) for n, r in rows(local, control).items()} == {n: sum(r) for n, r in rows(local, mask).items()}
    assert control.sum() == mask.sum() and (control != mask).any()


class Bare(nn.Module):
    """A convolution and a head, no norm."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 3, 3), nn.Linear(3 * 6 * 6, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(torch.relu(self.conv(x)).flatten(1))
        return out


def test_a_model_without_norms_is_told_of() -> None:
    """Of filters no scale tells which matter: their size does."""
    said = "method: sub_fedavg_hybrid prunes filters by the mean size of their weights"
    for kind, told in ((f"{HERE}:Bare", True), ("tests.tiny:Small", False)):
        notes = resolve(tiny.of_method("sub_fedavg_hybrid", model={"name": kind, "options": {}}))[1]
        assert any(note.startswith(said) for note in notes) == told
