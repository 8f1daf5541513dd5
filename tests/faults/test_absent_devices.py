"""Devices that never come, or do not come back: a run that cannot begin has left nothing, one that has begun ends."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from fedlth.engines.flower_session import FlowerRun
from fedlth.errors import NothingUsable, StudyError
from fedlth.experiment.resolve import resolve
from tests.engines.test_flower_engine import NODES, echo
from tests.engines.test_flower_rounds import Clock, Slow, clock, engine_over, folder, study

__all__ = ["clock", "folder"]  # fixtures


def test_devices_that_do_not_say_whom_they_serve_make_no_quorum(folder: Path, clock: Clock) -> None:
    """Four are connected, and two of them hang."""
    transport = Slow(folder, NODES, echo)
    transport.held = {1, 3}
    wanted = r"quorum: 3 of 4 clients must be there to begin, got 2, no \[1, 3\]; node 13: no answer"
    with pytest.raises(StudyError, match=wanted):
        engine_over(transport, study(quorum=3), clock).ready()


@pytest.mark.parametrize("federate", [{}, {"quorum": 3}])
def test_a_run_that_cannot_begin_leaves_no_folder(tmp_path: Path, clock: Clock, federate: dict[str, int]) -> None:
    """Else the next try, with all devices there, would find a run in its place."""
    made, out = study(**federate), tmp_path / "r"
    with pytest.raises(StudyError, match=r"got 2 after .*, no SuperNode of clients \[1, 3\]"):
        FlowerRun(resolve(made)[0], out, False).run(engine_over(Slow(out, {5: 0, 77: 2}), made, clock))
    assert not out.exists()


def test_a_run_whose_devices_all_leave_does_not_wait_for_ever(tmp_path: Path, clock: Clock) -> None:
    class Leaving(Slow):
        def online(self) -> Iterable[int]:
            assert clock.now < 1000, "it waits for ever"
            return [] if self.trained else super().online()

    made, out = study(rounds=5, clients_per_round=2, quorum=2), tmp_path / "r"
    says = "3 rounds without one usable reply; last: nobody took part; connected now: 0 of 4 clients"
    with pytest.raises(NothingUsable, match=says):
        FlowerRun(resolve(made)[0], out, False).run(engine_over(Leaving(out, NODES), made, clock))
    assert clock.now < 50, "ten seconds for each of the three rounds"
