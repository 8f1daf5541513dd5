"""What a device pays for a message: python benchmarks/device.py, with Flower's own processes and the standing one.

A federation of two devices on loopback, as `fedlth deploy init` writes it, run twice: once with the start line of the
standing process, once with Flower's. CPU and memory are those of everything that a device's start.sh has started.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

from fedlth import cli
from fedlth.deploy.folder import Folder
from fedlth.deploy.live import ask
from fedlth.deploy.settings import read_settings
from fedlth.storage.records import RoundRow
from fedlth.storage.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
DEVICES = 2
STUDY = (
    "clients.count=2 clients.unseen=0.0 federate.clients_per_round=2 federate.rounds={rounds} personalise.arms=[ticket]"
)
TICK = os.sysconf("SC_CLK_TCK")


def tree(pid: int) -> list[int]:
    """Return a process and all that descend from it."""
    found = [pid]
    for one in found:
        with suppress(OSError):
            for thread in os.listdir(f"/proc/{one}/task"):
                found += map(int, Path(f"/proc/{one}/task/{thread}/children").read_text().split())
    return found


def cpu_s(pid: int) -> float:
    """Return the CPU seconds of a process, of its children that have ended, and of all that still descend from it."""
    ticks = 0
    for one in tree(pid):
        with suppress(OSError):
            ticks += sum(map(int, Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()[11:15]))
    return ticks / TICK


def pss_mb(pid: int) -> float:
    """Return the memory of a tree of processes, in MB; what several share counts once, by shares."""
    total = 0
    for one in tree(pid):
        with suppress(OSError, StopIteration):
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
            total += int(next(line for line in lines if line.startswith("Pss:")).split()[1])
    return total / 1000


class Watched(threading.Thread):
    """Samples the memory of the devices until it is told to stop."""

    def __init__(self, pids: list[int]) -> None:
        super().__init__(daemon=True)
        self.pids, self.stop, self.most = pids, threading.Event(), 0.0

    def run(self) -> None:
        while not self.stop.wait(0.25):
            self.most = max(self.most, *map(pss_mb, self.pids))


def flowers_own(script: Path) -> None:
    """Take the standing process out of a device's start.sh: its SuperNode starts Flower's processes, as by default."""
    text = script.read_text()
    begin, end = text.index("# One process stays up"), text.index("# node.toml names")
    text = text[:begin] + text[end:]
    script.write_text(text.replace('--isolation process --superexec-auth-secret-file "$here/runtime-secret"', ""))


def measured(root: Path, port: int, rounds: int, *, standing: bool) -> None:
    folder = Folder(root)
    words = STUDY.format(rounds=rounds).split()
    given = ["--study", str(ROOT / "configs" / "smoke.yaml"), "--devices", str(DEVICES), "--port", str(port), *words]
    assert cli.main(["deploy", "init", str(root), *given]) == 0
    settings = read_settings(root)
    env = {**os.environ, "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))}
    programs: list[subprocess.Popen[bytes]] = []

    def start(script: Path) -> int:
        with (root / f"{script.parent.name}-{script.name}.log").open("wb") as log:
            programs.append(subprocess.Popen([script], env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL))
        return programs[-1].pid

    def await_health(port: int) -> None:
        while ask("GET", f"https://127.0.0.1:{port}/health", str(folder.authority)).status != 200:
            time.sleep(1)

    try:
        start(root / "superlink.sh")
        await_health(settings.superlink_port)
        start(root / "gate.sh")
        await_health(settings.port)
        subprocess.run([root / "register.sh"], env=env, check=True, capture_output=True)
        pids = []
        for number in range(DEVICES):
            script = folder.device(number) / "start.sh"
            if not standing:
                flowers_own(script)
            pids.append(start(script))
        spent = -9.0
        while (now := sum(map(cpu_s, pids))) - spent > 1.0:  # until everything is imported, and polls alone are left
            spent = now
            time.sleep(10)
        idle, before, at = max(map(pss_mb, pids)), sum(map(cpu_s, pids)), time.monotonic()
        time.sleep(20)
        polls = (sum(map(cpu_s, pids)) - before) / (time.monotonic() - at) / DEVICES
        before, at = sum(map(cpu_s, pids)), time.monotonic()
        watched = Watched(pids)
        watched.start()
        said = subprocess.Popen([root / "run.sh"], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert said.stdout is not None
        lines = [(time.monotonic(), line) for line in said.stdout]
        assert said.wait() == 0 and any("fedlth: done" in line for _, line in lines), lines
        seconds = time.monotonic() - at
        time.sleep(5)  # the last processes end
        cpu = sum(map(cpu_s, pids)) - before - polls * (time.monotonic() - at) * DEVICES
        watched.stop.set()
        ends = [when for when, line in lines if re.search(r"\] federate \d+:", line)]
        took = [after - before for before, after in zip(ends, ends[1:], strict=False)]
        messages = DEVICES * (1 + len(RunFolder(root / "run").rows(RoundRow)))  # the roll call; step 2 is a round too
        print(
            f"{'standing process' if standing else 'a fresh process a message'}: {cpu / messages:.2f} CPU s a message "
            f"({messages} messages), {statistics.median(took):.1f} s a round, {seconds:.0f} s in all; "
            f"a device's memory {idle:.0f} MB idle, {watched.most:.0f} MB at most; idle {100 * polls:.1f} % of a core"
        )
    finally:
        for program in reversed(programs):
            program.terminate()
        for program in programs:
            program.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--port", type=int, default=18443)
    args = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as scratch:
        for place, standing in ((0, True), (1, False)):
            measured(Path(scratch) / f"fed{place}", args.port + 10 * place, args.rounds, standing=standing)


if __name__ == "__main__":
    main()
