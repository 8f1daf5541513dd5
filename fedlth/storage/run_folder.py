"""A run's folder: append-only facts, a checkpoint that says how far they count, and a lock."""

from __future__ import annotations

import fcntl
import json
import logging
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from fedlth.errors import StudyError
from fedlth.models.layout import Params
from fedlth.storage import json_lines, store
from fedlth.storage.checkpoint import BEFORE, CHECKPOINT, Progress, encode, last_commit, read_commit
from fedlth.storage.header import Header, read_header
from fedlth.storage.records import Digests, read_log
from fedlth.storage.server_state import ServerState
from fedlth.storage.state_archive import Packs
from fedlth.storage.typed_record import as_record
from fedlth.study import schema

log = logging.getLogger(__name__)

T = TypeVar("T")
PATIENCE_S = 1.0
MEMORY = "memory/"  # what an aggregation rule remembers, beside the state's own arrays


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
        return last_commit(self.root)

    def recover(self, *, states: bool = True) -> None:
        """Cut the logs back to the last commit that is whole: the last one, or the one before it.

        Raises StudyError naming what is damaged, where both are. `states`: the clients' states are here, too. Only for
        who holds the lock: another process may be writing.
        """
        try:
            progress = self.progress()
            self.check(progress, states=states)
        except StudyError as error:
            file = self.root / BEFORE
            try:
                progress = read_commit(file)
                self.check(progress, states=states)
            except (StudyError, OSError):
                raise error from None
            log.info(f"note: {error}; the run goes on from the commit before the last one")
            store.write_atomic(self.root / CHECKPOINT, file.read_bytes())
        for name, length in progress.lengths.items():
            json_lines.truncate(self.log(name), length)

    def check(self, progress: Progress, *, states: bool) -> None:
        """Raise StudyError naming the first file that a commit needs and that is not whole."""
        for name, length in progress.lengths.items():
            json_lines.check(self.log(name), length, progress.checks.get(name))
        anchors = (p.stem for p in sorted((self.root / "checkpoints").glob("*.safetensors")) if p.stem[:6] != "theta-")
        for name in (*progress.states, *anchors):
            self.load_state(name)
        held = [(self.mirrors, progress.mirrors), (self.published, progress.published)]
        for packs, versions in [(self.clients, progress.versions), *held] if states else held:
            for client, version in versions.items():
                packs.get(int(client), version)

    def commit(self, progress: Progress) -> None:
        """Make a commit the last one; the last one so far is kept as the one before it."""
        file = self.root / CHECKPOINT
        if file.exists():
            store.write_atomic(self.root / BEFORE, file.read_bytes())
        store.write_atomic(file, encode(progress))

    def append(self, name: str, rows: Iterable[Any], check: int | None = 0) -> tuple[int, int | None]:
        """Write rows of the kind that LOGS names (or records of it, as a client sent them).

        Returns the new length and crc32 of the file; `check` is the latter before, None where it is not known.
        """
        data = json_lines.lines(rows)
        return json_lines.append(self.log(name), data), None if check is None else zlib.crc32(data, check)

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
