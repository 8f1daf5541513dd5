"""What crosses between the round loop and a client: names, bytes and numbers, never a live object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

RESYNC = "resync"
AT_ONCE = 32


@dataclass(frozen=True)
class Message:
    """One payload. `kind` is values, mask, scores, metrics or evaluation; `name` says which, e.g. "theta_g@3".

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

    `version` names the client's committed state ("" for none). `state` holds its bytes where the driver keeps them,
    and is None where they lie with the client (a device, a Flower node).
    """

    study: str
    phase: str
    round: int
    client: int
    inbox: tuple[Message, ...]
    version: str = ""
    state: bytes | None = None


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One client's answer. `state` is a new version of its state, current only once the round is committed."""

    round: int
    client: int
    outbox: tuple[Message, ...]
    state: bytes | None = None
    seconds: float = 0.0
    worker: str = ""
    device: str = ""
    framed_down_bytes: int | None = None
    framed_up_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Failure:
    """No answer. `kind` is raised, died, hung, memory or lost; `reason` is one line.

    What was sent has crossed all the same: the framed bytes are those of the job, and of the message that says so.
    """

    round: int
    client: int
    kind: str
    reason: str
    worker: str = ""
    framed_down_bytes: int | None = None
    framed_up_bytes: int | None = None


class Engine(Protocol):
    """A transport: the in-process engine is the definition, the others must equal it.

    `holds_state` says that clients keep their own state: the driver then neither sends nor stores it. `at_once` is
    how many jobs it wants in one map: enough for all its workers, few enough for their answers to fit in memory.
    """

    @property
    def name(self) -> str: ...

    @property
    def holds_state(self) -> bool: ...

    @property
    def at_once(self) -> int: ...

    def map(self, jobs: Sequence[Job], /) -> list[Reply | Failure]:
        """Run `client_step` on each job; one Reply or Failure a job, in job order."""
        ...

    def close(self) -> None: ...
