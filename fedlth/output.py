"""Lines for people, who may stop reading them (`| head`): the work goes on in silence, to its usual end."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO


def say(text: str, *, end: str = "\n") -> None:
    """Print a result to standard output; a reader that has gone is no error, a full disk is."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        _silence(sys.stdout)


def tell(line: str) -> None:
    """Print a line of live progress to standard error. No line is worth a run: whatever is wrong there is let be."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        _silence(sys.stderr)


class _Lines(logging.Handler):
    """Hands each record on as one line."""

    def __init__(self, line: Callable[[str], None]) -> None:
        super().__init__()
        self.line = line

    def emit(self, record: logging.LogRecord) -> None:
        self.line(record.getMessage())


def log_lines() -> None:
    """Print what the package logs as live progress, from now on: for a worker process."""
    logger = logging.getLogger("fedlth")
    logger.addHandler(_Lines(tell))
    logger.setLevel(logging.INFO)


@contextmanager
def lines_to(line: Callable[[str], None]) -> Iterator[None]:
    """Give `line` what the package logs: live progress and notes. What it raises is raised where it was logged."""
    logger, handler = logging.getLogger("fedlth"), _Lines(line)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def settle() -> None:
    """Flush what others have printed, or Python does it at its end, where a reader that has gone is exit code 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            _silence(stream)


def _silence(stream: TextIO) -> None:
    """Let everything that is still to be printed go nowhere."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
