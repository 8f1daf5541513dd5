"""The rows of simulations/public_tables: what each one runs is a study, and how ours is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedlth.experiment.resolve import read
from fedlth.study import schema
from simulations.public_tables import run

PLACE = Path(run.__file__).parent


@pytest.mark.parametrize("row", [row for row in run.ROWS if row.arm and row.table == "pfllib"], ids=lambda r: r.folder)
def test_every_row_that_runs_is_a_study_with_its_arm(row: run.Row) -> None:
    overrides = [o.format(rounds=7, epochs=3) for o in row.overrides]
    experiment = read(schema.load(PLACE / f"{row.table}.yaml", overrides))[0]
    assert row.arm in experiment.arms
    assert experiment.study.personalise.epochs == 3 or experiment.study.federate.rounds == 7


def test_large_clients_weigh_more(tmp_path: Path) -> None:
    rows = [
        {"arm": "global", "test_accuracy": 1.0, "num_test": 1}, {"arm": "global", "test_accuracy": 0.5, "num_test": 3},
        {"arm": "local", "test_accuracy": 0.0, "num_test": 9},
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run.accuracy(tmp_path, "global") == 62.5


def test_a_row_without_runs_says_so() -> None:
    assert run.line(run.Row("t", "FedPer", 97.44), []) == "| FedPer | 97.44 | open | 0 | |"
    assert run.line(run.Row("t", "Local", None, "dense"), [90.0, 92.0]).startswith(
        "| Local | no such row | 91.00 ± 1.41"
    )
