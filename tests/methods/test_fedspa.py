"""FedSpa: constant density, the mask of the next download in the same visit's answer, and what all-ones masks are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedlth.federation.jobs import Failure, Job, Reply
from fedlth.methods.client_update import NEXT_MASK, UPDATE
from fedlth.wire import mask as bitmap
from tests import tiny
from tests.test_methods import final_theta, manual_fedavg
from tests.test_resync import Forgetful


def test_with_all_ones_masks_it_is_unweighted_fedavg_to_the_bit(tmp_path: Path) -> None:
    partition = {"name": "dirichlet", "alpha": 1.0}
    made = tiny.study(method={"name": "fedspa", "density": 1.0}, federate={"rounds": 3}, partition=partition)
    tiny.run(made, tmp_path / "r")
    assert final_theta(tmp_path / "r") == manual_fedavg(made, weighted=False).digest()
    assert final_theta(tmp_path / "r") != manual_fedavg(made, weighted=True).digest()


@pytest.mark.parametrize("sections", [{}, {"model": {"personal": ["3.*"]}}], ids=["whole", "personal"])
@pytest.mark.parametrize("wire", ["raw", "lossless"])
def test_each_slice_is_of_the_mask_that_the_client_named_last(
    tmp_path: Path, wire: str, sections: dict[str, Any]
) -> None:
    made = tiny.of_method("fedspa", federate={"rounds": 4, "clients_per_round": 3}, wire=wire, **sections)
    tiny.run(made, tmp_path / "r")
    experiment = tiny.experiment(made)
    rows = [r for r in tiny.rows(tmp_path / "r", "ledger") if r["phase"] == "federate"]
    named = {f"client:{c}": bitmap.digest(experiment.first_mask(c)) for c in range(4)}
    for row in rows:
        client = row["receiver"] if row["sender"] == "server" else row["sender"]
        if row["name"] == NEXT_MASK:
            assert row["ticket"] != named[client], "the mask moves"
            named[client] = row["ticket"]
        elif row["name"] in ("theta_g", UPDATE):
            assert row["ticket"] == named[client] and row["mask_bytes"] == 0, "known to both ends"
    size = experiment.layout.num_prunable
    shares = {row["density"] for row in rows if row["kind"] != "metrics"}
    assert max(shares) - min(shares) < (0.1 if sections else 1e-9)
    bits = [r["payload_bytes"] for r in rows if r["name"] == NEXT_MASK]
    assert max(bits) <= -(-size // 8) + 24 + 2 + 1 + 4
    whole = tiny.task_of(tmp_path / "r").layout.num_prunable
    density = {r["density"] for r in tiny.rows(tmp_path / "r", "metrics") if r["arm"] in ("own", "own_tuned")}
    assert density == {round(0.4 * whole) / whole}, "of an unseen client too"


def test_what_comes_back_has_the_servers_value(tmp_path: Path) -> None:
    made = tiny.of_method("fedspa", federate={"rounds": 2, "clients_per_round": 3})
    folder = tiny.run(made, tmp_path / "r")
    theta = folder.load_params(folder.progress().theta)
    experiment = tiny.experiment(made)
    size = experiment.layout.num_prunable
    assert (theta.floats[:size] != 0).all(), "nobody's weights keep their old value"
    zero = tiny.study(method={"name": "fedspa", "density": 0.1, "uncovered": "zero"})
    zeroed = tiny.run(zero, tmp_path / "zero")
    assert (zeroed.load_params(zeroed.progress().theta).floats[:size] == 0).any()


@pytest.mark.parametrize("option", [{"drop": 0.0}, {"by": "random"}, {"same": True}], ids=str)
def test_each_option_changes_what_it_says(tmp_path: Path, option: dict[str, Any]) -> None:
    tickets = []
    for more in ({}, option):
        made = tiny.study(method={"name": "fedspa", "density": 0.4, **more}, federate={"rounds": 3})
        tiny.run(made, tmp_path / str(more))
        rows = [r for r in tiny.rows(tmp_path / str(more), "ledger") if r["phase"] == "federate" and r["ticket"]]
        tickets.append([(r["sender"], r["name"], r["ticket"]) for r in rows])
    usual, other = tickets
    assert usual != other
    first = {t for s, n, t in other if n == UPDATE}
    if "drop" in option:
        assert {t for s, n, t in other if n == NEXT_MASK} <= first, "masks never move"
    if "same" in option:
        assert len({t for _, _, t in other[:1]}) == 1 and other[0][2] == other[3][2], "all begin with one mask"
    if "by" in option:
        assert other[0] == usual[0], "the first masks are the same"


@pytest.mark.parametrize("how", ["lost", "other"])
def test_a_client_that_lost_its_mask_gets_it_back(tmp_path: Path, how: str) -> None:
    made = tiny.of_method("fedspa", federate={"rounds": 4, "clients_per_round": 3})
    engine = Forgetful(how=how, round=3)
    tiny.run(made, tmp_path / "hit", engine=engine)
    tiny.run(made, tmp_path / "whole")
    assert engine.hit and any(r["kind"] == "resync" for r in tiny.rows(tmp_path / "hit", "ledger"))
    assert tiny.digests(tmp_path / "hit") == tiny.digests(tmp_path / "whole")


def test_the_next_mask_must_come_after_the_update_that_it_refers_to(tmp_path: Path) -> None:
    class Reversed(tiny.Lists):
        def run(self, jobs: list[Job]) -> list[Reply | Failure]:
            return [self._turned(answer) for answer in super().run(jobs)]

        def _turned(self, answer: Reply | Failure) -> Reply | Failure:
            if isinstance(answer, Failure) or answer.client != 1 or len(answer.outbox) < 3:
                return answer
            update, mask, visit = answer.outbox
            return replace(answer, outbox=(mask, update, visit))

    made = tiny.of_method("fedspa", federate={"rounds": 3, "clients_per_round": 3}, wire="lossless")
    tiny.run(made, tmp_path / "r", engine=Reversed())
    failed = [f for r in tiny.rows(tmp_path / "r", "rounds") for f in r["failed"]]
    assert {(f["client"], f["kind"]) for f in failed} == {(1, "refused")}
