"""A device's start.sh, run with stand-ins for the programs: what serves messages, killed or unable, is followed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedlth.deploy.folder import filled

ENDS, KILLED, CANNOT = "exit 0", "kill -9 $$", "exit 1"


def started(folder: Path, serve: str) -> list[str]:
    """Run start.sh until its SuperNode, which waits for what serves, has ended; return what was called, in order."""
    programs = {
        "fedlth": f'echo "fedlth $@" >> calls; if [ -e again ]; then exit 0; fi; touch again; {serve}',
        "flower-superexec": 'echo "flower-superexec $@" >> calls',
        "flower-supernode": 'echo "flower-supernode $$ $@" >> calls; while ! [ -e over ]; do command sleep 0.01; done',
        "sleep": "exit 0",
    }
    (folder / "bin").mkdir()
    for name, text in programs.items():
        path = folder / "bin" / name
        path.write_text(f"#!/bin/sh\n{text}\n".replace("command sleep", "/bin/sleep"))
        path.chmod(0o700)
    script = folder / "start.sh"
    script.write_text(filled("device.sh", gate_address="gate:1", device_port=2, environment=""))
    env = {**os.environ, "PATH": f"{folder}/bin:{os.environ['PATH']}"}
    with subprocess.Popen(["sh", script], env=env, cwd=folder, stderr=subprocess.PIPE, text=True) as shell:
        assert int((wait_for(folder / "supernode.pid")).strip()) == shell.pid
        calls = folder / "calls"
        wanted = {ENDS: 2, KILLED: 3, CANNOT: 3}[serve]
        while not calls.exists() or len(calls.read_text().splitlines()) < wanted:
            assert shell.poll() is None
        (folder / "over").touch()
        assert shell.wait() == 0 and shell.stderr is not None
        said = shell.stderr.read()
    assert ("killed" in said.lower()) == (serve == KILLED) and ("fresh process" in said) == (serve == CANNOT)
    assert "exit code 305" in said, "what Flower does not say: why it could not connect"
    secret = folder / "runtime-secret"
    assert len(secret.read_text()) == 64 and secret.stat().st_mode & 0o777 == 0o600
    lines = calls.read_text().splitlines()
    (node,) = [line for line in lines if line.startswith("flower-supernode")]
    assert node.startswith(f"flower-supernode {shell.pid} ")
    assert node.endswith(f"--isolation process --superexec-auth-secret-file {secret}")
    served = [line.replace(str(shell.pid), "PID").replace(str(folder), "HERE") for line in lines if line != node]
    return served


def wait_for(path: Path) -> str:
    while not (path.exists() and path.read_text().endswith("\n")):
        pass
    return path.read_text()


SERVE = "fedlth deploy serve 127.0.0.1:2 --supernode PID --secret HERE/runtime-secret"
FRESH = (
    "flower-superexec --insecure --runtime-api-address 127.0.0.1:2 --parent-pid PID "
    "--superexec-auth-secret-file HERE/runtime-secret"
)


def test_one_that_ends_with_its_supernode_is_not_begun_again(tmp_path: Path) -> None:
    assert started(tmp_path, ENDS) == [SERVE]


def test_one_that_is_killed_is_followed_by_another(tmp_path: Path) -> None:
    assert started(tmp_path, KILLED) == [SERVE, SERVE]


def test_one_that_cannot_serve_is_followed_by_flowers_own(tmp_path: Path) -> None:
    assert started(tmp_path, CANNOT) == [SERVE, FRESH]


def test_what_stays_up_has_one_thread_whatever_the_shell_says() -> None:
    """With a second one, as numpy's BLAS starts them, no child would answer: each message had a fresh process."""
    pytest.importorskip("flwr")
    asks = "import os, fedlth.engines.flower_standing; print(len(os.listdir('/proc/self/task')))"
    env = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    script = f'here="$HOME"\n{filled("environment.sh")}\nexec "$0" -c "$1"'
    done = subprocess.run(["sh", "-c", script, sys.executable, asks], env=env, capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr
