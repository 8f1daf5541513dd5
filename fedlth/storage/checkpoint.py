"""Where a run stands, as its commits say it: the record of a checkpoint, written with a digest and read against it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedlth.errors import StudyError
from fedlth.storage import json_lines
from fedlth.storage.records import LOGS

CHECKPOINT, BEFORE = "checkpoint.json", "checkpoint.before.json"


@dataclass(frozen=True)
class Best:
    """The global model that was best on validation data, as `theta` names it, the round that made it, and its rank.

    `rank` is (how many clients of the federation answered, their mean): a round that some did not answer comes after.
    """

    theta: str
    phase: str
    round: int
    rank: tuple[int, float]


@dataclass(frozen=True)
class Health:
    """What clients saw in a round of a phase: medians of the score (more is better) and of the training's loss."""

    phase: str
    score: float
    loss: float
    clients: int


@dataclass(frozen=True)
class Progress:
    """Where a run stands: the next step, whose state is current, and how long each log is.

    `versions` name each client's state, `mirrors` the server's copy of its mask, `published` what it last sent others.
    `theta` names the checkpoint of the server's state, "" for the initial one. `good` names the last one that a client
    could work with, None while there is none. `holds` names everyone's mask as each client was last sent it ("" for
    everything). `norms` are those of accepted updates by phase and group, `fresh` how many of them are of the round
    that made `theta`. `health` is what clients saw of the last good states. `lengths` and `checks` are the logs' bytes
    and their crc32. `best` is what the evaluations have chosen so far.
    """

    step: int = 0
    theta: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    mirrors: dict[str, str] = field(default_factory=dict)
    published: dict[str, str] = field(default_factory=dict)
    holds: dict[str, str] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LOGS, 0))
    checks: dict[str, int] = field(default_factory=dict)
    empty_rounds: int = 0
    good: str | None = None
    norms: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    fresh: dict[str, int] = field(default_factory=dict)
    health: tuple[Health, ...] = ()
    best: Best | None = None

    @property
    def states(self) -> tuple[str, ...]:
        """The names of the server's states that it needs."""
        named = (self.theta, self.good or "", self.best.theta if self.best else "")
        return tuple(dict.fromkeys(name for name in named if name))


def encode(progress: Progress) -> bytes:
    record = asdict(progress)
    return json.dumps(record | {"digest": digest_of(record)}).encode()


def decode(data: bytes) -> Progress:
    """Return what was encoded; raise ValueError, TypeError or KeyError at anything else."""
    record = _checked(json.loads(data))
    best, health = record.pop("best", None), record.pop("health", ())
    return Progress(
        **record, best=best and Best(**{**best, "rank": tuple(best["rank"])}),
        health=tuple(Health(**one) for one in health),
    )  # fmt: skip


def digest_of(record: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=16).hexdigest()


def _checked(record: Any) -> dict[str, Any]:
    """Return a checkpoint without its digest; raise ValueError where they do not belong together."""
    rest = {k: v for k, v in record.items() if k != "digest"} if isinstance(record, dict) else {}
    if not rest or record["digest"] != digest_of(rest):
        raise ValueError("its digest does not match its content")
    return rest


def last_commit(run: Path) -> Progress:
    """Return a run's last commit; raise StudyError where it is damaged, or gone."""
    file = run / CHECKPOINT
    if not file.exists():
        if (run / BEFORE).exists():
            raise StudyError(f"{file}: is not there any more")
        return Progress()
    return read_commit(file)


def read_commit(file: Path) -> Progress:
    try:
        return decode(file.read_bytes())
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise StudyError(f"{file}: damaged: {error}") from error


def changed_logs(run: Path) -> list[str]:
    """Return a line for each log whose committed rows are not those that were written, for who only reads them."""
    try:
        progress = last_commit(run)
    except StudyError as error:
        return [str(error).removeprefix(f"{run}/")]
    found = []
    for name, length in progress.lengths.items():
        try:
            json_lines.check(run / f"{name}.jsonl", length, progress.checks.get(name))
        except StudyError as error:
            found.append(str(error).removeprefix(f"{run}/"))
    return found
