"""Injected faults: the same visits meet them on every engine and after every stop, and each costs its client alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedlth import forecast
from fedlth.engines.forked import Forked
from fedlth.engines.inprocess import InProcess
from fedlth.errors import StudyError
from fedlth.experiment.chaos import fault_of
from fedlth.federation import session
from fedlth.federation.jobs import Failure, Job, Reply
from fedlth.federation.rounds import missing
from fedlth.report.facts import read_run
from fedlth.report.headline import honest_notes
from fedlth.report.results import results_of
from fedlth.storage.checkpoint import Progress
from fedlth.storage.run_folder import RunFolder
from fedlth.study import schema
from fedlth.study.sections import Faults
from tests import tiny
from tests.faults.test_resume import Crash, Meddling, crashing

FAULTS = tuple(Faults.model_fields)
# What is said of each in the round's record: the kind of failure, and a word of its reason.
MET = {
    "drop": ("lost", "no answer came"), "delay": ("hung", "too late"), "duplicate": ("refused", "came twice"),
    "corrupt": ("refused", ""), "nan": ("refused", "finite"), "wrong_shape": ("refused", "schema"),
    "lie_about_counts": ("refused", "num_"), "huge": ("refused", ""), "kill": ("died", "was killed"),
    "disk_full": ("raised", "No space left"), "stale": ("refused", "answered for"),
}  # fmt: skip
SECTIONS: dict[str, Any] = {
    "federate": {"rounds": 3, "clients_per_round": 3},
    "personalise": {"arms": ["global", "ticket"], "clients_per_wave": 4},
    "finder": {"densities": [0.5]},
}


def study(chaos: dict[str, Any] | None, **sections: Any) -> schema.Study:
    return tiny.study(**{**SECTIONS, **sections}, **({"chaos": chaos} if chaos else {}))


def failed(out: Path) -> list[tuple[str, int, int, str, str]]:
    return [
        (row["phase"], row["round"], f["client"], f["kind"], f["reason"])
        for row in tiny.rows(out, "rounds")
        for f in row["failed"]
    ]


def victim() -> int:
    return min(set(range(4)) - set(tiny.open_task(study(None).science()).splits.unseen))


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Digests of the run in which one client does not answer in one round."""
    bad, out = victim(), tmp_path_factory.mktemp("lost") / "run"

    def lost(job: Job, answer: Reply | Failure) -> Reply | Failure:
        if (job.phase, job.round, job.client) == ("federate", 2, bad):
            return Failure(round=job.round, client=job.client, kind="lost", reason="")
        return answer

    tiny.run(study(None), out, engine=Meddling(lost))
    return tiny.digests(out)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_costs_its_client_alone_in_its_round(tmp_path: Path, without: dict[str, Any], fault: str) -> None:
    bad = victim()
    made = study({"faults": {fault: 1.0}, "rounds": [2], "clients": [bad], "phases": ["federate"]})
    tiny.run(made, tmp_path / "r")
    ((phase, round, client, kind, reason),) = failed(tmp_path / "r")
    assert (phase, round, client) == ("federate", 2, bad)
    assert kind == MET[fault][0] and MET[fault][1] in reason, reason
    assert tiny.digests(tmp_path / "r") == without, "as if it had not answered"
    (told,) = (row["injected"] for row in tiny.rows(tmp_path / "r", "rounds") if "injected" in row)
    assert told == [{"client": bad, "fault": fault}]
    statuses = {r["status"] for r in tiny.rows(tmp_path / "r", "ledger") if r["status"] != "ok"}
    assert statuses and all(status.endswith(f" (chaos: {fault})") for status in statuses), statuses


@pytest.mark.parametrize(
    ("method", "fault"),
    [
        ("fedpm", "nan"), ("ssfl", "huge"),
        *(pytest.param(*one, marks=pytest.mark.long) for one in (
            ("fedpm", "huge"), ("fedpm", "wrong_shape"), ("fedpm", "lie_about_counts"), ("ssfl", "nan"),
            ("ssfl", "wrong_shape"), ("spafl", "huge"), ("dispfl", "nan"), ("scaffold", "huge"), ("fedtiny", "nan"),
            ("heterofl", "wrong_shape"),
        )),
    ],
)  # fmt: skip
def test_what_carries_no_weights_is_spoilt_too(tmp_path: Path, method: str, fault: str) -> None:
    made = tiny.of_method(method, federate={"rounds": 1}, chaos={"seed": 1, "faults": {fault: 0.4}})
    tiny.run(made, tmp_path / "r")
    found = {(phase, round, client): kind for phase, round, client, kind, _ in failed(tmp_path / "r")}
    met = {
        (row["phase"], row["round"], one["client"])
        for row in tiny.rows(tmp_path / "r", "rounds")
        for one in row.get("injected", [])
    }
    assert met and found == dict.fromkeys(met, "refused")


@pytest.mark.parametrize(
    "wire", ["step", *(pytest.param(name, marks=pytest.mark.long) for name in ("raw", "bf16", "f16", "sign"))]
)
def test_every_codec_can_say_what_is_wrong(tmp_path: Path, wire: str) -> None:
    faults, bad = {"nan": 0.3, "huge": 0.3, "wrong_shape": 0.3}, victim()

    def seeded(seed: int) -> schema.Study:
        return study({"seed": seed, "faults": faults, "phases": ["federate"], "clients": [bad]}, wire=wire)

    met = ({fault_of(seeded(s), "federate", r, bad) for r in (1, 2, 3)} for s in range(100))
    tiny.run(seeded(next(s for s, one in enumerate(met) if one == set(faults))), tmp_path / "r")
    assert [(client, kind) for *_, client, kind, _ in failed(tmp_path / "r")] == [(bad, "refused")] * 3


def noting(commit: Callable[[RunFolder, Progress], None], seen: list[str]) -> Callable[[RunFolder, Progress], None]:
    def noted(self: RunFolder, progress: Progress) -> None:
        seen.append(progress.theta)
        commit(self, progress)

    return noted


def test_a_round_that_all_clients_fail_keeps_the_model(tmp_path: Path) -> None:
    """Where all answers are refused, the model may be why, and the one before it takes its place."""
    for fault, theta in (("drop", "theta-0"), ("nan", "theta-1")):
        made = study({"faults": {fault: 1.0}, "rounds": [2], "phases": ["federate"]}, method="fedavg")
        seen: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RunFolder, "commit", noting(RunFolder.commit, seen))
            tiny.run(made, tmp_path / fault)
        assert seen[:3] == ["theta-0", theta, "theta-2"]
        told = [row.get("rolled_back_to") for row in tiny.rows(tmp_path / fault, "rounds")]
        assert told[1] == (None if fault == "drop" else "the initial one")
        assert {row["client"] for row in tiny.rows(tmp_path / fault, "metrics")} == {0, 1, 2, 3}, "it ends well"


ALL = {"seed": 7, "faults": dict.fromkeys(FAULTS, 0.07)}


def test_a_stop_changes_nothing(tmp_path: Path) -> None:
    """Killed and dropped clients of step 2 would be made up for by a resume: of injected ones nobody is."""
    made = study({"seed": 3, "faults": {"kill": 0.2, "drop": 0.2, "corrupt": 0.1, "stale": 0.1, "nan": 0.1}})
    tiny.run(made, tmp_path / "whole")
    assert {"lost", "died"} <= {kind for phase, *_, kind, _ in failed(tmp_path / "whole")}
    assert any(phase == "personalise" for phase, *_ in failed(tmp_path / "whole"))
    for stop in (1, 3):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
            crashing(patch, "after the checkpoint", stop)
            tiny.run(made, tmp_path / f"r{stop}")
        session.resume(tmp_path / f"r{stop}", InProcess())
        assert tiny.facts(tmp_path / f"r{stop}") == tiny.facts(tmp_path / "whole")
    assert missing(RunFolder(tmp_path / "whole")) == []
    (note,) = (n for n in honest_notes(results_of((read_run(tmp_path / "whole"),))) if "on purpose" in n)
    assert "chaos" in note and "kill" in note


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_processes_are_really_killed_and_the_run_is_that_of_one_process(tmp_path: Path) -> None:
    made = study({"seed": 5, "faults": {"kill": 0.3, "drop": 0.1, "nan": 0.2}})
    tiny.run(made, tmp_path / "one")
    said: list[str] = []
    tiny.run(made, tmp_path / "forked", engine=Forked(2), tell=said.append)
    assert tiny.facts(tmp_path / "forked") == tiny.facts(tmp_path / "one")
    assert any("SIGKILL" in line for line in said)
    assert "died" in {kind for *_, kind, _ in failed(tmp_path / "one")}


def test_which_visit_meets_what_is_the_seeds_alone(tmp_path: Path) -> None:
    made = study(ALL)
    assert [fault_of(made, "federate", r, c) for r in range(1, 60) for c in range(4)].count("") < 200
    for changed in ({"seed": 1}, {"train": {"lr": 0.2}}, {"engine": "ray"}):
        other = study(ALL, **changed)
        assert all(fault_of(made, "federate", r, 1) == fault_of(other, "federate", r, 1) for r in range(60))
    more = study({**ALL, "faults": {**ALL["faults"], "stale": 0.2}})
    pairs = [(fault_of(made, "federate", r, 1), fault_of(more, "federate", r, 1)) for r in range(300)]
    assert {now for was, now in pairs if was != now} == {"stale"}, "a rate changes no other fault's visits"
    some = study({**ALL, "rounds": [2], "clients": [1], "phases": ["federate"]})
    assert {fault_of(some, *visit) for visit in (("federate", 1, 1), ("federate", 2, 0), ("personalise", 2, 1))} == {""}
    assert fault_of(made, "transfer", 1, 1) == ""


def test_without_it_nothing_is_said_of_it(tmp_path: Path) -> None:
    assert "chaos" not in study(None).science() and "chaos" in study(ALL).science()
    assert schema.build(dict(study(ALL).model_dump(mode="json"))) == study(ALL)


def test_check_counts_what_will_be_met(tmp_path: Path) -> None:
    made = study({"seed": 7, "faults": {"drop": 0.3, "nan": 0.1}, "rounds": [1, 2]}, out=str(tmp_path / "r"))
    text = forecast.forecast(made)
    assert "note: chaos: faults are injected by seed 7, at rates drop 0.3, nan 0.1; rounds 1, 2" in text
    tiny.run(made, tmp_path / "r")
    met = [one["fault"] for row in tiny.rows(tmp_path / "r", "rounds") for one in row.get("injected", [])]
    assert met and f"injected faults: {len(met)} of 13 visits: drop {met.count('drop')}" in text


@pytest.mark.parametrize(
    ("chaos", "message"),
    [
        pytest.param(
            {"faults": {"clock_skew": 0.1}}, "nothing here compares the clocks of two machines", id="clock_skew"
        ),
        ({"faults": {"drop": 0.7, "nan": 0.7}}, "at most 1"),
        ({"faults": {"drop": 1.5}}, "chaos.faults.drop"),
        ({"faults": {"flood": 0.5}}, "chaos.faults.flood"),
        ({}, "chaos.faults"),
    ],
)
def test_what_cannot_be_written_is_refused(chaos: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        schema.build(tiny.tree(chaos=chaos))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"chaos": {"faults": {}}}, "chaos.faults: must give at least one fault a rate"),
        ({"chaos": {"faults": {"drop": 0.1}, "clients": [4]}}, "chaos.clients must be below clients.count = 4"),
        ({"chaos": {"faults": {"drop": 0.1}, "phases": ["tickets"]}}, "chaos.phases must be among federate, "),
        ({"chaos": {"faults": {"kill": 0.1}}, "cohort": 2}, "chaos.faults.kill: needs cohort: 1"),
    ],
)
def test_what_the_study_cannot_have_is_refused(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        tiny.run(tiny.study(**sections), tmp_path / "r")
    assert not (tmp_path / "r").exists()
