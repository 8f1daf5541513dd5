"""Rounds on devices that wait for nobody: silent, absent and late nodes, answers that come twice, devices that return.

The transport is a fake; no Flower runs here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedlth.engines.choose import answers_at_once
from fedlth.engines.flower_client import roll_call
from fedlth.engines.flower_engine import Back, FlowerEngine, Sent
from fedlth.engines.flower_record import Records, View, of_answer, to_order
from fedlth.engines.flower_versions import VERSIONS, asked
from fedlth.errors import NothingUsable, StudyError
from fedlth.experiment.resolve import resolve
from fedlth.federation import session
from fedlth.federation.answer_bytes import most_at_once, most_of_one, said_at_start
from fedlth.federation.client_step import client_step
from fedlth.federation.jobs import Failure, Job, Reply
from fedlth.federation.missing import missing
from fedlth.forecast import forecast
from fedlth.methods.method import FederatedMethod
from fedlth.methods.table import METHODS
from fedlth.output import lines_to
from fedlth.report.facts import read_run
from fedlth.report.headline import summary_text
from fedlth.report.results import results_of
from fedlth.storage.run_folder import RunFolder
from tests import tiny
from tests.engines.test_flower_engine import NODES, Loopback, bare, echo, jobs


class Slow(Loopback):
    """Nodes that answer at once; an order or query to one of `held` is answered when `release` is called."""

    poll_s = 1.0

    def __init__(self, out: Path, partitions: dict[int, int], step: Callable[[Job], Reply] = client_step) -> None:
        super().__init__(out, partitions, step)
        self.held: set[int] = set()
        self.trained: list[int] = []
        self._later: list[tuple[int, Back]] = []

    def send(self, records: Records, *, node: int, kind: str) -> Sent:
        partition = self.partitions[node]
        self.trained += [partition] if kind == "train" else []
        sent = super().send(records, node=node, kind=kind)
        if partition in self.held:
            self._later += self._backs[:1]
            del self._backs[:1]
        self._backs = [(0, back) for _, back in self._backs]
        return sent

    def release(self, times: int = 1) -> None:
        self._backs += [(0, back) for _, back in self._later for _ in range(times)]
        self._later.clear()


class Clock:
    """Time that passes only while the engine waits; it stands for the `time` of its files and for its stop."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def wait(self, seconds: float) -> bool:
        self.now += max(seconds, 1e-3)
        return False


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for file in ("flower_engine", "flower_late", "flower_nodes", "flower_returns"):
        monkeypatch.setattr(f"fedlth.engines.{file}.time", clock)
    return clock


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").touch()
    return tmp_path


def engine_over(transport: Loopback, made: Any, clock: Any) -> FlowerEngine:
    return FlowerEngine(transport, study=made, out=transport.out, wait_s=10.0, stop=clock)


def study(**federate: Any) -> Any:
    return tiny.study(federate=federate, clients={"count": 4, "unseen": 0.0})


def limited(limit_s: float, clients: Iterable[int] = range(4)) -> list[Job]:
    return [Job(study="", phase="federate", round=1, client=c, inbox=(), limit_s=limit_s) for c in clients]


def kinds(answers: list[Reply | Failure]) -> list[str]:
    return [a.kind if isinstance(a, Failure) else "ok" for a in answers]


# The roll call


def test_a_silent_node_costs_nothing_after_the_first_time(folder: Path, clock: Clock) -> None:
    """It was waited for in every part of every round: 27 s a round became 241."""
    transport = Slow(folder, NODES, echo)
    transport.held = {1}
    engine = engine_over(transport, study(quorum=3), clock)
    assert engine.present() == {0, 2, 3} and clock.now == 120
    for _ in range(5):
        assert kinds(tiny.answers(engine, jobs())) == ["ok", "lost", "ok", "ok"]
    assert clock.now == 120 and transport.asked.count(13) == 2, "at 0 and 60 s"
    clock.now = 179
    engine.present()
    assert transport.asked.count(13) == 2, "the next time is twice as far away"
    clock.now = 181
    engine.present()
    assert transport.asked.count(13) == 3
    transport.held.clear()
    transport.release()
    assert engine.present() == {0, 1, 2, 3}, "a late answer registers its node"
    assert kinds(tiny.answers(engine, jobs())) == ["ok"] * 4 and clock.now == 181


def test_with_everybody_there_nobody_waits_for_the_time_that_there_is(folder: Path, clock: Clock) -> None:
    engine_over(Slow(folder, NODES, echo), study(quorum=3), clock).ready()
    assert clock.now == 1, "one look to ask, one to hear"


def test_a_silent_node_is_said_where_all_must_be_there(folder: Path, clock: Clock) -> None:
    transport = Slow(folder, NODES, echo)
    transport.held = {1}
    with pytest.raises(StudyError, match=r"must serve partition-id 0 to 3, no \[1\]; node 13: no answer"):
        engine_over(transport, study(), clock).ready()
    assert clock.now == 120


def test_nodes_that_go_on_coming_are_not_waited_for(folder: Path, clock: Clock) -> None:
    class Restless(Slow):
        def online(self) -> Iterable[int]:
            self.partitions = {n: c for n, c in NODES.items() if c != 1} | {int(1000 + clock.now): 1}
            return list(self.partitions)

    transport = Restless(folder, NODES, echo)
    transport.held = {1}
    with pytest.raises(StudyError, match="must serve partition-id 0 to 3"):
        engine_over(transport, study(), clock).ready()
    assert clock.now < 130


def test_fewer_than_the_quorum_are_named(folder: Path, clock: Clock) -> None:
    wanted = r"quorum: 3 of 4 clients must be there to begin, got 2 after .*, no SuperNode of clients \[1, 3\]"
    with pytest.raises(StudyError, match=wanted):
        engine_over(Slow(folder, {5: 0, 77: 2}), study(quorum=0.75), clock).ready()


def test_a_device_without_the_kernel_is_refused_at_the_roll_call(monkeypatch: pytest.MonkeyPatch) -> None:
    query: View = {"head": {"b": "sparse"}, VERSIONS: asked()}
    monkeypatch.setattr("fedlth.kernel.kernel.available", lambda: "the fast kernel needs numba")
    assert (
        roll_call(query, {"partition-id": 1}) == "partition-id 1: compute: sparse, but here the fast kernel needs numba"
    )
    assert roll_call({**query, "head": {"b": "reference"}}, {"partition-id": 1}) == 1
    assert "partition-id must be a whole number" in str(roll_call(query, {}))


# The deadline


def test_what_comes_after_the_deadline_is_counted_once_and_never_used(folder: Path, clock: Clock) -> None:
    transport = Slow(folder, NODES, echo)
    engine = engine_over(transport, study(), clock)
    engine.ready()
    transport.held, clock.now = {1}, 0.0
    answers = tiny.answers(engine, limited(7.5))
    assert kinds(answers) == ["ok", "late", "ok", "ok"] and clock.now == 7.5
    assert isinstance(answers[1], Failure) and answers[1].reason == "no answer within federate.deadline_s = 7.5 s"
    assert engine.late() == [] and engine.present() == {0, 2, 3}, "its device is at work"
    _, again = tiny.answers(engine, limited(7.5, [0, 1]))
    assert isinstance(again, Failure) and again.kind == "late" and "still at work on federate 1" in again.reason
    assert transport.trained.count(1) == 1 and not again.sent
    assert engine.present() == {0, 2, 3}
    transport.held.clear()
    transport.release(times=2)
    ((job, reply),) = engine.late()
    assert isinstance(reply, Reply) and (job.client, reply.framed_up_bytes) == (1, 9) and engine.late() == []
    assert kinds(tiny.answers(engine, limited(7.5))) == ["ok"] * 4 and clock.now == 7.5


def test_what_comes_by_the_deadline_counts(folder: Path, clock: Clock) -> None:
    class Last(Slow):
        def collect(self, ids: Iterable[str]) -> list[Back]:
            if clock.now >= 17.5:
                self.release()
            return super().collect(ids)

    transport = Last(folder, NODES, echo)
    engine = engine_over(transport, study(), clock)
    engine.ready()
    transport.held, clock.now = {1}, 10.0
    assert kinds(tiny.answers(engine, limited(7.5))) == ["ok"] * 4 and clock.now == 17.5


def test_a_device_that_lost_its_job_gets_another_and_a_slow_one_no_queue(folder: Path, clock: Clock) -> None:
    transport = Slow(folder, NODES, echo)
    engine = engine_over(transport, study(), clock)
    engine.ready()
    transport.held, clock.now = {1}, 0.0
    tiny.answers(engine, limited(10.0))
    for now, there in ((19.0, False), (20.0, True)):
        clock.now = now
        assert (1 in engine.present()) is there
    assert kinds(tiny.answers(engine, limited(10.0))) == ["ok", "late", "ok", "ok"]
    for now, there in ((49.0, False), (50.0, True)):
        clock.now = now
        assert (1 in engine.present()) is there
    transport.release()
    assert [job.client for job, _ in engine.late()] == [1, 1] and transport.trained.count(1) == 2


def test_step_2_asks_a_device_that_is_still_at_work_too(folder: Path, clock: Clock) -> None:
    """Its wave waits for it: else a device that was late in the last round would end without a ticket."""
    transport = Slow(folder, NODES, echo)
    engine = engine_over(transport, study(), clock)
    engine.ready()
    transport.held = {1}
    tiny.answers(engine, limited(10.0))
    assert engine.present() == {0, 2, 3}
    transport.held.clear()
    assert kinds(tiny.answers(engine, jobs())) == ["ok"] * 4 and transport.trained.count(1) == 2


@pytest.mark.parametrize("odd", [{"head": 7}, {}, {"head": {"b": True}}, {"head": {"b": "x\n" * 999}}])
def test_an_odd_answer_to_the_roll_call_is_one_line(folder: Path, clock: Clock, odd: Any) -> None:
    class Odd(Slow):
        def send(self, records: Records, *, node: int, kind: str) -> Sent:
            sent = super().send(records, node=node, kind=kind)
            if kind == "query" and node == 13:
                self._backs = [(0, Back(sent.id, records=odd)) if b.id == sent.id else (n, b) for n, b in self._backs]
            return sent

    with pytest.raises(StudyError, match=r"no \[1\]; node 13: ") as raised:
        engine_over(Odd(folder, NODES, echo), study(), clock).ready()
    assert str(raised.value).isprintable() and len(str(raised.value)) < 400 and clock.now < 10


def test_a_part_whose_round_is_over_is_not_sent(folder: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedlth.engines.flower_engine.AT_ONCE", 2)
    transport = Slow(folder, NODES, echo)
    engine = engine_over(transport, study(), clock)
    engine.ready()
    transport.held = {1}
    assert kinds(tiny.answers(engine, limited(10.0))) == ["ok", "late", "late", "late"]
    assert transport.trained == [0, 1]


def test_an_answer_that_comes_twice_counts_once(folder: Path, clock: Clock) -> None:
    """The second of the same poll, which claims another content, and one of an earlier round."""

    class Twice(Slow):
        def collect(self, ids: Iterable[str]) -> list[Back]:
            found = super().collect(ids)
            old = Back("m1", 9, of_answer(Failure(round=1, client=0, kind="raised", reason="another")))
            return [*found, *(Back(b.id, 9, old.records) for b in found), old]

    engine = engine_over(Twice(folder, NODES, echo), study(), clock)
    assert kinds(tiny.answers(engine, jobs())) == ["ok"] * 4
    assert kinds(tiny.answers(engine, jobs())) == ["ok"] * 4 and engine.late() == []


# Whole runs


def test_with_everybody_there_a_quorum_changes_no_draw(tmp_path: Path, clock: Clock) -> None:
    one, other = tmp_path / "inprocess", tmp_path / "flower"
    tiny.run(tiny.of_method("fedavg"), one)
    made = tiny.of_method("fedavg", federate={"rounds": 2, "clients_per_round": 2, "quorum": 2, "deadline_s": 600.0})
    tiny.run(made, other, engine=engine_over(Loopback(other, NODES), made, clock))
    for name in ("ledger", "metrics", "rounds"):
        assert bare(tiny.rows(one, name)) == bare(tiny.rows(other, name)), name
    assert tiny.digests(one) == tiny.digests(other)


class Away(Slow):
    """Partition 1 has no node until step 2 has been done without it."""

    def send(self, records: Records, *, node: int, kind: str) -> Sent:
        if kind == "train" and to_order(records).job.phase == "personalise":
            self.partitions.setdefault(13, 1)
        return super().send(records, node=node, kind=kind)


def test_a_round_draws_who_is_there_and_who_returns_gets_its_ticket(tmp_path: Path, clock: Clock) -> None:
    out = tmp_path / "r"
    made = tiny.study(
        clients={"count": 4, "unseen": 0.0}, federate={"rounds": 2, "clients_per_round": 3, "quorum": 3},
        personalise={"arms": ["ticket"], "clients_per_wave": 4},
    )  # fmt: skip
    tiny.run(made, out, engine=engine_over(Away(out, {77: 2, 5: 0, 900: 3}), made, clock))
    rounds = tiny.rows(out, "rounds")
    assert [(r["phase"], r["clients"], r.get("absent")) for r in rounds] == [
        ("federate", [0, 2, 3], [1]), ("federate", [0, 2, 3], [1]), ("personalise", [0, 1, 2, 3], [1]),
        ("personalise", [1], None),
    ]  # fmt: skip
    assert missing(RunFolder(out)) == [] and {r["client"] for r in tiny.rows(out, "metrics")} == {0, 1, 2, 3}
    first = [r for r in tiny.rows(out, "ledger") if (r["phase"], r["round"]) == ("personalise", 1)]
    assert len(first) == 6 and "client:1" not in {p for r in first for p in (r["sender"], r["receiver"])}, "not sent"


class OneSlow(Slow):
    """Partition 2 answers the first round when the second begins."""

    def send(self, records: Records, *, node: int, kind: str) -> Sent:
        if kind == "train":
            round = to_order(records).job.round
            self.held = {2} if round == 1 else set()
            if round == 2:
                self.release()
        return super().send(records, node=node, kind=kind)


def test_a_late_answer_is_a_row_of_its_own_round(tmp_path: Path, clock: Clock) -> None:
    out, other = tmp_path / "r", tmp_path / "without"
    federate = {"rounds": 3, "clients_per_round": 4, "deadline_s": 30.0}
    made = tiny.study(method="fedavg", clients={"count": 4, "unseen": 0.0}, federate=federate)
    tiny.run(made, out, engine=engine_over(OneSlow(out, NODES), made, clock))
    failed = [(r["round"], f["client"], f["kind"]) for r in tiny.rows(out, "rounds") for f in r["failed"]]
    assert failed == [(1, 2, "late"), (2, 2, "late")]
    late = [r for r in tiny.rows(out, "ledger") if r["status"] == "late"]
    assert {(r["round"], r["sender"]) for r in late} == {(1, "client:2")} and late[0]["payload_bytes"] > 0

    class Lost(tiny.Lists):
        def run(self, jobs: list[Job]) -> list[Reply | Failure]:
            gone = {j.client: Failure(round=j.round, client=j.client, kind="late", reason="") for j in jobs}
            bad = [j.phase == "federate" and j.round < 3 and j.client == 2 for j in jobs]
            return [gone[j.client] if b else super(Lost, self).run([j])[0] for j, b in zip(jobs, bad, strict=True)]

    tiny.run(tiny.study(method="fedavg", clients={"count": 4, "unseen": 0.0},
                        federate={"rounds": 3, "clients_per_round": 4}), other, engine=Lost())  # fmt: skip
    assert tiny.digests(out)["theta_g"] == tiny.digests(other)["theta_g"]


# Rounds that do not count


def losing(fails: Callable[[Job], bool], kind: str = "lost") -> tiny.Lists:
    class Losing(tiny.Lists):
        def run(self, jobs: list[Job]) -> list[Reply | Failure]:
            return [
                Failure(round=j.round, client=j.client, kind=kind, reason="no cable") if fails(j)
                else super(Losing, self).run([j])[0] for j in jobs
            ]  # fmt: skip

    return Losing()


@pytest.mark.parametrize("method", ["lotteryfl", "scaffold"])
def test_a_void_round_leaves_everything_as_it_was(tmp_path: Path, method: str) -> None:
    """One usable reply of two that a round needs: as if nobody had answered, masks and the clients' states included."""
    few, none = tmp_path / "few", tmp_path / "none"
    shape = {"clients": {"count": 4, "unseen": 0.0}, "personalise": {"arms": ["own", "dense"]}}
    federate = {"rounds": 3, "clients_per_round": 4}
    made = tiny.of_method(method, federate={**federate, "min_clients": 2}, **shape)
    tiny.run(made, few, engine=losing(lambda j: j.phase == "federate" and j.round == 2 and j.client != 3))
    tiny.run(tiny.of_method(method, federate=federate, **shape), none,
             engine=losing(lambda j: j.phase == "federate" and j.round == 2))  # fmt: skip
    assert [bool(r.get("void")) for r in tiny.rows(few, "rounds")][:3] == [False, True, False]
    assert tiny.digests(few) == tiny.digests(none)
    assert tiny.rows(few, "metrics") == tiny.rows(none, "metrics")


def test_void_rounds_in_a_row_end_the_run_and_a_resume_continues(tmp_path: Path) -> None:
    made = tiny.of_method("fedavg", federate={"rounds": 5, "clients_per_round": 3, "min_clients": 3})
    out, bad = tmp_path / "r", losing(lambda j: j.phase == "federate" and j.round > 1 and j.client == _drawn(made, j))
    with pytest.raises(NothingUsable, match=r"3 rounds without federate.min_clients = 3 usable replies; last: of 3 "
                       r"clients 2 gave one; no cable; .* `fedlth resume .*` continues"):  # fmt: skip
        tiny.run(made, out, engine=bad)
    with lines_to(lambda line: None):
        session.resume(out, tiny.Lists())
    assert [bool(r.get("void")) for r in tiny.rows(out, "rounds")][:5] == [False, True, True, True, False]
    text = " ".join(summary_text(results_of((read_run(out),))).split())
    assert "in which everything stayed as it was: federate 2, federate 3, federate 4" in text


@pytest.mark.parametrize(("method", "phase"), [("ssfl", "saliency"), ("flash", "sensitivity"), ("fedtiny", "measure")])
def test_a_phase_that_must_count_ends_the_run_and_a_resume_asks_again(tmp_path: Path, method: str, phase: str) -> None:
    """Found: without its mask SSFL and FLASH trained dense to the end, and FedTiny failed in each resume, too."""
    made, out, whole = tiny.of_method(method), tmp_path / "r", tmp_path / "whole"
    with pytest.raises(NothingUsable, match=f"{method} needs what phase {phase} finds, none of whose rounds had one "
                       r"usable reply; last: no cable; .* `fedlth resume .*` continues"):  # fmt: skip
        tiny.run(made, out, engine=losing(lambda j: j.phase == phase))
    with lines_to(lambda line: None):
        session.resume(out, tiny.Lists())
    tiny.run(made, whole)
    assert tiny.facts(out) == tiny.facts(whole)


@pytest.mark.parametrize("method", ["ssfl", "flash", "fedtiny"])
def test_nothing_is_rolled_back_behind_a_phase_that_must_count(tmp_path: Path, method: str) -> None:
    """Found: where all clients of the next round failed, the mask was gone again, and with it FedTiny's statistics."""
    made, out = tiny.of_method(method, federate={"rounds": 3}), tmp_path / "r"
    second = tiny.experiment(made).phases[1].name
    tiny.run(made, out, engine=losing(lambda j: (j.phase, j.round) == (second, 1), kind="raised"))
    rows = [r for r in tiny.rows(out, "rounds") if r["phase"] == second]
    assert rows[0]["void"] and not any(r.get("rolled_back_to") for r in rows)
    assert all(r["density"] < 1 for r in tiny.rows(out, "metrics") if r["arm"] == "global")


def test_a_phase_of_which_one_round_has_counted_does_not_end_the_run(tmp_path: Path) -> None:
    made = tiny.study(method="tests.engines.test_flower_rounds:in_two_phases")
    tiny.run(made, tmp_path / "r", engine=losing(lambda j: (j.phase, j.round) == ("first", 2)))
    assert [bool(r.get("void")) for r in tiny.rows(tmp_path / "r", "rounds")][:3] == [False, True, False]


def in_two_phases() -> FederatedMethod:
    known = METHODS["fedavg"]()
    first = replace(known.phases[0], name="first", rounds=2, must_count=True)
    return replace(known, name="mine", phases=(first, *known.phases))


def _drawn(made: Any, job: Job) -> int:
    experiment = tiny.experiment(made)
    return experiment.clients(experiment.phase("federate"), job.round)[0]


def test_a_run_on_devices_that_stops_says_who_is_connected(tmp_path: Path, clock: Clock) -> None:
    out = tmp_path / "r"
    made = tiny.study(clients={"count": 4, "unseen": 0.0},
                      federate={"rounds": 5, "clients_per_round": 3, "quorum": 2, "min_clients": 2})  # fmt: skip
    transport = Slow(out, NODES)
    transport.faults = {c: Back("", code=2, reason="no") for c in range(1, 4)}
    with pytest.raises(NothingUsable, match=r"connected now: 4 of 4 clients \(0, 1, 2, 3\); .* the same `flwr run`"):
        tiny.run(made, out, engine=engine_over(transport, made, clock))


@pytest.mark.parametrize(
    ("federate", "says"),
    [
        ({"min_clients": 3}, "federate.min_clients must be at most the 2 clients of federate 1, got 3"),
        ({"quorum": 5}, "federate.quorum must be at most clients.count = 4, got 5"),
        ({"min_clients": 2, "quorum": 1}, "federate.quorum must be at least federate.min_clients = 2, got 1"),
    ],
)
def test_counts_that_no_round_can_meet_are_refused(federate: dict[str, Any], says: str) -> None:

    with pytest.raises(StudyError, match=says):
        resolve(tiny.study(federate={"rounds": 2, "clients_per_round": 2, **federate}))


def test_a_deadline_of_devices_is_refused_elsewhere_and_a_quorum_is_noted() -> None:
    from fedlth.engines.choose import check_engine, without_effect

    with pytest.raises(StudyError, match=r"federate.deadline_s: is for devices.* engine is inprocess"):
        check_engine(tiny.study(federate={"deadline_s": 60.0}))
    says = "federate.quorum: has no effect, on engine ray every client is there"
    assert without_effect(tiny.study(federate={"quorum": 2}, engine="ray")) == [says]


@pytest.mark.parametrize(
    ("sections", "count"),
    [
        ({"workers": 1}, 3), ({"workers": 1, "cohort": 4}, 6), ({"workers": 2}, 18), ({"engine": "flower"}, 256),
        ({"engine": "ray", "ray": {"workers": 3}, "cohort": 2}, 50),
    ],
)  # fmt: skip
def test_every_engine_says_how_much_memory_answers_can_take(sections: dict[str, Any], count: int) -> None:
    """Only Flower did: nobody else knew what a round may bring before it came."""
    made = tiny.study(clients={"count": 110, "unseen": 0.0}, federate={"clients_per_round": 110}, **sections)
    assert answers_at_once(made) == count
    experiment = tiny.experiment(made)
    count = min(count, 110)  # of a round's clients
    size = count * most_of_one(experiment, experiment.phase("federate"))
    assert said_at_start(experiment, count) == (
        f"the answers of {count} clients are read at once, {1e-6 * size:.1f} MB at most"
    )


def test_a_check_says_it_of_every_engine() -> None:
    made = tiny.study(workers=1, federate={"rounds": 1}, personalise={"arms": ["global"], "clients_per_wave": 4})
    says = "the answers of 3 clients are read at once, 1.6 MB at most"  # of their four in step 2
    assert f"server: {says}" in forecast(made)


def test_the_most_that_answers_can_bring_is_a_bound(tmp_path: Path) -> None:
    made = tiny.study()
    experiment = tiny.experiment(made)
    size, count = most_at_once(experiment, 256)
    assert count in (2, 4) and size >= 2 * 4 * experiment.layout.num_floats
    tiny.run(made, tmp_path / "r")
    for phase in experiment.phases:
        rows = [
            r for r in tiny.rows(tmp_path / "r", "ledger") if r["phase"] == phase.name and r["receiver"] == "server"
        ]
        most = {(r["round"], r["sender"]): 0 for r in rows}
        for r in rows:
            most[r["round"], r["sender"]] += r["payload_bytes"]
        assert max(most.values()) <= most_of_one(experiment, phase)


def test_a_stop_ends_the_wait_for_clients(folder: Path) -> None:
    stop = threading.Event()
    transport = Slow(folder, dict(NODES), echo)
    engine = FlowerEngine(transport, study=study(), out=folder, wait_s=5.0, stop=stop)
    engine.ready()
    transport.partitions.clear()
    stop.set()
    with pytest.raises(KeyboardInterrupt):
        engine.present(until=bool)
