"""The client's side: its state lies with it, in versions, and a step that hangs costs only itself."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fedlth.engines import flower_client
from fedlth.engines.flower_client import Place, bounded, serve
from fedlth.engines.flower_record import Order, of_order, to_answer
from fedlth.errors import StudyError
from fedlth.experiment.experiment import open_experiment
from fedlth.federation.jobs import RESYNC, Failure, Job, Message, Reply
from fedlth.storage.client_state import ClientState
from tests import tiny

RUN = "0123456789abcdef"


def job(round: int = 1, version: str = "", client: int = 2) -> Job:
    return Job(study="", phase="federate", round=round, client=client, inbox=(), version=version)


def counting(one: Job) -> Reply:
    """Count visits in the state: what a client keeps between them."""
    visits = ClientState.from_bytes(one.state).visits + 1
    return Reply(round=one.round, client=one.client, outbox=(), state=ClientState(visits).to_bytes())


def ask(place: Place, one: Job, step: Callable[[Job], Reply] = counting, timeout_s: float = 60.0) -> Reply | Failure:
    return to_answer(serve(of_order(Order(one, RUN, timeout_s)), place, step=step), one)


def held(tmp_path: Path, run: str = RUN) -> dict[str, int]:
    """Return the versions that lie on the device, with the visits each one counts."""
    files = (tmp_path / run / "000002").iterdir()
    return {p.stem: ClientState.from_bytes(p.read_bytes()).visits for p in files}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place.of({"partition-id": 2, "state-dir": str(tmp_path)}, "")


def test_state_grows_by_the_committed_version_alone(place: Place, tmp_path: Path) -> None:
    assert isinstance(ask(place, job(1)), Reply)
    assert held(tmp_path) == {"federate-1": 1}
    ask(place, job(2, "federate-1"))
    assert held(tmp_path) == {"federate-1": 1, "federate-2": 2}
    # Round 2 was never committed: round 3 starts from version 1, and what was not committed goes.
    ask(place, job(3, "federate-1"))
    assert held(tmp_path) == {"federate-1": 1, "federate-3": 2}
    ask(place, job(3, "federate-1"))  # the same job once more changes nothing
    assert held(tmp_path) == {"federate-1": 1, "federate-3": 2}


def test_a_device_that_lost_a_version_asks_anew_and_deletes_nothing(place: Place, tmp_path: Path) -> None:
    ask(place, job(1))
    seen: list[Job] = []

    def asking(one: Job) -> Reply:
        """What client_step does with a version that it does not have: see tests/test_resync.py."""
        seen.append(one)
        return Reply(round=one.round, client=one.client, outbox=(Message("control", RESYNC, bytes(8)),))

    answer = ask(place, job(5, "federate-4"), asking)
    assert isinstance(answer, Reply) and answer.outbox[0].name == RESYNC
    assert [(one.version, one.state) for one in seen] == [("federate-4", None)]
    assert held(tmp_path) == {"federate-1": 1}


def test_a_first_order_that_comes_twice_deletes_nothing(place: Place, tmp_path: Path) -> None:
    ask(place, job(1))
    ask(place, job(2, "federate-1"))
    ask(place, job(3, "federate-2"))
    ask(place, job(1))
    assert held(tmp_path) == {"federate-1": 1, "federate-2": 2, "federate-3": 3}
    ask(place, job(4, "federate-3"))
    assert held(tmp_path) == {"federate-3": 3, "federate-4": 4}


def test_a_failed_step_leaves_the_committed_state(place: Place, tmp_path: Path) -> None:
    def broken(one: Job) -> Reply:
        raise RuntimeError("no\nluck")

    ask(place, job(1))
    answer = ask(place, job(2, "federate-1"), broken)
    assert isinstance(answer, Failure) and (answer.kind, answer.reason) == ("raised", "RuntimeError: no luck")
    assert held(tmp_path) == {"federate-1": 1}


def test_runs_on_one_device_keep_apart(place: Place, tmp_path: Path) -> None:
    other = "f" * 16
    ask(place, job(1))
    serve(of_order(Order(job(1), other, 60.0)), place, step=counting)
    assert held(tmp_path, other) == {"federate-1": 1}
    assert held(tmp_path) == {"federate-1": 1}


@pytest.mark.parametrize(
    "order",
    [
        Order(job(client=3), RUN, 60.0),
        Order(job(version="../../x-1"), RUN, 60.0),
        Order(job(), "../x", 60.0),
        Order(replace(job(), phase="../x"), RUN, 60.0),
    ],
)
def test_orders_for_others_and_names_that_leave_the_folder_are_refused(order: Order, place: Place) -> None:
    answer = to_answer(serve(of_order(order), place, step=counting), order.job)
    assert isinstance(answer, Failure) and answer.kind == "raised"


def test_without_a_folder_of_its_own_a_node_uses_the_run_folder_if_it_is_there(tmp_path: Path) -> None:
    place = Place.of({"partition-id": 2}, str(tmp_path))
    answer = ask(place, job(1))
    assert isinstance(answer, Failure) and "state-dir" in answer.reason
    (tmp_path / "config.yaml").touch()
    assert isinstance(ask(place, job(1)), Reply)
    assert held(tmp_path, "devices") == {"federate-1": 1}


@pytest.mark.parametrize("value", [None, "0", -1, True, 1.0])
def test_a_node_must_say_which_partition_it_serves(value: object) -> None:
    with pytest.raises(StudyError, match="partition-id"):
        Place.of({"partition-id": value}, "")


def test_a_step_that_hangs_is_given_up(place: Place, tmp_path: Path) -> None:
    release, ended = threading.Event(), threading.Event()
    text = tiny.study().science()
    stuck = open_experiment(text).task

    def hanging(one: Job) -> Reply:
        release.wait(30)
        ended.set()
        return counting(one)

    began = time.monotonic()
    answer = ask(place, job(1), hanging, timeout_s=0.2)
    assert isinstance(answer, Failure) and answer.kind == "hung" and time.monotonic() - began < 10
    assert any(t.is_alive() for t in flower_client.HUNG)
    release.set()
    assert ended.wait(10)
    for thread in flower_client.HUNG:
        thread.join(10)
    assert open_experiment(text).task is not stuck, "whose one module the hung step holds"
    flower_client.end_if_hung()  # nothing hangs any more: this process goes on
    assert not (tmp_path / RUN / "000002").exists()  # what came too late is not written


def test_sys_exit_in_a_step_ends_the_step_alone() -> None:
    def leaving(one: Job) -> Reply:
        sys.exit(3)

    answer = bounded(leaving, job(), 60.0)
    assert isinstance(answer, Failure) and answer.kind == "raised"
