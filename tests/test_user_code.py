"""A user's own model and data run the two steps under every buffer policy, without touching fedlth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from fedlth import train
from fedlth.errors import StudyError
from fedlth.methods.state import ClientState
from fedlth.params import read
from fedlth.tickets_file import load_ticket
from fedlth.wire import mask as bitmap
from tests import tiny

POLICIES = ("aggregate", "local_statistics", "local_all")


def own(buffers: str, **sections: Any) -> Any:
    return tiny.study(
        data={"name": "tests.user_model:sentences"},
        model={"name": "tests.user_model:reader", "options": {"width": 6}, "buffers": buffers},
        **{"federate": {"rounds": 3, "clients_per_round": 2}, **sections},
    )


@pytest.mark.parametrize("buffers", POLICIES)
def test_two_steps_and_a_ticket_that_predicts_as_reported(tmp_path: Path, buffers: str) -> None:
    made = own(buffers, personalise={"epochs": 1, "arms": ["global", "dense", "ticket", "random"]})
    folder = tiny.run(made, tmp_path / "r")
    world = tiny.open_world(made.science())
    assert not [f for r in tiny.rows(tmp_path / "r", "rounds") for f in r["failed"]]
    names = {e.name for e in world.layout.prunable}
    assert names == {"head.weight", "lstm.weight_hh_l0", "lstm.weight_ih_l0"}, "not the embedding, not the frozen part"
    tied = next(e for e in world.layout.floats if "embed.weight" in (e.name, *e.aliases))
    assert {tied.name, *tied.aliases} == {"embed.weight", "decoder.weight"}
    rows = [r for r in tiny.rows(tmp_path / "r", "metrics") if r["arm"] == "ticket" and r["target_density"] == 0.2]
    assert len(rows) == 4
    for row in rows:
        model = load_ticket(tmp_path / "r", row["client"])
        x, y = world.part(row["client"], "test")
        with torch.inference_mode():
            right = int((model(x).argmax(-1) == y).sum())
        assert right / len(y) == row["test_accuracy"]
        named = dict(model.named_parameters())
        assert named["embed.weight"].data_ptr() == named.get("decoder.weight", named["embed.weight"]).data_ptr()
        with safe_open(tmp_path / "r" / "tickets" / f"client-{row['client']:04d}.safetensors", "numpy") as file:
            meta = file.metadata()
            masks = {n: file.get_tensor(f"{n}_mask") for n in names}
        kept = sum(int(np.unpackbits(m).sum()) for m in masks.values())
        assert kept == round(0.2 * world.layout.num_prunable) and float(meta["density"]) == row["density"]
        frozen = read(model, world.layout).floats, world.theta_0.floats
        for entry in world.layout.floats:
            if entry.name.startswith("frozen"):
                np.testing.assert_array_equal(frozen[0][entry.slice], frozen[1][entry.slice])
    assert folder.progress().step == 5


def test_what_each_policy_sends() -> None:
    worlds = {b: tiny.open_world(own(b).science()) for b in POLICIES}
    layout = worlds["aggregate"].layout
    assert worlds["aggregate"].exchange is layout
    kept = {b: {e.name for e in layout.entries} - {e.name for e in w.exchange.entries} for b, w in worlds.items()}
    statistics = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert kept == {
        "aggregate": set(), "local_statistics": statistics, "local_all": statistics | {"norm.weight", "norm.bias"},
    }  # fmt: skip


@pytest.mark.parametrize("buffers", ["local_statistics", "local_all"])
def test_what_stays_local_is_the_clients_own(tmp_path: Path, buffers: str) -> None:
    made = own(buffers, federate={"rounds": 3, "clients_per_round": 3}, personalise={"arms": ["global"]})
    folder = tiny.run(made, tmp_path / "r")
    world, versions = tiny.open_world(made.science()), folder.progress().versions
    local = [e for e in world.layout.floats if e.name not in {x.name for x in world.exchange.entries}]
    states = {c: ClientState.from_bytes(folder.clients.get(int(c), v)) for c, v in versions.items()}
    seen = [s.vectors["private"] for s in states.values() if "private" in s.vectors]
    assert len(seen) == 3
    for entry in local:
        values = [v[entry.slice].tobytes() for v in seen]
        assert len(set(values)) == 3, f"{entry.name} differs between clients"
    (row,) = [r for r in tiny.rows(tmp_path / "r", "metrics") if r["client"] == int(next(iter(states)))]
    client = row["client"]
    theta = folder.load_params(folder.progress().theta)
    mine = world.merge(theta, type(theta)(states[str(client)].vectors["private"], world.theta_0.ints))
    accuracy, _ = train.evaluate(world.bound, mine, world.part(client, "test"))
    assert accuracy == row["test_accuracy"]


def test_a_prunable_norm_cannot_stay_local() -> None:
    sections = {
        "model": {"name": "tests.user_model:reader", "buffers": "local_all", "prunable": ["*weight*"], "options": {}}
    }
    with pytest.raises(StudyError, match="model.prunable: a norm's weight"):
        tiny.open_world(tiny.study(data={"name": "tests.user_model:sentences"}, **sections).science())


def test_masks_are_named_by_their_bits(tmp_path: Path) -> None:
    made = own("aggregate")
    folder = tiny.run(made, tmp_path / "r")
    for row in tiny.rows(tmp_path / "r", "metrics"):
        if row["arm"] == "ticket" and row["target_density"] == 0.2:
            version = folder.progress().versions[str(row["client"])]
            state = ClientState.from_bytes(folder.clients.get(row["client"], version))
            assert bitmap.digest(state.masks["ticket"]) == row["ticket"]


def test_no_ticket_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="no ticket of client 7"):
        load_ticket(tmp_path, 7)
