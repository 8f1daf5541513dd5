"""pFedGate: the knapsack on four blocks, what is sent and averaged, and that room for everything is FedAvg."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedlth.experiment.resolve import read
from fedlth.methods.aggregate import Contribution, FedAvg, join
from fedlth.methods.client_update import THETA_G
from fedlth.methods.pfedgate import Gate, RunsOfRows, UntouchedMean, chosen
from fedlth.models.layout import Entry, Layout, Params
from fedlth.storage.client_state import ClientState
from fedlth.storage.run_folder import RunFolder
from fedlth.storage.server_state import ServerState
from fedlth.training import masked_training
from fedlth.training.local_client import LocalClient
from fedlth.wire.payload import Content
from tests import tiny
from tests.test_personal import started

NONE = np.zeros(0, np.int64)
BLOCKS = Layout((Entry("a", (3,), "param", 0, prunable=True), Entry("b", (1,), "param", 3, prunable=True)))
SMALL = {"federate": {"rounds": 3, "clients_per_round": 2}, "train": {"epochs": 2, "weight_decay": 0.01}}


def gated(density: float, **sections: Any) -> Any:
    return tiny.study(method={"name": "pfedgate", "density": density}, **{**SMALL, **sections})


def test_the_knapsack_takes_each_tensors_best_then_what_fits() -> None:
    score, sizes = np.array([0.1, 0.9, 0.5, 0.2]), np.array([2, 4, 2, 1])
    assert chosen(score, BLOCKS, sizes, 5).tolist() == [False, True, False, True]
    assert chosen(score, BLOCKS, sizes, 7).tolist() == [False, True, True, True]
    assert chosen(score, BLOCKS, sizes, 9).all()
    assert chosen(score, BLOCKS, sizes, 0).tolist() == [False, True, False, True], "no tensor is left without any"
    assert chosen(np.ones(4), BLOCKS, sizes, 7).tolist() == [True, False, True, True], "of equals the first"


def test_runs_of_rows_are_of_nearly_equal_length() -> None:
    layout = tiny.experiment(gated(0.5)).task.layout
    groups = RunsOfRows(5).groups(layout)
    assert groups.of is not None
    first, last = layout.prunable
    assert [e.shape for e in groups.layout.prunable] == [(5,), (4,)]
    assert np.bincount(groups.of[first.slice] // 1).tolist() == [64 * n for n in (3, 2, 3, 2, 2)]
    assert (np.diff(groups.of) >= 0).all() and set(groups.of[last.slice]) == {5, 6, 7, 8}


def test_what_a_client_did_not_send_counts_as_it_was_sent() -> None:
    layout = Layout((Entry("w", (2, 2), "param", 0, prunable=True),))
    state = ServerState(Params(np.array([1, 1, 1, 1], np.float32), NONE))
    masks = np.array([[1, 1, 0, 0], [1, 1, 1, 1]], bool)
    floats = np.array([[3, 5, 0, 0], [7, 9, 5, 1]], np.float32)
    came = [Contribution(i, n, Content(masks[i], floats[i], NONE)) for i, n in enumerate((1, 3))]
    assert join(UntouchedMean(), state, came, layout).theta.floats.tolist() == [6, 8, 4, 1]
    whole = [Contribution(i, n, Content(masks[1], floats[i] / 3, NONE)) for i, n in enumerate((5, 9))]
    found = [join(rule, state, whole, layout).theta.digest() for rule in (UntouchedMean(), FedAvg())]
    assert found[0] == found[1]


@pytest.mark.parametrize("compute", ["reference", "auto"])
def test_with_room_for_everything_it_sends_what_fedavg_sends(tmp_path: Path, compute: str) -> None:
    partition = {"name": "dirichlet", "alpha": 1.0}
    found = {}
    for name, method in {"gate": {"name": "pfedgate", "density": 1.0}, "avg": {"name": "fedavg"}}.items():
        made = tiny.study(
            method=method, **SMALL, partition=partition, compute=compute, personalise={"arms": ["global"]}
        )
        tiny.run(made, tmp_path / name)
        rows = [r for r in tiny.rows(tmp_path / name, "ledger") if r["phase"] == "federate" and r["kind"] != "metrics"]
        found[name] = (rows, tiny.digests(tmp_path / name)["theta_g"])
    assert found["gate"] == found["avg"]


def test_the_gated_training_with_a_full_mask_is_the_reference_training_to_the_bit() -> None:
    recipe = {"momentum": 0.5, "weight_decay": 0.01, "clip_norm": 0.5}
    for model in ({}, {"model": {"name": "tests.tiny:Small", "options": {}}}):
        made = tiny.study(
            method={"name": "pfedgate", "density": 0.5}, compute="reference", train={"epochs": 2, **recipe}, **model
        )  # fmt: skip
        local = LocalClient(tiny.experiment(made).task, 0, 1, "federate")
        gate = Gate(1.0, RunsOfRows(5))
        start = local.task.theta_0
        done = local.train_masking(start, gate, gate.first(local), recipe=local.recipe)
        plain = local.train(start, recipe=local.recipe)
        assert done.params.digest() == plain.params.digest() != start.digest()
        assert done.loss == plain.loss and done.often.min() == done.often.max() == 1
        assert local.log[0].alive_flops == local.log[1].alive_flops == local.log[0].flops


def test_a_batchs_mask_has_its_density_and_a_gradient_for_every_block() -> None:
    local = LocalClient(tiny.experiment(gated(0.4)).task, 0, 1, "federate")
    gate, layout = Gate(0.4, RunsOfRows(5)), local.task.layout
    extra = torch.from_numpy(gate.first(local)).requires_grad_()
    weights = torch.from_numpy(local.task.theta_0.floats[: layout.num_params].copy())
    mask = gate.mask(weights, extra, local.train_part, layout)
    assert set(mask.tolist()) == {0.0, 1.0} and 0.3 < float(mask.detach().mean()) <= 0.4
    mask.sum().backward()  # type: ignore[no-untyped-call]
    assert extra.grad is not None and (extra.grad[-9:] > 0).all()


def test_sent_is_the_union_of_what_batches_touched_and_the_gate_stays(tmp_path: Path) -> None:
    made = gated(0.4, wire="raw")
    started(made, tmp_path / "r", after=2)
    folder, experiment = RunFolder(tmp_path / "r"), tiny.experiment(made)
    rows = [r for r in tiny.rows(tmp_path / "r", "ledger") if r["receiver"] == "server" and r["kind"] != "metrics"]
    assert {r["kind"] for r in rows} == {"values"} and all(0.3 < r["density"] <= 1 for r in rows)
    size, rest = experiment.layout.num_prunable, experiment.layout.num_floats - experiment.layout.num_prunable
    for r in rows:
        kept = round(r["density"] * size)
        assert r["value_bytes"] == 4 * (kept + rest) and (r["mask_bytes"] == 0) == (kept == size)
    own: Any = experiment.method.own
    for client, version in folder.progress().versions.items():
        state = ClientState.from_bytes(folder.clients.get(int(client), version))
        local = LocalClient(experiment.task, int(client), 1, "federate")
        assert (state.vectors["gate"] != own.gate.first(local)).any(), "it has learnt"
        assert set(state.vectors) - {"owed"} == {"gate"}


def test_what_no_batch_touched_is_not_moved_by_weight_decay() -> None:
    made = gated(0.4, train={"epochs": 1, "batch_size": 1000, "weight_decay": 0.5})
    experiment = tiny.experiment(made)
    theta = experiment.initial()
    inbox = {THETA_G: Content(np.ones(experiment.layout.num_prunable, bool), theta.floats, theta.ints)}
    local = LocalClient(experiment.task, 0, 1, "federate")
    update: Any = experiment.method.own
    content = update(local, inbox, ClientState()).contents["update"]
    assert 0.3 < content.mask.mean() <= 0.4, "one batch, one mask"
    held, params = content.mask, update.own(local, inbox, ClientState())
    assert not content.floats[: held.size][~held].any()
    assert (content.floats[: held.size][held] != theta.floats[: held.size][held]).mean() > 0.9
    np.testing.assert_array_equal(held, params.mask, "the gate's choice for all its data, which is this batch")
    cost = local.log[-1]
    assert cost.alive_flops < 0.5 * cost.flops


def test_options_are_checked_and_small_densities_have_more_blocks() -> None:
    for bad in ({"density": 0.0}, {"gate_lr": 0}, {"blocks": 0}):
        with pytest.raises(Exception, match=f"method.{next(iter(bad))}"):
            read(tiny.study(method={"name": "pfedgate", **bad}))
    update: Any = tiny.experiment(gated(0.1)).method.own
    assert update.gate.blocks == RunsOfRows(10)


def test_the_gate_follows_the_schedule_over_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step: what the gate moves by falls with round_decay as the weights' rate does, and in step 2 begins anew."""
    train = {"epochs": 1, "batch_size": 1000, "lr": 0.2, "momentum": 0.0}
    paces = list[float]()
    real = masked_training.train

    def spy(*args: Any, pace: float, **more: Any) -> Any:
        paces.append(pace)
        return real(*args, pace=pace, **more)

    monkeypatch.setattr(masked_training, "train", spy)

    def moved(round: int, **more: Any) -> np.ndarray:
        experiment = tiny.experiment(gated(0.4, train={**train, **more}, personalise={"lr": 0.05}))
        theta = experiment.initial()
        update: Any = experiment.method.own
        inbox = {THETA_G: Content(np.ones(experiment.layout.num_prunable, bool), theta.floats, theta.ints)}
        local: Any = LocalClient(experiment.task, 0, round, "federate", rounds=3)
        of_round = replace(local, round=1)  # the batches of the first
        object.__setattr__(of_round, "recipe", local.recipe)
        done: Any = update(of_round, inbox, ClientState())
        update.tune(local, inbox, ClientState(), local.personal_recipe)
        return np.asarray(done.state.vectors["gate"] - update.gate.first(local))

    first, third = moved(1, round_decay=0.5), moved(3, round_decay=0.5)
    assert np.abs(first).max() > 0 and third == pytest.approx(first / 4, rel=1e-3, abs=1e-7)
    by_cosine = moved(3, round_schedule={"name": "linear", "final_at": "last", "final": 0.0})
    assert not by_cosine.any(), "a rate of 0 moves nothing"
    assert paces == pytest.approx([0.1 / 0.2, 0.1 / 0.05] * 3), "gate_lr where no schedule has begun"
