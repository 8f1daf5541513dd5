"""The matrix as one whole: stops, failures, changes, controls, the tuning budget."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest
import tiny_bench

from fedlth.bench import forecast
from fedlth.bench.controls import kinds_of, with_controls
from fedlth.bench.matrix import load, merged, stored
from fedlth.bench.outcome import read_outcome
from fedlth.errors import StudyError
from fedlth.experiment.effects import check_arms
from fedlth.experiment.experiment import Experiment, method_of
from fedlth.experiment.resolve import read
from fedlth.output import lines_to
from fedlth.storage.header import read_header
from fedlth.storage.run_folder import RunFolder
from tests import tiny

# But for the one of `whole`, which is made before.
pytestmark = pytest.mark.usefixtures("unpainted")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny bench, run without a stop."""
    folder = tmp_path_factory.mktemp("whole")
    return tiny_bench.run(tiny_bench.write(folder), folder / "out")


def rows(root: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((root / "leaderboard.csv").read_text().splitlines()))


def test_every_cell_is_an_ordinary_run_and_local_is_added(whole: Path) -> None:
    cells = {str(file.parent.relative_to(whole)) for file in whole.glob("*/*/*/header.json")}
    methods, partitions = ("fedavg", "lotteryfl", "local"), ("iid", "skewed")
    assert cells == {f"{p}/{m}/{seed}" for p in partitions for m in methods for seed in (0, 1)}
    assert all(read_header(whole / cell).finished for cell in cells)
    assert {(row["partition"], row["method"]) for row in rows(whole)} == {(p, m) for p in partitions for m in methods}


def test_a_mask_stands_beside_its_controls(whole: Path) -> None:
    own = {row["row"]: row for row in rows(whole) if (row["partition"], row["method"]) == ("iid", "lotteryfl")}
    assert set(own) == {"own result", "random mask", "global model's mask", "dense twin"}
    density = own["own result"]["density_share"]
    assert own["random mask"]["density_share"] == own["global model's mask"]["density_share"] == density
    assert float(density) < 1 and own["dense twin"]["density_share"] == "1"
    assert own["own result"]["down_bytes"] and not own["random mask"]["down_bytes"]


def test_csv_columns_carry_units_and_name_no_clock(whole: Path) -> None:
    units = ("percent", "points", "bytes", "share", "flops", "epochs", "seconds", "_p", "_p_holm", "_and_visit")
    for name in rows(whole)[0]:
        words = ("partition", "method", "row", "arm", "metric", "seeds", "clients", "diverged_clients")
        assert name in words or name.endswith(units), name
    assert "wall_seconds,peak_memory_MB" in (whole / "cells.csv").read_text()
    assert float(rows(whole)[0]["mean_percent"]) > 1


def test_the_cost_of_a_method_is_without_what_judges_it(whole: Path) -> None:
    found = {row["method"]: row for row in rows(whole) if row["partition"] == "iid" and row["row"] == "own result"}
    moved = 0
    for seed in (0, 1):
        folder = RunFolder(whole / "iid" / "lotteryfl" / str(seed))
        ledger = [json.loads(line) for line in folder.log("ledger").read_text().splitlines()]
        moved += sum(
            row["payload_bytes"] for row in ledger if row["receiver"] != "server" and row["kind"] != "evaluation"
        )
        assert any(row["kind"] == "evaluation" for row in ledger)
    assert float(found["lotteryfl"]["down_bytes"]) == moved / 2
    assert float(found["local"]["down_bytes"]) == float(found["local"]["up_bytes"]) == 0
    assert 25 < float(found["fedavg"]["down_bits_per_number_and_visit"]) < 33
    assert float(found["fedavg"]["training_flops"]) > 0 and found["fedavg"]["round_epochs"] == "1"


def test_a_stop_in_the_middle_changes_no_byte(whole: Path, tmp_path: Path) -> None:
    file, stopped = tiny_bench.write(tmp_path), False

    def stop(line: str) -> None:
        nonlocal stopped
        if line.startswith("cell 4 of") and not stopped:
            stopped = True
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), lines_to(stop):
        tiny_bench.run(file, tmp_path / "out")
    ended = [h for h in (tmp_path / "out" / "tiny").glob("*/*/*/header.json") if read_header(h.parent).finished]
    assert 3 <= len(ended) < 12
    partial = tiny_bench.run(file, tmp_path / "out", report_only=True)
    assert "cells have not ended" in (partial / "leaderboard.html").read_text()
    root = tiny_bench.run(file, tmp_path / "out")
    assert (root / "leaderboard.csv").read_bytes() == (whole / "leaderboard.csv").read_bytes()
    before = {one: one.stat().st_mtime_ns for one in root.glob("*/*/*/ledger.jsonl")}
    lines: list[str] = []
    with lines_to(lines.append):
        tiny_bench.run(file, tmp_path / "out")
    assert before == {one: one.stat().st_mtime_ns for one in root.glob("*/*/*/ledger.jsonl")} and not lines


def test_a_failed_cell_costs_itself_and_is_shown(tmp_path: Path) -> None:
    broken = {"name": "fedavg", "sections": {"partition": "natural"}}
    file = tiny_bench.write(
        tmp_path, methods={"fedavg": {}, "broken": broken}, partitions={"iid": {}}, seeds=[0, 1], parallel=1
    )
    root = tiny_bench.run(file, tmp_path / "out")
    failed = read_outcome(root / "iid" / "broken" / "0")
    assert failed.status == "failed" and "natural keys" in failed.reason
    assert {row["method"] for row in rows(root)} == {"fedavg", "local"}
    page = (root / "leaderboard.html").read_text()
    assert "iid/broken/0 and iid/broken/1 failed: partition: natural must have" in page


def test_a_cells_log_has_each_line_once(tmp_path: Path) -> None:
    file = tiny_bench.write(tmp_path, methods={}, partitions={"iid": {}}, seeds=[0])
    with lines_to(lambda line: os.write(2, f"{line}\n".encode())):  # as the command line's own lines go to the terminal
        folder = tiny_bench.run(file, tmp_path / "out")
    lines = (folder / "iid" / "local" / "0" / "log.txt").read_text().splitlines()
    assert len(lines) == len(set(lines)) > 1


def test_a_text_of_a_run_is_escaped(whole: Path) -> None:
    file = whole / "iid" / "fedavg" / "7" / "outcome.json"
    assert not file.exists()
    matrix = load(tiny_bench.write(whole.parent / "more", seeds=[0, 1, 7]))
    file.parent.mkdir()
    file.write_text(json.dumps({"status": "failed", "reason": "<script>alert(1)</script>"}))
    from fedlth.bench.leaderboard import write_leaderboard

    kept = (whole / "leaderboard.csv").read_bytes()
    page, _ = write_leaderboard(matrix, whole)
    text = page.read_text()
    file.unlink()
    assert "<script" not in text and "&lt;script&gt;alert(1)" in text
    assert (whole / "leaderboard.csv").read_bytes() == kept


def test_what_exists_is_not_mixed_with_another_study(whole: Path, tmp_path: Path) -> None:
    changed = {**tiny_bench.STUDY, "train": {**tiny_bench.STUDY["train"], "lr": 0.2}}
    with pytest.raises(StudyError, match=r"begun with another study: train.lr: 0.1 -> 0.2"):
        tiny_bench.run(tiny_bench.write(tmp_path, study=changed), whole.parent)
    # More methods, partitions and seeds, or another engine's settings, touch no cell that exists.
    more = tiny_bench.write(tmp_path, study={**tiny_bench.STUDY, "workers": 2}, seeds=[0, 1, 2])
    tiny_bench.run(more, whole.parent, dry_run=True, only="seed=2,method=local")


@pytest.mark.parametrize("seeds", ["first", "all"])
def test_the_tuning_budget_is_equal_and_published(tmp_path: Path, seeds: str) -> None:
    file = tiny_bench.write(
        tmp_path, methods={"lotteryfl": tiny_bench.tree()["methods"]["lotteryfl"]}, partitions={"iid": {}},
        tune={"lr": [0.001, 0.1], "rounds": 1, "seeds": seeds}, parallel=1,
    )  # fmt: skip
    root = tiny_bench.run(file, tmp_path / "out", only="method=lotteryfl")
    folder = root / "iid" / "lotteryfl"
    places = [folder] if seeds == "first" else [folder / "0", folder / "1"]
    assert sorted(p.parent.parent for p in folder.rglob("chosen.json")) == places
    rates = {RunFolder(folder / seed).study().train.lr for seed in ("0", "1")}
    assert rates <= {0.001, 0.1} and (seeds == "all" or len(rates) == 1)
    table = list(csv.DictReader((root / "tuning.csv").read_text().splitlines()))
    told = ["first"] if seeds == "first" else ["0", "1"]
    assert [(row["seed"], row["lr"]) for row in table] == [(seed, lr) for seed in told for lr in ("0.001", "0.1")]
    assert all(0 <= float(row["validation_accuracy_percent"]) <= 100 for row in table)
    assert all(int(row["trial_bytes"]) > 0 for row in table) and sum(int(row["chosen"]) for row in table) == len(places)
    trials = [RunFolder(file.parent).study() for file in folder.rglob("tune/*/config.yaml")]
    assert trials and {one.personalise.arms for one in trials} == {("own_tuned",)}


def controls(**of: str) -> dict[str, Any]:
    """Return rows of LotteryFL with a random score, each the control of the row that is given."""
    own = tiny.METHODS["lotteryfl"]
    rows = {row: {"name": "lotteryfl", **own, "score": "random", "control_of": one} for row, one in of.items()}
    return {"methods": {"fedavg": {}, "lotteryfl": own, **rows}}


def test_a_control_is_a_row_that_is_not_ranked_and_changes_no_cell(tmp_path: Path) -> None:
    made = controls(by="lotteryfl")
    matrix = load(tiny_bench.write(tmp_path / "with", **made))
    del made["methods"]["by"]["control_of"]
    plain = load(tiny_bench.write(tmp_path / "without", **made))
    assert matrix.cells == plain.cells and set(plain.ranked) == {*matrix.ranked, "by"}
    assert matrix.control_of == {"by": "lotteryfl"} and matrix.ranked == ("fedavg", "lotteryfl", "local")
    assert stored(matrix.text()).control_of == matrix.control_of
    assert matrix.label_of("lotteryfl") == "lotteryfl" and matrix.label_of("by") is None


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"methods": {"fedavgg": {}}}, "fedavgg"),
        ({"seeds": []}, "seeds must be at least one"),
        ({"partitions": {"a/b": {}}}, "a name must be letters"),
        ({"partitions": {"iid": {"seed": 3}}}, "partitions.iid.seed: is decided by the bench"),
        ({"methods": {"fedavg": {"sections": {"tune": {"lr": [0.1]}}}}}, "must try as many rates"),
        ({"matrix": 1}, "bench.yaml: matrix: unknown key"),
        ({"methods": {"local": {"name": "fedavg"}}}, "methods.local.name must be local: .* got 'fedavg'"),
        ({"against": ["fedavgg"]}, "against must be names of fedavg, lotteryfl, local, .* got 'fedavgg'"),
        ({"study": {**tiny_bench.STUDY, "trian": {}}}, "trian: unknown key"),
        (
            controls(by="lotterfl"),
            "methods.by.control_of must be another row .* of fedavg, lotteryfl, local, got 'lott",
        ),
        (controls(by="by"), "methods.by.control_of must be another row that is no control itself, .* got 'by'"),
        (controls(by="lotteryfl", of="by"), "methods.of.control_of must be another row .* got 'by'"),
        (
            controls(by="fedavg"),
            "control_of must be a row of the same method, lotteryfl, got 'fedavg, which is fedavg'",
        ),
        (
            {"methods": {"fedavg": {}, "by": {"name": "fedavg", "control_of": "fedavg"}}},
            r"methods.by.control_of: must differ from fedavg in an option",
        ),
        ({**controls(by="lotteryfl"), "against": ["by"]}, "against must be names of fedavg, lotteryfl, local, .* 'by'"),
    ],
)
def test_a_bench_that_cannot_be_is_refused(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        load(tiny_bench.write(tmp_path, **sections))


@pytest.mark.parametrize("name", sorted(tiny.METHODS))
def test_whoever_makes_masks_has_controls_that_it_can_have(name: str) -> None:
    made = with_controls(tiny.of_method(name))
    method = method_of(made)
    check_arms(made, method, read(made)[0].arms)
    arms, masks = set(read(made)[0].arms), {"ticket", "own_random", "frozen_random"} & set(method.arms)
    assert arms >= set(method.arms) and (arms == set(method.arms) or masks)
    if "ticket" in masks:
        assert arms >= {"random", "dense", "dense_total"} and ("global_mask" in arms) == bool(method.phases)
    if "own_random" in masks:
        assert "dense" in arms and ("own_global_mask" in arms) == method.has_whole
    assert ("global" in kinds_of(made)) == (method.space.kind == "scores"), "what clients share is a mask itself"
    # FedSelect's masks say what crosses, in every round: its random control is a row of its own.
    assert masks or not method.own_masks or name == "fedselect"


def test_only_names_what_is_there(tmp_path: Path) -> None:
    file = tiny_bench.write(tmp_path)
    with pytest.raises(StudyError, match=r"--only method must be one of fedavg, lotteryfl, local, got 'ditto'"):
        tiny_bench.run(file, tmp_path / "out", only="method=ditto", dry_run=True)


@pytest.mark.parametrize("only", ["", "seed=0,"])
def test_nothing_is_no_choice(tmp_path: Path, only: str) -> None:
    with pytest.raises(StudyError, match="--only must be method=NAME"):
        tiny_bench.run(tiny_bench.write(tmp_path), tmp_path / "out", only=only, dry_run=True)


def test_a_forecast_and_a_report_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="exclude each other"):
        tiny_bench.run(tiny_bench.write(tmp_path), tmp_path / "out", dry_run=True, report_only=True)


def test_a_forecast_of_nothing_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    natural = {"natural": {"partition": "natural"}}
    lines: list[str] = []
    with lines_to(lines.append), pytest.raises(StudyError, match="nothing could be forecast: partition: natural"):
        tiny_bench.run(tiny_bench.write(tmp_path, partitions=natural), tmp_path / "out", dry_run=True)
    told = capsys.readouterr().out
    assert told.count("natural must have") == 1 and "hours" not in told
    assert [line for line in lines if line.startswith("forecast 3 of 3: natural/")]


def test_a_forecast_is_kept_and_made_anew_for_what_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop in the middle of it keeps what was tried; a dry run leaves no folder."""
    cells, out = load(tiny_bench.write(tmp_path, seeds=[0, 1])).cells, tmp_path / "forecast.jsonl"
    lines: list[str] = []

    def stop(line: str) -> None:
        lines.append(line)
        if line.startswith("forecast 2 of 6"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), lines_to(stop):
        forecast.expect(cells, out)
    with out.open("a") as file:
        file.write('\n{"study": "a line that was cut')
    with lines_to(lines.append):
        first = forecast.expect(cells, out)
    assert [line.split(":")[0] for line in lines] == [f"forecast {k} of 6" for k in (1, 2, 2, 3, 4, 5, 6)]
    monkeypatch.setattr(forecast, "spawn", None)
    assert forecast.expect([cell for cell in cells if cell.seed == 1], out) == first, "any seed's serves"
    monkeypatch.undo()
    lines.clear()
    (longer,) = load(tiny_bench.write(tmp_path, methods={}, partitions={"iid": {"federate": {"rounds": 9}}})).firsts
    with lines_to(lines.append):
        forecast.expect([longer], out)
    assert lines == ["forecast 1 of 1: iid/local"]


def test_a_local_row_of_another_name_serves(tmp_path: Path) -> None:
    methods = {"fedavg": {}, "alone": {"name": "local"}}
    file = tiny_bench.write(tmp_path, methods=methods, partitions={"iid": {}}, seeds=[0])
    assert set(load(file).methods) == {"fedavg", "alone"}
    root = tiny_bench.run(file, tmp_path / "out")
    found = {row["method"]: row for row in rows(root)}
    assert found["fedavg"]["hurt_vs_local_percent"] and found["fedavg"]["vs_local_points"]


def test_local_trains_as_long_as_a_client_of_the_others(tmp_path: Path) -> None:
    """Two of three clients a round, two rounds: 4/3 visits of an epoch; three trainings of a search of two targets."""

    def local(**sections: Any) -> dict[str, Any]:
        cells = load(tiny_bench.write(tmp_path, **sections)).firsts
        assert all(c.study.finder.schedule["name"] == "iterative" for c in cells if c.method not in ("local", "alone"))
        study = next(c.study for c in cells if c.method in ("local", "alone"))
        again = Experiment.of(study)
        held = again.finder.trainings(study.finder.densities)[0]
        p = study.personalise
        return {"epochs": p.epochs and p.epochs * held, "steps": p.steps and p.steps * held}

    base = tiny_bench.STUDY
    assert local() == {"epochs": 5, "steps": None}  # 4/3 + 3, rounded up
    assert local(methods={"fedavg": {}, "alone": {"name": "local"}}) == {"epochs": 5, "steps": None}
    more = {"iid": {"federate": {"rounds": 20}}}
    assert local(partitions=more) == {"epochs": 17, "steps": None}
    steps = {**base, "train": {**base["train"], "steps": 6}, "personalise": {"steps": 4, "clients_per_wave": 2}}
    assert local(study=steps) == {"epochs": None, "steps": 20}  # 8 + 12
    mixed = {**base, "personalise": {"steps": 4, "clients_per_wave": 2}}
    assert local(study=mixed) == {"epochs": None, "steps": 12}
    for own in ({"personalise": {"epochs": 2}}, {"finder": {"densities": [0.5, 0.2]}}):
        epochs = 3 * own.get("personalise", base["personalise"])["epochs"]
        assert local(methods={"fedavg": {}, "local": {"sections": own}}) == {"epochs": epochs, "steps": None}


def test_the_cells_of_local_alone_are_of_that_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tiny_bench.write(tmp_path)
    new = [cell.study.science() for cell in load(file).cells if cell.method != "local"]
    monkeypatch.setattr("fedlth.bench.matrix.whole_length", lambda *_: {})
    assert new == [cell.study.science() for cell in load(file).cells if cell.method != "local"]


def test_local_had_as_many_epochs_as_it_was_to_have(whole: Path) -> None:
    found = {row["method"]: row for row in rows(whole) if row["partition"] == "iid" and row["row"] == "own result"}
    assert found["local"]["own_epochs"] == "5"
    said = (whole / "leaderboard.md").read_text()
    assert "local trained for 5 epochs a client, more than 2 of 2 federated methods" in said and "fewer" not in said


def test_a_method_that_cannot_do_what_it_is_for_is_named(tmp_path: Path) -> None:
    methods = {"sub_fedavg": tiny.METHODS["sub_fedavg"], "longer": {
        "name": "sub_fedavg", **tiny.METHODS["sub_fedavg"], "sections": {"train": {"epochs": 2}}
    }}  # fmt: skip
    file, lines = tiny_bench.write(tmp_path, methods=methods, partitions={"iid": {}}, seeds=[0]), list[str]()
    (tmp_path / "out" / "tiny").mkdir(parents=True)
    with lines_to(lines.append):
        root = tiny_bench.run(file, tmp_path / "out", report_only=True)
    why = "iid/sub_fedavg cannot do what the method is for: train.epochs: with 1, sub_fedavg's two masks"
    assert [line for line in lines if why in line] and why in (root / "leaderboard.md").read_text()
    assert not [line for line in lines if "longer" in line]


def test_a_section_is_merged_and_a_named_part_replaced() -> None:
    base = {"train": {"lr": 0.1, "epochs": 2}, "partition": {"name": "dirichlet", "alpha": 0.3}}
    found = merged(base, {"train": {"lr": 0.2}, "partition": {"name": "iid"}})
    assert found == {"train": {"lr": 0.2, "epochs": 2}, "partition": {"name": "iid"}}


@pytest.mark.parametrize("file", sorted((ROOT / "bench").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_bench_is_one(file: Path) -> None:
    matrix = load(file)
    assert matrix.name == file.stem and "local" in matrix.methods
    for cell in matrix.firsts:
        read(cell.study)
        if method_of(cell.study).name == "fedselect" and cell.method in matrix.ranked:
            assert cell.method in matrix.control_of.values(), "its random control is a row of the bench"
