"""Several calls side by side, one at a time, that meet wherever each of them asks for the same kind of work."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

T = TypeVar("T")

# How the training that a call reaches, many frames down, knows whom to ask. Unset: nobody, it does its own work.
# A context and no argument, so that methods and client_step are the same with a cohort and without; a thread's own.
ASK: ContextVar[Callable[[Any], Any] | None] = ContextVar("ASK", default=None)


class Abandoned(BaseException):
    """The others have been given up (Ctrl-C, say); a BaseException, so that no `except Exception` goes on."""


class _Member(Generic[T]):
    """A call in a thread that runs only while it is its turn: until it asks, or ends."""

    def __init__(self, call: Callable[[], T]) -> None:
        self.call, self.turn, self.yielded = call, threading.Semaphore(0), threading.Semaphore(0)
        self.asked: Any = None
        self.answer: Any = None
        self.ended, self.value, self.error = False, list[T](), list[BaseException]()
        self.thread = threading.Thread(target=self._live, daemon=True)

    def step(self) -> None:
        """Give the member its turn; return when it has asked or ended."""
        self.turn.release()
        self.yielded.acquire()

    def _live(self) -> None:
        self.turn.acquire()
        ASK.set(self._ask)
        try:
            if self.answer is None:  # else abandoned before it began
                self.value.append(self.call())
        except BaseException as error:
            self.error.append(error)
        finally:
            self.ended = True
            self.yielded.release()

    def _ask(self, asked: Any) -> Any:
        self.asked = asked
        self.yielded.release()
        self.turn.acquire()
        answer, self.asked, self.answer = self.answer, None, None
        if isinstance(answer, BaseException):
            raise answer
        return answer


def side_by_side(calls: Sequence[Callable[[], T]], together: Callable[[Sequence[Any]], Sequence[Any]]) -> list[T]:
    """Return what each call returns, in order.

    Each runs until it asks (`ASK`) or ends, one after the other in their order: they need no locks, may use torch's
    global generator as if alone, and leave nothing to chance. Once every one that has not ended has asked, `together`
    answers all; an answer that is an exception is raised where it was asked for.
    """
    members = [_Member(call) for call in calls]
    for member in members:
        member.thread.start()
    try:
        living = members
        while living:
            for member in living:
                member.step()
            living = [member for member in living if not member.ended]
            for member, answer in zip(living, together([m.asked for m in living]) if living else (), strict=True):
                member.answer = answer
    except BaseException:
        _abandon(members)
        raise
    for member in members:
        member.thread.join()
        if member.error:
            raise member.error[0]
    return [member.value[0] for member in members]


def _abandon(members: Sequence[_Member[T]]) -> None:
    """Let every thread end. One that was interrupted in its turn ends where it asks next, and is not waited for."""
    for member in members:
        member.answer = Abandoned()
        member.turn.release()
