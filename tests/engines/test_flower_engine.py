"""The engine over a transport without Flower: equal results, answers matched to jobs, and failures that stay alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from fedlth.engines.flower_client import Place, serve
from fedlth.engines.flower_engine import UNREADABLE, Back, FlowerEngine, Sent
from fedlth.engines.flower_record import Records
from fedlth.errors import StudyError
from fedlth.federation.client_step import client_step
from fedlth.federation.jobs import Failure, Job, Reply
from fedlth.output import lines_to
from tests import tiny

NAMES = ("ledger", "metrics", "rounds")


class Loopback:
    """Nodes in this process, which answer in reverse order, two polls late."""

    poll_s = 0.0

    def __init__(self, out: Path, partitions: dict[int, int], step: Callable[[Job], Reply] = client_step) -> None:
        self.out, self.partitions, self.step = out, dict(partitions), step
        self.faults: dict[int, Back | None] = {}  # by partition: what comes back instead
        self.silent: set[int] = set()  # partitions that do not say which they are
        self.asked: list[int] = []
        self._backs: list[tuple[int, Back]] = []
        self._sent = 0

    def online(self) -> Iterable[int]:
        return list(self.partitions)

    def send(self, records: Records, *, node: int, kind: str) -> Sent:
        self._sent += 1
        id, partition = f"m{self._sent}", self.partitions[node]
        if kind == "query":
            self.asked.append(node)
            back: Back | None = None if partition in self.silent else Back(id, records={"head": {"b": partition}})
        elif partition in self.faults:
            fault = self.faults[partition]
            back = None if fault is None else Back(id, 9, fault.records, fault.code, fault.reason)
        else:
            place = Place(partition, None, self.out)
            back = Back(id, 9, serve(records, place, step=self.step))
        if back is not None:
            self._backs.insert(0, (2, back))
        return Sent(id, 7)

    def collect(self, ids: Iterable[str]) -> list[Back]:
        wanted = set(ids)
        due = [b for late, b in self._backs if late == 0 and b.id in wanted]
        self._backs = [(max(0, late - 1), b) for late, b in self._backs if late > 0 or b.id not in wanted]
        return due


def engine_over(transport: Loopback, study: Any = None, wait_s: float = 0.2) -> FlowerEngine:
    return FlowerEngine(
        transport, study=study or tiny.study(), out=transport.out, wait_s=wait_s,
        stop=threading.Event(),
    )  # fmt: skip


def bare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "framed_bytes"} for row in rows]


def jobs(count: int = 4) -> list[Job]:
    return [Job(study="", phase="federate", round=1, client=c, inbox=()) for c in range(count)]


def echo(job: Job) -> Reply:
    return Reply(round=job.round, client=job.client, outbox=(), state=b"s")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").touch()
    return tmp_path


NODES = {77: 2, 5: 0, 900: 3, 13: 1}


@pytest.mark.parametrize("method", ["two_step", "lotteryfl", "feddst", "prunefl"])
def test_a_run_equals_the_in_process_run(tmp_path: Path, method: str) -> None:
    one, other = tmp_path / "inprocess", tmp_path / "flower"
    study = tiny.of_method(method)
    tiny.run(study, one)
    tiny.run(study, other, engine=engine_over(Loopback(other, NODES), study))
    for name in NAMES:
        assert bare(tiny.rows(one, name)) == bare(tiny.rows(other, name)), name
    assert tiny.digests(one) == tiny.digests(other)
    framed = [r["framed_bytes"] for r in tiny.rows(other, "ledger") if r["framed_bytes"] is not None]
    assert framed and set(framed) == {7, 9}


def test_answers_are_in_job_order_whatever_order_they_came_in(folder: Path) -> None:
    answers = tiny.answers(engine_over(Loopback(folder, NODES, echo)), jobs()[::-1])
    assert [a.client for a in answers] == [3, 2, 1, 0]
    assert all(isinstance(a, Reply) and (a.framed_down_bytes, a.framed_up_bytes) == (7, 9) for a in answers)


@pytest.mark.parametrize(
    ("back", "kind"),
    [
        (Back("", code=2, reason="ClientAppException: no"), "raised"),
        (Back("", code=0, reason="<class 'ray.exceptions.ActorDiedError'>"), "died"),
        (Back("", code=0, reason="<class 'ray.exceptions.ActorUnavailableError'>:<'gone'>"), "died"),
        (Back("", code=8, reason="the process ended"), "died"),
        (Back("", code=0, reason="ray.exceptions.OutOfMemoryError"), "memory"),
        (Back("", code=5, reason="Node Unavailable"), "lost"),
        (Back("", records={"head": {"b": "{}"}}), "raised"),
        (Back("", records={"head": 7}), "raised"),  # type: ignore[dict-item]
        (Back("", code=UNREADABLE, reason="TypeError: odd"), "raised"),
        (None, "lost"),
    ],
)
def test_a_fault_costs_only_its_own_job(
    folder: Path, back: Back | None, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedlth.engines.flower_engine.GRACE_S", 0.2)
    transport = Loopback(folder, NODES, echo)
    transport.faults[1] = back
    answers = tiny.answers(engine_over(transport, tiny.study(job_timeout_s=0.2)), jobs())
    assert [type(a) for a in answers] == [Reply, Failure, Reply, Reply]
    assert isinstance(answers[1], Failure) and answers[1].kind == kind
    came = back is not None and back.records is not None  # else nothing but what was sent has crossed
    tries = 2 if back is not None and back.code == 5 else 1  # a node that went away and is there is sent its job again
    assert (answers[1].framed_down_bytes, answers[1].framed_up_bytes) == (7 * tries, 9 if came else None)


@pytest.mark.parametrize("back", [Back("", code=UNREADABLE, reason="TypeError: odd"), Back("", records={"head": 7})])  # type: ignore[dict-item]
def test_an_answer_that_cannot_be_unpacked_costs_one_round(folder: Path, back: Back) -> None:
    """Row 29: its client answers in the next one."""
    transport = Loopback(folder, NODES, echo)
    engine = engine_over(transport)
    transport.faults[1] = back
    assert [type(a) for a in tiny.answers(engine, jobs())] == [Reply, Failure, Reply, Reply]
    del transport.faults[1]
    assert [type(a) for a in tiny.answers(engine, jobs())] == [Reply] * 4


def test_a_long_reason_keeps_its_end(folder: Path) -> None:
    """Row 20, its brother: Ray's text begins with what ran and ends with what it raised."""
    transport = Loopback(folder, NODES, echo)
    transport.faults[1] = Back("", code=2, reason=f"ray::run() {'File x, line 1 ' * 50} OSError: no disk")
    failure = tiny.answers(engine_over(transport), jobs())[1]
    assert isinstance(failure, Failure) and len(failure.reason) == 300
    assert failure.reason.startswith("Flower error 2: ray::run()") and failure.reason.endswith("OSError: no disk")


def test_a_wait_for_answers_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 30, its brother: a node that has gone was waited for in silence, for an hour unless the study says less."""
    monkeypatch.setattr("fedlth.engines.flower_engine.GRACE_S", 0.3)
    monkeypatch.setattr("fedlth.engines.flower_engine.TOLD_EVERY_S", 0.1)
    transport, told = Loopback(folder, NODES, echo), list[str]()
    transport.poll_s, transport.faults[1] = 0.02, None
    engine = FlowerEngine(
        transport, study=tiny.study(job_timeout_s=0.1), out=folder, wait_s=1.0,
        stop=threading.Event(),
    )  # fmt: skip
    with lines_to(told.append):
        tiny.answers(engine, jobs())
    assert 2 <= len(told) <= 4 and told[0] == "waiting for 1 of 4 answers; none came for 0 s, the limit is 0.4 s"


def test_a_node_that_does_not_say_whom_it_serves_is_not_waited_for_as_for_a_training(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 30, its brother: a node may hang after its SuperLink was restarted; an hour was the wait for one word."""
    monkeypatch.setattr("fedlth.engines.flower_engine.GRACE_S", 0.2)
    transport = Loopback(folder, NODES, echo)
    transport.silent = {1}
    with pytest.raises(StudyError, match=r"must serve partition-id 0 to 3, no \[1\]; node 13: no answer"):
        engine_over(transport).ready()


def test_clients_without_a_node_are_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fedlth.engines.flower_nodes.TOLD_EVERY_S", 0.05)
    wanted = r"clients.count = 4 .* got 2 after 0.2 s, no SuperNode of clients \[1, 2\]; start theirs"
    with caplog.at_level("INFO"), pytest.raises(StudyError, match=wanted):
        engine_over(Loopback(folder, {5: 0, 6: 3})).ready()
    assert "waiting for SuperNodes: 2 online, 2 of 4 known, none yet of clients [1, 2]" in caplog.text
    some = tiny.study(federate={"quorum": 3})
    with pytest.raises(
        StudyError, match=r"quorum: 3 of 4 .* got 1 after 0.2 s, no SuperNode of clients \[0, 1, 2\]; st"
    ):
        engine_over(Loopback(folder, {6: 3}), some).ready()


@pytest.mark.parametrize(
    ("partitions", "said"),
    [({1: 0, 2: 1, 3: 1, 4: 2}, r"got \[1\] more than once"), ({1: 0, 2: 1, 3: 2, 4: 7}, r"no \[3\]")],
)
def test_partitions_must_be_served_once_each(folder: Path, partitions: dict[int, int], said: str) -> None:
    with pytest.raises(StudyError, match=said):
        engine_over(Loopback(folder, partitions)).ready()


def test_nodes_are_asked_once_and_one_that_comes_back_takes_over(folder: Path) -> None:
    transport = Loopback(folder, NODES, echo)
    engine = engine_over(transport, tiny.study(federate={"quorum": 3}))
    tiny.answers(engine, jobs())
    assert sorted(transport.asked) == sorted(NODES)
    del transport.partitions[13]
    answers = tiny.answers(engine, jobs())
    assert isinstance(answers[1], Failure) and answers[1].kind == "lost"
    transport.partitions[14] = 1
    answers = tiny.answers(engine, jobs())  # asked now, and not waited for
    assert isinstance(answers[1], Failure) and not answers[1].sent
    assert all(isinstance(a, Reply) for a in tiny.answers(engine, jobs()))
    assert sorted(transport.asked) == sorted([*NODES, 14])


def test_the_run_keeps_its_name_on_the_devices(folder: Path) -> None:
    first = engine_over(Loopback(folder, NODES, echo))
    tiny.answers(first, jobs())
    name = (folder / "flower-run").read_text()
    tiny.answers(engine_over(Loopback(folder, NODES, echo)), jobs())
    assert (folder / "flower-run").read_text() == name


def test_a_stop_ends_the_wait(folder: Path) -> None:
    transport = Loopback(folder, NODES, echo)
    stop = threading.Event()
    engine = FlowerEngine(transport, study=tiny.study(), out=folder, wait_s=1.0, stop=stop)
    stop.set()
    with pytest.raises(KeyboardInterrupt):
        tiny.answers(engine, jobs())


def test_the_wait_for_an_answer_counts_with_what_a_link_takes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a large model on a thin link would be lost on its way, each time, however well the device works."""
    monkeypatch.setattr("fedlth.engines.flower_engine.GRACE_S", 0.05)
    transport, asked = Loopback(folder, NODES, echo), list[int]()
    transport.poll_s, transport.faults[1] = 0.01, None

    def link_s(size: int) -> float:
        asked.append(size)
        return 0.2

    engine = FlowerEngine(
        transport, study=tiny.study(job_timeout_s=0.05), out=folder, wait_s=1.0, stop=threading.Event(), link_s=link_s
    )
    began = time.monotonic()
    lost = tiny.answers(engine, jobs())[1]
    assert isinstance(lost, Failure) and (lost.kind, lost.reason) == ("lost", "no answer for 0.3 s")
    assert asked == [7] and time.monotonic() - began >= 0.3
