"""JSON and JSON-lines files of a run folder, read with errors that name the file and the line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedlth.errors import StudyError


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


def read_rows(path: Path, *, required: bool, forgive_last: bool) -> tuple[list[dict[str, Any]], str]:
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
    lines = text.split("\n")
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"{type(row).__name__}")
        except ValueError as error:
            if forgive_last and number == len(lines):
                return rows, f"{path.name}: the half-written last line was left out"
            raise StudyError(f"{path}:{number}: expected one JSON object, got {error}") from None
        rows.append(row)
    return rows, ""
