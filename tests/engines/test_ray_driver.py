"""The Ray engine's driver: it says when there is no Ray, and leaves no process behind however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ray_study import map_one, study_of

from fedlth.errors import StudyError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:9", "ray.address: cannot reach Ray at 127.0.0.1:9"),
        ("nowhere", "ray.address: must be host:port"),
        ("ray://10.0.0.1:10001", "ray.address: must be host:port of the cluster's head, from a machine of the cluster"),
    ],
)
def test_an_address_without_ray_is_said(address: str, said: str) -> None:
    with pytest.raises(StudyError, match=said):
        map_one(study_of(engine="ray", ray={"address": address}))


def test_a_ray_that_cannot_start_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(**_: object) -> None:
        raise Exception("The current node timed out during startup.")  # as Ray does where the machine is overloaded

    monkeypatch.setattr("ray.init", late)
    with pytest.raises(StudyError, match="^ray: cannot start Ray here: Exception: The current node timed out"):
        map_one(study_of(engine="ray"))


@pytest.mark.long
def test_a_driver_that_ends_leaves_no_process(tmp_path: Path) -> None:
    """Both while a worker hangs, since one that does not answer is the hardest to end."""
    # Ctrl-C in a terminal goes to the whole group; kill -9 to one process.
    ends = {signal.SIGINT: (os.killpg, 130), signal.SIGKILL: (os.kill, -signal.SIGKILL)}
    drivers = {sent: driver(tmp_path / sent.name) for sent in ends}
    try:
        for sent, (kill, code) in ends.items():
            process = drivers[sent]
            wait_until((tmp_path / sent.name / "marker").exists, seconds=120)
            kill(process.pid, sent)
            assert process.wait(timeout=60) == code
            wait_until(lambda leader=process.pid: not alive_in_session(leader), seconds=40)
    finally:
        for process in drivers.values():
            for pid in alive_in_session(process.pid):
                os.kill(pid, signal.SIGKILL)
            process.wait()


def driver(folder: Path) -> subprocess.Popen[bytes]:
    """Start a run whose second client hangs, after leaving a file `marker`."""
    folder.mkdir()
    code = (
        # A test run in the background inherits an ignored SIGINT.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import sys; from pathlib import Path; from ray_study import *\n"
        f"study = study_of(fault='hang', marker={str(folder / 'marker')!r}, engine='ray', ray={{'workers': 1}})\n"
        "try: run(study, Path('run'))\n"
        "except KeyboardInterrupt: sys.exit(130)\n"
    )
    here = Path(__file__).parent  # with the root: ray_study takes its study from tests.tiny
    paths = [str(here), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.Popen([sys.executable, "-c", code], cwd=folder, env=env, start_new_session=True)


def wait_until(true: Callable[[], object], *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.2)


def alive_in_session(session: int) -> list[int]:
    """Return the living processes that descend from a session's leader, orphans included."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found
