"""Forked workers equal the in-process engine, whatever their number; what kills one costs one client."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fedlth.engines.forked import Forked, Forks
from fedlth.engines.inprocess import InProcess, attempt
from fedlth.engines.pool import Lost
from fedlth.engines.worker import Worker
from fedlth.errors import StudyError
from fedlth.federation import rounds, session
from fedlth.federation.jobs import Failure, Job, Reply
from tests import everything, tiny

sys.path.insert(0, str(Path(__file__).parent))
from ray_study import study_of  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks are for Linux")


@pytest.mark.parametrize("name", ["two_step", "fedselect"])
def test_any_number_of_workers_equals_one_process(name: str, tmp_path: Path) -> None:
    made = tiny.of_method(name, federate={"rounds": 3, "clients_per_round": 3})
    tiny.run(made, tmp_path / "one")
    for workers in (2, 5):
        out = tmp_path / str(workers)
        tiny.run(made, out, engine=Forked(workers))
        assert tiny.facts(out) == tiny.facts(tmp_path / "one")
        used = {row["worker"] for row in tiny.rows(out, "times") if row["client"] is not None}
        assert 1 < len(used) <= workers and all(w.startswith("fork:") for w in used)


def test_a_study_with_everything_equals_one_process(tmp_path: Path) -> None:
    tiny.run(everything.study(), tmp_path / "one")
    tiny.run(everything.study(), tmp_path / "two", engine=Forked(2))
    assert tiny.facts(tmp_path / "one") == tiny.facts(tmp_path / "two")
    kinds = {failed["kind"] for row in tiny.rows(tmp_path / "one", "rounds") for failed in row["failed"]}
    assert {"late", "dropped"} <= kinds, "else its fleet tests nothing"


@pytest.mark.parametrize(
    ("fault", "kind", "reason"),
    [
        ("raise", "raised", "RuntimeError: planted"),
        ("exit", "died", "its process ended with 3 (3 tries)"),
        ("segfault", "died", "its process was ended by SIGSEGV (3 tries)"),
        ("hang", "hung", "no answer within job_timeout_s = 2 s"),
    ],
)
def test_a_faulty_client_costs_only_itself(fault: str, kind: str, reason: str, tmp_path: Path) -> None:
    num_rounds = 1 if fault == "hang" else 2  # each is waited for
    made = study_of(
        fault=fault, personalise={"arms": ["global"]}, federate={"rounds": num_rounds, "clients_per_round": 4}
    )
    tiny.run(made, tmp_path / "r", engine=Forked(2, job_timeout_s=2.0))
    told = tiny.rows(tmp_path / "r", "rounds")
    assert len(told) > num_rounds
    for row in told:
        assert [(f["client"], f["kind"], f["reason"]) for f in row["failed"]] == [(2, kind, reason)]


def test_work_lost_with_its_process_is_done_again_and_equals_one_process(tmp_path: Path) -> None:
    """Row 40: a worker is killed in step 1 while a client trains there."""
    marker = tmp_path / "killed"
    made = study_of(
        fault="killed", marker=str(marker), method="two_step", federate={"rounds": 2, "clients_per_round": 3}
    )
    told: list[str] = []
    tiny.run(made, tmp_path / "forked", engine=Forked(2), tell=told.append)
    again = [line for line in told if "was lost" in line]
    assert marker.exists() and len(again) == 1 and "SIGKILL); done again: client 2" in again[0]
    tiny.run(made, tmp_path / "one")
    assert tiny.facts(tmp_path / "forked") == tiny.facts(tmp_path / "one")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError("no room"), "memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"), "memory"),
        (RuntimeError("planted"), "raised"),
    ],
)
def test_a_step_without_memory_is_told_apart_from_one_that_fails(error: Exception, kind: str) -> None:
    """The pool gives up the worker of the one, and goes on with that of the other."""

    def step(job: Job) -> Reply:
        raise error

    answer = attempt(step, Job(study="", phase="federate", round=1, client=2, inbox=()))
    assert isinstance(answer, Failure) and (answer.client, answer.kind) == (2, kind)


@pytest.mark.parametrize(
    ("method", "error", "kind"),
    [
        ("start", ImportError("no such part"), "raised"),
        ("step", EOFError("odd"), "raised"),
        ("step", MemoryError(), "memory"),
    ],
)
def test_what_a_child_raises_outside_its_step_is_told(
    method: str, error: BaseException, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 20: its last words cross before it ends."""

    def raises(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Worker, method, raises)
    forks = Forks()
    child = forks.spawn()
    assert forks.call(child, method, [], forks.put("study")) is child
    assert forks.wait([child], timeout_s=20.0) == [child]
    assert forks.get(child) == Lost(kind, f"{type(error).__name__}: {error}".strip())
    forks.kill(child)


def test_a_start_that_raises_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 20: no bare exit code."""

    def raises(self: Worker, study: str, **_: object) -> None:
        raise ImportError("no such part")

    monkeypatch.setattr(Worker, "start", raises)
    job = Job(study=tiny.study().science(), phase="federate", round=1, client=0, inbox=())
    with pytest.raises(StudyError, match="no worker could be started: ImportError: no such part"):
        list(Forked(2).map([job]))


def test_children_leave_with_a_parent_that_is_killed_and_hold_no_lock(tmp_path: Path) -> None:
    out = tmp_path / "r"
    code = (
        "import sys; sys.path.insert(0, '.'); from pathlib import Path; from tests import everything, tiny; "
        "from fedlth.engines.forked import Forked; "
        f"tiny.run(tiny.study(federate=dict(rounds=500)), Path({str(out)!r}), engine=Forked(2))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    try:
        _until(lambda: (out / "checkpoint.json").exists())
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        assert len(children) == 2
    finally:
        parent.kill()
        parent.wait()
    with pytest.MonkeyPatch.context() as patch:
        # A lock still held by a child would refuse at once.
        patch.setattr(rounds.Federation, "run", lambda self, stop_after=None: (_ for _ in ()).throw(InterruptedError()))
        with pytest.raises(InterruptedError):
            session.resume(out, InProcess())
    _until(lambda: not any(Path(f"/proc/{child}").exists() for child in children))


def test_close_ends_the_workers_and_a_new_map_starts_them() -> None:
    made = tiny.study()
    job = Job(study=made.science(), phase="federate", round=1, client=0, inbox=())
    engine = Forked(2)
    for _ in range(2):
        ((_, answer),) = engine.map([job])
        assert isinstance(answer, Reply | Failure)
        pids = [place.actor.pid for place in engine._pool.places if place.actor]  # type: ignore[union-attr]
        assert pids
        engine.close()
        for pid in pids:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)


def test_a_worker_killed_while_idle_costs_nobody_and_no_pid_is_signalled_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [Job(study=tiny.study().science(), phase="federate", round=1, client=c, inbox=()) for c in range(2)]
    engine = Forked(2)
    before = [answer for _, answer in engine.map(jobs)]
    places = engine._pool.places  # type: ignore[union-attr]
    gone = places[0].actor.pid
    os.kill(gone, signal.SIGKILL)
    _until(lambda: Path(f"/proc/{gone}/stat").read_text().rpartition(")")[2].split()[0] == "Z")
    signalled: list[int] = []
    real = os.kill
    monkeypatch.setattr(os, "kill", lambda pid, number: (signalled.append(pid), real(pid, number)))
    after = [answer for _, answer in engine.map(jobs)]
    assert [type(a) for a in after] == [type(a) for a in before]
    assert [getattr(a, "reason", "") for a in after] == [getattr(a, "reason", "") for a in before]
    engine.close()
    assert len(set(signalled)) == len(signalled)


def _until(true: object, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.05)
