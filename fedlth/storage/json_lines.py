"""JSON-lines files: appended to durably, cut back to the last commit, read with errors that name file and line."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedlth.errors import StudyError
from fedlth.storage.typed_record import as_record

PART = 1 << 20  # bytes that are read at once


def lines(rows: Iterable[Any]) -> bytes:
    """Serialise rows, one JSON object a line, keys sorted so that equal rows are equal bytes."""
    return b"".join(json.dumps(r, sort_keys=True, allow_nan=False, default=as_record).encode() + b"\n" for r in rows)


def append(path: Path, data: bytes) -> int:
    """Append bytes durably and return the file's new length."""
    if not data and path.exists():
        return path.stat().st_size  # nothing to flush
    with path.open("ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def check(path: Path, length: int, crc32: int | None) -> None:
    """Raise StudyError where the first `length` bytes are not there, or are not those of this crc32 (None: any)."""
    there = path.stat().st_size if path.exists() else 0
    if there < length:
        raise StudyError(f"{path}: must hold the {length} bytes that are committed, got {there}")
    found, left = 0, length if crc32 is not None else 0
    if left:
        with path.open("rb") as file:
            while left and (data := file.read(min(left, PART))):
                found, left = zlib.crc32(data, found), left - len(data)
        if found != crc32:
            raise StudyError(f"{path}: damaged: its {length} committed bytes are not those that were written")


def truncate(path: Path, length: int) -> None:
    """Cut back what was written after the last commit; it never became a fact. Committed rows must be there."""
    there = path.stat().st_size if path.exists() else 0
    if there < length:
        raise StudyError(f"{path}: must hold the {length} bytes that are committed, got {there}")
    if there > length:
        with path.open("r+b") as file:
            file.truncate(length)


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`; raises StudyError where it is missing or is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StudyError(f"{path}: expected a file of a run folder, got none") from None
    except (ValueError, OSError) as error:
        raise StudyError(f"{path}: expected a JSON object, got {error}") from None
    if not isinstance(value, dict):
        raise StudyError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def read_lines(path: Path, *, required: bool = False, forgive_last: bool = False) -> tuple[list[dict[str, Any]], str]:
    """Return the rows of a JSON-lines file and a note ("" if nothing was forgiven).

    forgive_last: a killed run may leave half a last line; it is dropped and the note says so. Anywhere else a
    broken line raises StudyError naming file and line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if required:
            raise StudyError(f"{path}: expected a file of a finished run, got none") from None
        return [], f"{path.name} is not there"
    except (ValueError, OSError) as error:
        raise StudyError(f"{path}: expected UTF-8 text, got {error}") from None
    written = text.split("\n")
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(written, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"{type(row).__name__}")
        except ValueError as error:
            if forgive_last and number == len(written):
                return rows, f"{path.name}: the half-written last line was left out"
            raise StudyError(f"{path}:{number}: expected one JSON object, got {error}") from None
        rows.append(row)
    return rows, ""
