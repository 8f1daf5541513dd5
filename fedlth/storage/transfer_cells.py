"""The cells of a run's transfer matrix (transfer/cells.jsonl): facts that were trained once, and are read again."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

from fedlth.storage import json_lines
from fedlth.storage.records import parse
from fedlth.storage.typed_record import Count, Label, Name, Number, Numbers, Share, Target

TRANSFER = "transfer"  # the folder, and the phase of its jobs
DENSE, THETA_0 = "dense twin", "theta_0's own mask"  # masks that are no ticket


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One mask, trained on one client's data from `start` and evaluated on its test part.

    `mask` is its name for people, `source` the client whose ticket it is (None for other masks). `key` names all that
    decides the cell's numbers. `jaccard` is |both| / |either| with the target's own ticket, over what clients exchange;
    accuracies are None where targets are real numbers.
    """

    OPTIONAL: ClassVar[frozenset[str]] = frozenset({"source", "diverged", "test_metrics"})

    mask: Name
    source: Count | None = None
    target: Count
    key: Name
    jaccard: Share
    density: Target
    start: Label
    ticket: Label
    num_test: Count
    test_accuracy: Share | None
    test_loss: Number
    test_metrics: Annotated[dict[str, Any], Numbers()] = field(default_factory=dict)
    diverged: bool = False

    def value(self, metric: str) -> float:
        """Return a metric's value on test data; NaN where the cell does not say it."""
        found = {"accuracy": self.test_accuracy, "loss": self.test_loss}.get(metric, self.test_metrics.get(metric))
        return float("nan") if found is None else float(found)


def path_of(run: Path) -> Path:
    return run / TRANSFER / "cells.jsonl"


def recovered(run: Path) -> dict[str, Cell]:
    """Return a run's cells by key, and cut off half a line that a kill has left; only for who holds the lock."""
    path = path_of(run)
    if path.exists():
        whole = path.read_bytes()
        json_lines.truncate(path, whole.rfind(b"\n") + 1)
    rows, _ = json_lines.read_lines(path)
    cells = [parse(Cell, row, place=f"{path}:{i}") for i, row in enumerate(rows, start=1)]
    return {cell.key: cell for cell in cells}


def append(run: Path, cell: Cell) -> None:
    """Add a cell durably, as one line."""
    path_of(run).parent.mkdir(parents=True, exist_ok=True)
    json_lines.append(path_of(run), json_lines.lines([cell]))
