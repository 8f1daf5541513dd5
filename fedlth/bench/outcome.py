"""What is known of a cell beside its run: how it ended, and what it took on this machine (outcome.json, plan.yaml)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from fedlth.bench.matrix import Cell, differences
from fedlth.errors import StudyError
from fedlth.storage.header import read_header
from fedlth.storage.store import write_atomic
from fedlth.study import schema

OUTCOME, PLAN, LOG = "outcome.json", "plan.yaml", "log.txt"
DONE, FAILED, UNFINISHED, WAITING = "done", "failed", "unfinished", "not begun"


@dataclass(frozen=True)
class Outcome:
    """How a cell stands. `seconds` are of all calls together, `peak_memory_mb` the largest of any of its processes."""

    status: str = WAITING
    reason: str = ""
    seconds: float = 0.0
    peak_memory_mb: float = 0.0


def read_outcome(folder: Path) -> Outcome:
    """Return how the cell in a folder stands, as its files tell it."""
    file = folder / OUTCOME
    if not file.is_file():
        return Outcome(UNFINISHED if (folder / PLAN).exists() else WAITING)
    try:
        return Outcome(**json.loads(file.read_bytes()))
    except (ValueError, TypeError) as error:
        raise StudyError(f"{file}: damaged: {error}") from error


def write_outcome(folder: Path, outcome: Outcome) -> None:
    write_atomic(folder / OUTCOME, json.dumps(asdict(outcome)).encode())


def finished(folder: Path) -> bool:
    """Say whether the run in a cell's folder has ended."""
    return (folder / "header.json").is_file() and read_header(folder).finished


def plan(cell: Cell, root: Path) -> None:
    """Write what a cell is to run, before anything of it is there."""
    folder = cell.folder(root)
    if not (folder / PLAN).exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / PLAN, schema.dump(cell.study, given_only=True).encode())


def changed(cell: Cell, root: Path) -> list[str]:
    """Return how a cell that exists differs from what the bench now says; nothing where none exists."""
    file = cell.folder(root) / PLAN
    return differences(schema.load(file), cell.study) if file.exists() else []
