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
    ],
)
def test_an_address_without_ray_is_said(address: str, said: str) -> None:
    with pytest.raises(StudyError, match=said):
        map_one(study_of(engine="ray", ray={"address": address}))


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_driver_that_ends_leaves_no_process(sent: signal.Signals, code: int, tmp_path: Path) -> None:
    """Both while a worker hangs, since one that does not answer is the hardest to end."""
    marker = tmp_path / "marker"
    driver = (
        # A test run in the background inherits an ignored SIGINT.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import sys; from pathlib import Path; from ray_study import *\n"
        f"try: run(study_of(fault='hang', marker={str(marker)!r}, engine='ray', ray={{'workers': 1}}), Path('run'))\n"
        "except KeyboardInterrupt: sys.exit(130)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    process = subprocess.Popen([sys.executable, "-c", driver], cwd=tmp_path, env=env, start_new_session=True)
    try:
        wait_until(marker.exists, seconds=120)
        # Ctrl-C in a terminal goes to the whole group; kill -9 to one process.
        (os.killpg if sent == signal.SIGINT else os.kill)(process.pid, sent)
        assert process.wait(timeout=60) == code
        wait_until(lambda: not alive_in_session(process.pid), seconds=40)
    finally:
        for pid in alive_in_session(process.pid):
            os.kill(pid, signal.SIGKILL)


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
