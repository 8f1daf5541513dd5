"""A federation of two devices, the first behind a thin link: what a study then takes, in seconds and in bytes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from fedlth import cli
from fedlth.deploy.folder import Folder
from fedlth.deploy.live import ask
from fedlth.deploy.settings import read_settings
from tests.deploy.metered_gate import PULL, PUSH, Request, requests_in
from tests.deploy.test_federation import free_ports, running, wait_for
from tests.deploy.thin_link import FAR, NEAR, Crossed, Link

ROOT = Path(__file__).parents[2]
DEVICES = 2
RETRIED = "Connection attempt failed, retrying"  # what Flower's client says whenever it sends a request again


@dataclass(frozen=True)
class Ran:
    """A run whose client 0 is behind the link: its folder, and what crossed from the run's beginning to its end.

    `requests` are those of client 0; `retried` is how often its SuperNode said that it tries one again.
    """

    out: Path
    seconds: float
    link: Crossed
    requests: tuple[Request, ...]
    retried: int

    def twice(self) -> list[str]:
        """Return the objects that crossed more than once, and requests that broke off on the way."""
        moved = [one for one in self.requests if one.path in (PUSH, PULL)]
        times = Counter((one.path, one.object) for one in moved if one.object)
        again = [f"{count} times {path} {id[:12]}" for (path, id), count in times.items() if count > 1]
        return [*again, *(f"broke off: {one}" for one in self.requests if not one.whole or one.status != 200)]

    def content_bytes(self, path: str) -> int:
        """Return the bytes of the objects that crossed by one path."""
        return sum(one.content_bytes for one in self.requests if one.path == path)

    def largest(self, path: str) -> int:
        """Return the bytes of the largest object that crossed by one path."""
        return max(one.content_bytes for one in self.requests if one.path == path)

    def framed(self) -> dict[str, int]:
        """Return the bytes of client 0's messages as the ledger has them, `up` and `down`."""
        total = {"up": 0, "down": 0}
        for line in (self.out / "ledger.jsonl").read_text().splitlines():
            row = json.loads(line)
            if row["client"] == 0:
                total[row["direction"]] += row["framed_bytes"] or 0
        return total


def ran_behind(link: Link, root: Path, words: list[str]) -> Ran:
    """Run a study on two devices, the first behind the link, with a gate that counts; `root` is a folder to fill."""
    root.mkdir()
    folder, port = Folder(root / "fed"), str(free_ports())
    made = ["deploy", "init", str(folder.root), "--host", NEAR, "--port", port, "--devices", str(DEVICES), *words]
    assert cli.main(made) == 0
    settings = read_settings(folder.root)
    programs: list[subprocess.Popen[bytes]] = []
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}

    def start(name: str, *command: object) -> None:
        with (root / f"{name}.log").open("wb") as log:
            words = [str(word) for word in command]
            programs.append(subprocess.Popen(words, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL))

    def healthy(port: int, host: str) -> bool:
        return ask("GET", f"https://{host}:{port}/health", str(folder.authority)).status == 200

    with running(programs, root):
        start("superlink", folder.root / "superlink.sh")
        wait_for("SuperLink", lambda: healthy(settings.superlink_port, "127.0.0.1"), programs)
        start("gate", sys.executable, "-m", "tests.deploy.metered_gate", folder.root, root / "requests.jsonl")
        wait_for("gate", lambda: healthy(settings.port, NEAR), programs)
        subprocess.run([folder.root / "register.sh"], env=env, check=True, capture_output=True)
        for number in range(DEVICES):
            shutil.move(folder.device(number), root / f"device-{number}")
            script = str(root / f"device-{number}" / "start.sh")
            start(f"device-{number}", *(link.behind(script) if number == 0 else [script]))
        began, before = time.monotonic(), link.crossed()
        done = subprocess.run([folder.root / "run.sh", root / "run"], env=env, capture_output=True, text=True)
        seconds, after = time.monotonic() - began, link.crossed()
        assert "fedlth: done" in done.stdout, done.stdout + done.stderr
    return Ran(
        root / "run", seconds, after.less(before),
        tuple(one for one in requests_in(root / "requests.jsonl") if one.who == FAR),
        (root / "device-0.log").read_text().count(RETRIED),
    )  # fmt: skip
