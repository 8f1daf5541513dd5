"""The tables of a lottery study: every arm at every round, and every probe, means over seeds."""

from __future__ import annotations

import numpy as np

from fedlth.report.lottery_facts import LotteryFacts, over_seeds
from fedlth.report.tables import Table
from fedlth.report.units import NOTHING, percent, points

HEADER = (
    "arm", "round", "density", "early stop (iteration)", "test % at early stop", "± over seeds", "test % at the end",
    "against the search (points)",
)  # fmt: skip


def arms_table(facts: LotteryFacts) -> Table:
    """Return one row an arm and round; the difference is to the arm's own search at the same round, seed by seed."""
    rows = []
    for cell in facts.cells:
        spec = facts.config["arms"].get(cell.arm)
        base = None if spec is None else facts.cell(spec["of"], cell.round)
        test = cell.values("test_accuracy")
        gain = NOTHING if base is None else points(float((test - base.values("test_accuracy")).mean()))
        rows.append((
            cell.arm, str(cell.round), f"{cell.density:.4f}", f"{cell.mean('early_stop'):.0f}",
            percent(float(test.mean()), digits=2), percent(_sd(test), digits=2),
            percent(cell.mean("final_test_accuracy"), digits=2), gain,
        ))  # fmt: skip
    return Table("Every arm at every round, mean over seeds", HEADER, tuple(rows))


def probe_table(facts: LotteryFacts, probe: str) -> Table:
    """Return a probe's rows: what was asked, then what was measured, as mean ± standard deviation over seeds."""
    merged = over_seeds(facts.probes[probe])
    columns = list(dict.fromkeys(key for row in merged for key in row))
    measured = {key for row in merged for key, value in row.items() if isinstance(value, np.ndarray)}
    columns = [key for key in columns if key not in measured] + [key for key in columns if key in measured]
    rows = tuple(tuple(_cell(row.get(key)) for key in columns) for row in merged)
    left = len(columns) - len(measured & set(columns))
    return Table(f"{probe}: {facts.part(probe)}", tuple(key.replace("_", " ") for key in columns), rows, left)


def _cell(value: object) -> str:
    if value is None:
        return NOTHING
    if isinstance(value, np.ndarray):
        mean = f"{value.mean():.4g}"
        return mean if len(value) < 2 or np.ptp(value) == 0 else f"{mean} ± {_sd(value):.2g}"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)


def _sd(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else float("nan")
