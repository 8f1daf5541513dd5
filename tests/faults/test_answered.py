"""A wave of step 2 that is stopped goes on client by client: who has answered does not train again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedlth.engines.inprocess import InProcess
from fedlth.federation import answered, session
from fedlth.federation.jobs import Job, Reply
from tests import tiny

SECTIONS: dict[str, Any] = {
    "personalise": {"arms": ["ticket", "random"], "clients_per_wave": 4},
    "refine": {"rounds": 1, "clients_per_round": 2},
}


class Stop(BaseException):
    """Stands for kill -9."""


class Counting(tiny.Lists):
    """Notes which clients run in step 2; stops at the `stop`-th of them."""

    def __init__(self, stop: int = 0) -> None:
        self.stop, self.ran = stop, list[int]()

    def map(self, jobs: Any, /, *, again: Any = None) -> Any:
        for job in jobs:
            if job.phase == "personalise":
                self.ran.append(job.client)
                if len(self.ran) == self.stop:
                    raise Stop
            yield from InProcess().map([job])


def stopped(out: Path, at: int = 4, **sections: Any) -> Any:
    study = tiny.study(**{**SECTIONS, **sections})
    with pytest.raises(Stop):
        tiny.run(study, out, engine=Counting(at))
    return study


@pytest.mark.parametrize("damage", ["none", "torn", "another job"])
def test_who_has_answered_is_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    monkeypatch.setattr(answered, "WORTH_S", 0.0)
    study = stopped(tmp_path / "r")
    files = sorted((tmp_path / "r" / "answered" / "personalise-1").iterdir())
    assert [int(f.stem) for f in files] == [0, 1, 2]
    if damage == "torn":
        files[1].write_bytes(files[1].read_bytes()[:-9])
    if damage == "another job":
        files[1].write_bytes(files[0].read_bytes())
    engine = Counting()
    session.resume(tmp_path / "r", engine)
    assert engine.ran == ([3] if damage == "none" else [1, 3])
    tiny.run(study, tmp_path / "whole")
    assert tiny.facts(tmp_path / "r") == tiny.facts(tmp_path / "whole")
    assert not (tmp_path / "r" / "answered").exists()


@pytest.mark.parametrize(
    ("worth", "sections"), [(0.0, {"cohort": 2}), (1e9, {})], ids=["a cohort trains together", "too short"]
)
def test_where_nothing_is_kept_the_wave_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worth: float, sections: dict[str, Any]
) -> None:
    monkeypatch.setattr(answered, "WORTH_S", worth)
    stopped(tmp_path / "r", 3, **sections)
    assert not (tmp_path / "r" / "answered").exists()
    engine = Counting()
    session.resume(tmp_path / "r", engine)
    assert engine.ran == [0, 1, 2, 3]


def test_an_answer_is_read_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answered, "WORTH_S", 0.0)
    seen = list[tuple[Job, Reply]]()
    real: Callable[..., None] = answered.Answered.put

    def put(self: answered.Answered, job: Job, reply: Reply) -> None:
        real(self, job, reply)
        seen.append((job, reply))
        assert self.get(job) == reply

    monkeypatch.setattr(answered.Answered, "put", put)
    tiny.run(tiny.study(**SECTIONS), tmp_path / "r")
    assert len([1 for job, _ in seen if job.phase == "personalise"]) == 4 and all(r.work for _, r in seen)
