"""What a method's run cost: FLOPs as they were spent, those of what was alive, and of a run that did not say them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedlth.bench.spending import Spending, spending
from fedlth.report.choice import main_choice
from fedlth.report.facts import read_run
from tests import tiny


def spent(out: Path) -> Spending:
    facts = read_run(out)
    return spending(facts, main_choice([facts]))


def as_of_old(out: Path) -> None:
    """Take from a run's times what earlier versions did not write."""
    rows = tiny.rows(out, "times")
    for row in rows:
        for work in row.get("work", ()):
            work.pop("flops", None), work.pop("alive_flops", None)
    (out / "times.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(("method", "options"), [("fedavg", {}), ("apfl", {}), ("salientgrads", {"density": 0.2})])
def test_flops_are_those_of_the_trainings_that_were_done(
    tmp_path: Path, method: str, options: dict[str, float]
) -> None:
    tiny.run(tiny.study(method={"name": method, **options}), tmp_path / "r")
    now = spent(tmp_path / "r")
    assert now.alive_flops is not None
    trained = [w for row in tiny.rows(tmp_path / "r", "times") for w in row.get("work", ()) if w.get("epochs")]
    assert trained and all(0 < work["alive_flops"] <= work["flops"] for work in trained)
    as_of_old(tmp_path / "r")
    old = spent(tmp_path / "r")
    assert old.alive_flops is None
    if method == "salientgrads":
        assert now.alive_flops < 0.7 * now.flops  # a fifth of the prunable weights, all biases
    else:
        assert now.alive_flops == pytest.approx(now.flops)
        assert old.flops == pytest.approx(now.flops)  # every epoch is one of the dense network: apfl trains two
