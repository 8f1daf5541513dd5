"""`fedlth bench`: forecast, run, report, one file after the other."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from fedlth.bench.forecast import KEPT, expect, expected_minutes, told
from fedlth.bench.headline import idle
from fedlth.bench.leaderboard import write_leaderboard
from fedlth.bench.matrix import Cell, Matrix, load
from fedlth.bench.outcome import finished
from fedlth.bench.run import refuse_changed, run
from fedlth.errors import StudyError, require, wrong
from fedlth.output import say

log = logging.getLogger(__name__)

KINDS = ("method", "partition", "seed")


class Wishes(Protocol):
    """What the command line asks for beside the files."""

    out: Path
    only: str | None
    dry_run: bool
    report_only: bool


def bench(words: Sequence[Path], wishes: Wishes) -> None:
    """Run the benches of these files (words with = override keys of their base studies) and write leaderboards."""
    files = [word for word in words if "=" not in str(word)]
    overrides = [str(word) for word in words if "=" in str(word)]
    if wishes.dry_run and wishes.report_only:
        raise StudyError("bench: --dry-run and --report-only exclude each other: the one forecasts, the other reports")
    if not files:
        raise StudyError("bench: expected a FILE.yaml, got none")
    if not wishes.dry_run:
        require("fedlth bench", "scipy", "matplotlib", "jinja2", extra="sim")
    matrices = [load(file, overrides) for file in files]
    if twice := {m.name for m in matrices if [one.name for one in matrices].count(m.name) > 1}:
        raise wrong("bench: names", "different in every file, since each is a folder", sorted(twice))
    asked = [_asked(matrix, wishes.only) for matrix in matrices]
    for matrix in matrices:
        refuse_changed(matrix, wishes.out / matrix.name)
    reasons = [_one(matrix, cells, wishes) for matrix, cells in zip(matrices, asked, strict=True)]
    if wishes.dry_run and all(reasons):
        raise StudyError(f"bench: nothing could be forecast: {reasons[0]}")


def _one(matrix: Matrix, cells: Sequence[Cell], wishes: Wishes) -> str:
    """Return why nothing could be forecast, '' where something was, or nothing was to be."""
    root = wishes.out / matrix.name
    for warning in idle(matrix):
        log.info(f"note: {warning}")
    left = [cell for cell in cells if not finished(cell.folder(root))]
    reason = ""
    if left and not wishes.report_only:
        log.info(f"bench {matrix.name}: forecasting {len({(c.partition, c.method) for c in left})} kinds of runs")
        if not wishes.dry_run:
            root.mkdir(parents=True, exist_ok=True)
        expected = expect(left, root / KEPT if root.is_dir() else None)
        reason = next(iter(expected.values())).reason if all(one.run is None for one in expected.values()) else ""
        say(told(matrix, left, expected, done=len(cells) - len(left)))
        if not wishes.dry_run:
            minutes = {cell.name: expected_minutes(matrix, cell, expected) for cell in left}
            _run(matrix, cells, root, minutes)
    elif wishes.dry_run:
        say(f"bench {matrix.name}: all {len(cells)} cells have ended")
    if not wishes.dry_run:
        if not root.is_dir():
            raise StudyError(f"{root}: no bench here")
        path, text = write_leaderboard(matrix, root)
        say(f"\n{text}\n\nleaderboard: {path}")
    return reason


def _run(matrix: Matrix, cells: Sequence[Cell], root: Path, minutes: dict[str, float]) -> None:
    try:
        run(matrix, cells, root, minutes)
    except KeyboardInterrupt:
        log.info(f"stopped; to go on: the same command (what is done is kept in {root})")
        raise


def _asked(matrix: Matrix, only: str | None) -> list[Cell]:
    """Return the cells that `--only` names, all without it; one kind given twice means either."""
    wanted: dict[str, set[str]] = {}
    for word in () if only is None else only.split(","):
        kind, equals, name = word.partition("=")
        known = {"method": matrix.methods, "partition": matrix.partitions, "seed": map(str, matrix.seeds)}
        if kind not in KINDS or not equals:
            raise wrong("--only", "method=NAME, partition=NAME or seed=NUMBER", word)
        if name not in (names := list(known[kind])):
            raise wrong(f"--only {kind}", f"one of {', '.join(names)}", name)
        wanted.setdefault(kind, set()).add(name)
    return [
        cell for cell in matrix.cells
        if all(str(getattr(cell, kind)) in names for kind, names in wanted.items())
    ]  # fmt: skip
