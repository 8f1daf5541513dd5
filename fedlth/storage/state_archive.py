"""Many clients' states in few files: one immutable file a step, and a tidy-up that keeps the disk near what is live.

A file a client would cost a disk flush a client: 1,000 clients a round are then ten seconds of waiting.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from fedlth.errors import StudyError

Index = dict[int, tuple[int, int, int]]  # client: where its state begins, its length, its crc32
FOOT = struct.Struct("<IQ")  # the index's crc32 and length


class Writer:
    """A pack that is being written; it exists under its name only once it is whole and on disk."""

    def __init__(self, path: Path) -> None:
        self._path, self._part = path, path.with_name(path.name + ".part")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._part.open("wb")
        self.index: Index = {}

    def add(self, client: int, data: bytes) -> None:
        self.index[client] = (self._file.tell(), len(data), zlib.crc32(data))
        self._file.write(data)

    def finish(self) -> None:
        """Make the pack durable under its name; one without clients leaves nothing."""
        if not self.index:
            self.give_up()
            return
        index = json.dumps([[client, *place] for client, place in sorted(self.index.items())]).encode()
        self._file.write(index + FOOT.pack(zlib.crc32(index), len(index)))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._part, self._path)

    def give_up(self) -> None:
        self._file.close()
        self._part.unlink(missing_ok=True)


@dataclass(frozen=True)
class Packs:
    """Versioned states under one folder: `<version>.pack` holds those of every client that took part in a step."""

    root: Path

    @cached_property
    def _known(self) -> dict[str, Index]:
        return {}

    def path(self, version: str) -> Path:
        return self.root / f"{version}.pack"

    @contextmanager
    def writing(self, version: str) -> Iterator[Writer]:
        """Write one step's states; what an earlier, uncommitted try left under this name is replaced."""
        writer = Writer(self.path(version))
        try:
            yield writer
            writer.finish()
        except BaseException:
            writer.give_up()
            raise
        self._known[version] = writer.index

    def has(self, client: int, version: str) -> bool:
        """Say whether a version of this client's state lies here."""
        return self.path(version).exists() and client in self._index(version)

    def get(self, client: int, version: str) -> bytes | None:
        """Return a version's bytes, None for the empty version (no state yet); raise StudyError where it is missing."""
        if not version:
            return None
        path = self.path(version)
        if not self.has(client, version):
            raise StudyError(f"{path}: the committed state of client {client} is missing; the run folder is incomplete")
        with path.open("rb") as file:
            return _read(file, path, client, self._index(version)[client])

    def tidy(self, live: Mapping[str, set[int]]) -> None:
        """Delete packs of which nothing is live, and write anew those of which less than half is.

        `live` maps a version to the clients whose state it is. Safe at any moment: a live state is always in a whole
        file under its own name.
        """
        if not self.root.is_dir():
            return
        for path in self.root.iterdir():
            version = path.name.removesuffix(".pack")
            clients = live.get(version, set())
            if not clients:
                path.unlink()
                self._known.pop(version, None)
                continue
            index = self._index(version)
            held = sum(size for client, (_, size, _) in index.items() if client in clients)
            if 2 * held < sum(size for _, size, _ in index.values()):
                with path.open("rb") as old, self.writing(version) as new:
                    for client in sorted(clients & index.keys()):
                        new.add(client, _read(old, path, client, index[client]))

    def _index(self, version: str) -> Index:
        if version not in self._known:
            self._known[version] = _read_index(self.path(version))
        return self._known[version]


def _read(file: BinaryIO, path: Path, client: int, place: tuple[int, int, int]) -> bytes:
    at, size, checksum = place
    file.seek(at)
    data = file.read(size)
    if zlib.crc32(data) != checksum:
        raise StudyError(f"{path}: damaged: the checksum of client {client}'s state does not match")
    return data


def _read_index(path: Path) -> Index:
    """Return the index of a pack; raise StudyError at a file that is not a whole one."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END) - FOOT.size
            file.seek(max(0, end))
            checksum, size = FOOT.unpack(file.read(FOOT.size))
            if size > end:
                raise ValueError("its index is cut off")
            file.seek(end - size)
            text = file.read(size)
        if zlib.crc32(text) != checksum:
            raise ValueError("the checksum of its index does not match")
        return {client: (at, length, crc) for client, at, length, crc in json.loads(text)}
    except (OSError, ValueError, TypeError, struct.error) as error:
        raise StudyError(f"{path}: damaged: {error}") from error
