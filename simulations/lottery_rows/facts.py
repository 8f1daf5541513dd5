"""What the relations of the rows are computed from: the rows of a finished study, per seed and over seeds."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Outcome:
    """Whether a relation held, and the figures that say so."""

    held: bool
    figures: str


@dataclass(frozen=True)
class Facts:
    """The rows of one study's results.jsonl."""

    rows: tuple[dict, ...]

    @staticmethod
    def read(folder: Path) -> Facts:
        return Facts(tuple(json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()))

    def trainings(self, arm: str, number: int | None = None) -> list[dict]:
        found = [r for r in self.rows if r.get("arm") == arm and r["kind"] == "training"]
        return [r for r in found if number is None or r["round"] == number]

    def values(self, arm: str, number: int, key: str = "test_accuracy") -> np.ndarray:
        """Return (seeds,) values in the order of the seeds."""
        found = sorted(self.trainings(arm, number), key=lambda r: r["seed"])
        if not found:
            raise KeyError(f"no training of {arm} at round {number}")
        return np.array([r[key] for r in found], float)

    def median(self, arm: str, number: int, key: str = "test_accuracy") -> float:
        return float(np.median(self.values(arm, number, key)))

    def mean(self, arm: str, number: int, key: str = "test_accuracy") -> float:
        return float(self.values(arm, number, key).mean())

    def rounds(self, arm: str) -> list[int]:
        return sorted({r["round"] for r in self.trainings(arm)})

    def probe(self, name: str, keep: Callable[[dict], bool] = lambda row: True) -> list[dict]:
        return [r for r in self.rows if r["kind"] == "probe" and r["probe"] == name and keep(r)]


def pt(share: float) -> str:
    """Return a share in per cent."""
    return f"{100 * share:.2f}"
