"""A global model that still trains and is of no use is undone; a run in order never sees any of it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlth.engines.inprocess import InProcess
from fedlth.federation import session
from fedlth.federation.collapse import collapsed, followed, health_of
from fedlth.federation.jobs import Failure, Job, Reply
from fedlth.federation.rounds import Federation
from fedlth.federation.update_norms import without_last
from fedlth.report.facts import read_run
from fedlth.report.headline import summary_text
from fedlth.report.results import results_of
from fedlth.storage.checkpoint import Health, Progress
from fedlth.storage.records import VisitRecord
from fedlth.storage.run_folder import RunFolder
from fedlth.wire import metrics
from tests import tiny
from tests.faults.test_absurd_updates import poisoned, run, scatter, study

CLASSES = 4  # of the tiny data
GOOD, GUESS = Health("federate", 0.8, 0.5, 3), math.log(CLASSES)
SHARE = 0.1


def judged(now: Health | None, before: Health | None = GOOD, **sections: Any) -> bool:
    return bool(collapsed(tiny.experiment(study(**sections)), [before] * 3 if before else [], now))


@pytest.mark.parametrize(
    ("now", "before", "bad"),
    [
        (Health("federate", 0.25, GUESS, 3), GOOD, True),
        (Health("federate", 0.0, 1e4, 3), GOOD, True),
        (Health("federate", 0.0, 0.9, 3), GOOD, False),  # forgotten, and learnt again at once: honest
        (Health("federate", 0.4, 1e4, 3), GOOD, True),
        (Health("federate", 0.4, 2 * GUESS, 3), GOOD, False),
        (Health("federate", 0.25, GUESS, 3), Health("federate", 0.8, GUESS + 0.1, 3), False),  # learns slowly
        (Health("federate", 0.25, GUESS, 3), Health("federate", 0.32, 0.5, 3), False),  # had no lead to lose
        (Health("federate", 0.3, 10 * GUESS, 3), Health("federate", 0.3, 1e30, 3), True),  # after a first round of lies
        (Health("federate", 0.3, 9 * GUESS, 3), Health("federate", 0.3, 1e30, 3), False),
        (Health("federate", 0.4, 10 * GUESS, 3), Health("federate", 0.3, 1.0, 3), False),
        (Health("refine", 0.0, 1e4, 3), GOOD, False),
        (Health("federate", 0.25, 0.8 * GUESS, 3), GOOD, False),
        (None, GOOD, False),
        (Health("federate", 0.0, 1e4, 3), None, False),
    ],
)
def test_the_rule(now: Health | None, before: Health | None, bad: bool) -> None:
    assert judged(now, before) == bad
    assert not judged(now, before, federate={"rounds": 3, "roll_back": 0})


def test_a_lead_that_comes_and_goes_is_none_to_lose() -> None:
    """Where few classes live with a client, what is seen of a model in order may be anything in any round."""
    bad = Health("federate", 0.25, GUESS, 3)
    experiment, odd = tiny.experiment(study()), Health("federate", 0.2, 0.5, 3)
    assert collapsed(experiment, [GOOD, GOOD, GOOD], bad)
    for before in ([GOOD, GOOD], [odd, GOOD, GOOD], [GOOD, odd, GOOD]):
        assert not collapsed(experiment, before, bad)
    assert followed([GOOD] * 3, bad) == (GOOD, GOOD, bad) and followed([GOOD], None) == (GOOD,)
    assert followed([GOOD] * 3, Health("refine", 0.9, 0.1, 3)) == (Health("refine", 0.9, 0.1, 3),)


def test_most_must_say_so() -> None:
    """Of two both: or one client could undo the work of the others, over and over."""
    experiment = tiny.experiment(study())
    phase = experiment.phases[0]
    fine, bad = (VisitRecord(10, loss, seen) for loss, seen in ((0.4, 0.9), (1e38, 0.0)))

    def found(*visits: VisitRecord) -> Health | None:
        return health_of(experiment, phase, list(enumerate(visits)), ())

    assert found(fine, bad) == Health("federate", 0.9, 0.4, 2) and found(bad, fine, bad) == Health(
        "federate", 0.0, 1e38, 3
    )
    assert found(bad) is None and found(bad, VisitRecord(10)) is None


def test_who_keeps_a_part_to_itself_judges_once_it_has_one() -> None:
    """A first visit of FedPer looks at the body under a head that nobody has trained."""
    visits = [(client, VisitRecord(10, 1.0, 0.1)) for client in range(4)]
    for method, counted in (("fedavg", 4), ("fedper", 2), ("spafl", 2)):
        experiment = tiny.experiment(tiny.of_method(method))
        found = health_of(experiment, experiment.phases[0], visits, {"1", "3"})
        assert found is not None and found.clients == counted, method


def dead(floats: np.ndarray, ints: np.ndarray) -> None:
    floats[-16:-4] = -4.0  # the hidden units' biases: no unit is ever alive again, a few norms of the model away


def attacked(out: Path, rounds: set[int], **sections: Any) -> list[str]:
    """Run a study in which all clients of these rounds send what is within all that the door can know."""
    made = study(federate={"rounds": 7, "clients_per_round": 3, **sections.pop("federate", {})}, **sections)

    def when(job: Job) -> bool:
        return job.phase == "federate" and job.round in rounds

    return run(out, made, when, lambda job, reply: poisoned(job, reply, scatter if job.round == 1 else dead))


@pytest.mark.parametrize(("round", "back"), [(1, "the initial one"), (5, "that of federate 4")])
def test_an_attack_by_all_clients_is_undone(tmp_path: Path, round: int, back: str) -> None:
    """It was joined: in a first round there is nothing to hold it against."""
    said = attacked(tmp_path / "r", {round}, method="fedavg")
    rows = [r for r in tiny.rows(tmp_path / "r", "rounds") if r["phase"] == "federate"]
    assert [r.get("rolled_back_to", "") for r in rows] == [back if r["round"] == round + 1 else "" for r in rows]
    why = rows[round]["undone"]
    assert why.startswith(f"federate {round}: most of 3 clients saw accuracy ") and "in the last good round" in why
    assert any(f"note: undone: {why}; it is rolled back to {back}" in line for line in said)
    assert rows[-1]["val_accuracy"] > 1.5 / CLASSES
    text = " ".join(summary_text(results_of((read_run(tmp_path / "r"),))).split())
    assert f"round {round + 1} of federate: undone: federate {round}: most of" in text


def test_without_the_defence_it_ruins_the_run(tmp_path: Path) -> None:
    attacked(tmp_path / "r", {5}, federate={"roll_back": 0})
    rows = [r for r in tiny.rows(tmp_path / "r", "rounds") if r["phase"] == "federate"]
    assert not any("undone" in r for r in rows)
    assert rows[6]["val_accuracy"] < rows[4]["val_accuracy"]


def test_the_undone_rounds_leave_nothing_with_anybody(tmp_path: Path) -> None:
    """After it the run goes on as from the last good state: model, states, masks, and what is known of norms."""
    seen, commit = list[Progress](), RunFolder.commit

    def noted(self: RunFolder, progress: Progress) -> None:
        seen.append(progress)
        commit(self, progress)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "commit", noted)
        attacked(tmp_path / "r", {5})
    known = seen[-1].norms["federate"]
    assert max(known["parameters"]) < 5, "what was undone is no measure of later updates"
    assert len(known["parameters"]) == 15, "those of rounds 1 to 4, and 7"
    assert set(seen[5].versions.values()) == {"federate-5"}, "round 6, which undoes it, gives nobody a state"


@pytest.mark.parametrize("after", [5, pytest.param(6, marks=pytest.mark.long)])
def test_it_resumes_like_anything_else(tmp_path: Path, after: int) -> None:
    attacked(tmp_path / "whole", {5})
    stepped = Federation.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Federation, "run", lambda self: stepped(self, stop_after=after))
        patch.setattr(session, "_finish", lambda *_: None)
        with pytest.raises(Exception, match="no client finished"):
            attacked(tmp_path / "cut", {5})
    session.resume(tmp_path / "cut", InProcess())
    assert tiny.facts(tmp_path / "cut") == tiny.facts(tmp_path / "whole")


def test_a_single_liar_undoes_nothing(tmp_path: Path) -> None:
    made = study(federate={"rounds": 4, "clients_per_round": 2})

    def lies(job: Job, reply: Reply) -> Reply | Failure:
        told = metrics.decode(reply.outbox[1].payload) | {"loss": 1e38, "val_accuracy": 0.0}
        return replace(reply, outbox=(reply.outbox[0], replace(reply.outbox[1], payload=metrics.encode(told))))

    first: dict[int, int] = {}

    def when(job: Job) -> bool:
        return job.phase == "federate" and first.setdefault(job.round, job.client) == job.client

    run(tmp_path / "r", made, when, lies)
    assert not any("undone" in r for r in tiny.rows(tmp_path / "r", "rounds"))


@pytest.mark.parametrize("method", [pytest.param(m, marks=pytest.mark.long) for m in tiny.METHODS])
def test_no_run_in_order_is_judged(tmp_path: Path, method: str) -> None:
    """In every method: with few classes a client, few clients a round and many local steps."""
    made = tiny.of_method(
        method, partition={"name": "classes", "classes_per_client": 2}, federate={"rounds": 8, "clients_per_round": 2},
        train={"epochs": 4}, clients={"count": 6, "unseen": 0.0},
    )  # fmt: skip
    tiny.run(made, tmp_path / "r")
    assert not any("rolled_back_to" in r for r in tiny.rows(tmp_path / "r", "rounds"))


def test_norms_without_the_last() -> None:
    assert without_last({"a": [1.0, 2.0, 3.0], "b": [1.0]}, {"a": 2, "b": 5}) == {"a": [1.0], "b": []}
    assert np.allclose(SHARE, study().federate.roll_back), "the stated default"
