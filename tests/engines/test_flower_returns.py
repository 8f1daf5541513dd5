"""SuperNodes that go away in mid-run and come back: whom a round waits for, and what is sent again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from fedlth.engines.flower_engine import Back, Sent
from fedlth.engines.flower_record import Records
from fedlth.federation.client_step import client_step
from fedlth.federation.jobs import Job, Reply
from fedlth.output import lines_to
from fedlth.report.diff import diff
from tests import tiny
from tests.engines.test_flower_engine import NODES, Loopback, echo, jobs
from tests.engines.test_flower_rounds import Clock, clock, engine_over, folder, kinds, limited, study

__all__ = ["clock", "folder"]  # fixtures
WAIT_S = 10.0  # engine_over's


class Killed(Loopback):
    """The node of client 1 is killed with the `kill`-th job in its hands, and is online again `away_s` later."""

    poll_s = 1.0

    def __init__(
        self, out: Path, clock: Clock, step: Callable[[Job], Reply] = client_step, *, away_s: float, kill: int = 1
    ) -> None:  # fmt: skip
        super().__init__(out, NODES, step)
        self.clock, self.away_s, self.kill, self.until, self.sent = clock, away_s, kill, 0.0, 0

    def online(self) -> Iterable[int]:
        away = self.clock.now < self.until
        return [n for n in super().online() if not (away and self.partitions[n] == 1)]

    def send(self, records: Records, *, node: int, kind: str) -> Sent:
        theirs = kind == "train" and self.partitions[node] == 1
        self.sent += theirs
        if theirs and self.sent == self.kill:
            self.until = self.clock.now + self.away_s
            self.faults[1] = Back("", code=5, reason="Node Unavailable")
        sent = super().send(records, node=node, kind=kind)
        self.faults.clear()
        return sent


def test_a_job_is_sent_again_to_a_node_that_came_back(folder: Path, clock: Clock) -> None:
    transport = Killed(folder, clock, echo, away_s=6.0)
    engine = engine_over(transport, study(), clock)
    engine.ready()
    began = clock.now
    answers = tiny.answers(engine, jobs())
    assert kinds(answers) == ["ok"] * 4 and 6.0 <= clock.now - began < WAIT_S
    assert [a.framed_down_bytes for a in answers] == [7, 14, 7, 7], "both tries have crossed"


def test_a_run_ends_as_if_nobody_had_been_killed(tmp_path: Path, clock: Clock) -> None:
    """In a round, and in step 2."""
    made = study()
    tiny.run(made, tmp_path / "inprocess")
    for kill in (1, 2):
        out = tmp_path / f"killed-{kill}"
        transport = Killed(out, clock, away_s=6.0, kill=kill)
        tiny.run(made, out, engine=engine_over(transport, made, clock))
        assert transport.sent == 3 and diff(tmp_path / "inprocess", out) == [], kill


def test_who_does_not_come_back_costs_the_wait_once(folder: Path, clock: Clock) -> None:
    transport = Killed(folder, clock, echo, away_s=1000.0)
    engine = engine_over(transport, study(), clock)
    engine.ready()
    said: list[str] = []
    with lines_to(said.append):
        for _ in range(3):
            assert kinds(tiny.answers(engine, jobs())) == ["ok", "lost", "ok", "ok"]
        assert WAIT_S <= clock.now < 2 * WAIT_S
        clock.now = 2000.0
        assert kinds(tiny.answers(engine, jobs())) == ["ok"] * 4
    assert [line for line in said if line.startswith("waiting for clients whose SuperNode has gone: [1]")]


def test_a_node_that_dies_of_its_job_is_not_sent_it_for_ever(folder: Path, clock: Clock) -> None:
    transport = Loopback(folder, NODES, echo)
    transport.faults[1] = Back("", code=5, reason="Node Unavailable")
    assert kinds(tiny.answers(engine_over(transport, study(), clock), jobs())) == ["ok", "lost", "ok", "ok"]


@pytest.mark.parametrize("federate", [{"quorum": 3}, {"deadline_s": 4.0}])
def test_rounds_that_wait_for_nobody_do_not_wait_here(folder: Path, clock: Clock, federate: dict[str, float]) -> None:
    """A quorum says that rounds do without it; a deadline ends this wait too."""
    transport = Killed(folder, clock, echo, away_s=6.0)
    made = study(quorum=3) if "quorum" in federate else study()
    engine = engine_over(transport, made, clock)
    engine.ready()
    began = clock.now
    asked = limited(4.0) if "deadline_s" in federate else jobs()
    assert kinds(tiny.answers(engine, asked)) == ["ok", "lost", "ok", "ok"]
    assert clock.now - began <= 5.0 and transport.sent == 1
