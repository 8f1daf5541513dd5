"""Rows of text files: TSV, CSV, JSON lines and folders of Hugging Face `datasets`, by name or place of column."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from fedlth.data.factory import told
from fedlth.errors import StudyError, require

Column = str | int
SPLITS = ("train", "validation", "test")
FORMATS = (".tsv", ".csv", ".jsonl", ".json")


@dataclass(frozen=True)
class Row:
    """One example as a file has it; `label` is text, or what JSON or `datasets` hold."""

    text: str
    pair: str | None
    label: Any
    key: str


@dataclass(frozen=True)
class Columns:
    """Which columns an example is made of: names from the file's first line (or JSON), or places from 0 without one."""

    text: Column = "text"
    pair: Column | None = None
    label: Column | None = "label"
    key: Column | None = None

    def __post_init__(self) -> None:
        given = [column for column in (self.text, self.pair, self.label, self.key) if column is not None]
        if len({type(column) for column in given}) > 1 or not all(
            (isinstance(c, str) and c) or (isinstance(c, int) and not isinstance(c, bool) and c >= 0) for c in given
        ):
            raise StudyError(
                "data.options: text, pair, label and key must all be names of columns, or all places from 0 (of a file "
                f"without a first line of names), got {given}"
            )

    @property
    def placed(self) -> bool:
        return isinstance(self.text, int)

    def row(self, cells: Mapping[Any, Any], place: str, key: str) -> Row:
        """Return the example in a line's cells; raise StudyError naming the place where a column is not there."""
        wanted = {"text": self.text, "pair": self.pair, "label": self.label, "key": self.key}
        found: dict[str, Any] = {}
        for what, column in wanted.items():
            if column is not None and cells.get(column) is None:
                known = ", ".join(map(str, cells)) or "none"
                raise StudyError(f"{place}: must have the column {column!r} (data.options.{what}), got {known}")
            found[what] = None if column is None else cells[column]
        for what in ("text", "pair"):
            if not isinstance(found[what], str | None):
                raise StudyError(f"{place}: {what} must be text, got {found[what]!r}")
        return Row(found["text"], found["pair"], found["label"], key if self.key is None else str(found["key"]))


def read(path: Path, columns: Columns, key: str) -> dict[str, list[Row]]:
    """Return the rows of a file as {"train": ...}, of a folder of `datasets` by its splits.

    key: the natural key of a row without a column for it.
    Raises StudyError naming file and line.
    """
    if path.is_dir():
        return _folder(path, columns, key)
    if path.suffix not in FORMATS:
        raise StudyError(f"{path}: must be a folder of datasets, or end in {', '.join(FORMATS)}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
        lines = _json_lines(path, text) if path.suffix in (".jsonl", ".json") else _table(path, text, columns)
        rows = [columns.row(cells, f"{path}: line {number}", key) for number, cells in lines]
    except (OSError, ValueError, csv.Error) as error:
        raise StudyError(f"{path}: must be a file of UTF-8 text that can be read, got {told(error)}") from error
    if not rows:
        raise StudyError(f"{path}: must hold an example, got none")
    return {"train": rows}


def _table(path: Path, text: str, columns: Columns) -> Iterator[tuple[int, Mapping[Any, Any]]]:
    """Yield each line's number and cells. A TSV's quotes are plain text; a CSV's are quotes."""
    lines: Iterator[tuple[int, Sequence[str]]]
    if path.suffix == ".tsv":
        lines = ((n, line.removesuffix("\r").split("\t")) for n, line in enumerate(text.split("\n"), 1) if line)
    else:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        lines = ((reader.line_num, cells) for cells in reader if cells)
    if columns.placed:
        yield from ((number, dict(enumerate(cells))) for number, cells in lines)
        return
    names: Sequence[str] = next(lines, (0, ()))[1]
    for number, cells in lines:
        if len(cells) != len(names):
            raise StudyError(f"{path}: line {number}: must have the {len(names)} columns, got {len(cells)}")
        yield number, dict(zip(names, cells, strict=True))


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, Mapping[Any, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            found = json.loads(line)
            if not isinstance(found, dict):
                raise StudyError(f"{path}: line {number}: must hold an object, got {type(found).__name__}")
            yield number, found


def _folder(path: Path, columns: Columns, key: str) -> dict[str, list[Row]]:
    """Read what `save_to_disk` of the library `datasets` wrote: one data set, or one a split."""
    require(f"data: the folder {path}", "datasets", extra="hf")
    library: Any = import_module("datasets")
    try:
        found = library.load_from_disk(str(path))
    except Exception as error:  # the library raises its own and the file system's errors
        raise StudyError(f"{path}: must be a folder that datasets.save_to_disk wrote: {told(error)}") from error
    splits = (
        {split: found[split] for split in SPLITS if split in found} if isinstance(found, dict) else {"train": found}
    )
    if "train" not in splits:
        raise StudyError(f"{path}: must hold the split train, got {', '.join(found)}")
    return {
        split: [columns.row(cells, f"{path}: {split} {n}", key) for n, cells in enumerate(part)]
        for split, part in splits.items()
    }
