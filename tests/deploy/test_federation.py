"""A whole federation on loopback, as `fedlth deploy init` writes it, equals the in-process run."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from fedlth import cli
from fedlth.deploy.check import check
from fedlth.deploy.folder import Folder
from fedlth.deploy.live import ask
from fedlth.deploy.settings import Settings, read_settings
from fedlth.experiment.saved_ticket import load_ticket
from fedlth.report.diff import diff, notes
from fedlth.study import schema
from tests import tiny
from tests.engines import test_own_data

pytestmark = [pytest.mark.long, pytest.mark.timeout(3000)]
ROOT = Path(__file__).parents[2]
DEVICES = 3
STUDY = (
    "clients.count=3 clients.unseen=0.0 federate.rounds=1 federate.clients_per_round=2 personalise.arms=[dense,ticket]"
)
LONGEST_S = 600.0


def free_ports() -> int:
    """Return a port with free ones behind it, as many as a federation needs."""
    for first in range(20_000 + os.getpid() % 10_000, 60_000, 10):
        if all(free(port) for port in range(first, first + 2 + DEVICES)):
            return first
    raise AssertionError("no free ports")


def free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
        return True
    except OSError:
        return False


def wait_for(what: str, ready: Callable[[], bool], programs: list[subprocess.Popen[bytes]]) -> None:
    end = time.monotonic() + LONGEST_S
    while not ready():
        assert time.monotonic() < end, f"{what}: not ready"
        assert all(one.poll() is None for one in programs), f"{what}: a program has ended"
        time.sleep(1)


@contextmanager
def running(programs: list[subprocess.Popen[bytes]], root: Path) -> Iterator[None]:
    """End every program that was started, SuperNodes first, and what they have started."""
    try:
        yield
    finally:
        for program in reversed(programs):
            program.terminate()
        for program in programs:
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


def federated(
    tmp_path: Path, words: list[str], prepare: Callable[[int, Path], None] = lambda *_: None,
    meanwhile: Callable[[subprocess.Popen[bytes]], None] = lambda _: None, path: tuple[Path, ...] = (ROOT,),
) -> Path:  # fmt: skip
    """Make a federation, run its study on three devices, end everything; return the run's folder.

    `prepare` puts into a device's folder, by its number, what only that device has; `meanwhile` is called while the
    study runs, and may wait for its end; `path` is where every program finds modules.
    """
    folder = Folder(tmp_path / "fed")
    port = str(free_ports())
    assert cli.main(["deploy", "init", str(folder.root), "--devices", str(DEVICES), "--port", port, *words]) == 0
    settings = read_settings(folder.root)
    programs: list[subprocess.Popen[bytes]] = []
    places = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    env = {**os.environ, "PATH": places, "PYTHONPATH": os.pathsep.join(map(str, path))}

    def start(script: Path) -> None:
        with (tmp_path / f"{script.parent.name}-{script.name}.log").open("wb") as log:
            programs.append(subprocess.Popen([script], env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL))

    def said(*command: object) -> str:
        done = subprocess.run([str(word) for word in command], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def healthy(port: int) -> Callable[[], bool]:
        return lambda: ask("GET", f"https://127.0.0.1:{port}/health", str(folder.authority)).status == 200

    with running(programs, tmp_path):
        start(folder.root / "superlink.sh")
        wait_for("SuperLink", healthy(settings.superlink_port), programs)
        start(folder.root / "gate.sh")
        wait_for("gate", healthy(settings.port), programs)
        said(folder.root / "register.sh")
        for number in range(DEVICES):  # as if to another machine: nothing in it may depend on where it lies
            shutil.move(folder.device(number), tmp_path / f"moved-{number}")
            prepare(number, tmp_path / f"moved-{number}")
            start(tmp_path / f"moved-{number}" / "start.sh")
        for device_port in settings.device_ports:
            wait_for("SuperNode", lambda port=device_port: not free(port), programs)
        faults, seen = check(folder.root)  # it asks the gate for the control API, too
        assert not faults and len(seen) == 1 and "not in this folder any more" in seen[0]
        refused_at_the_gate(folder, settings, env)
        out = tmp_path / "devices"
        told = tmp_path / "run.log"
        with told.open("wb") as log, subprocess.Popen([folder.root / "run.sh", out], env=env, stdout=log) as run:
            meanwhile(run)
        assert "fedlth: done" in told.read_text(), told.read_text()
        pids = {name: int((folder.root / f"{name}.pid").read_text()) for name in ("superlink", "gate")}
        assert list(pids.values()) == [program.pid for program in programs[:2]]
    assert not started_under(tmp_path)
    return out


def test_a_federation_on_loopback_equals_the_in_process_run(tmp_path: Path) -> None:
    out = federated(tmp_path, ["--study", str(ROOT / "configs" / "smoke.yaml"), *STUDY.split()])
    tiny.run(schema.load(tmp_path / "fed" / "app" / "study.yaml"), tmp_path / "inprocess")
    assert diff(tmp_path / "inprocess", out) == []
    assert [note for note in notes(tmp_path / "inprocess", out) if f"{DEVICES} tickets stay on their devices" in note]
    for number in range(DEVICES):
        assert list((tmp_path / f"moved-{number}" / "state").rglob("personalise-*"))


def test_devices_with_data_that_nobody_else_has_equal_the_simulation(tmp_path: Path) -> None:
    """Each device's ticket is a file of its own that predicts as the simulation's does."""
    study = test_own_data.study(test_own_data.devices(tmp_path / "data"), federate={"rounds": 1})
    (tmp_path / "study.yaml").write_text(schema.dump(study))
    tiny.run(study, tmp_path / "simulation")
    away = (tmp_path / "data").rename(tmp_path / "away")
    out = federated(
        tmp_path, ["--study", str(tmp_path / "study.yaml")],
        lambda number, folder: None if shutil.copytree(away / str(number), folder / "data") else None,
    )  # fmt: skip
    assert diff(tmp_path / "simulation", out) == []
    for number in range(DEVICES):
        (file,) = (tmp_path / f"moved-{number}" / "state").glob(f"*/client-{number:04d}.safetensors")
        own, simulated = load_ticket(file).state_dict(), load_ticket(tmp_path / "simulation", number).state_dict()
        assert all(torch.equal(own[name], simulated[name]) for name in simulated)


def test_a_standing_process_that_is_killed_or_outdated_costs_no_answer(tmp_path: Path) -> None:
    """Device 0's is killed, then a file that all have imported is replaced: the run equals the in-process one."""
    extra = tmp_path / "extra"
    extra.mkdir()
    (extra / "sitecustomize.py").write_text("value = 1\n")

    def log(number: int) -> str:
        return (tmp_path / f"moved-{number}-start.sh.log").read_text()

    def serving(number: int) -> int:
        """Return the process that waits for the messages of a device: the eldest one of the command."""
        found = [pid for pid in started_under(tmp_path / f"moved-{number}") if b"serve" in command_of(pid)]
        return min(found, default=0)

    def meanwhile(run: subprocess.Popen[bytes]) -> None:
        wait_for("a round", lambda: "federate 1:" in (tmp_path / "run.log").read_text(), [run])
        killed = serving(0)
        os.kill(killed, signal.SIGKILL)
        (extra / "sitecustomize.py").write_text("value = 20\n")
        assert run.wait(LONGEST_S) == 0
        assert "another follows" in log(0) and serving(0) not in (0, killed)
        for number in (1, 2):
            assert "sitecustomize.py has changed" in log(number)
            assert log(number).count("standing: one process for the messages") == 2
        os.kill(int((tmp_path / "moved-2" / "supernode.pid").read_text()), signal.SIGKILL)
        wait_for("the end of what served it", lambda: not serving(2), [])

    out = federated(
        tmp_path, ["--study", str(ROOT / "configs" / "smoke.yaml"), *STUDY.replace("rounds=1", "rounds=2").split()],
        meanwhile=meanwhile, path=(ROOT, extra),
    )  # fmt: skip
    tiny.run(schema.load(tmp_path / "fed" / "app" / "study.yaml"), tmp_path / "inprocess")
    assert diff(tmp_path / "inprocess", out) == []


def command_of(pid: int) -> bytes:
    try:
        return (Path("/proc") / str(pid) / "cmdline").read_bytes()
    except OSError:
        return b""


def refused_at_the_gate(folder: Folder, settings: Settings, env: dict[str, str]) -> None:
    """Try to register a key with nothing but the authority's certificate, as a stranger could at the SuperLink."""
    home = folder.root.parent / "stranger"
    home.mkdir()
    text = folder.flower_config.read_text().replace(f":{settings.superlink_port}", f":{settings.port}")
    (home / "config.toml").write_text(text)
    done = subprocess.run(
        ["flwr", "supernode", "register", folder.device_public(0), "fedlth"],
        env={**env, "FLWR_HOME": str(home)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0 and "404" in done.stdout + done.stderr, done.stdout + done.stderr
