"""The append-only record of every message: one JSON row each, a fact once its round is committed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlth.errors import StudyError


@dataclass(frozen=True, kw_only=True)
class Row:
    """One message. `payload_bytes` is len() of what was serialised; `framed_bytes` is what the transport tells.

    `kind` is values, mask, scores, metrics or evaluation, as the message says; "install" is a client's first model,
    "control" a client's request, "resync" what was sent again because of it. `coding` names the mask mode and the
    value mode; `mask_bytes` and `value_bytes` are those sections (the rest is header and checksum); `iid_bytes` is
    the sum of n H(k / n) over the mask's layers: a reference beside `mask_bytes`, no minimum.
    """

    round: int
    phase: str
    sender: str
    receiver: str
    kind: str
    name: str
    payload_bytes: int
    framed_bytes: int | None = None
    density: float = 1.0
    ticket: str = ""
    broadcast: bool = False
    status: str = "ok"
    coding: str = ""
    mask_bytes: int = 0
    value_bytes: int = 0
    iid_bytes: float | None = None


def party(client: int | None) -> str:
    """Name a sender or receiver: "server" or "client:7"."""
    return "server" if client is None else f"client:{client}"


def lines(rows: Iterable[Row | Mapping[str, Any]]) -> bytes:
    """Serialise rows, one compact JSON object a line, keys sorted so that equal rows are equal bytes."""
    plain = [vars(r) if isinstance(r, Row) else r for r in rows]
    return b"".join(json.dumps(r, sort_keys=True, allow_nan=False).encode() + b"\n" for r in plain)


def append(path: Path, data: bytes) -> int:
    """Append bytes durably and return the file's new length."""
    if not data and path.exists():
        return path.stat().st_size  # nothing to flush
    with path.open("ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def truncate(path: Path, length: int) -> None:
    """Cut back what was written after the last commit; it never became a fact. Committed rows must be there."""
    there = path.stat().st_size if path.exists() else 0
    if there < length:
        raise StudyError(f"{path}: must hold the {length} bytes that are committed, got {there}")
    if there > length:
        with path.open("r+b") as file:
            file.truncate(length)
