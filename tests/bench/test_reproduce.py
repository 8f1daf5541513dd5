"""fedlth reproduce: every row is a study that resolves, and its figure is read as its protocol says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fedlth import cli
from fedlth.bench import reproduce
from fedlth.bench.reproduce import Ours, Row, judged, row_of, rows, text
from fedlth.errors import StudyError
from fedlth.experiment.experiment import Experiment
from fedlth.methods.table import METHODS
from tests import tiny

TINY = Row(
    name="tiny", source="nowhere", study={**tiny.tree(method="fedavg"), "tickets": "none"}, arm="global",
    over="examples", seed_keys=("seed", "partition.seed"), paper=50.0, selects="round", not_matched=("the data",),
)  # fmt: skip


@pytest.mark.parametrize("name", [name for name in rows() if name.partition("_")[2]])
def test_every_row_is_a_study_with_its_arm(name: str) -> None:
    row = row_of(name)
    study = row.of_seed(3, Path("out"))
    if study.method["name"] not in METHODS:
        pytest.fail(f"{name} needs {study.method['name']}")
    assert row.arm in Experiment.of(study).arms
    assert study.seed == 3 and study.out == "out"
    assert bool(study.evaluate.every) == (row.selects != "none")


def test_the_honest_figure_stands_beside_the_selected_one(tmp_path: Path) -> None:
    (ours,) = reproduce.run(TINY, 1, tmp_path)
    folder = tmp_path / "tiny" / "seed-0"
    curve = [r for r in tiny.rows(folder, "curve") if r["arm"] == "global"]
    rounds = {r["round"] for r in curve}

    def right(found: list[dict[str, float]]) -> float:
        return 100 * sum(r["test_accuracy"] * r["num_test"] for r in found) / sum(r["num_test"] for r in found)

    assert ours.selected == pytest.approx(max(right([r for r in curve if r["round"] == n]) for n in rounds))
    assert ours.honest == pytest.approx(right([r for r in tiny.rows(folder, "metrics") if r["arm"] == "global"]))
    own = judged(replace(TINY, selects="client_rounds", over="clients"), folder)
    best = {c: max(r["test_accuracy"] for r in curve if r["client"] == c) for c in range(4)}
    assert own.selected == pytest.approx(25 * sum(best.values())) and own.selected >= own.honest
    told = text(TINY, [ours])
    assert "as published: the best round on test data" in told and "honest: the last round" in told
    assert "- the data" in told


def test_finished_seeds_are_kept_and_another_study_is_refused(tmp_path: Path) -> None:
    first = reproduce.run(TINY, 1, tmp_path)
    both = reproduce.run(TINY, 2, tmp_path)
    assert both[0] == first[0] and len(both) == 2
    with pytest.raises(StudyError, match="has another `train` than is asked for"):
        reproduce.run(TINY, 1, tmp_path, ["train.lr=0.5"])


@pytest.mark.parametrize("method", ["fedper", "fedrep", "local"])
def test_what_a_method_decides_of_a_study_is_no_other_study(method: str, tmp_path: Path) -> None:
    """Its parts that stay with a client stand in a run's config, and in no row."""
    arm = "local" if method == "local" else "global"
    row = replace(TINY, study={**tiny.tree(method=method), "tickets": "none"}, arm=arm, selects="none")
    assert reproduce.run(row, 1, tmp_path) == reproduce.run(row, 1, tmp_path)


def test_what_was_changed_is_said() -> None:
    told = text(TINY, [Ours(40.0, 45.0), Ours(42.0, 47.0)], ["federate.rounds=3"])
    assert "- changed by you: federate.rounds=3" in told and "46.00 ± 1.41" in told and "-4.00" in told


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reproduce"]) == 0
    listed = capsys.readouterr().out
    assert "pfllib_fedavg" in listed and "85.85" in listed
    assert cli.main(["reproduce", "nothing"]) == 2
    assert "must be one of" in capsys.readouterr().err
    assert cli.main(["reproduce", "pfllib_fedavg", "--seeds", "0"]) == 2
    assert "--seeds must be at least 1" in capsys.readouterr().err


def test_large_clients_weigh_more(tmp_path: Path) -> None:
    (ours,) = reproduce.run(replace(TINY, selects="none"), 1, tmp_path)
    file = tmp_path / "tiny" / "seed-0" / "metrics.jsonl"
    made = [json.loads(line) for line in file.read_text().splitlines()]
    rows_ = [r for r in made if r["arm"] == "global"]
    mean = sum(r["test_accuracy"] * r["num_test"] for r in rows_) / sum(r["num_test"] for r in rows_)
    assert ours == Ours(pytest.approx(100 * mean), None)
