"""Ctrl-C and SIGTERM: a command ends at its last commit with 130, and at once when it is asked twice."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedlth import cli
from fedlth.engines.flower_session import interruptible
from fedlth.engines.inprocess import InProcess
from fedlth.federation import session
from fedlth.federation.rounds import Federation
from fedlth.storage.run_folder import RunFolder
from tests import tiny


@pytest.fixture
def file(tmp_path: Path) -> Path:
    made = tmp_path / "s.yaml"
    made.write_text(yaml.safe_dump(tiny.tree(method={"name": "fedavg"}, workers=1)))
    return made


def signalled(patch: pytest.MonkeyPatch, one: signal.Signals) -> None:
    """Send this process a signal after the second commit."""
    committed = Federation._commit

    def commit(self: Federation, *args: Any, **more: Any) -> None:
        committed(self, *args, **more)
        if self.progress.step == 2:
            os.kill(os.getpid(), one)

    patch.setattr(Federation, "_commit", commit)


@pytest.fixture
def sigint() -> Any:
    """Have Ctrl-C handled as Python does: a test run in the background inherits an ignored SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("sigint")
@pytest.mark.parametrize("one", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_at_its_last_commit(
    tmp_path: Path, file: Path, one: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    out, handler = tmp_path / "run", signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        signalled(patch, one)
        assert cli.main(["run", str(file), f"out={out}"]) == 130
    said = capsys.readouterr().err
    assert f"fedlth resume {out}" in said and "Traceback" not in said
    assert signal.getsignal(signal.SIGTERM) is handler and RunFolder(out).progress().step == 2
    session.resume(out, InProcess())
    tiny.run(tiny.of_method("fedavg"), tmp_path / "whole")
    assert tiny.facts(out) == tiny.facts(tmp_path / "whole")


@pytest.mark.usefixtures("sigint")
def test_a_second_one_waits_for_nothing(tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """While the first is being obeyed: workers that do not end must not keep the user."""
    closed: list[str] = []

    def close(self: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        closed.append("to its end")

    with pytest.MonkeyPatch.context() as patch:
        signalled(patch, signal.SIGINT)
        patch.setattr(InProcess, "close", close)
        assert cli.main(["run", str(file), f"out={tmp_path / 'run'}"]) == 130
    assert not closed and "Traceback" not in capsys.readouterr().err
    assert RunFolder(tmp_path / "run").progress().step == 2


def test_under_flower_both_ask_the_server_to_stop() -> None:
    for one in (signal.SIGINT, signal.SIGTERM):
        stop, before = threading.Event(), signal.getsignal(one)
        with interruptible(stop):
            os.kill(os.getpid(), one)
            assert stop.is_set() and signal.getsignal(one) is before
        assert signal.getsignal(one) is before


def test_another_thread_may_run_a_command() -> None:
    ended: list[int] = []
    thread = threading.Thread(target=lambda: ended.append(cli.main(["list", "engines"])))
    thread.start()
    thread.join()
    assert ended == [0]
