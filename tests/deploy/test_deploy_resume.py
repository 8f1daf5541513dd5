"""fedlth resume for a run on devices: its federation's run.sh, whose exit code says nothing, and the run's own end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedlth import api, cli
from fedlth.engines.flower_engine import RUN_NAME
from fedlth.errors import StudyError
from fedlth.output import lines_to
from tests import tiny

SAYS_ENDED = """#!/bin/sh
echo "$1" >> "$(dirname "$0")/asked"
sed -i 's/"finished": false/"finished": true/' "$1/header.json"
"""
SAYS_NOTHING = "#!/bin/sh\nexit 0\n"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A run that `flwr run` began and something stopped, in the folder of a federation without a run.sh."""
    out = tmp_path / "fed" / "run"
    tiny.run(tiny.study(), out)
    (out / RUN_NAME).write_text("0" * 16)
    unfinished(out)
    return out


def unfinished(out: Path) -> None:
    header = json.loads((out / "header.json").read_bytes())
    (out / "header.json").write_text(json.dumps({**header, "finished": False}, indent=1))


def federation(out: Path, script: str) -> Path:
    (out.parent / "federation.json").write_text("{}")
    (out.parent / "run.sh").write_text(script)
    (out.parent / "run.sh").chmod(0o700)
    return out.parent / "asked"


def test_it_is_continued_by_run_sh_and_once_ended_left_alone(out: Path) -> None:
    asked = federation(out, SAYS_ENDED)
    assert api.resume(out) == out and asked.read_text() == f"{out}\n"
    said: list[str] = []
    with lines_to(said.append):
        api.resume(out)
    assert asked.read_text() == f"{out}\n" and said == [f"{out}: has ended already"]


def test_the_exit_code_is_that_of_the_run(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    federation(out, SAYS_NOTHING)
    assert cli.main(["resume", str(out)]) == 2
    told = capsys.readouterr().err
    assert "has not ended; what was committed is kept, and the same command continues" in told


def test_elsewhere_the_command_that_continues_it_is_named(out: Path) -> None:
    """It trained in this process, from states that lie on the devices: "run folder is not whole"."""
    with pytest.raises(StudyError, match=f"DIR/run.sh {out} continues it"):
        api.resume(out)
