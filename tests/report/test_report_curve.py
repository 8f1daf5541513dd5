"""The report of a curve: last, best on validation, best on test as an audit; and totals that are without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_run import message, write_rows, write_run

from fedlth.report import read_results, summary_text, write_report
from fedlth.report.accounting import account, account_json, account_text
from fedlth.report.curve import curve_table, curves_of, inflation
from fedlth.report.curve_figure import curve_picture
from fedlth.report.facts import read_run
from fedlth.report.tables import WIDTH, aligned
from fedlth.storage.typed_record import as_record

# After rounds 4, 9, ..., 29: the best on validation is the third, the best on test the fourth; the last is worse.
VAL = (0.3, 0.5, 0.66, 0.62, 0.6, 0.6)
TEST = (0.31, 0.5, 0.6, 0.7, 0.62, 0.58)


def curved(folder: Path, *, seed: int = 0, owns: bool = True, kept: str = "", lost: int = 0) -> Path:
    """Write a made-up run with a curve of six evaluations of twenty clients, two of them unseen."""
    run = write_run(folder, seed=seed)
    rounds = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    curve: list[dict[str, Any]] = []
    told, ledger = [], []
    for row in rounds:
        told.append(row)
        number, rest = divmod(row["round"] + 1, 5)
        if rest:
            continue
        failed = [{"client": 0, "kind": "lost", "reason": ""}] * lost
        told.append({"round": row["round"] + 1, "phase": "evaluate", "clients": list(range(20)), "up_bytes": 2,
                     "down_bytes": 3, "failed": failed,
                     **({"kept_best": kept} if kept and number == 6 else {})})  # fmt: skip
        for client in range(20):
            ledger.append(as_record(message(row["round"] + 1, "server", f"client:{client}", 80_000, kind="evaluation",
                                            phase="evaluate", broadcast=True)))  # fmt: skip
            for arm in ("global", "own") if owns else ("global",):
                more = (0.1 if arm == "own" else 0) + (client % 3 - 1) * 0.05 + seed * 0.01
                curve.append({"round": row["round"], "phase": "federate", "client": client, "unseen": client >= 18,
                              "arm": arm, "density": 1.0, "val_accuracy": VAL[number - 1] + more,
                              "test_accuracy": TEST[number - 1] + more, "val_loss": 1.0, "test_loss": 1.0, "num_val": 9,
                              "num_test": 9})  # fmt: skip
    write_rows(run / "rounds.jsonl", told)
    write_rows(run / "curve.jsonl", curve)
    with (run / "ledger.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in ledger)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return curved(tmp_path_factory.mktemp("curve") / "run")


def test_the_table_has_last_best_and_audit(run: Path) -> None:
    table = curve_table(read_results(run))
    assert [row[:5] for row in table.rows if row[0] == "global model"] == [
        ("global model", "the last", "30", "60.0", "58.0"),
        ("global model", "best on validation", "15", "66.0", "60.0"),
        ("global model", "best on test (audit)", "20", "62.0", "70.0"),
    ]
    assert {row[0] for row in table.rows} == {"global model", "method's own"}
    assert table.rows[-1][5] == "67.5", "the unseen clients stand apart"


def test_the_sentence_says_how_much_an_audit_inflates(run: Path) -> None:
    text = inflation(read_results(run))
    assert "58.0 % mean test accuracy after the last round, and 60.0 % at the round that validation data choose" in text
    assert "70.0 %: that is an audit and no result" in text
    assert "inflated by 12.0 points over the last round, and by 10.0 over the choice on validation" in text
    assert "Step 2 began" not in text


def test_totals_are_without_the_evaluations(run: Path, tmp_path: Path) -> None:
    plain = write_run(tmp_path / "plain")
    ours, theirs = (account_json(account(read_run(out))) for out in (run, plain))
    assert ours.pop("evaluation") == {
        "messages": 120, "up_bytes": 0, "down_bytes": 9_600_000, "between_bytes": 0, "total_bytes": 9_600_000,
    }  # fmt: skip
    assert theirs.pop("evaluation")["messages"] == 0
    assert {k: v for k, v in ours.items() if k != "run"} == {k: v for k, v in theirs.items() if k != "run"}
    assert "beside all: evaluation between rounds" in account_text(account(read_run(run)))
    assert "evaluation between rounds" not in account_text(account(read_run(plain)))
    bytes_of = [one.unicast for one in read_results(run).traffics]
    assert bytes_of == [one.unicast for one in read_results(plain).traffics]


def test_the_page_has_table_picture_and_words(tmp_path: Path) -> None:
    run = curved(tmp_path / "run", kept="federate 14", lost=1)
    write_report(run)
    page = (run / "report.html").read_text()
    assert 'id="curve"' in page and "best on test (audit)" in page and "between the rounds, for the curve alone" in page
    assert "Step 2 began with the model that was best on validation data: federate 14." in page
    assert "6 evaluations between the rounds failed" in page
    assert (run / "figures" / "accuracy_curve.png").exists() and (run / "tables" / "curve.csv").exists()
    text = summary_text(read_results(run))
    assert "best on validation" in text and "that is an audit and no result" in text
    assert max(map(len, aligned(curve_table(read_results(run))).splitlines())) <= WIDTH


def test_a_run_without_a_curve_says_nothing_of_one(fake: Path) -> None:
    results = read_results(fake)
    assert curve_picture(results) is None and inflation(results) == "" and not any(curves_of(results))
    assert "evaluation between" not in summary_text(results)


def test_seeds_choose_each_for_itself(tmp_path: Path) -> None:
    for seed in (0, 1):
        curved(tmp_path / f"seed-{seed}", seed=seed, owns=False, kept="federate 14" if seed else "")
    results = read_results(tmp_path)
    assert curve_table(results).rows[0][:5] == ("global model", "the last", "30", "60.5", "58.5")
    assert "federate 14 (seed 1)" in inflation(results)
    picture = curve_picture(results)
    assert picture is not None and "one line a seed" in picture.guide


def test_bytes_and_rounds_are_those_of_the_training(run: Path) -> None:
    ((_, held),) = curves_of(read_results(run))
    assert [point.rounds for point in held.points] == [5, 10, 15, 20, 25, 30]
    moved = [one.cumulative_bytes for one in read_results(run).traffics[0].by_round]
    assert [point.total_bytes for point in held.points] == moved[4:30:5]


def test_simulated_time_is_a_third_axis_where_the_rounds_have_it(tmp_path: Path) -> None:
    run = curved(tmp_path / "run")
    picture = curve_picture(read_results(run))
    assert picture is not None and len(picture.draw.axes) == 2
    rows = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    write_rows(run / "rounds.jsonl", [{**row, "simulated_s": 2.5} for row in rows])
    picture = curve_picture(read_results(run))
    assert picture is not None and [label for label, _ in picture.draw.axes][2] == "simulated time (s)"
    ((_, held),) = curves_of(read_results(run))
    assert [point.simulated_s for point in held.points] == [12.5 * i for i in range(1, 7)]


def test_a_client_that_never_answered_gives_no_point(tmp_path: Path) -> None:
    run = curved(tmp_path / "run", owns=False)
    rows = [json.loads(line) for line in (run / "curve.jsonl").read_text().splitlines()]
    write_rows(run / "curve.jsonl", [r for r in rows if r["unseen"] or (r["round"] != 14 and r["client"] != 3)] + [
        r for r in rows if r["round"] == 9 and r["client"] == 3])  # fmt: skip
    ((held,),) = curves_of(read_results(run))
    assert len(held.points) == 5 and held.chosen()["best on validation"].rounds == 10, "where all answered"
