"""A run's folder: append-only facts, a checkpoint that says how far they count, and a lock."""

from __future__ import annotations

import fcntl
import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from fedlth.errors import StudyError
from fedlth.models.layout import Params
from fedlth.storage import json_lines, store
from fedlth.storage.header import Header, read_header
from fedlth.storage.records import LOGS, Digests, read_log
from fedlth.storage.server_state import ServerState
from fedlth.storage.state_archive import Packs
from fedlth.storage.typed_record import as_record
from fedlth.study import schema

T = TypeVar("T")
PATIENCE_S = 1.0
MEMORY = "memory/"  # what an aggregation rule remembers, beside the state's own arrays


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
    that made `theta`. `health` is what clients saw
    of the last good states. `best` is what the evaluations have chosen so
    far.
    """

    step: int = 0
    theta: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    mirrors: dict[str, str] = field(default_factory=dict)
    published: dict[str, str] = field(default_factory=dict)
    holds: dict[str, str] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LOGS, 0))
    empty_rounds: int = 0
    good: str | None = None
    norms: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    fresh: dict[str, int] = field(default_factory=dict)
    health: tuple[Health, ...] = ()
    best: Best | None = None


@dataclass(frozen=True)
class RunFolder:
    """One run's files. A row written after the last commit is cut off on resume: it never became a fact."""

    root: Path

    @cached_property
    def clients(self) -> Packs:
        """The clients' states, where the driver keeps them."""
        return Packs(self.root / "state")

    @property
    def devices(self) -> store.Store:
        """The states of clients that keep their own, where they share this machine."""
        return store.Store(self.root / "devices")

    @cached_property
    def mirrors(self) -> Packs:
        """The server's copies of the clients' last committed masks."""
        return Packs(self.root / "server")

    @cached_property
    def published(self) -> Packs:
        """What clients last published to one another, as it was sent."""
        return Packs(self.root / "published")

    def log(self, name: str) -> Path:
        return self.root / f"{name}.jsonl"

    def create(self, study: schema.Study) -> None:
        """Start a new run; refuse a folder that already holds one."""
        if (self.root / "config.yaml").exists():
            raise StudyError(f"{self.root}: holds a run already; `fedlth resume {self.root}`, or give another out=")
        self.root.mkdir(parents=True, exist_ok=True)
        store.write_atomic(self.root / "config.yaml", schema.dump(study).encode())

    def study(self) -> schema.Study:
        if not (self.root / "config.yaml").is_file():
            raise StudyError(f"{self.root}: no run here (config.yaml is missing)")
        return schema.load(self.root / "config.yaml")

    def progress(self) -> Progress:
        """Return the last commit; nothing is changed. Raises StudyError where the checkpoint is damaged."""
        file = self.root / "checkpoint.json"
        if not file.exists():
            return Progress()
        try:
            record = _checked(json.loads(file.read_bytes()))
            best, health = record.pop("best", None), record.pop("health", ())
            return Progress(
                **record,
                best=best and Best(**{**best, "rank": tuple(best["rank"])}),
                health=tuple(Health(**one) for one in health),
            )
        except (ValueError, TypeError, KeyError) as error:
            raise StudyError(f"{file}: damaged: {error}") from error

    def recover(self) -> None:
        """Cut the logs back to the last commit. Only for who holds the lock: another process may be writing them."""
        for name, length in self.progress().lengths.items():
            json_lines.truncate(self.log(name), length)

    def commit(self, progress: Progress) -> None:
        record = asdict(progress)
        store.write_atomic(self.root / "checkpoint.json", json.dumps(record | {"digest": _digest(record)}).encode())

    def append(self, name: str, rows: Iterable[Any]) -> int:
        """Write rows of the kind that LOGS names (or records of it, as a client sent them); return the new length."""
        return json_lines.append(self.log(name), json_lines.lines(rows))

    def rows(self, kind: type[T]) -> tuple[T, ...]:
        """Return all rows of a kind in LOGS, none where there is no such file yet."""
        return read_log(self.root, kind)[0]

    def header(self) -> Header | None:
        """Return the run's header, None where it has not been written yet."""
        return read_header(self.root) if (self.root / "header.json").is_file() else None

    def write(self, value: Header | Digests) -> None:
        name = "header.json" if isinstance(value, Header) else "digests.json"
        store.write_atomic(self.root / name, json.dumps(value, indent=1, default=as_record).encode())

    def save_params(self, name: str, params: Params) -> None:
        self.save_state(name, ServerState(params))

    def load_params(self, name: str) -> Params:
        return self.load_state(name).theta

    def has_params(self, name: str) -> bool:
        return (self.root / "checkpoints" / f"{name}.safetensors").exists()

    def save_state(self, name: str, state: ServerState) -> None:
        """Write the server's state, its memory included, as one file."""
        more = {f"{MEMORY}{k}": v for k, v in state.memory.items()}
        if state.mask is not None:
            more["mask"] = state.mask.astype(np.uint8)
        data = store.pack({"floats": state.theta.floats, "ints": state.theta.ints, **more})
        store.write_atomic(self.root / "checkpoints" / f"{name}.safetensors", data)

    def load_state(self, name: str) -> ServerState:
        file = self.root / "checkpoints" / f"{name}.safetensors"
        try:
            arrays, _ = store.unpack(file.read_bytes())
            memory = {k.removeprefix(MEMORY): v for k, v in arrays.items() if k.startswith(MEMORY)}
            mask = arrays["mask"].astype(bool) if "mask" in arrays else None
            return ServerState(Params(arrays["floats"], arrays["ints"]), memory, mask)
        except (OSError, ValueError, KeyError) as error:
            raise StudyError(f"{file}: cannot be read: {error}") from error

    def drop_params(self, keep: Iterable[str]) -> None:
        wanted = {f"{name}.safetensors" for name in keep}
        for file in (self.root / "checkpoints").glob("*"):
            if file.name not in wanted:
                file.unlink()

    def mirror(self, client: int, version: str, size: int) -> np.ndarray | None:
        """Return the server's copy of a client's last committed mask, (size,) bool."""
        data = self.mirrors.get(client, version)
        if data is None:
            return None
        return np.unpackbits(store.unpack(data)[0]["mask"], count=size).astype(bool)

    def packed_mask(self, mask: np.ndarray) -> bytes:
        """Return a mask as `mirror` reads it."""
        return store.pack({"mask": np.packbits(mask)})

    @contextmanager
    def locked(self, name: str = ".lock") -> Iterator[None]:
        """Keep a second process out of this folder; another `name` is another lock, for a wider or narrower claim."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            file = (self.root / name).open("w")
        except OSError as error:
            raise StudyError(f"{self.root}: must be a folder that can be written to, got {error.strerror}") from error
        with file:
            if not _got(file):
                raise StudyError(f"{self.root}: another process is running this run")
            yield


def _got(file: IO[str]) -> bool:
    """Take the lock. A killed run's child, between its fork and its exec, may still hold it for some milliseconds."""
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > until:
                return False
            time.sleep(0.01)


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=16).hexdigest()


def _checked(record: Any) -> dict[str, Any]:
    """Return a checkpoint without its digest; raise ValueError where they do not belong together."""
    rest = {k: v for k, v in record.items() if k != "digest"} if isinstance(record, dict) else {}
    if not rest or record["digest"] != _digest(rest):
        raise ValueError("its digest does not match its content")
    return rest
