"""A federation of three devices for the tests of fedlth deploy: its folder alone, or running on loopback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fedlth import cli
from fedlth.deploy import make
from fedlth.deploy.folder import Folder
from fedlth.deploy.live import ask
from fedlth.deploy.settings import Settings, read_settings
from tests import tiny

DEVICES = 3
HOST = "192.0.2.7"  # an address of no machine (RFC 5737)
ROOT = Path(__file__).parents[2]
LONGEST_S = 600.0
SERVE, SERVER_APP = "deploy serve", "flwr-serverapp"


def made(root: Path, *, port: int = 8443, hosts: tuple[str, ...] = (HOST, "fed.example.org")) -> Folder:
    """Write a federation of three devices that run the tiny study."""
    path = root.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(tiny.tree(clients={"count": DEVICES, "unseen": 0.0})))
    return make.init(root, path, ["seed=3"], devices=DEVICES, hosts=hosts, port=port)


def copied(folder: Folder, to: Path) -> Folder:
    """Copy a federation, the one path in its Flower config that names its place too."""
    shutil.copytree(folder.root, to)
    other = Folder(to)
    config = other.flower_config.read_text()
    other.flower_config.write_text(config.replace(str(folder.root), str(to)))
    return other


@dataclass
class Federation:
    """A federation that runs: each program by its name, "superlink", "gate", "device-0" and so on.

    `path` is where every program finds further modules.
    """

    root: Path
    folder: Folder
    settings: Settings
    path: tuple[Path, ...] = ()
    programs: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def env(self) -> dict[str, str]:
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        modules = os.pathsep.join(filter(None, (str(ROOT), *map(str, self.path), os.environ.get("PYTHONPATH"))))
        return {**os.environ, "PATH": path, "PYTHONPATH": modules}

    def device(self, number: int) -> Path:
        """Return where a device's folder lies: as if on another machine, since nothing in it may name its place."""
        return self.root / f"moved-{number}"

    def start(self, name: str) -> None:
        """Start a program by its script, as its operator does, and wait until it serves."""
        kind, _, number = name.partition("-")
        script = self.device(int(number)) / "start.sh" if number else self.folder.root / f"{name}.sh"
        self.begin(name, script)
        if number:
            port = self.settings.device_ports[int(number)]
            self.wait_for(name, lambda: not free(port))
        else:
            port = {"superlink": self.settings.superlink_port, "gate": self.settings.port}[name]
            url, trusted = f"https://127.0.0.1:{port}/health", str(self.folder.authority)
            self.wait_for(name, lambda: ask("GET", url, trusted).status == 200)

    def begin(self, name: str, *command: object) -> None:
        """Start a program; what it says is in the log of its name, after what earlier ones of it said."""
        with self.log(name).open("ab") as log:
            self.programs[name] = subprocess.Popen(
                [str(word) for word in command], env=self.env, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )

    def log(self, name: str) -> Path:
        return self.root / f"{name}.log"

    def said(self, *command: object) -> str:
        """Run a command to its end and return what it says; it must succeed."""
        done = subprocess.run([str(word) for word in command], env=self.env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def wait_for(self, what: str, ready: Callable[[], bool], *, all_run: bool = True) -> None:
        end = time.monotonic() + LONGEST_S
        while not ready():
            assert time.monotonic() < end, f"{what}: not ready"
            ended = [name for name, program in self.programs.items() if program.poll() is not None]
            assert not (all_run and ended), f"{what}: {ended} ended"
            time.sleep(0.2)

    def kill(self, name: str) -> None:
        """End a program as a power cut would: kill -9."""
        program = self.programs.pop(name)
        program.send_signal(signal.SIGKILL)
        program.wait()

    def at_work(self, number: int) -> bool:
        """Say whether a device's client is at work on a message."""
        return len(self.processes(SERVE, self.device(number))) > 1  # beside the one that stays up

    def serving(self, number: int) -> int:
        """Return the process that waits for a device's messages, the eldest of the command; 0 where none does."""
        return min(self.processes(SERVE, self.device(number)), default=0)

    def processes(self, program: str, under: Path) -> list[int]:
        """Return the processes of one of Flower's programs whose Flower home lies in a folder."""
        return [pid for pid in started_under(under) if program in command_of(pid)]

    def flower_runs(self) -> list[dict[str, Any]]:
        """Return what the SuperLink says of its runs, the latest first."""
        env = {**self.env, "FLWR_HOME": str(self.folder.flower_config.parent)}
        done = subprocess.run(["flwr", "ls", "fedlth", "--format", "json"], env=env, capture_output=True, text=True)
        return list(json.loads(done.stdout)["runs"])


@contextmanager
def federation(
    root: Path, words: list[str], prepare: Callable[[int, Path], object] = lambda *_: None, path: tuple[Path, ...] = ()
) -> Iterator[Federation]:  # fmt: skip
    """Make a federation with keys and TLS, start all its programs, end everything; no process of it may be left.

    `prepare` puts into a device's folder, by its number, what only that device has; `path` is where every program finds
    further modules.
    """
    folder = Folder(root / "fed")
    port = str(free_ports())
    assert cli.main(["deploy", "init", str(folder.root), "--devices", str(DEVICES), "--port", port, *words]) == 0
    made = Federation(root, folder, read_settings(folder.root), path)
    with running(made.programs, root):
        made.start("superlink")
        made.start("gate")
        made.said(folder.root / "register.sh")
        for number in range(DEVICES):
            shutil.move(folder.device(number), made.device(number))
            prepare(number, made.device(number))
            made.start(f"device-{number}")
        yield made
    assert not started_under(root)


def free_ports() -> int:
    """Return a port with free ones behind it, as many as a federation needs; two processes of tests try others."""
    for first in range(20_000 + 10 * (os.getpid() % 1000), 60_000, 10):
        if all(free(port) for port in range(first, first + 2 + DEVICES)):
            return first
    raise AssertionError("no free ports")


def free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
        return True
    except OSError:
        return False


@contextmanager
def running(programs: dict[str, subprocess.Popen[bytes]], root: Path) -> Iterator[None]:
    """End every program that was started, SuperNodes first, and what they have started."""
    try:
        yield
    finally:
        for program in reversed(programs.values()):
            program.terminate()
        for program in programs.values():
            try:
                program.wait(60)
            except subprocess.TimeoutExpired:
                program.kill()
                program.wait()
        for _ in range(30):  # Flower's children watch for their parent's end
            if not (left := started_under(root)):
                break
            time.sleep(1)
        for pid in left:
            os.kill(pid, signal.SIGKILL)


def started_under(root: Path) -> list[int]:
    """Return the processes whose Flower home lies in a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"FLWR_HOME={root}".encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""
