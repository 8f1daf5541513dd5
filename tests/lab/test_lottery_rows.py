"""The studies of simulations/lottery_rows are valid, and every row of the table but the federated ones is judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedlth.lab import study

ROWS = Path(__file__).parents[2] / "simulations" / "lottery_rows"
STUDIES = sorted(ROWS.glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_every_study_is_valid_and_has_three_seeds(path: Path) -> None:
    made = study.load(path)
    assert made.lottery == path.stem
    assert len(made.seeds) >= 3
    assert made.data.name == "fashion_mnist"


def test_every_row_is_judged_by_a_study_that_is_there() -> None:
    code = "import json, rows; print(json.dumps([[r.number, r.studies] for r in rows.ROWS]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROWS, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert sorted(number for number, _ in found) == [n for n in range(1, 30) if n != 25]
    assert {name for _, studies in found for name in studies} == {path.stem for path in STUDIES}
