"""A fleet from a file: one row a client, as CSV, YAML or JSON, checked row by row and grouped into tiers."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from fedlth.errors import StudyError, wrong
from fedlth.study.yaml_text import parse

TEXT = ("name",)
COLUMNS = ("client", "density", "width", "speed", "memory_mb", "down_bytes_s", "up_bytes_s", "latency_s", *TEXT)
WHERE = "clients.capacity"


def rows(path: str) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yield (place, client, what it can carry) of every row; empty cells are left out.

    Raises StudyError naming file, line and column.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"{WHERE}: {path}: cannot be read as UTF-8 text: {error}") from error
    read = _csv_rows if file.suffix == ".csv" else _list_rows
    met: set[int] = set()
    for line, row in read(f"{WHERE}: {path}", text):
        place = f"{WHERE}: {path}:{line}"
        unknown = next((key for key in row if key not in COLUMNS), None)
        if unknown is not None:
            raise wrong(f"{place}: column", f"among {', '.join(COLUMNS)}", unknown)
        client = row.pop("client", None)
        if not isinstance(client, int) or isinstance(client, bool) or client < 0:
            raise wrong(f"{place}: client", "a whole number of at least 0", client)
        if client in met:
            raise StudyError(f"{place}: client: must be given once, got {client} again")
        met.add(client)
        yield place, client, row


def _csv_rows(where: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(text, newline=""))
    header = [cell.strip() for cell in next(reader, [])]
    if "client" not in header or len(set(header)) < len(header):
        raise wrong(f"{where}:1: header", f"distinct columns, client and some of {', '.join(COLUMNS[1:])}", header)
    for cells in reader:
        if not cells:
            continue
        if len(cells) != len(header):
            raise StudyError(f"{where}:{reader.line_num}: must have {len(header)} cells, got {len(cells)}")
        row = {key: cell.strip() for key, cell in zip(header, cells, strict=True) if cell.strip()}
        yield reader.line_num, {key: cell if key in TEXT else _number(cell) for key, cell in row.items()}


def _number(cell: str) -> int | float | str:
    """Return a cell as a number; what is none stays text, and is refused where its column is checked."""
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell


def _list_rows(where: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the entries of a YAML list; JSON is YAML too."""
    found = parse(text, where)
    if not isinstance(found, list):
        raise wrong(where, "a list of clients", type(found).__name__)
    tree: Any = yaml.compose(text, Loader=yaml.SafeLoader)
    lines = [node.start_mark.line + 1 for node in tree.value]
    for line, row in zip(lines, found, strict=True):
        if not isinstance(row, dict):
            raise wrong(f"{where}:{line}", "a mapping of columns", row)
        yield line, {key: value for key, value in row.items() if value is not None}
