"""Lines for people, who may stop reading them (`| head`): the work goes on in silence, to its usual end."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
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
