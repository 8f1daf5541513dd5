"""A system under measurement: a process that runs one round when it is told to.

One that ends is `Gone`, and so is a peer that says nothing for PATIENCE_S a round of ten clients. Whatever a system
started carries its mark in the environment, daemons too, and goes with it.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from yardsticks.tree import cpu_seconds, memory_mb, tree

HERE = Path(__file__).parents[1]
PATIENCE_S = 240.0
MARK = "FEDLTH_BENCHMARK_CHILD"


class Gone(Exception):
    """A system ended, hangs, or does other work."""


@dataclass
class Child:
    """A system and what its rounds took."""

    name: str
    density: float
    process: subprocess.Popen[str]
    mark: str
    log: IO[str] | None = None  # a peer's chatter; of ours, standard error is shown
    pauses: bool = False
    patience_s: float | None = None
    walls: list[float] = field(default_factory=list)
    cpus: list[float] = field(default_factory=list)
    steps: set[int] = field(default_factory=set)
    memory: dict[str, float] = field(default_factory=dict)

    def read(self) -> str:
        """Return the next line; raise `Gone` if none comes."""
        out = self.process.stdout
        assert out is not None
        if not select.select([out], [], [], self.patience_s)[0]:
            raise Gone(f"{self.name}: no word in {self.patience_s:.0f} s")
        line = out.readline()
        if not line:
            raise self.ended()
        return line

    def ended(self) -> Gone:
        """Return the error of a system that is no more, with its last words."""
        words = [""]
        if self.log:
            self.log.seek(0)
            words = [line for line in self.log.read().splitlines() if line.strip()] or words
        return Gone(f"{self.name} ended with {self.process.wait()} {words[-1][:200]}".strip())

    def round(self) -> dict[str, Any]:
        """Run one round, keep what it took, and return what the system said."""
        self.signal(signal.SIGCONT)
        before = cpu_seconds(self.process.pid)
        assert self.process.stdin is not None
        try:
            self.process.stdin.write("round\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self.ended() from None
        told: dict[str, Any] = json.loads(self.read())
        self.walls.append(told["wall"])
        self.cpus.append(cpu_seconds(self.process.pid) - before)
        self.steps.add(told["steps"])
        self.memory = memory_mb(self.process.pid)
        self.signal(signal.SIGSTOP)
        return told

    def signal(self, what: int) -> None:
        """Stop or continue a peer, whose daemons would use the CPUs in the turns of others."""
        if self.pauses and self.process.poll() is None:
            # Ray's agents write their title over their environment, and with it the mark.
            for pid in {*tree(self.process.pid), *self.marked()}:
                _kill(pid, what)

    def marked(self) -> list[int]:
        """Return the living processes that this system started, and itself."""
        found = []
        for place in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):  # ended meanwhile, or another user's
                if self.mark.encode() in place.read_bytes():
                    found.append(int(place.parent.name))
        return found

    def end(self) -> None:
        """End the system and all it started."""
        self.signal(signal.SIGCONT)
        with suppress(subprocess.TimeoutExpired, BrokenPipeError):
            self.process.communicate("", timeout=10)
        while pids := self.marked():
            for pid in pids:
                _kill(pid, signal.SIGKILL)
            self.process.poll()
            time.sleep(0.05)


def _kill(pid: int, what: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, what)


def child(
    name: str, script: str, given: dict[str, Any], density: float = 1.0, python: str | Path | None = None,
    pauses: bool = False,
) -> Child:  # fmt: skip
    """Start a system and wait until it stands before its first measured round; a peer has a Python of its own."""
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    mark = uuid.uuid4().hex
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", MARK: mark}
    log = tempfile.TemporaryFile("w+", errors="replace") if python else None  # noqa: SIM115, it lives as the child
    process = subprocess.Popen(
        [str(python or sys.executable), str(HERE / script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
        text=True, env=env, cwd=HERE.parent,
    )  # fmt: skip
    patience_s = PATIENCE_S * max(1, given["clients"] / 10) if python else None
    made = Child(name, density, process, mark, log, pauses, patience_s)
    try:
        assert process.stdin is not None
        process.stdin.write(json.dumps(given) + "\n")
        process.stdin.flush()
        if made.read().strip() != "ready":
            raise Gone(f"{name}: did not say ready")
    except BaseException:
        made.end()
        raise
    made.signal(signal.SIGSTOP)
    return made
