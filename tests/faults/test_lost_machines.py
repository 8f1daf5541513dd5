"""Clients whose machine was lost: what the live line says of them, and what a resume makes up for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedlth.engines.inprocess import InProcess
from fedlth.errors import NothingUsable, StudyError
from fedlth.federation import session
from fedlth.federation.jobs import Failure, Job, Reply
from fedlth.federation.missing import missing
from fedlth.federation.rounds import Federation
from fedlth.output import lines_to
from fedlth.storage.run_folder import RunFolder
from fedlth.wire import metrics
from tests import tiny

REFINED: dict[str, Any] = {"refine": {"rounds": 1, "clients_per_round": 2}}


class Losing(tiny.Lists):
    """An engine that answers for a job with what `fault` returns, if it returns anything."""

    def __init__(self, fault: Callable[[Job], Failure | None]) -> None:
        self.fault = fault

    def run(self, jobs: list[Job]) -> list[Reply | Failure]:
        return [self.fault(job) or super(Losing, self).run([job])[0] for job in jobs]


def losing(kinds: dict[int, str], *phases: str) -> Losing:
    def fault(job: Job) -> Failure | None:
        if job.phase not in phases or job.client not in kinds:
            return None
        reason = f"because of {kinds[job.client]}"
        return Failure(round=job.round, client=job.client, kind=kinds[job.client], reason=reason)

    return Losing(fault)


def by_client(out: Path, name: str) -> list[dict[str, Any]]:
    return sorted(tiny.rows(out, name), key=lambda row: (row["client"], row["arm"], row["target_density"]))


def facts(out: Path) -> dict[str, Any]:
    """Return what must be equal: parameters, tickets, metrics whatever their order."""
    made = tiny.facts(out)
    apart = ("ledger.jsonl", "rounds.jsonl", "metrics.jsonl")
    return {**{k: v for k, v in made.items() if k not in apart}, "metrics": by_client(out, "metrics")}


def test_the_live_line_says_why_once_a_kind(tmp_path: Path) -> None:
    """Row 21: the reason stood in rounds.jsonl alone."""
    made = tiny.study(personalise={"clients_per_wave": 4})
    said: list[str] = []
    tiny.run(made, tmp_path / "r", engine=losing({0: "died", 2: "hung", 3: "died"}, "personalise"), tell=said.append)
    (line,) = [line for line in said if " failed" in line]
    assert line.endswith("  3 failed: clients 0, 3: died: because of died; client 2: hung: because of hung")


def test_a_run_that_ends_for_refused_replies_says_what_was_wrong_with_them(tmp_path: Path) -> None:
    """Row 21, its brother: "every reply was refused" and no more."""

    class Odd(tiny.Lists):
        def run(self, jobs: list[Job]) -> list[Reply | Failure]:
            answers = [a for a in super().run(jobs) if isinstance(a, Reply)]
            bad = metrics.encode({"num_examples": -1})
            return [replace(a, outbox=(a.outbox[0], replace(a.outbox[1], payload=bad))) for a in answers]

    with pytest.raises(StudyError, match="every reply was refused, the first with: metrics: num_examples must be"):
        tiny.run(tiny.study(federate={"rounds": 3}), tmp_path / "r", engine=Odd())


@pytest.mark.parametrize("kind", ["died", "lost"])
@pytest.mark.parametrize("method", ["two_step", "lotteryfl", "fedpm"])
def test_a_resume_visits_whom_a_machine_cost_step_2(method: str, kind: str, tmp_path: Path) -> None:
    """Row 40: everything but the ledger is then that of a run which lost nobody; the ledger counts what crossed."""
    made = tiny.of_method(method, finder={"rewind": {"name": "global", "round": 1}} if method == "two_step" else {})
    tiny.run(made, tmp_path / "whole")
    out, said = tmp_path / "r", list[str]()
    tiny.run(made, out, engine=losing({0: kind, 1: kind, 2: kind}, "personalise"), tell=said.append)
    assert missing(RunFolder(out)) == [0, 1, 2]
    assert said[-1].startswith("note: no result of 3 clients") and f"fedlth resume {out} visits" in said[-1]
    before = tiny.rows(out, "ledger")
    session.resume(out, InProcess())
    assert missing(RunFolder(out)) == [] and facts(out) == facts(tmp_path / "whole")
    ledger = tiny.rows(out, "ledger")
    assert ledger[: len(before)] == before, "what crossed stays counted"
    again = [{**row, "round": 0} for row in ledger[len(before) :]]
    once = [{**r, "round": 0} for r in tiny.rows(tmp_path / "whole", "ledger") if r["phase"] == "personalise"]
    assert again == [r for r in once if "client:3" not in (r["sender"], r["receiver"])], "and the visits made up for"
    waves = [(row["round"], row["clients"]) for row in tiny.rows(out, "rounds") if row["phase"] == "personalise"]
    assert waves == [(1, [0, 1]), (2, [2, 3]), (3, [0, 1]), (4, [2])]
    said.clear()
    with lines_to(said.append):
        session.resume(out, InProcess())
    assert said == [f"{out}: has ended already"]


@pytest.mark.parametrize("kind", ["raised", "hung", "memory"])
def test_a_clients_own_fault_costs_itself_for_good(kind: str, tmp_path: Path) -> None:
    """Row 40: only what a machine cost is made up for."""
    out, said = tmp_path / "r", list[str]()
    tiny.run(tiny.study(), out, engine=losing({1: kind}, "personalise"))
    with lines_to(said.append):
        session.resume(out, InProcess())
    assert said == [f"{out}: has ended already"] and missing(RunFolder(out)) == []


def test_with_refinement_only_its_last_phase_is_made_up_for(tmp_path: Path) -> None:
    """Row 40: a client without a ticket in the refinement cannot have taken part in it afterwards."""
    made = tiny.study(**REFINED, personalise={"arms": ["dense", "ticket"]})
    tiny.run(made, tmp_path / "whole")
    tiny.run(made, tmp_path / "r", engine=losing({1: "lost"}, "refined"))
    assert missing(RunFolder(tmp_path / "r")) == [1]
    session.resume(tmp_path / "r", InProcess())
    assert facts(tmp_path / "r") == facts(tmp_path / "whole")
    tiny.run(made, tmp_path / "early", engine=losing({1: "lost"}, "personalise"))
    assert missing(RunFolder(tmp_path / "early")) == []


def test_a_stop_in_the_revisit_is_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 40: between two waves, and after the last one, before the tickets are written."""
    made, out = tiny.study(), tmp_path / "r"
    tiny.run(made, tmp_path / "whole")
    tiny.run(made, out, engine=losing({0: "died", 1: "died", 3: "died"}, "personalise"))
    step, finish = Federation._step, session._finish

    def stopped(self: Federation, *given: Any) -> None:
        step(self, *given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Federation, "_step", stopped)
        with pytest.raises(KeyboardInterrupt):
            session.resume(out, InProcess())
    assert missing(RunFolder(out)) == [3]

    def full(*_: Any) -> None:
        raise OSError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(session, "_finish", full)
        with pytest.raises(OSError, match="no space"):
            session.resume(out, InProcess())
    assert missing(RunFolder(out)) == [] and session._finish is finish
    session.resume(out, InProcess())
    assert facts(out) == facts(tmp_path / "whole")


def test_flower_goes_on_with_a_run_that_lost_devices(tmp_path: Path) -> None:
    """Row 40: `flwr run` with the same `out`, as long as somebody is missing."""
    from fedlth.engines.flower_session import run_of

    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny.tree()))
    asked = {"study": "tiny.yaml", "out": str(tmp_path / "r")}
    tiny.run(tiny.study(), tmp_path / "r", engine=losing({1: "lost"}, "personalise"))
    task = run_of(asked, tmp_path)
    assert task is not None and task.resume
    session.resume(tmp_path / "r", InProcess())
    assert run_of(asked, tmp_path) is None


def test_a_resume_asks_everybody_once_more_where_nobody_finished(tmp_path: Path) -> None:
    """What stops all may be the study's own code: mended, the rounds before are not lost with it."""
    made, out = tiny.study(), tmp_path / "r"
    tiny.run(made, tmp_path / "whole")
    cut = losing({client: "raised" for client in range(4)}, "personalise")
    again = rf"^{out}: no client finished step 2; .* because of raised; .* fedlth resume {out} visits them again$"
    with pytest.raises(NothingUsable, match=again):
        tiny.run(made, out, engine=cut)
    with pytest.raises(NothingUsable, match=again):
        session.resume(out, cut)
    session.resume(out, InProcess())
    assert {row["client"] for row in tiny.rows(out, "metrics")} == {0, 1, 2, 3}
    done = [r for r in tiny.rows(tmp_path / "whole", "rounds") if r["phase"] == "federate"]
    assert [r for r in tiny.rows(out, "rounds") if r["phase"] == "federate"] == done
    waves = [len(row["failed"]) for row in tiny.rows(out, "rounds") if row["phase"] == "personalise"]
    assert waves == [2, 2, 2, 2, 0, 0]


def test_why_nobody_finished_is_not_told_of_a_round(tmp_path: Path) -> None:
    def fault(job: Job) -> Failure | None:
        early = job.phase == "federate"
        if early and job.client != 1:
            return None
        reason = "of the round" if early else "of step 2"
        return Failure(round=job.round, client=job.client, kind="raised", reason=reason)

    with pytest.raises(NothingUsable, match="the first failed with: of step 2;"):
        tiny.run(tiny.study(), tmp_path / "r", engine=Losing(fault))
    assert "of the round" in {f["reason"] for row in tiny.rows(tmp_path / "r", "rounds") for f in row["failed"]}
