"""One piece of a bench in a process of its own: what goes wrong there, or is killed, costs only this piece."""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from fedlth.bench.outcome import DONE, FAILED, LOG, UNFINISHED, Outcome, read_outcome, write_outcome
from fedlth.errors import StudyError
from fedlth.kernel.late_jit import load_numba
from fedlth.output import lines_to

INTERRUPTED = 130


def begin(work: Callable[[], None], folder: Path) -> BaseProcess:
    """Start `work` in a fresh process, which writes how it ended into `folder`; its lines go to the log there."""
    return spawn(_piece, work, folder)


def spawn(target: Callable[..., None], *values: object) -> BaseProcess:
    """Start `target(*values)` in a process that shares what is imported here, where libraries survive a fork.

    This process must not have trained before; nothing in a bench's own process does.
    """
    process: BaseProcess
    if sys.platform == "linux":
        with suppress(ImportError):  # 1.5 s of a run's first two, once for all of them
            load_numba()
            import pcodec  # noqa: F401
        process = multiprocessing.get_context("fork").Process(target=target, args=values)
    else:
        process = multiprocessing.get_context("spawn").Process(target=target, args=values)
    process.start()
    return process


def _piece(work: Callable[[], None], folder: Path) -> None:
    os.setsid()  # Ctrl-C reaches the bench alone, which interrupts each of its processes once
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _end_with_parent()
    before, began = read_outcome(folder), time.monotonic()
    status, reason, code = DONE, "", 0
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOG).open("a", encoding="utf-8") as file:

        def line(text: str) -> None:
            print(text, file=file, flush=True)

        try:
            _silent(file.fileno())
            logging.getLogger("fedlth").handlers.clear()  # the bench's own: it would print to the log what `line` does
            with lines_to(line):
                work()
        except KeyboardInterrupt:
            status, code = UNFINISHED, INTERRUPTED
        except StudyError as error:
            status, reason = FAILED, str(error)
        except Exception as error:
            status, reason = FAILED, f"{type(error).__name__}: {' '.join(str(error).split())}"
            traceback.print_exc(file=file)
    used = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    peak = max(before.peak_memory_mb, max(used) / (1024 if sys.platform == "linux" else 1024**2))
    write_outcome(folder, Outcome(status, reason, before.seconds + time.monotonic() - began, peak))
    sys.exit(code)


def _silent(descriptor: int) -> None:
    """Send what is printed to the log: several pieces at a time would be unreadable in one terminal."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


def _end_with_parent() -> None:
    """Interrupt this process when the bench's own is gone, whatever ended that: it would work on unseen."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, daemon=True).start()


def ended(process: BaseProcess, folder: Path) -> Outcome:
    """Return how a piece ended; of one that was killed, say by what, and note it in its folder."""
    process.join()
    code = process.exitcode or 0
    if code in (0, INTERRUPTED):
        return read_outcome(folder)
    before = read_outcome(folder)
    why = f"signal {-code}{', which out of memory looks like' if code == -signal.SIGKILL else ''}"
    found = Outcome(FAILED, f"its process was ended by {why if code < 0 else f'exit code {code}'}", before.seconds)
    write_outcome(folder, found)
    return found
