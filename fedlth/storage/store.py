"""Per-party state on disk: immutable versions, written atomically; a commit elsewhere says which one is current."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedlth.errors import StudyError


def pack(arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any] | None = None) -> bytes:
    """Serialise arrays and a JSON-able meta value; no pickle, equal input gives equal bytes."""
    # Not ascontiguousarray, which makes a scalar an array of one axis.
    ordered = {k: np.asarray(arrays[k], order="C") for k in sorted(arrays)}
    told = json.dumps(meta or {}, sort_keys=True)
    return safetensors_bytes(ordered, {"meta": told, "digest": content_digest(ordered, told)})


def safetensors_bytes(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """Serialise in the safetensors format; equal input gives equal bytes.

    The library keeps metadata in a hash map, so the order of its keys is another in every call: it is set here.
    """
    data = bytes(save(dict(arrays)))
    size = int.from_bytes(data[:8], "little")
    head = {"__metadata__": dict(sorted(metadata.items())), **json.loads(data[8 : 8 + size])}
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def unpack(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return what `pack` was given; raise ValueError at bytes that are not such a state."""
    arrays, told, digest = _read(data)
    if digest != content_digest(arrays, told):
        raise ValueError("not a packed state: its digest does not match its content")
    return arrays, dict(json.loads(told))


def unpack_whole(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Do what `unpack` does with bytes whose reader has checked them already."""
    arrays, told, _ = _read(data)
    return arrays, dict(json.loads(told))


def _read(data: bytes) -> tuple[dict[str, np.ndarray], str, str]:
    try:
        size = int.from_bytes(data[:8], "little")
        head = json.loads(data[8 : 8 + size])["__metadata__"]
        return dict(load(data)), head["meta"], head["digest"]
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"not a packed state: {error}") from error


def content_digest(arrays: Mapping[str, np.ndarray], told: str) -> str:
    """Return the blake2b-128 hex of names, types, shapes and values, and of a text that goes with them."""
    state = hashlib.blake2b(told.encode(), digest_size=16)
    for name in sorted(arrays):
        state.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        state.update(arrays[name].tobytes())
    return state.hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a crash leaves the old content or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@dataclass(frozen=True)
class Store:
    """Versioned states keyed by partition id under one folder."""

    root: Path

    def path(self, client: int, version: str) -> Path:
        return self.root / f"{client:06d}" / f"{version}.safetensors"

    def put(self, client: int, version: str, data: bytes) -> None:
        write_atomic(self.path(client, version), data)

    def has(self, client: int, version: str) -> bool:
        """Say whether a version of this client's state lies here."""
        return self.path(client, version).exists()

    def get(self, client: int, version: str) -> bytes | None:
        """Return a version's bytes; None for the empty version (no state yet)."""
        if not version:
            return None
        path = self.path(client, version)
        if not path.exists():
            raise StudyError(f"{path}: the committed state of client {client} is missing; the run folder is incomplete")
        data = path.read_bytes()
        try:
            unpack(data)
        except ValueError as error:
            raise StudyError(f"{path}: damaged: {error}") from error
        return data

    def held(self, client: int, version: str) -> bytes | None:
        """Return a version's bytes, None where a device has lost them: the step then asks for its download anew."""
        try:
            return self.get(client, version)
        except StudyError:
            return None

    def drop_others(self, client: int, keep: str) -> None:
        """Delete every version but the committed one."""
        folder = self.root / f"{client:06d}"
        if folder.is_dir():
            for file in folder.iterdir():
                if file.name != f"{keep}.safetensors":
                    file.unlink(missing_ok=True)
