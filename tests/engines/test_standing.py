"""The standing process: a forked child for each message, a fresh process where that cannot be, and what it says."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from fedlth.engines import standing
from fedlth.engines.standing import MOST_REFUSALS, LoadedFiles, Standing, alive, patient

NOTHING = LoadedFiles({})


@pytest.fixture(autouse=True)
def told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fedlth")


def serving(tokens: list[str], serve: Callable[[str], None], tmp_path: Path, loaded: LoadedFiles = NOTHING) -> Standing:
    return Standing(
        acquire=lambda: tokens.pop(0) if tokens else None,
        serve=serve,
        fresh=lambda token: ["sh", "-c", f"echo $$ {token} > {tmp_path}/fresh"],
        loaded=loaded,
    )


def ended(one: Standing) -> None:
    end = time.monotonic() + 30
    while one.begun and time.monotonic() < end:
        one.reap()
        time.sleep(0.01)
    assert not one.begun


def test_each_message_has_a_child_and_what_it_does_stays_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(standing, "threads", lambda: 1)  # this process may have those of pytest-xdist
    here: list[str] = []

    def serve(token: str) -> None:
        here.append(token)
        (tmp_path / token).write_text(f"{os.getpid()} {here}")
        if token == "second":
            sys.exit(3)
        if token == "third":
            raise RuntimeError("said")

    one = serving(["first", "second", "third"], serve, tmp_path)
    one.reap()  # children of earlier tests
    caplog.clear()
    assert [one.turn() for _ in range(4)] == [""] * 4
    ended(one)
    assert here == []
    said = [(tmp_path / token).read_text() for token in ("first", "second", "third")]
    assert [text.partition(" ")[2] for text in said] == ["['first']", "['second']", "['third']"]
    assert len({text.partition(" ")[0] for text in said} | {str(os.getpid())}) == 4
    took = [line for line in caplog.messages if line.startswith("standing: a message took")]
    assert sorted(line.partition("CPU s")[2] for line in took) == ["", "; exit code 1", "; exit code 3"]


def test_what_was_replaced_on_disk_is_not_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The message that shows it waits for the process that is begun anew."""
    monkeypatch.setattr(standing, "threads", lambda: 1)
    module = tmp_path / "standing_part.py"
    module.write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    import standing_part  # type: ignore[import-not-found]

    loaded = LoadedFiles.here()
    assert loaded.changed() == "" and standing_part.__file__ in loaded.stamps
    module.write_text("value = 20\n")
    assert loaded.changed() == str(module)
    one = serving(["token"], lambda _: pytest.fail("in the old code"), tmp_path, loaded)
    assert one.turn() == "token" and not one.begun
    assert f"standing: {module} has changed" in caplog.messages
    module.unlink()
    assert loaded.changed() == str(module)
    del sys.modules["standing_part"]


def test_a_process_with_threads_forks_no_child(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()
    try:
        one = serving(["token"], lambda _: pytest.fail("forked"), tmp_path)
        assert one.turn() == "" and len(one.begun) == 1
    finally:
        over.set()
        thread.join()
    ended(one)
    assert (tmp_path / "fresh").read_text().endswith(" token\n")
    assert [line for line in caplog.messages if "threads run in the standing process" in line]


def test_a_supernode_that_is_away_or_refuses_is_borne_for_a_while() -> None:
    request = httpx.Request("POST", "http://127.0.0.1")
    answers: list[object] = [
        httpx.ConnectError("away"), None, "token",
        *[httpx.HTTPStatusError("401", request=request, response=httpx.Response(401))] * (MOST_REFUSALS + 1),
    ]  # fmt: skip

    def token() -> str | None:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, str) else None

    asked = patient(token)
    assert [asked() for _ in range(3)] == [None, None, "token"]
    assert [asked() for _ in range(MOST_REFUSALS - 1)] == [None] * (MOST_REFUSALS - 1)
    with pytest.raises(httpx.HTTPStatusError):
        asked()
    assert alive(os.getpid())
    with subprocess.Popen(["true"]) as done:
        os.waitid(os.P_PID, done.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is still there to be asked about
        assert not alive(done.pid)
    assert not alive(done.pid)


@pytest.mark.long
def test_what_a_child_shares_is_imported_without_a_thread_and_without_what_no_device_needs() -> None:
    text = (
        "import fedlth.engines.flower_standing, sys\n"
        "from fedlth.engines.standing import threads\n"
        "unneeded = {'ray', 'matplotlib', 'pyarrow', 'pandas', 'scipy', 'numba', 'sympy'} & set(sys.modules)\n"
        "print(threads(), sorted(unneeded))\n"
    )
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # as a device's environment has it (deploy/templates)
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True, env=env)
    assert done.stdout == "1 []\n"
