"""CELL: its gate in numbers, what each turn trains and sends, and what it is without a prune."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlth.methods.cell import AdaptiveGate, CellUpdate, Turn, cell
from fedlth.methods.client_update import THETA_G, UPDATE, Inbox
from fedlth.models.layout import Params
from fedlth.storage.client_state import ClientState
from fedlth.training.local_client import LocalClient
from fedlth.training.task import Task
from fedlth.wire.payload import Content
from tests import tiny


def broadcast(task: Task, scale: float = 1.1) -> tuple[Params, Inbox]:
    theta = Params((task.theta_0.floats * np.float32(scale)).astype(np.float32), task.theta_0.ints)
    return theta, {THETA_G: Content(np.ones(task.layout.num_prunable, bool), theta.floats, theta.ints)}


def test_the_gate_decays_for_stragglers_and_is_set_back_by_a_prune() -> None:
    gate = AdaptiveGate(rate=0.2, density=0.5, val_accuracy=0.5, decay=0.8)
    assert gate(1.0, 0.5, 0.5) == Turn("theta_g", 1.0, 0.4), "must exceed it"
    assert gate(1.0, 0.4, 0.45) == Turn("theta_0", 0.8, 0.5)
    assert gate(0.8, 0.4, 0.0) == Turn("theta_g", 1.0, pytest.approx(0.32)), "a straggler is dense again"
    assert gate(0.6, 0.5, 0.9) == Turn("theta_0", 0.5, 0.5), "the last step ends at the target"
    assert gate(0.5, 0.3, 0.0) == Turn("theta_g", 0.5, 0.3), "at the target: no gate, no rewind"
    assert gate(1.0, -1.0, 0.0) == Turn("theta_0", 0.8, 0.5)


def test_at_the_defaults_four_prunes_reach_the_target() -> None:
    """1 less four times .2 is .20000000000000007: no fifth prune for the last bit."""
    update = cell().own
    assert isinstance(update, CellUpdate)
    density, walked = 1.0, []
    while (turn := update.gate(density, -1.0, 0.0)).start == "theta_0":
        density = turn.density
        walked.append(density)
    assert walked == pytest.approx([0.8, 0.6, 0.4, 0.2]) and walked[-1] == 0.2


@pytest.mark.parametrize("method", [{"density": 1.0}, {"val_accuracy": 1.0, "decay": 1.0}], ids=lambda m: str(m))
def test_without_a_prune_it_is_fedavg_to_the_bit(tmp_path: Path, method: dict[str, Any]) -> None:
    sections: dict[str, Any] = {"federate": {"rounds": 3}, "partition": {"name": "dirichlet", "alpha": 1.0}}
    tiny.run(tiny.study(method={"name": "cell", **method}, **sections), tmp_path / "cell")
    tiny.run(tiny.of_method("fedavg", **sections), tmp_path / "fedavg")
    assert tiny.digests(tmp_path / "cell")["theta_g"] == tiny.digests(tmp_path / "fedavg")["theta_g"]
    sent = [r["payload_bytes"] for r in tiny.rows(tmp_path / "cell", "ledger") if r["name"] == UPDATE]
    assert sent == [r["payload_bytes"] for r in tiny.rows(tmp_path / "fedavg", "ledger") if r["name"] == UPDATE]


def test_the_mask_is_theta_gs_of_this_round_and_the_start_theta_0_until_the_target(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    experiment = tiny.experiment(tiny.of_method("cell"))  # 0.7, then 0.5
    task, update = experiment.task, experiment.phases[0].update
    starts: list[Params] = []
    train = LocalClient.train
    monkeypatch.setattr(LocalClient, "train", lambda self, start, **k: starts.append(start) or train(self, start, **k))
    state, masks, size = ClientState(), [], task.layout.num_prunable
    for round in (1, 2, 3):
        theta, inbox = broadcast(task)
        floats = theta.floats.copy()
        floats[:size] = np.roll(floats[:size], round)  # another theta_g has another mask
        theta, inbox = Params(floats, theta.ints), {THETA_G: replace(inbox[THETA_G], floats=floats)}
        done = update(LocalClient(task, 0, round, "federate"), inbox, state)
        mask, state = done.contents[UPDATE].mask, done.state
        assert mask.sum() == round_of(max(0.5, 1 - 0.3 * round), size)
        sizes = np.abs(theta.floats[:size])
        for e in task.layout.prunable:
            assert sizes[e.slice][mask[e.slice]].min() >= sizes[e.slice][~mask[e.slice]].max()
        begun = task.theta_0 if round < 3 else theta
        np.testing.assert_array_equal(starts[-1].floats, begun.masked(mask).floats)
        masks.append(mask)
    assert (masks[1] & ~masks[0]).any(), "drawn anew: what had left may come back"
    assert (masks[2] != masks[1]).any()


def round_of(density: float, size: int) -> int:
    return round(density * size)


def test_a_straggler_sends_the_dense_model_and_its_ticket_stays_what_it_was() -> None:
    made = tiny.study(method={"name": "cell", "rate": 0.3, "density": 0.4, "val_accuracy": 1.0, "decay": 0.5})
    experiment = tiny.experiment(made)
    task, update = experiment.task, experiment.method.own
    _, inbox = broadcast(task)
    state = ClientState(vectors={"cell": np.array([0.7, 1.0])})
    done = update(LocalClient(task, 0, 1, "federate"), inbox, state)
    assert done.contents[UPDATE].mask.all()
    np.testing.assert_allclose(done.state.vectors["cell"], [0.7, 0.5])
    own = update.own(LocalClient(task, 0, 2, "federate"), inbox, done.state)  # type: ignore[attr-defined]
    assert own.mask.sum() == round(0.7 * own.mask.size)


def test_zeros_count_in_the_mean(tmp_path: Path) -> None:
    folder = tiny.run(
        tiny.of_method("cell", federate={"rounds": 1, "clients_per_round": 2}, wire="raw"), tmp_path / "r"
    )
    theta = folder.load_params(folder.progress().theta)
    size = tiny.task_of(tmp_path / "r").layout.num_prunable
    # Both sent the same 70 % of theta_0: what neither sent is the mean of zeros, not the old value.
    assert (theta.floats[:size] == 0).sum() == size - round(0.7 * size)


def test_score_random_draws_another_ticket_for_each_client() -> None:
    experiment = tiny.experiment(tiny.of_method("cell"))
    drawn = tiny.experiment(tiny.study(method={"name": "cell", **tiny.METHODS["cell"], "score": "random"}))
    task = experiment.task
    _, inbox = broadcast(task)
    masks = [
        made.phases[0].update(LocalClient(task, c, 1, "federate"), inbox, ClientState()).contents[UPDATE].mask
        for made in (experiment, drawn)
        for c in (0, 1)
    ]
    assert (masks[0] == masks[1]).all() and (masks[2] != masks[3]).any()
    assert len({int(m.sum()) for m in masks}) == 1
