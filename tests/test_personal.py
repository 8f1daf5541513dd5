"""Tensors that stay with a client: FedPer's head as a line of a study. They never cross, in any message."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedlth.engines.inprocess import InProcess
from fedlth.errors import StudyError
from fedlth.experiment.resolve import read, resolve
from fedlth.experiment.saved_ticket import load_ticket
from fedlth.federation import session
from fedlth.methods.method import FederatedMethod
from fedlth.methods.table import METHODS
from fedlth.storage.client_state import ClientState
from fedlth.wire.codec import RAW
from fedlth.wire.payload import decode
from tests import tiny

HEAD = {"name": "tests.tiny:Small", "options": {}, "personal": ["head.*"]}
REFINED = {"refine": {"rounds": 2, "clients_per_round": 2}}


def started(made: Any, out: Path, after: int) -> None:
    """Leave a run as a machine would that stops after so many commits."""
    experiment, _ = resolve(made)
    folder = session.RunFolder(out)
    folder.create(experiment.study)
    session._write_header(folder, experiment, InProcess())
    tiny.opened(folder).run(stop_after=after)


@pytest.mark.parametrize(
    ("method", "sections"),
    [
        ("two_step", REFINED),
        ("two_step", {"wire": "step", **REFINED}),
        ("lotteryfl", {}),
        ("sub_fedavg", {"wire": "sign"}),
        ("fedselect", {}),
    ],
)
def test_a_personal_head_stays_personal(tmp_path: Path, method: str, sections: dict[str, Any]) -> None:
    made = tiny.of_method(method, model=HEAD, **sections)
    folder = tiny.run(made, tmp_path / "whole")
    assert not [f for r in tiny.rows(folder.root, "rounds") for f in r["failed"]]
    task = tiny.task_of(folder.root)
    header = json.loads((folder.root / "header.json").read_bytes())
    head = [e for e in task.layout.floats if e.name.startswith("head.")]
    assert header["num_exchanged"] == task.layout.num_floats - sum(e.size for e in head)
    assert any(e.prunable for e in head), "a personal tensor may be prunable"
    heads = set()
    for client, version in folder.progress().versions.items():
        vectors = ClientState.from_bytes(folder.clients.get(int(client), version)).vectors
        if "home" in vectors or "private" in vectors:
            whole = tiny.kept_by(task, ClientState(vectors=vectors))
            heads.add(b"".join(whole.floats[e.slice].tobytes() for e in head))
    assert len(heads) >= 2, "each client's is its own"
    rows = [r for r in tiny.rows(folder.root, "metrics") if r["arm"] in ("refined", "ticket", "own_tuned")]
    for client in range(4):
        net, part = load_ticket(folder.root, client).eval(), task.part(client, "test")
        with torch.inference_mode():
            accuracy = int((net(part.tensor).argmax(-1) == part.y).sum()) / len(part)
        assert accuracy == [r["test_accuracy"] for r in rows if r["client"] == client][-1]
    started(made, tmp_path / "cut", after=3)
    session.resume(tmp_path / "cut", InProcess())
    assert tiny.facts(tmp_path / "cut") == tiny.facts(folder.root)


def test_no_message_holds_a_personal_tensor(tmp_path: Path) -> None:
    made = tiny.of_method("fedavg_ft", model=HEAD, wire="raw")
    seen = []

    class Reading(tiny.Lists):
        def run(self, jobs: list[Any]) -> list[Any]:
            answers = super().run(jobs)
            seen.extend(m for one in (*(j.inbox for j in jobs), *(a.outbox for a in answers)) for m in one)
            return answers

    folder = tiny.run(made, tmp_path / "r", engine=Reading())
    exchange = tiny.task_of(folder.root).exchange
    values = [m for m in seen if m.kind == "values"]
    assert len(values) > 8 and not any(e.name.startswith("head.") for e in exchange.entries)
    for message in values:
        assert decode(message.payload, "values", exchange, codec=RAW).floats.size == exchange.num_floats


def test_all_that_is_prunable_may_be_personal(tmp_path: Path) -> None:
    """Found as a bug: a division by the exchange's prunable weights, of which there were none."""
    model = {**HEAD, "personal": ["head.weight", "conv.weight"]}
    for method in ("two_step", "lotteryfl"):
        folder = tiny.run(tiny.of_method(method, model=model), tmp_path / method)
        assert not [f for r in tiny.rows(folder.root, "rounds") for f in r["failed"]]
        assert len(tiny.digests(folder.root)["tickets"]) == 4
        assert tiny.task_of(folder.root).exchange.num_prunable == 0


@pytest.mark.parametrize(
    ("method", "personal", "says"),
    [
        ("fedavg", ["hed.*"], r"model\.personal: 'hed\.\*' must match a tensor that is trained"),
        ("fedavg", ["*"], r"model\.personal: must leave something to share"),
        ("fedpm", ["head.*"], r"model\.personal: must leave all that is prunable shared, method fedpm learns scores"),
        ("spafl", ["head.*"], r"model\.personal: must leave .* shared, method spafl learns thresholds"),
    ],
)
def test_what_cannot_be_personal_is_refused(method: str, personal: list[str], says: str) -> None:
    with pytest.raises(StudyError, match=says):
        resolve(tiny.of_method(method, model={**HEAD, "personal": personal}))


def fedper() -> FederatedMethod:
    return replace(METHODS["fedavg_ft"](), name="fedper", personal=("head.*",))


def test_a_method_may_name_what_is_personal_and_a_study_may_say_otherwise() -> None:
    own = {"name": "tests.test_personal:fedper"}
    model = {"name": "tests.tiny:Small", "options": {}}
    by_method, by_line = read(tiny.study(method=own, model=model))[0], read(tiny.of_method("fedavg_ft", model=HEAD))[0]
    assert by_method.study.model == by_line.study.model
    assert by_method.layout.num_floats == by_line.layout.num_floats
    shared = read(tiny.study(method=own, model={**model, "personal": []}))[0]
    assert shared.task.exchange is shared.task.layout.moving
    assert "model.personal: has no effect, method local sends nothing" in read(tiny.of_method("local", model=HEAD))[1]
    assert np.array_equal(by_method.initial().floats, by_line.initial().floats)
