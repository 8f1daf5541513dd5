"""A folder has one run at a time, from the first file of a run to its last."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlth.engines.inprocess import InProcess
from fedlth.errors import StudyError
from fedlth.federation import session
from fedlth.federation.jobs import Failure, Job, Reply
from tests import tiny
from tests.faults.test_resume import Meddling


def test_a_run_that_is_going_on_is_neither_resumed_nor_begun_again(tmp_path: Path) -> None:
    """That a run which was resumed holds its folder was known; one that has just begun must hold it too."""
    made, out, refused = tiny.of_method("fedavg"), tmp_path / "r", list[str]()

    def second_comes(job: Job, answer: Reply | Failure) -> Reply | Failure:
        if not refused:
            for second in (lambda: session.resume(out, InProcess()), lambda: tiny.run(made, out)):
                with pytest.raises(StudyError, match="another process is running this run"):
                    second()
                refused.append(job.phase)
        return answer

    tiny.run(made, out, engine=Meddling(second_comes))
    assert refused == ["federate", "federate"]
    tiny.run(made, tmp_path / "alone")
    assert tiny.facts(out) == tiny.facts(tmp_path / "alone"), "nor does the first one notice"
