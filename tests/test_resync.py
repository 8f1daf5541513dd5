"""A client that has lost what its download refers to gets it again, whole; that is counted, and costs nobody else."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlth.engines.inprocess import InProcess
from fedlth.federation.jobs import Failure, Job, Reply
from fedlth.methods.lotteryfl import lotteryfl
from fedlth.methods.method import FederatedMethod
from fedlth.storage.client_state import ClientState
from fedlth.training.task import Task
from tests import tiny
from tests.test_transport import Counting, check

STUDY: dict[str, Any] = {"federate": {"rounds": 4, "clients_per_round": 3}}


class Forgetful(Counting):
    """Clients whose state is gone (`lost`), or whose mask is another than the server believes (`other`), in a round."""

    def __init__(self, *, how: str, round: int, phase: str = "federate") -> None:
        super().__init__()
        self.how, self.round, self.phase = how, round, phase
        self.hit: set[int] = set()

    def run(self, jobs: list[Job]) -> list[Reply | Failure]:
        return super().run([self._struck(job) for job in jobs])

    def _struck(self, job: Job) -> Job:
        if (job.phase, job.round) != (self.phase, self.round) or job.client in self.hit or not job.version:
            return job
        self.hit.add(job.client)
        if self.how == "lost":
            return replace(job, state=None)
        state = ClientState.from_bytes(job.state)
        (name,) = {"shared", "everyones"} & state.masks.keys()
        return replace(job, state=state.with_(masks={name: np.roll(state.masks[name], 1)}).to_bytes())


@pytest.mark.parametrize("wire", ["raw", "lossless", "step"])
@pytest.mark.parametrize("how", ["lost", "other"])
def test_what_was_lost_is_sent_again_and_counted(
    how: str, wire: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = Forgetful(how=how, round=3)
    tiny.run(tiny.of_method("lotteryfl", wire=wire, **STUDY), tmp_path / "r", engine=engine)
    assert engine.hit
    rows = tiny.rows(tmp_path / "r", "ledger")
    again = [r for r in rows if r["kind"] == "resync"]
    asked = [r for r in rows if r["kind"] == "control"]
    assert {r["receiver"] for r in again} == {r["sender"] for r in asked} == {f"client:{c}" for c in engine.hit}
    assert {r["round"] for r in again} == {3} and {r["payload_bytes"] for r in asked} == {8}
    first = {(r["receiver"], r["ticket"]): r for r in rows if r["kind"] == "values" and r["round"] == 3}
    for row in again:  # the same mask, this time with its bits
        assert row["mask_bytes"] > first[row["receiver"], row["ticket"]]["mask_bytes"] == 0
    assert not any(r["failed"] for r in tiny.rows(tmp_path / "r", "rounds"))
    check(engine, tmp_path / "r", capsys)


def test_a_client_that_lost_its_mask_gets_it_back(tmp_path: Path) -> None:
    engine = Forgetful(how="other", round=3)
    tiny.run(tiny.of_method("lotteryfl", **STUDY), tmp_path / "hit", engine=engine)
    tiny.run(tiny.of_method("lotteryfl", **STUDY), tmp_path / "whole", engine=InProcess())
    # LotteryFL keeps nothing but its mask: with that back, the run is the one in which nothing was lost.
    assert tiny.digests(tmp_path / "hit") == tiny.digests(tmp_path / "whole")
    assert tiny.rows(tmp_path / "hit", "metrics") == tiny.rows(tmp_path / "whole", "metrics")


@pytest.mark.parametrize(("phase", "round"), [("federate", 3), ("personalise", 1)])
def test_what_is_asked_for_again_takes_two_latencies_more(tmp_path: Path, phase: str, round: int) -> None:
    """On a fleet of one tier: a second message each way beside the bytes. In step 2 the whole model beside a slice, for
    controls alone, counted in the first of the two tries."""
    fleet = {"flops_s": 1e6, "down_bytes_s": 1e3, "up_bytes_s": 5e2, "latency_s": 7.0}
    for name, engine in (("hit", hit := Forgetful(how="other", round=round, phase=phase)), ("whole", InProcess())):
        tiny.run(tiny.of_method("lotteryfl", fleet=fleet, **STUDY), tmp_path / name, engine=engine)
    seconds, moved = [], []
    for name in ("hit", "whole"):
        rows = [row for row in tiny.rows(tmp_path / name, "ledger") if (row["phase"], row["round"]) == (phase, round)]
        assert (phase == "personalise") == any(row["kind"] == "evaluation" for row in rows)
        rows = [row for row in rows if phase == "federate" or row["kind"] not in ("evaluation", "metrics")]
        times = [row for row in tiny.rows(tmp_path / name, "times") if (row["phase"], row["round"]) == (phase, round)]
        seconds.append({row["client"]: row["simulated_s"] for row in times if row.get("client") in hit.hit})
        moved.append({c: sum(r["payload_bytes"] / (5e2 if r["sender"] == f"client:{c}" else 1e3) for r in rows
                             if f"client:{c}" in (r["sender"], r["receiver"])) for c in hit.hit})  # fmt: skip
    assert hit.hit
    for client in hit.hit:
        more = moved[0][client] - moved[1][client]
        assert seconds[0][client] - seconds[1][client] == pytest.approx(2 * 7.0 + more)


@pytest.mark.parametrize("name", ["salientgrads", "feddst"])
@pytest.mark.parametrize("wire", ["raw", "lossless"])
@pytest.mark.parametrize("how", ["lost", "other"])
def test_everyone_s_mask_is_sent_again_to_whoever_lost_it(
    how: str, wire: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = Forgetful(how=how, round=3)
    made = tiny.of_method(name, wire=wire, **STUDY)
    made = made.model_copy(update={"method": {**made.method, "every": 9}}) if name == "feddst" else made
    tiny.run(made, tmp_path / "hit", engine=engine)
    tiny.run(made, tmp_path / "whole", engine=InProcess())
    rows = tiny.rows(tmp_path / "hit", "ledger")
    again = [r for r in rows if r["kind"] == "resync"]
    asked = [r for r in rows if r["kind"] == "control"]
    assert len(engine.hit) == 3 and {r["receiver"] for r in again} == {f"client:{c}" for c in engine.hit}
    assert {r["round"] for r in again} == {3} and {r["payload_bytes"] for r in asked} == {8}
    assert all(r["mask_bytes"] > 0 and r["broadcast"] for r in again)
    assert not any(r["failed"] for r in tiny.rows(tmp_path / "hit", "rounds"))
    assert tiny.digests(tmp_path / "hit") == tiny.digests(tmp_path / "whole")
    check(engine, tmp_path / "hit", capsys)


def test_a_client_that_asks_again_and_again_fails_alone(tmp_path: Path) -> None:
    class Stubborn(tiny.Lists):
        def run(self, jobs: list[Job]) -> list[Reply | Failure]:
            lost = [replace(j, state=None, version="x-1") if (j.client, j.round) == (victim, 2) else j for j in jobs]
            return super().run(lost)

    made = tiny.of_method("lotteryfl", federate={"rounds": 3, "clients_per_round": 3})
    victim = next(c for c in range(4) if c not in tiny.open_task(made.science()).splits.unseen)
    tiny.run(made, tmp_path / "r", engine=Stubborn())
    failed = [f for r in tiny.rows(tmp_path / "r", "rounds") for f in r["failed"]]
    assert [(f["client"], f["kind"]) for f in failed] == [(victim, "refused")]


@dataclass(frozen=True)
class Half:
    """Every second weight, another half for odd clients than for even ones."""

    def __call__(self, task: Task, client: int, /) -> np.ndarray:
        return np.arange(task.layout.num_prunable) % 2 == client % 2


def halves() -> FederatedMethod:
    return replace(lotteryfl(**tiny.METHODS["lotteryfl"]), name="halves", first_mask=Half(), arms=("own", "own_tuned"))


@pytest.mark.parametrize("personal", [[], ["3.*"]])
def test_a_first_mask_costs_nothing_and_comes_back_after_a_loss(personal: list[str], tmp_path: Path) -> None:
    made = tiny.study(
        method="tests.test_resync:halves", model={"personal": personal}, federate={"rounds": 3, "clients_per_round": 3}
    )
    tiny.run(made, tmp_path / "whole")
    engine = Forgetful(how="lost", round=2)
    tiny.run(made, tmp_path / "lost", engine=engine)
    assert engine.hit
    for run in ("whole", "lost"):
        assert not any(r["failed"] for r in tiny.rows(tmp_path / run, "rounds"))
        first = [r for r in tiny.rows(tmp_path / run, "ledger") if r["kind"] == "install"]
        assert len(first) == 4 and {r["mask_bytes"] for r in first} == {0}
        assert [r["density"] for r in first] == [pytest.approx(0.5, abs=0.01)] * 4
        (unseen,) = tiny.task_of(tmp_path / run).splits.unseen
        row = next(r for r in tiny.rows(tmp_path / run, "metrics") if (r["client"], r["arm"]) == (unseen, "own"))
        assert row["density"] == pytest.approx(0.5, abs=0.01), "of personal tensors too"
