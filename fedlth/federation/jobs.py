"""What crosses between the round loop and a client: names, bytes and numbers, never a live object."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

RESYNC = "resync"
MACHINES = frozenset({"died", "lost"})  # kinds of failure that are a machine's; the others are the client's own


@dataclass(frozen=True)
class Message:
    """One payload. `kind` is values, mask, scores, statistics, metrics or evaluation; `name` says which: "theta_g@3".

    A message of kind control and name RESYNC, alone in an outbox, asks for the download again without references. Its
    payload is the 8 bytes that name the client's mask, all zero where the client's state is lost.
    """

    kind: str
    name: str
    payload: bytes
    broadcast: bool = False


@dataclass(frozen=True, kw_only=True)
class Job:
    """One client's step. `study` is the canonical JSON of the study, from which a worker builds the rest once.

    `data` names the data set and its division as the driver has them (Splits.name), "" where anyone's will do.
    `version` names the client's committed state ("" for none). `state` holds its bytes where the driver keeps them,
    and is None where they lie with the client (a device, a Flower node). After `limit_s` from the beginning of its
    round an answer comes too late; only engines of devices have a clock for that.
    """

    study: str
    phase: str
    round: int
    client: int
    inbox: tuple[Message, ...]
    data: str = ""
    version: str = ""
    state: bytes | None = None
    limit_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One client's answer. `state` is a new version of its state, current only once the round is committed.

    `work` says what its trainings cost this machine, for times.jsonl: nothing that decides a result. `flops` and
    `alive_flops` are what it trained, counted dense and by what is alive, told where the study has a fleet: they decide
    who is late. `injected` names the fault that the study's chaos put into it.
    """

    round: int
    client: int
    outbox: tuple[Message, ...]
    state: bytes | None = None
    seconds: float = 0.0
    worker: str = ""
    device: str = ""
    work: tuple[dict[str, Any], ...] = ()
    flops: float = 0.0
    alive_flops: float = 0.0
    framed_down_bytes: int | None = None
    framed_up_bytes: int | None = None
    injected: str = ""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """No answer. `kind` is raised, died, hung, memory, lost, late or (on a fleet) dropped; `reason` is one line.

    What was sent has crossed all the same: the framed bytes are those of the job, and of the message that says so.
    `sent` False: there was nobody to send it to.
    """

    round: int
    client: int
    kind: str
    reason: str
    worker: str = ""
    framed_down_bytes: int | None = None
    framed_up_bytes: int | None = None
    sent: bool = True
    injected: str = ""


Enough = Callable[[frozenset[int]], bool]
Again = Callable[[Job, Reply], Job | None]
Answers = Generator[tuple[Job, Reply | Failure], None, None]


def never(job: Job, reply: Reply) -> None:
    """Ask for nothing again."""


class Engine(Protocol):
    """A transport: the in-process engine is the definition, the others must equal it.

    `holds_state` says that clients keep their own state: the driver then neither sends nor stores it.
    """

    @property
    def name(self) -> str: ...

    @property
    def holds_state(self) -> bool: ...

    def map(self, jobs: Iterable[Job], /, *, again: Again = never) -> Answers:
        """Run `client_step` on each job; yield each with its Reply or Failure, in job order, while others are at work.

        Jobs are drawn as workers come free, a few ahead of the answers, so that memory does not grow with their number.
        A job that `again` returns for a reply is run in the place of the first; those of one cohort together.
        """
        ...

    def present(self, *, until: Enough | None = None) -> frozenset[int] | None:
        """Return the clients that can be given a job now, None where all always can.

        With `until` it waits, for a bounded time, until enough of them are there.
        """
        ...

    def late(self) -> Sequence[tuple[Job, Reply | Failure]]:
        """Return the answers that have come since their round was closed, each once; nothing of them is used."""
        ...

    def close(self) -> None: ...
