"""Ticket files: both forms hold the same model, and anyone opens the compact one with three lines of numpy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from fedlth.errors import StudyError
from fedlth.methods.resolve import resolve
from fedlth.report import tickets as told
from fedlth.report.facts import read_run
from fedlth.tickets_file import load_ticket
from tests import tiny
from tests.test_user_code import own

FINDER = {"schedule": "one_shot", "densities": [0.3]}


def made(out: Path, **changes: object) -> Path:
    arms = {"arms": ["ticket"], "epochs": 1}
    study = tiny.of_method("two_step", finder=FINDER, personalise=arms, **changes)
    tiny.run(study, out)
    return out


def test_a_compact_ticket_is_the_dense_one(tmp_path: Path) -> None:
    dense, compact = made(tmp_path / "dense"), made(tmp_path / "compact", tickets="compact")
    for client in range(4):
        name = f"tickets/client-{client:04d}.safetensors"
        one, other = load_ticket(dense, client).state_dict(), load_ticket(compact, client).state_dict()
        assert one.keys() == other.keys() and all(one[k].equal(other[k]) for k in one)
        with safe_open(compact / name, "numpy") as file:
            shapes = json.loads(file.metadata()["shapes"])
            masked = [n.removesuffix("_mask") for n in file.keys() if n.endswith("_mask")]  # noqa: SIM118
            assert masked
            for n in masked:
                mask = np.unpackbits(file.get_tensor(f"{n}_mask"), count=np.prod(shapes[n])).astype(bool)
                weights = np.zeros(mask.size, np.float32)
                weights[mask] = file.get_tensor(n)
                np.testing.assert_array_equal(weights.reshape(shapes[n]), one[n].numpy())
        assert (compact / name).stat().st_size < (dense / name).stat().st_size
    shown = [told.shown(read_run(run), [0]).partition("tensor  ")[2] for run in (dense, compact)]
    assert shown[0] == shown[1] and "all masked tensors" in shown[0]
    assert told.overlapping(read_run(dense), []) == told.overlapping(read_run(compact), [])


def test_tied_weights_are_kept_once(tmp_path: Path) -> None:
    study = own("aggregate", tickets="compact", personalise={"arms": ["ticket"], "epochs": 1})
    tiny.run(study, tmp_path / "r")
    module = load_ticket(tmp_path / "r", 0)
    state = module.state_dict()
    assert state["embed.weight"].equal(state["decoder.weight"]) and state["embed.weight"].any()


def test_without_files_only_digests_are_left(tmp_path: Path) -> None:
    compact, none = made(tmp_path / "compact", tickets="compact"), made(tmp_path / "none", tickets="none")
    assert not (none / "tickets").exists()
    assert tiny.digests(none) == tiny.digests(compact) and len(tiny.digests(none)["tickets"]) == 4
    with pytest.raises(StudyError, match="no ticket of client 0"):
        load_ticket(none, 0)


def test_frozen_dead_weights_need_the_dense_form() -> None:
    study = tiny.of_method("two_step", finder=FINDER | {"dead": "init"}, tickets="compact")
    with pytest.raises(StudyError, match="tickets: must be dense"):
        resolve(study)
