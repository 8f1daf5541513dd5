"""The report of a lottery study: means over seeds, pairs by seed, every probe a table, the same bytes twice."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlth.errors import StudyError
from fedlth.report.lottery import alarms, arms_table, legend, lottery_text, probe_table, words, write_lottery
from fedlth.report.lottery_facts import over_seeds, read_lottery

CONFIG = """
lottery: made <up>
seeds: [0, 1]
data: {name: nothing}
model: {name: none}
searches:
  imp:
    score: {name: "mine:Own", power: 2}
    schedule: {name: shrink}
    scope: {name: layerwise}
    rewind: {name: init}
    granularity: {name: row}
    dead: {name: zero}
    gate: {name: always}
    stop: {name: target}
    train: {lr: 0.01}
arms:
  reinit: {of: imp, mask: {name: shuffle}, start: {name: reinit}, dead: {name: init}, train: {}}
probes: {shake: {name: instability}, other: {name: mine}}
"""


def training(arm: str, seed: int, number: int, kept: int, test: float, stop: int) -> dict[str, Any]:
    return {
        "kind": "training", "arm": arm, "seed": seed, "round": number, "kept": kept, "size": 100,
        "layer_kept": {"a": kept}, "early_stop": stop, "validation_loss": 0.5, "validation_accuracy": test,
        "test_accuracy": test, "final_validation_accuracy": test, "final_test_accuracy": test - 0.01,
        "curve": [[10, 0.7, 0.5], [20, 0.5, test]],
    }  # fmt: skip


def folder(tmp_path: Path) -> Path:
    rows = []
    for seed in (0, 1):
        for number, (kept, test, stop) in enumerate(((100, 0.80, 20), (80, 0.82, 10), (64, 0.79, 10))):
            rows.append(training("imp", seed, number, kept, test + 0.02 * seed, stop))
        rows.append(training("reinit", seed, 1, 80, 0.79 + 0.03 * seed, 20))
    for seed in (0, 1):
        for alpha in ("0.00", "0.50", "1.00"):
            rows.append({"kind": "probe", "probe": "shake", "seed": seed, "alpha": alpha, "density": "1",
                         "rewind_step": 0, "error": 0.1 + seed, "barrier": 0.0})  # fmt: skip
        rows.append({"kind": "probe", "probe": "other", "seed": seed, "what": "<b>", "size": 3 + seed, "much": 1.5})
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_cells_are_means_over_seeds_and_differences_are_paired(tmp_path: Path) -> None:
    facts = read_lottery(folder(tmp_path))
    assert facts.arms == ("imp", "reinit")
    cell = facts.cell("imp", 1)
    assert cell is not None and cell.density == 0.8 and cell.mean("test_accuracy") == pytest.approx(0.83)
    row = {r[0] + r[1]: r for r in arms_table(facts).rows}["reinit1"]
    # 79 - 82 and 82 - 84: the mean of the seeds' own differences
    assert row[-1] == "−2.5" and row[3] == "20" and row[4] == "80.50"
    assert arms_table(facts).rows[0][-1] == "–"


def test_probes_merge_what_was_asked_and_average_what_was_measured(tmp_path: Path) -> None:
    facts = read_lottery(folder(tmp_path))
    merged = over_seeds(facts.probes["shake"])
    assert [row["alpha"] for row in merged] == ["0.00", "0.50", "1.00"]
    assert all(np.array_equal(row["error"], [0.1, 1.1]) for row in merged)
    table = probe_table(facts, "shake")
    assert "0.6 ± 0.71" in table.rows[0]
    # a count that differs by seed keeps the seeds apart
    assert len(probe_table(facts, "other").rows) == 2


def test_the_legend_says_what_every_name_is(tmp_path: Path) -> None:
    assert legend(read_lottery(folder(tmp_path))) == [
        (
            "imp",
            "search: score mine:Own (power 2), schedule shrink, scope layerwise, rewind init, granularity row, "
            "train.lr 0.01",
        ),
        ("reinit", "arm: imp's masks under the control shuffle, start reinit, dead init"),
    ]


def test_a_long_probe_is_pointed_at_in_the_terminal(tmp_path: Path) -> None:
    run = folder(tmp_path)
    assert "0.50   1        0" in lottery_text(run)
    more = [
        json.dumps({"kind": "probe", "probe": "shake", "seed": 0, "alpha": str(i), "error": 0.1}) for i in range(40)
    ]
    (run / "results.jsonl").write_text((run / "results.jsonl").read_text() + "\n".join(more) + "\n")
    assert "43 rows: " in lottery_text(run) and "probe_shake.md" in lottery_text(run)


def test_the_words_say_where_the_search_ends(tmp_path: Path) -> None:
    (told,) = words(read_lottery(folder(tmp_path)))
    assert "dense network has 81.00 %" in told
    assert "ticket that is best on validation data has 83.00 % at 80.0 %" in told
    assert "sparsest ticket not below it on validation data keeps 80.0 %" in told
    assert told.endswith(
        " At 80.0 % of the weights the ticket has 83.00 % and the best of its arms there, reinit, 80.50 %."
    )


def changed(run: Path, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> Path:
    rows = [change(json.loads(line)) for line in (run / "results.jsonl").read_text().splitlines()]
    (run / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows if row))
    return run


def test_validation_data_choose_and_test_data_do_not(tmp_path: Path) -> None:
    def preferred(row: dict[str, Any]) -> dict[str, Any]:
        return row | {"validation_accuracy": 0.99} if (row.get("arm"), row.get("round")) == ("imp", 2) else row

    (told,) = words(read_lottery(changed(folder(tmp_path), preferred)))
    assert "that is best on validation data has 80.00 % at 64.0 %" in told


def test_without_a_dense_round_and_with_a_stop_at_another_density_for_each_seed(tmp_path: Path) -> None:
    def moved(row: dict[str, Any]) -> dict[str, Any] | None:
        if row.get("round") == 0:
            return None
        return row | {"kept": 80} if (row.get("arm"), row.get("round"), row["seed"]) == ("imp", 2, 1) else row

    run = changed(folder(tmp_path), moved)
    cell = read_lottery(run).cell("imp", 2)
    assert cell is not None and cell.density == pytest.approx(0.72)
    (told,) = words(read_lottery(run))
    assert told.startswith("imp: trains no dense network; the ticket that is best on validation data has 83.00 %")
    write_lottery(run)


def test_the_page_is_whole_escaped_and_the_same_twice(tmp_path: Path) -> None:
    run = folder(tmp_path)
    page = write_lottery(run).read_text()
    assert "made &lt;up&gt;" in page and "made <up>" not in page
    assert "&lt;b&gt;" in page and "<td><b></td>" not in page
    assert not re.search(r'(?:src|href)="https?:', page)
    assert page.count("<figure>") == 4
    before = {p.relative_to(run): p.read_bytes() for p in run.rglob("*") if p.is_file()}
    write_lottery(run)
    assert before == {p.relative_to(run): p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert (run / "figures" / "accuracy_by_density.png").read_bytes()[:4] == b"\x89PNG"
    assert (run / "tables" / "arms.csv").read_text().startswith("arm,round,density")
    assert "reinit" in lottery_text(run) and "shake: instability" in lottery_text(run)


@pytest.mark.parametrize("points", [1, 0])
def test_a_seed_that_diverged_has_a_shorter_curve(tmp_path: Path, points: int) -> None:
    def cut(row: dict[str, Any]) -> dict[str, Any]:
        here = (row.get("arm"), row.get("round"), row["seed"]) == ("imp", 1, 1)
        return row | {"curve": row["curve"][:points] or [[0, 2.3, 0.1]], "diverged": True} if here else row

    write_lottery(changed(folder(tmp_path), cut))
    assert "Diverged: imp at round 1 (1 of 2 seeds)" in lottery_text(tmp_path)


def test_an_unfinished_study_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    with pytest.raises(StudyError, match="results.jsonl"):
        write_lottery(tmp_path)


def test_an_empty_layer_raises_the_alarm_once_an_arm(tmp_path: Path) -> None:
    run = folder(tmp_path)
    assert alarms(read_lottery(run)) == []

    def emptied(row: dict[str, Any]) -> dict[str, Any]:
        empty = row.get("round", 0) >= 1 and row["arm"] == "imp"
        return row | {"layer_kept": {"a": row["kept"], "b": int(row["seed"] == 0)}} if empty else row

    (told,) = alarms(read_lottery(changed(run, emptied)))
    assert "imp at density 0.8 has nothing left in b" in told and "compression of 50 " in told
