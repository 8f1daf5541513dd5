"""The command line's ends: a reader that goes away, a disk that is full, and words that fit the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedlth import api, catalogue, cli, output
from fedlth.report import build
from tests import tiny

ROOT = Path(__file__).parents[1]


def study_file(folder: Path, **sections: Any) -> Path:
    file = folder / "s.yaml"
    file.write_text(yaml.safe_dump(tiny.tree(workers=1, **sections)))
    return file


def behind_a_pipe(*words: str, lines: int) -> int:
    """Run a command whose two outputs go into one pipe that is closed after some lines; return its exit code."""
    read, write = os.pipe()
    process = subprocess.Popen([sys.executable, "-m", "fedlth", *words], stdout=write, stderr=write, cwd=ROOT)
    os.close(write)
    with os.fdopen(read) as reader:
        for _ in range(lines):
            reader.readline()
    return process.wait()


def test_a_run_behind_head_goes_on_to_its_end(tmp_path: Path) -> None:
    """Row 18: `fedlth run ... 2>&1 | head -1` abandoned the run, with exit code 0."""
    out = tmp_path / "run"
    assert behind_a_pipe("run", str(study_file(tmp_path)), f"out={out}", lines=1) == 0
    assert json.loads((out / "header.json").read_bytes())["finished"]
    assert (out / "report.html").exists()


@pytest.mark.parametrize(
    ("words", "code"),
    [(["--help"], 0), (["list", "methodz"], 2), (["diff", "{run}", "{other}"], 1)],
)
def test_a_listing_behind_head_ends_with_its_usual_code(
    tmp_path_factory: pytest.TempPathFactory, words: list[str], code: int
) -> None:
    """Row 18: a reader that has gone changes no exit code: `diff` still says 1, bad input 2."""
    folder = tmp_path_factory.getbasetemp() / "listings"
    if not folder.exists():
        folder.mkdir()
        for name, seed in (("run", 0), ("other", 1)):
            tiny.run(tiny.of_method("fedavg", seed=seed, federate={"rounds": 1}), folder / name)
    places = {"run": folder / "run", "other": folder / "other"}
    assert behind_a_pipe(*(word.format(**places) for word in words), lines=0) == code


def test_progress_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    """Row 18's brother: standard error on a full disk."""
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    code = "from fedlth import output\noutput.tell('one')\noutput.tell('two')\noutput.settle()\nprint('done')"
    with full.open("w") as stderr:
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=stderr, cwd=ROOT, text=True)
    assert done.returncode == 0 and done.stdout == "done\n"


def test_a_pipe_that_breaks_inside_a_run_is_no_reader_that_has_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Row 18's brother: a worker's broken pipe was taken for `| head`, and the run for a good one."""

    def broken(*args: Any, **more: Any) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(api, "drive", broken)
    assert cli.main(["run", str(study_file(tmp_path)), f"out={tmp_path / 'r'}"]) == cli.DISK
    assert "Broken pipe" in capsys.readouterr().err


def no_space(*args: Any, **more: Any) -> Any:
    raise OSError(28, "No space left on device")


def test_an_os_error_has_words_that_fit_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows 19 and 46: only what can be resumed is said to be, and the folder is named."""
    out, file = tmp_path / "r", study_file(tmp_path)

    def said(*words: str) -> str:
        capsys.readouterr()
        assert cli.main(list(words)) == cli.DISK
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        return line

    with monkeypatch.context() as patch:
        patch.setattr(api, "drive", no_space)
        run = "fedlth: run: [Errno 28] No space left on device; "
        not_begun = f"the run in {out} has not begun, and nothing of it is kept"
        assert said("run", str(file), f"out={out}") == run + not_begun
        kept = f"what was committed is kept: fedlth resume {out}"
        assert said("run", str(file), f"out={out}", "seeds=[0,1]") == run + kept
        assert said("resume", str(out)).endswith(f"what was committed is kept: fedlth resume {out}")
    tiny.run(tiny.of_method("fedavg"), tmp_path / "a")
    tiny.run(tiny.of_method("fedavg"), tmp_path / "b")
    with monkeypatch.context() as patch:
        patch.setattr(build, "write_file", no_space)
        told = said("report", str(tmp_path / "a"))
        assert "resume" not in told and f"to write it again: fedlth report {tmp_path / 'a'}" in told
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", no_space)
        told = said("compare", str(tmp_path / "a"), str(tmp_path / "b"), "--tables", str(tmp_path / "t"))
        assert told == "fedlth: compare: [Errno 28] No space left on device"
    with monkeypatch.context() as patch:
        patch.setattr(catalogue, "listing", no_space)
        assert said("list") == "fedlth: list: [Errno 28] No space left on device"


def test_an_os_error_of_the_laboratory_says_how_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Row 19: `fedlth resume` does not know a lottery study."""
    from fedlth.lab import runner
    from tests.lab import tiny_lottery

    file, out = tmp_path / "l.yaml", tmp_path / "l"
    file.write_text(yaml.safe_dump(tiny_lottery.tree()))
    monkeypatch.setattr(runner, "run", no_space)
    assert cli.main(["lottery", str(file), f"out={out}"]) == cli.DISK
    told = capsys.readouterr().err
    assert "fedlth resume" not in told and f"the same command with out={out} continues" in told


def test_progress_and_results_are_apart(capsys: pytest.CaptureFixture[str]) -> None:
    output.tell("progress")
    output.say("result", end="")
    said = capsys.readouterr()
    assert (said.out, said.err) == ("result", "progress\n")
