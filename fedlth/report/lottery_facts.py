"""The facts of a lottery study's folder, and the means over seeds that its report shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedlth.errors import StudyError
from fedlth.report.facts import grouped
from fedlth.storage.json_lines import read_lines
from fedlth.study.yaml_text import parse

Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One arm at one round, over seeds: values (seeds,) float64 in the order of the study's seeds.

    density: the mean, since a search that may stop early need not keep as much for every seed.
    """

    arm: str
    round: int
    density: float
    rows: tuple[Row, ...]

    def values(self, key: str) -> np.ndarray:
        return np.array([row[key] for row in self.rows], float)

    def mean(self, key: str) -> float:
        return float(self.values(key).mean())


@dataclass(frozen=True)
class LotteryFacts:
    """A finished lottery study: its resolved YAML, its cells in the order of the file, its probes' rows by name."""

    config: Mapping[str, Any]
    cells: tuple[Cell, ...]
    probes: Mapping[str, tuple[Row, ...]]

    @property
    def arms(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(cell.arm for cell in self.cells))

    def of(self, arm: str) -> tuple[Cell, ...]:
        return tuple(cell for cell in self.cells if cell.arm == arm)

    def cell(self, arm: str, round: int) -> Cell | None:
        return next((cell for cell in self.cells if (cell.arm, cell.round) == (arm, round)), None)

    def part(self, probe: str) -> str:
        """Return the name of the part that a probe of the study is."""
        return str(self.config["probes"][probe]["name"])


def read_lottery(run: Path) -> LotteryFacts:
    """Read a finished lottery study; raises StudyError naming the file that is missing or broken."""
    rows, _ = read_lines(run / "results.jsonl", required=True)
    try:
        config = parse((run / "config.yaml").read_text(encoding="utf-8"), str(run / "config.yaml"))
    except OSError as error:
        raise StudyError(f"{run}: expected a lottery study's folder, got {error}") from None
    trainings = [row for row in rows if row["kind"] == "training"]
    cells = [
        Cell(arm, number, float(np.mean([row["kept"] / row["size"] for row in members])), tuple(members))
        for (arm, number), members in grouped(((row["arm"], row["round"]), row) for row in trainings).items()
    ]
    probes = grouped((str(row["probe"]), row) for row in rows if row["kind"] == "probe")
    return LotteryFacts(config, tuple(cells), {name: tuple(members) for name, members in probes.items()})


def over_seeds(rows: Sequence[Row]) -> list[Row]:
    """Return a probe's rows with every measured number (a float) as its (seeds,) values.

    Rows of two seeds belong together where all that is no float is equal; the n-th of a seed goes with the n-th.
    """
    counts: dict[Any, int] = {}

    def key(row: Row) -> tuple[Any, ...]:
        words = tuple((k, str(v)) for k, v in row.items() if k not in ("kind", "probe", "seed") and not _measured(v))
        counts[words, row["seed"]] = counts.get((words, row["seed"]), 0) + 1
        return (*words, counts[words, row["seed"]])

    merged = []
    for members in grouped((key(row), row) for row in rows).values():
        first = {k: v for k, v in members[0].items() if k not in ("kind", "probe", "seed")}
        for k, v in first.items():
            if _measured(v):
                first[k] = np.array([row[k] for row in members], float)
        merged.append(first)
    return merged


def _measured(value: object) -> bool:
    return isinstance(value, float)
