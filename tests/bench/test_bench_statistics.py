"""Tests, ranks and words of a leaderboard, against numbers worked out by hand or printed in the paper."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_bench
from matplotlib.figure import Figure

from fedlth.bench.board import Board, read_board
from fedlth.bench.contrasts import NO_INTERVAL, contrast, corrected, over_seeds, paired_t
from fedlth.bench.controls import GLOBAL, RANDOM
from fedlth.bench.drawing import MARKS, stretch
from fedlth.bench.headline import _seen, headline, warnings
from fedlth.bench.leaderboard import write_leaderboard
from fedlth.bench.mask_picture import crossing, mask_lines, wins_below
from fedlth.bench.matrix import load
from fedlth.bench.pictures import Pareto, Rows, limits, numbers, pareto, pictures
from fedlth.bench.ranks import critical_difference, friedman, ranking
from fedlth.bench.tables import cost_table, leaderboard_csv, outcome_table, whole_table
from fedlth.bench.ticket_table import tickets_table
from fedlth.bench.time_to import time_to_worst
from fedlth.report.canvas import LIGHT
from fedlth.report.choice import Choice
from fedlth.report.facts import read_run
from fedlth.report.intervals import Interval
from fedlth.report.measure import Shown
from fedlth.report.tables import csv_text
from fedlth.storage.header import ACCURACY
from tests import tiny
from tests.report.fake_run import write_run

# Table 6 of Demsar, JMLR 2006: AUC of four variants of C4.5 on 14 data sets.
DEMSAR = {
    "C4.5": [.763, .599, .954, .628, .882, .936, .661, .583, .775, 1.0, .940, .619, .972, .957],
    "C4.5+m": [.768, .591, .971, .661, .888, .931, .668, .583, .838, 1.0, .962, .666, .981, .978],
    "C4.5+cf": [.771, .590, .968, .654, .886, .916, .609, .563, .866, 1.0, .965, .614, .9751, .946],
    "C4.5+m+cf": [.798, .569, .967, .657, .898, .931, .685, .625, .875, 1.0, .962, .669, .975, .970],
}  # fmt: skip


def test_ranks_and_critical_difference_are_demsars() -> None:
    scores = {name: {str(i): value for i, value in enumerate(values)} for name, values in DEMSAR.items()}
    found = ranking(scores, higher_is_better=True)
    assert found is not None and found.names == ("C4.5+m+cf", "C4.5+m", "C4.5+cf", "C4.5")
    np.testing.assert_allclose(found.ranks, (1.964, 2.000, 2.893, 3.143), atol=5e-4)
    assert found.critical == pytest.approx(1.25, abs=0.005)  # printed there
    assert found.groups == ((0, 3),)  # 3.143 - 1.964 < 1.25: Nemenyi tells none apart
    assert friedman((3.143, 2.000, 2.893, 1.964), 14) == pytest.approx(0.0197, abs=5e-4)  # F(3, 39) = 3.69


def test_the_critical_difference_by_hand() -> None:
    assert critical_difference(3, 4) == pytest.approx(2.343 * (12 / 24) ** 0.5, abs=1e-3)  # q of Demsar's table 5
    assert critical_difference(2, 10) == pytest.approx(1.960 * (6 / 60) ** 0.5, abs=1e-3)
    assert friedman((1.0, 2.0), 5) == 0.0  # every block agrees


def test_ties_share_ranks_and_lower_can_be_better() -> None:
    scores = {"a": {"1": 0.5, "2": 0.1}, "b": {"1": 0.5, "2": 0.2}, "c": {"1": 0.9, "2": 0.3, "3": 1.0}}
    found = ranking(scores, higher_is_better=False)
    assert found is not None and (found.names, found.ranks) == (("a", "b", "c"), (1.25, 1.75, 3.0))
    assert found.blocks == ("1", "2")
    assert 0.1 + 0.2 > 0.3 and 0.1 + 0.7 < 0.8  # equal accuracies, summed in another order
    one, other = {"1": 0.1 + 0.2, "2": 0.8}, {"1": 0.3, "2": 0.1 + 0.7}
    level = ranking({"a": one, "b": other}, higher_is_better=True)
    assert level is not None and level.ranks == (1.5, 1.5)
    assert ranking({"a": {"1": 0.5}, "b": {"1": 0.2}}, higher_is_better=True) is None


def test_a_paired_t_over_seeds_by_hand() -> None:
    found, p = paired_t(np.array([1.0, 2.0, 3.0]))  # mean 2, sd 1, t = 2 sqrt 3 with 2 degrees of freedom
    assert p == pytest.approx(0.0742, abs=1e-4)
    assert (found.low, found.high) == pytest.approx((2 - 2.4841, 2 + 2.4841), abs=1e-3)
    # without a spread over seeds there is nothing to test by
    assert paired_t(np.zeros(3))[1] is None and paired_t(np.ones(3))[1] is None
    level = corrected({"a": contrast([np.ones(4)] * 3, better=True)})["a"]
    assert level.level and not level.tested and level.verdict == "(ahead)"


def test_clients_are_never_the_unit_of_a_test() -> None:
    """A thousand clients that all gain in one seed and all lose in the next say nothing for certain."""
    samples = [np.full(1000, 0.10), np.full(1000, -0.05), np.full(1000, 0.02)]
    found = corrected({"a": contrast(samples, better=True)})["a"]
    assert found.p_holm is not None and found.p_holm > 0.5 and found.verdict == "no clear difference"
    assert found.hurt == pytest.approx(1 / 3) and found.num_pairs == 3000
    few = corrected({"a": contrast(samples[:1] * 2, better=True)})["a"]
    assert few.p_value is None and few.verdict == "(ahead)"  # said in brackets: no test stands behind it


def test_holm_over_methods_by_hand() -> None:
    means = {"a": (0.9, 1.0, 1.1), "b": (0.5, 1.0, 1.5), "c": (0.1, 1.0, 1.9)}
    family = {name: contrast([np.full(2, value) for value in values], better=True) for name, values in means.items()}
    found = corrected({**family, "none": None})
    p = {name: one.p_value or 0.0 for name, one in found.items()}
    assert p["a"] < p["b"] < p["c"] and "none" not in found
    assert found["a"].p_holm == pytest.approx(3 * p["a"])
    assert found["b"].p_holm == pytest.approx(max(3 * p["a"], 2 * p["b"]))
    assert found["c"].p_holm == pytest.approx(max(3 * p["a"], 2 * p["b"], p["c"]))


def test_the_pareto_front() -> None:
    cost = {"local": 0.0, "small": 1.0, "bad": 2.0, "best": 3.0, "same": 3.0}
    value = {"local": 0.5, "small": 0.7, "bad": 0.6, "best": 0.9, "same": 0.8}
    assert pareto(cost, value, higher_is_better=True) == ["local", "small", "best"]
    assert pareto(cost, value, higher_is_better=False) == ["local"]


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bench of made-up runs, every arm in each, in which all methods have equal results: its file and its folder."""
    folder = tmp_path_factory.mktemp("made_up")
    methods = {"fedavg": {}, "two_step": {}, "local": {}}
    file = tiny_bench.write(folder, methods=methods, partitions={"iid": {}}, seeds=[0, 1, 2])
    for method in methods:
        for seed in range(3):
            write_run(folder / "tiny" / "iid" / method / str(seed), seed=seed, num_clients=10, rounds=4, method=method)
    return file, folder / "tiny"


@pytest.fixture(scope="module")
def board(made_up: tuple[Path, Path]) -> Board:
    """The made-up bench, read once for the tests that leave it as it is."""
    return read_board(load(made_up[0]), made_up[1])


def test_the_words_say_when_federation_did_not_help(board: Board) -> None:
    said = headline(board)["iid"]
    # local itself is no federated method
    assert "Federation did not help here: none of 2 federated methods has a better mean than training alone" in said
    assert "Better than a random mask of the same density (paired t over 3 seeds, Holm, 5 %)" in said
    contrasts = board.contrasts("iid", "local")
    assert {one.verdict for one in contrasts.values()} == {"(no clear difference)"}
    assert any("untested, since all seeds differ by exactly the same: fedavg less" in one for one in warnings(board))
    assert any("sees large differences only" in line for line in warnings(board))


def test_only_who_has_all_seeds_is_the_best(made_up: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(made_up[1], tmp_path / "tiny")
    for seed in (1, 2):
        shutil.rmtree(tmp_path / "tiny" / "iid" / "two_step" / str(seed))
    board = read_board(load(made_up[0]), tmp_path / "tiny")
    said, order = headline(board)["iid"], [line.method for line in board.lines["iid"] if not line.control]
    assert order[-1] == "two_step" and said.startswith(f"{order[0]} has the best mean test accuracy of the 2 methods")
    assert any(row[1].endswith("(1 of 3 seeds)") for row in outcome_table(board, "iid").rows)
    assert "two_step: untested, 1 seed" in said
    assert "it does not matter" not in said
    assert list(numbers(board)) == order


def test_a_difference_that_would_have_been_seen() -> None:
    found = corrected({"a": contrast([np.full(2, value) for value in (1.0, 2.0, 3.0)], better=True)})["a"]
    # t of two degrees of freedom times sd / sqrt 3: 4.3027 at 5 %, 6.2053 at 2.5 %
    assert found.seen(1) == pytest.approx(4.3027 / 3**0.5, abs=1e-3)
    assert found.seen(2) == pytest.approx(6.2053 / 3**0.5, abs=1e-3)


def test_a_difference_that_cannot_be_would_not_have_been_seen() -> None:
    shown = Shown(ACCURACY)
    near = contrast([np.full(2, value) for value in (0.01, 0.02, 0.03)], better=True)
    far = contrast([np.full(2, value) for value in (-0.9, 0.0, 0.9)], better=True)
    tested = corrected({"a": near, "b": far})
    near, far = tested["a"], tested["b"]
    assert _seen(shown, {"a": near}, 1) == "; a difference of 2.5 points would have been clear"
    assert _seen(shown, {"a": near, "b": far}, 1) == "; a difference of 2.5 points would have been clear, for b none"
    assert "for any difference" in _seen(shown, {"b": far}, 1)


def test_one_mask_for_all_is_not_held_against_itself(made_up: tuple[Path, Path]) -> None:
    board = read_board(load(made_up[0]), made_up[1])
    entry = board.entries["iid"]["two_step"]
    assert not entry.one_mask and "two_step" in board.beaten("iid", GLOBAL)
    entry.__dict__["one_mask"] = True
    assert "two_step" not in board.beaten("iid", GLOBAL) and not any(
        line.method == "two_step" for line in mask_lines(board)
    )
    assert any(row[1] == "global model's mask: the same mask" for row in outcome_table(board, "iid").rows)


@pytest.mark.parametrize("digest", ["a", "b"])
def test_one_mask_for_all_is_the_global_models_where_the_digests_say_so(digest: str, tmp_path: Path) -> None:
    """PruneFL's clients share one mask, of which the last readjustment has revived weights that are still zero."""
    methods = {"fedavg": {}, "prunefl": {}, "local": {}}
    file = tiny_bench.write(tmp_path, methods=methods, partitions={"iid": {}}, seeds=[0, 1, 2])
    for method in methods:
        for seed in range(3):
            place = tmp_path / "tiny" / "iid" / method / str(seed)
            run = write_run(place, seed=seed, num_clients=10, rounds=4, method=method)
            if method == "prunefl":  # equally dense in every layer, whatever the mask
                prune_in_rounds(run, 0.01 * seed, own_tuned="a", own_global_mask=digest, own_random="c")
    board = read_board(load(file), tmp_path / "tiny")
    entry = board.entries["iid"]["prunefl"]
    assert entry.choice.arm == "own_tuned" and entry.one_mask == (digest == "a")
    assert ("prunefl" in board.beaten("iid", GLOBAL)) == (digest == "b")
    (told,) = (row[1] for row in outcome_table(board, "iid").rows if row[1].startswith(GLOBAL) and "seen" in row[1])
    assert (told == f"{GLOBAL}: the same mask (seen clients)") == (digest == "a")


def rewritten(made_up: tuple[Path, Path], folder: Path, change: Callable[[str, int, dict[str, Any]], None]) -> Board:
    """Return the made-up bench after `change(method, seed, row)` of every metric row, in a copy."""
    shutil.copytree(made_up[1], folder / "tiny")
    for file in sorted((folder / "tiny" / "iid").glob("*/*/metrics.jsonl")):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for row in rows:
            change(file.parent.parent.name, int(file.parent.name), row)
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return read_board(load(made_up[0]), folder / "tiny")


def test_who_is_worse_is_said_to_be_and_not_among_the_undecided(made_up: tuple[Path, Path], tmp_path: Path) -> None:
    def change(method: str, seed: int, row: dict[str, Any]) -> None:
        if (row["arm"], row["target_density"]) != ("ticket", 0.2):
            return
        value = row["test_accuracy"]
        shift = {"fedavg": -0.3 - 0.001 * seed, "two_step": (0.01, -0.005, 0.02)[seed]}.get(method, 0.0)
        row["test_accuracy"] = float(np.clip(value + shift, 0, 1))

    board = rewritten(made_up, tmp_path, change)
    said = headline(board)["iid"]
    assert "Federation is not shown to help here" in said and "the largest gain is two_step's, +0." in said
    assert "Worse than training alone (local) (paired t over 3 seeds, Holm, 5 %), in points: fedavg by −30." in said
    random = board.beaten("iid", RANDOM)
    assert random["fedavg"].behind and random["two_step"].ahead
    (worse,) = (one for one in said.split(". ") if one.startswith("Worse than a random mask"))
    assert worse.startswith(
        "Worse than a random mask of the same density (paired t over 3 seeds, Holm, 5 %), in points:"
    )
    assert "fedavg by −" in worse and "is not shown to beat a random mask" not in said
    (undecided,) = (one for one in said.split(". ") if "not shown to beat the global model's own mask" in one)
    assert board.beaten("iid", GLOBAL)["fedavg"].behind and "two_step" in undecided and "fedavg" not in undecided


def test_every_diverged_training_is_told(made_up: tuple[Path, Path], tmp_path: Path) -> None:
    def change(method: str, seed: int, row: dict[str, Any]) -> None:
        place = method, seed, row["arm"], row["target_density"]
        if place in (("two_step", 0, "dense", 1), ("two_step", 1, "global_mask", 0.2), ("fedavg", 0, "ticket", 0.2)):
            row["diverged"] = row["client"] < (2 if row["arm"] == "ticket" else 1)

    told = [line for line in warnings(rewritten(made_up, tmp_path, change)) if "diverged" in line]
    assert sorted(told) == [
        "iid/fedavg: the training of 2 clients diverged; each is a guess.",
        "iid/two_step, its dense twin (arm dense): the training of 1 client diverged; it is a guess.",
        "iid/two_step, its global model's mask (arm global_mask): the training of 1 client diverged; it is a guess.",
    ]


@pytest.fixture(scope="module")
def with_row(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bench of made-up runs in which one row is the control of another: its file and its folder."""
    folder = tmp_path_factory.mktemp("with_row")
    by = {"name": "fedselect", "score": "random", "control_of": "fedselect"}
    methods = {"fedavg": {}, "fedselect": {}, "by_chance": by, "local": {}}
    file = tiny_bench.write(folder, methods=methods, partitions={"iid": {}}, seeds=[0, 1, 2])
    for shift, method in enumerate(methods):
        for seed in range(3):
            place = folder / "tiny" / "iid" / method / str(seed)
            write_run(place, seed=seed + 10 * shift, num_clients=10, rounds=4, method=method)
            header = place / "header.json"
            header.write_text(json.dumps({**json.loads(header.read_text()), "seed": seed}))
            if method in ("fedselect", "by_chance"):  # models of all weights, as FedSelect's are
                rows = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
                kept = [{**row, "arm": "own_tuned" if row["arm"] == "global" else row["arm"]} for row in rows
                        if row["arm"] in ("global", "dense", "local")]  # fmt: skip
                (place / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in kept))
    return file, folder / "tiny"


def test_a_row_that_is_a_control_stands_under_its_method_and_competes_with_none(with_row: tuple[Path, Path]) -> None:
    matrix = load(with_row[0])
    board = read_board(matrix, with_row[1])
    held = board.entries["iid"]
    assert set(held) == {"fedavg", "fedselect", "local"} == set(board.ranking.names if board.ranking else ())
    assert set(board.contrasts("iid", "local")) == {"fedavg", "fedselect"}
    lines = [(line.control, line.row) for line in board.lines["iid"] if line.method == "fedselect"]
    assert lines == [("", ""), ("dense twin", ""), ("random mask", "by_chance")]
    entry, other = held["fedselect"], held["fedselect"].beside["by_chance"]
    assert entry.choice.arm == other.choice.arm == "own_tuned"
    gap = board.beaten("iid", RANDOM)["fedselect (against by_chance)"]
    ours, its = (np.mean(list(one.blocks(one.choice).values())) for one in (entry, other))  # of the seen clients
    assert gap.mean == pytest.approx(ours - its) and gap.mean != 0 and gap.num_seeds == 3
    assert "fedselect (against by_chance)" in headline(board)["iid"]
    outcome, cost = outcome_table(board, "iid"), cost_table(board, "iid")
    (row,) = [row for row in outcome.rows if row[0] == "by_chance"]
    assert row[1].startswith("random mask: ") and [row[0] for row in cost.rows].count("by_chance") == 1
    rows = {row["row"]: row for row in csv.DictReader(leaderboard_csv(board).splitlines())
            if row["method"] == "fedselect"}  # fmt: skip
    assert float(rows["random mask: by_chance"]["down_bytes"]) == pytest.approx(other.cost.down_bytes)
    assert not rows["dense twin"]["down_bytes"] and not any(row["method"] == "by_chance" for row in rows.values())
    figure = Figure()
    Pareto(board, "iid")(figure, LIGHT)
    drawn = [float(mark.get_ydata()[0]) for mark in figure.axes[0].lines if mark.get_marker() == MARKS[RANDOM][0]]
    assert pytest.approx(100 * (np.mean(list(entry.blocks().values())) - gap.mean)) in drawn


def test_masks_without_any_random_control_are_told(with_row: tuple[Path, Path], tmp_path: Path) -> None:
    told = "makes masks, but no random mask stands beside it"
    assert not any(told in line for line in warnings(read_board(load(with_row[0]), with_row[1])))
    shutil.copytree(with_row[1], tmp_path / "tiny")
    shutil.rmtree(tmp_path / "tiny" / "iid" / "by_chance")
    found = [line for line in warnings(read_board(load(with_row[0]), tmp_path / "tiny")) if told in line]
    assert found == [f"iid/fedselect {told}."]
    file = tmp_path / "tiny" / "iid" / "fedselect" / "1" / "metrics.jsonl"
    file.write_text("".join(f"{line}\n" for line in file.read_text().splitlines() if '"dense"' not in line))
    (lacks,) = (line for line in read_board(load(with_row[0]), tmp_path / "tiny").problems if "has no" in line)
    assert lacks.startswith("iid/fedselect has no dense twin (arm dense) in seeds 1, which were run before")
    shutil.rmtree(tmp_path / "tiny" / "iid" / "fedselect")
    shutil.copytree(with_row[1] / "iid" / "by_chance", tmp_path / "tiny" / "iid" / "by_chance")
    board = read_board(load(with_row[0]), tmp_path / "tiny")
    assert "iid/by_chance is left out: nothing of fedselect has ended" in board.problems
    assert set(board.entries["iid"]) == {"fedavg", "local"}


def test_an_outlier_does_not_stretch_an_axis() -> None:
    assert limits([80.0, 81, 82, 83, 84, 85, 86, 10]) == (80, 86)
    assert limits([10.0, 30, 50, 70, 90]) == (10, 90) and limits([]) == (0, 1)


def test_the_picture_of_masks_has_every_density(board: Board) -> None:
    line = next(line for line in mask_lines(board) if line.method == "two_step")
    assert [density for density, _, _ in line.points] == pytest.approx([0.5, 0.2, 0.1, 0.05])
    entry = board.entries["iid"]["two_step"]
    kept = {s.choice.target_density: s.mean for s in entry.results.summaries if s.choice.arm == "ticket"}
    plain = {s.choice.target_density: s.mean for s in entry.results.summaries if s.choice.arm == "global_mask"}
    assert line.points[-1][1] == pytest.approx(100 * (kept[0.05] - plain[0.05]))
    assert line.points[-1][2].low > 0 > line.points[0][2].low  # the made-up personal mask wins where it is sparse
    wins = [interval.low > 0 for _, _, interval in line.points]
    begins = line.points[wins.index(True)][0]
    assert wins == sorted(wins) and wins_below(line) == begins
    assert f"the better one in two_step from density {begins:.2g} on" in crossing([line])
    lost = replace(line, points=(*line.points, (0.01, -1.0, Interval(-2.0, 0.5))))
    assert wins_below(lost) is None and "No uncorrected" in crossing([lost])
    unknown = replace(line, points=((0.2, 1.0, NO_INTERVAL),))  # one client of one seed
    assert wins_below(unknown) is None and "No uncorrected" in crossing([unknown])
    found = {picture.name: picture for picture in pictures(board)}
    assert {f"{kind}_{one}" for kind in ("rows", "pareto", "tickets") for one in board.entries} <= set(found)


def test_what_masks_reach_at_every_density_is_in_a_table(board: Board, pruned: Board) -> None:
    rows = [row for row in csv.DictReader(csv_text(tickets_table(board)).splitlines()) if row["method"] == "two_step"]
    assert [(row["at_density_share"], row["arm"]) for row in rows] == [
        (f"{density:g}", arm) for density in (0.5, 0.2, 0.1, 0.05)
        for arm in ("ticket", "random", "global_mask", "dense", "dense_total")
    ]  # fmt: skip
    line = next(line for line in mask_lines(board) if line.method == "two_step")
    general = [row for row in rows if row["arm"] == "global_mask"]
    for (density, gain, ends), row in zip(line.points, general, strict=True):
        names = ("at_density_share", *(f"own_less_control{end}_points" for end in ("", "_low", "_high")))
        assert [float(row[name]) for name in names] == pytest.approx([density, gain, ends.low, ends.high])
    known = {summary.choice: summary for summary in board.entries["iid"]["two_step"].results.summaries}
    for row in rows:
        target = 1.0 if row["arm"].startswith("dense") else float(row["at_density_share"])
        assert float(row["mean_percent"]) == pytest.approx(100 * known[Choice(row["arm"], target)].mean)
        assert (row["row"] == "own result") == (not row["own_less_control_points"])
    seen = csv.DictReader(csv_text(tickets_table(pruned)).splitlines())
    told = {row["arm"]: (row["mean_percent"], row["clients"]) for row in seen if row["method"] == "lotteryfl"}
    assert told == {"own_tuned": ("81", "8"), "own_random": ("71", "8"), "own_global_mask": ("76", "8"),
                    "dense": ("79", "8")}  # fmt: skip


def test_what_bytes_buy_has_controls_and_intervals_over_seeds(board: Board) -> None:
    figure = Figure()
    Pareto(board, "iid")(figure, LIGHT)
    (axes,) = figure.axes
    drawn = [line for line in axes.lines if line.get_marker() in ("o", *(mark for mark, _ in MARKS.values()))]
    lines = [line for line in board.lines["iid"] if line.control in ("", *MARKS) and not line.same]
    assert sorted(float(mark.get_ydata()[0]) for mark in drawn) == pytest.approx(
        sorted(100 * line.summary.mean for line in lines)
    )
    assert {line.control for line in lines} == {"", *MARKS}
    places = sorted(axes.transData.transform((float(mark.get_xdata()[0]), 0.0))[0] for mark in drawn)
    assert min(np.diff(places)) * 72 / figure.dpi > 5  # equal bytes stand side by side
    bars = {tuple(np.round(bar.get_ydata(), 6)) for bar in axes.lines}
    known = [line for line in lines if np.isfinite(line.seeds.low)]
    assert known and all(line.summary.num_seeds >= 3 for line in known)
    for line in known:
        assert tuple(np.round([100 * line.seeds.low, 100 * line.seeds.high], 6)) in bars


def test_the_interval_over_seeds_is_students() -> None:
    found = over_seeds([0.80, 0.82, 0.87])
    half = 4.302652729911275 * np.std([0.80, 0.82, 0.87], ddof=1) / np.sqrt(3)
    assert (found.low, found.high) == pytest.approx((0.83 - half, 0.83 + half))
    assert np.isnan(over_seeds([0.8, 0.9]).low)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Board:
    """Read a bench of made-up runs of a method that prunes in the rounds: two unseen clients of ten have no mask."""
    folder = tmp_path_factory.mktemp("pruned")
    methods = {"fedavg": {}, "lotteryfl": tiny_bench.tree()["methods"]["lotteryfl"], "local": {}}
    file = tiny_bench.write(folder, methods=methods, partitions={"iid": {}}, seeds=[0, 1, 2])
    for method in methods:
        for seed in range(3):
            run = write_run(
                folder / "tiny" / "iid" / method / str(seed), seed=seed, num_clients=10, rounds=4, method=method
            )
            if method == "lotteryfl":
                prune_in_rounds(run, 0.01 * seed)
    return read_board(load(file), folder / "tiny")


def prune_in_rounds(run: Path, more: float, **masks: str) -> None:
    """Give a run a method's own masks and their controls; where there is no mask, all of them are one dense model.

    masks: the digest of an arm's mask, by arm.
    """
    own = {"own_tuned": 0.8, "own_random": 0.7, "own_global_mask": 0.75, "dense": 0.78}
    told = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [row for row in told if row["arm"] == "local"]
    for row in [row for row in told if row["arm"] == "dense"]:
        for arm, accuracy in own.items():
            density = 1.0 if row["unseen"] or arm == "dense" else 0.25
            value = 0.9 if row["unseen"] else accuracy + more
            ticket = masks.get(arm, "") if density < 1 else ""
            kept.append(
                {**row, "arm": arm, "ticket": ticket, "density": density, "target_density": 1.0, "test_accuracy": value}
            )
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))


def test_a_client_without_a_mask_is_no_pair_of_it_and_its_control(pruned: Board) -> None:
    lines = {line.control: line for line in pruned.lines["iid"] if line.method == "lotteryfl"}
    own, random = lines[""], lines["random mask"]
    assert own.summary.density == random.summary.density == pytest.approx(0.25)
    assert random.summary.mean == pytest.approx(0.71) and own.summary.mean == pytest.approx(0.8 * 0.81 + 0.2 * 0.9)
    assert random.beaten is not None and random.beaten.mean == pytest.approx(0.1)
    assert random.beaten.num_pairs == 24 and lines["dense twin"].beaten.mean == pytest.approx(0.02)
    assert own.summary.unseen == random.summary.unseen == pytest.approx(0.9)
    assert own.against["local"].num_pairs == 30  # another method has a result for every client
    # a picture has a control as far from the method as the same clients have it
    assert own.drawn - random.drawn == pytest.approx(0.1)
    rows = {row[1]: row for row in outcome_table(pruned, "iid").rows}
    assert "random mask (seen clients)" in rows and lines["dense twin"].fewer and not own.fewer
    ((density, gain, _),) = next(line for line in mask_lines(pruned) if line.method == "lotteryfl").points
    assert (density, gain) == pytest.approx((0.25, 5.0))


def test_an_interval_is_students_everywhere_from_three_seeds_on(board: Board) -> None:
    first = board.lines["iid"][0]
    found = over_seeds(board.entries["iid"][first.method].blocks().values())
    shown = board.shown
    assert shown is not None and first.interval == found != first.summary.interval
    assert outcome_table(board, "iid").rows[0][4] == shown.bounds(found)
    assert shown.bounds(found) in headline(board)["iid"]
    row = next(csv.DictReader(leaderboard_csv(board).splitlines()))
    assert float(row["mean_low_percent"]) == pytest.approx(100 * found.low)
    assert float(row["mean_high_percent"]) == pytest.approx(100 * found.high)
    figure = Figure()
    Rows(board, "iid")(figure, LIGHT)
    bars = [np.sort(bar.get_xdata()) for bar in figure.axes[0].lines if len(bar.get_xdata()) == 2]
    assert any(np.allclose(bar, [100 * found.low, 100 * found.high]) for bar in bars)
    few = replace(first, seeds=over_seeds([0.8, 0.9]))
    assert few.interval == first.summary.interval


def test_the_words_warn_where_local_trained_less(made_up: tuple[Path, Path]) -> None:
    board = read_board(load(made_up[0]), made_up[1])
    assert "A caution" not in headline(board)["iid"]
    entry = board.entries["iid"]["fedavg"]
    board.entries["iid"]["fedavg"] = replace(entry, cost=replace(entry.cost, round_epochs=9.0, own_epochs=99.0))
    own = board.entries["iid"]["local"].cost.own_epochs
    assert (
        f"A caution: local trained for {own:.0f} epochs a client, fewer than fedavg 108: a part"
        in headline(board)["iid"]
    )
    # or more: that, too, is no fair race
    board.entries["iid"]["fedavg"] = replace(entry, cost=replace(entry.cost, round_epochs=1.0, own_epochs=2.0))
    usual = (
        3 + board.entries["iid"]["two_step"].cost.own_epochs + board.entries["iid"]["two_step"].cost.round_epochs
    ) / 2
    assert (
        f"A caution: local trained for {own:.0f} epochs a client, more than 1 of 2 federated methods "
        f"(the median of all is {usual:.3g}): a part" in headline(board)["iid"]
    )


def test_the_time_to_what_the_worst_reaches(made_up: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(made_up[1], tmp_path / "tiny")
    assert not read_board(load(made_up[0]), tmp_path / "tiny").timed
    reach = {"fedavg": [0.1, 0.3, 0.5, 0.6], "two_step": [0.5, 0.7, 0.8, 0.9]}
    for method, values in reach.items():
        for seed in range(3):
            file = tmp_path / "tiny" / "iid" / method / str(seed) / "rounds.jsonl"
            told = [json.loads(line) for line in file.read_text().splitlines()]
            shifted = [value - 0.1 * (seed == 2) for value in values]
            rows = [{**r, "val_accuracy": v, "simulated_s": 10.0} for r, v in zip(told, shifted, strict=True)]
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    board = read_board(load(made_up[0]), tmp_path / "tiny")
    found = board.reached["iid"]
    assert found.target == pytest.approx(0.5)  # fedavg's third seed, in its last round
    # A round's value is of the model that it began with.
    assert found.seconds == pytest.approx({"fedavg": (20 + 20 + 30) / 3, "two_step": (0 + 0 + 10) / 3})
    table = cost_table(board, "iid")
    assert table.header[-1] == "time to 50.0 %" and {row[0]: row[-1] for row in table.rows}["local"] == "–"
    assert {row[0]: row[-1] for row in table.rows}["fedavg"] == "23.3 s"
    told = {r["method"]: r for r in csv.DictReader(leaderboard_csv(board).splitlines()) if r["row"] == "own result"}
    assert float(told["two_step"]["time_to_seconds"]) == pytest.approx(10 / 3) and not told["local"]["time_to_seconds"]
    assert told["fedavg"]["time_to_percent"] == "50" and len({len(row) for row in whole_table(board).rows}) == 1


def test_the_time_is_of_the_curve_over_all_clients_where_there_is_one(tmp_path: Path) -> None:
    fleet = {"flops_s": 1e6, "down_bytes_s": 1000, "up_bytes_s": 500}
    made = tiny.of_method("fedavg", fleet=fleet, evaluate={"every": 1}, federate={"rounds": 3})
    facts = read_run(tiny.run(made, tmp_path / "r").root)
    found = time_to_worst({"fedavg": [facts]})
    last = [row.val_accuracy for row in facts.curve if row.round == 3 and not row.unseen]
    assert found.target == pytest.approx(np.mean(last))
    ends = np.cumsum([row.simulated_s for row in facts.rounds if row.phase == "federate"])
    assert found.seconds["fedavg"] in [pytest.approx(end) for end in ends]


def test_equal_runs_give_an_equal_leaderboard(made_up: tuple[Path, Path]) -> None:
    names = ("leaderboard.csv", "leaderboard.html", "leaderboard.md", "leaderboard.tex", "tickets.csv")
    write_leaderboard(load(made_up[0]), made_up[1])
    first = {name: (made_up[1] / name).read_bytes() for name in names}
    write_leaderboard(load(made_up[0]), made_up[1])
    assert first == {name: (made_up[1] / name).read_bytes() for name in names}
    assert "http" not in first["leaderboard.html"].decode().replace("http://www.w3.org", "")
    assert "prefers-color-scheme: dark" in first["leaderboard.html"].decode()


def test_other_data_are_told(made_up: tuple[Path, Path], tmp_path: Path) -> None:
    header = made_up[1] / "iid" / "fedavg" / "0" / "header.json"
    kept = header.read_text()
    try:
        header.write_text(json.dumps({**json.loads(kept), "partition_digest": "00" * 32}))
        board = read_board(load(made_up[0]), made_up[1])
        assert any("other data" in line for line in warnings(board))
        header.write_text(json.dumps({**json.loads(kept), "num_parameters": 44_470}))
        usual = json.loads(kept)["num_parameters"]
        told = f"iid: fedavg has 44,470 parameters, the others {usual:,}: another network."
        assert told in warnings(read_board(load(made_up[0]), made_up[1]))
    finally:
        header.write_text(kept)


@pytest.mark.parametrize("amounts", [[0.0, 63.0, 102.0, 320.0], [0.0, 0.4, 320.0], [5.0], [0.0, 0.0]])
def test_an_axis_of_bytes_has_all_of_them(amounts: list[float]) -> None:
    axes = Figure().add_subplot()
    stretch(axes, amounts)
    low, high = axes.get_xlim()
    assert low < min(amounts) and max(amounts) < high
