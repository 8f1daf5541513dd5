"""The command line."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from fedlth.cli.grammar import parser
from fedlth.errors import StudyError
from fedlth.output import lines_to, settle, tell

INTERRUPTED = 130
DISK = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: 0 done, 1 differs or a fault, 2 bad input, 3 disk, 130 interrupted."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        with stoppable():
            return _main(argv)
    finally:
        settle()


@contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGTERM, which a scheduler or a container sends, end a command as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _main(argv: Sequence[str] | None) -> int:
    grammar = parser()
    args, more = grammar.parse_known_args(argv)
    words = next((name for name in ("override", "bench") if hasattr(args, name)), "")
    if more and words and all("=" in one and not one.startswith("-") for one in more):
        getattr(args, words).extend(more)  # argparse takes no key=value that stands behind an option
    elif more:
        grammar.error(f"unrecognized arguments: {' '.join(more)}")
    try:
        with lines_to(tell):
            return int(args.act(args))
    except StudyError as error:
        tell(f"fedlth: {error}")
        return 2
    except OSError as error:
        tell("; ".join((f"fedlth: {args.command}: {error}", *getattr(error, "__notes__", ()))))
        return DISK
    except KeyboardInterrupt:
        tell("fedlth: stopped")
        return INTERRUPTED
