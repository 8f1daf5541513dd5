"""A process that stays up between messages: everything is imported once, and each message has a forked child.

No flwr in here: what asks for messages and what serves one are handed in.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from httpx import HTTPError, TransportError

from fedlth.output import settle

log = logging.getLogger(__name__)

MOST_REFUSALS = 30
Stamp = tuple[int, int, int]


@dataclass(frozen=True)
class LoadedFiles:
    """The files of the modules that this process has imported, as they were when it imported them."""

    stamps: Mapping[str, Stamp]

    @staticmethod
    def here() -> LoadedFiles:
        named = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
        return LoadedFiles({name: stamp for name in named if name and (stamp := _stamp(name))})

    def changed(self) -> str:
        """Return the first file that another has replaced, as an upgrade does; empty where all are as they were."""
        return next((name for name, stamp in self.stamps.items() if _stamp(name) != stamp), "")


def _stamp(path: str) -> Stamp | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def threads() -> int:
    """Return how many threads this process has, those that Python does not know of included."""
    return len(os.listdir("/proc/self/task"))


@dataclass
class Standing:
    """Takes messages one by one and gives each a process: a child of this one, or where that cannot be, a fresh one.

    `acquire` returns the token of a message that waits, or None; `serve` answers it, in the child; `fresh` is the
    command that would answer it in a process of its own.
    """

    acquire: Callable[[], str | None]
    serve: Callable[[str], None]
    fresh: Callable[[str], Sequence[str]]
    loaded: LoadedFiles
    begun: dict[int, float] = field(default_factory=dict)

    def turn(self) -> str:
        """Look once for a message and for children that have ended.

        Returns the token of a message that came and has no answer, since what is imported here is not current: this
        process is to begin anew, and to answer it then. Empty otherwise.
        """
        self.reap()
        token = self.acquire()
        if token is None:
            return ""
        if changed := self.loaded.changed():
            log.info(f"standing: {changed} has changed")
            return token
        self.answer(token)
        return ""

    def answer(self, token: str) -> None:
        """Give a message its process."""
        if why := _unforkable():
            log.info(f"standing: {why}: this message has a fresh process")
            command = list(self.fresh(token))
            pid = os.posix_spawnp(command[0], command, os.environ)
        else:
            pid = self._forked(token)
        self.begun[pid] = time.monotonic()

    def reap(self) -> None:
        """Say of each child that has ended what it took."""
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            begun = self.begun.pop(pid, None)  # none of a child that was begun before this process was begun anew
            took = "" if begun is None else f"{time.monotonic() - begun:.1f} s, "
            cpu = usage.ru_utime + usage.ru_stime
            code = os.waitstatus_to_exitcode(status)
            log.info(f"standing: a message took {took}{cpu:.2f} CPU s" + (f"; exit code {code}" if code else ""))

    def _forked(self, token: str) -> int:
        settle()  # or the child prints once more what still waits to be printed
        if pid := os.fork():
            return pid
        code = 1
        try:
            self.serve(token)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            settle()
            os._exit(code)  # not through the frames of the parent, nor what it would do at its own end


def _unforkable() -> str:
    """Say why no child can be forked now: one of a process with threads may wait for ever for what they held."""
    count = threads()
    return f"{count} threads run in the standing process" if count > 1 else ""


def freeze() -> None:
    """Let no collection touch what is there, or every child copies the pages of what it shares."""
    gc.collect()
    gc.freeze()


def patient(token: Callable[[], str | None]) -> Callable[[], str | None]:
    """Return what asks as `token` does, and bears a SuperNode that is not up yet, or that refuses now and then."""
    refused = 0

    def asked() -> str | None:
        nonlocal refused
        try:
            found = token()
            refused = 0
            return found
        except TransportError:
            return None
        except HTTPError as error:  # of a secret that is not its own, or of a clock that has jumped
            refused += 1
            log.info(f"standing: the SuperNode refuses: {error}")
            if refused == MOST_REFUSALS:
                raise
            return None

    return asked


def alive(pid: int) -> bool:
    """Say whether a process runs; one that has ended, and that nobody has asked about yet (a zombie), does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
