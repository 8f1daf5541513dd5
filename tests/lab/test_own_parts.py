"""A user's own parts: the ten lines of docs/finders.md in both commands, and errors that name a part that is wrong."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from fedlth.cli import main
from fedlth.errors import StudyError
from fedlth.storage.json_lines import read_lines
from fedlth.study.yaml_text import parse
from tests import tiny as federated
from tests.lab import tiny_lottery as tiny

TEXT = (Path(__file__).parents[2] / "docs" / "finders.md").read_text().partition("## A part of your own")[2]
FILES = {name: code for code, name in re.findall(r"```(?:python|yaml)\n(# (\w+\.\w+)\n.*?)```", TEXT, re.S)}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in a folder that holds what the docs show, as a user would."""
    for name, code in FILES.items():
        (tmp_path / name).write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for module in ("my_score", "my_parts", "mine"):
        sys.modules.pop(module, None)
    return tmp_path


def test_the_score_in_the_docs_has_ten_lines() -> None:
    assert len(FILES["my_score.py"].strip().splitlines()) <= 10


@pytest.mark.usefixtures("unpainted")
def test_it_works_in_fedlth_lottery_and_the_results_name_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lottery", "own_lottery.yaml", "out=run"]) == 0
    assert "score my_score:Grown (share 0.8)" in capsys.readouterr().out
    assert "score my_score:Grown (share 0.8)" in (folder / "run" / "report.html").read_text()
    rows, _ = read_lines(folder / "run" / "results.jsonl", required=True)
    kept = {(r["arm"], r["round"]): r["kept"] for r in rows}
    size = rows[0]["size"]
    assert kept["grown", 1] == round(0.5 * size) and kept["grown", 2] == round(0.2 * size)
    ends = {r["arm"]: r["curve"] for r in rows if r["round"] == 2}
    assert ends["grown"] != ends["magnitude"], "it acts"


@pytest.mark.usefixtures("unpainted")
def test_it_works_in_fedlth_run_and_the_results_name_it(folder: Path) -> None:
    assert main(["run", "own_study.yaml", "out=run"]) == 0
    rows = [r for r in federated.rows(folder / "run", "metrics") if r["arm"] == "ticket"]
    assert [r["density"] for r in rows] == pytest.approx([0.5, 0.2] * 4, abs=1e-5)
    assert "my_score:Grown" in (folder / "run" / "report.html").read_text()


def test_a_schedule_a_scope_and_a_rewind_of_ones_own(folder: Path) -> None:
    text = re.search(r"```yaml\n(finder:.*?)```", TEXT, re.S)
    assert text
    finder = parse(text.group(1), "finders.md")["finder"]
    federated.run(federated.study(finder=finder), folder / "federated")
    rows = [r for r in federated.rows(folder / "federated", "metrics") if r["arm"] == "ticket"]
    assert len(rows) == 4 and all(abs(r["density"] - 0.1) < 1e-3 and r["search_epochs"] == 3 for r in rows)
    tiny.run(folder / "lottery", searches={"own": finder})
    told, _ = read_lines(folder / "lottery" / "results.jsonl", required=True)
    assert told[-1]["trainings"] == 3 and all(told[-1]["layer_kept"].values()), "0.5, 0.25, 0.1; no layer is empty"


WRONG = """
import numpy as np

class Nothing: pass
class Short:
    def __call__(self, evidence): return np.zeros(3)
class Holes:
    def __call__(self, evidence): return evidence.now * np.nan
class Words:
    def __call__(self, evidence): return evidence.now.astype(str)
class Few:
    def __call__(self, score, alive, layout, density): return alive & (np.arange(alive.size) < 5)
class Back:
    def __call__(self, score, alive, layout, density):
        kept = np.arange(alive.size) < round(density * alive.size)
        return kept if density > 0.5 else kept[::-1]
class Numbers:
    def __call__(self, score, alive, layout, density): return np.arange(5)
class Rising:
    def __call__(self, targets): return ((0.1, 0.3, *targets),)
class Elsewhere:
    def __call__(self, targets): return ((0.7,),)
class Flat:
    def __call__(self, targets): return targets
class Beyond:
    def __call__(self, targets): return ((1.5, *targets),)
class NoRate: anchor = None
class Lost: anchor, replay_lr = "somewhere", True
class Half:
    anchor, replay_lr = "theta_0", True
    def changed(self, weights, mask, layout, rng): return weights[:7]
class Holding:
    holds = True
    def __call__(self, origin, now): return origin[:7]
class Mute:
    def __call__(self, origin, now): return origin
"""
CASES = [
    ("score", "Nothing", r"score: Nothing must have __call__\(evidence\)"),
    ("score", "Short", r"score: Short must give \(\d+,\) numbers, one for each prunable weight, got shape \(3,\)"),
    ("score", "Holes", r"score: Holes must give .* got \d+ that are not a number"),
    ("score", "Words", r"score: Words must give .* numbers"),
    ("scope", "Nothing", "scope: Nothing must have __call__"),
    ("scope", "Few", r"scope: Few must keep exactly \d+ of \d+ at density 0.[258], got 5"),
    ("scope", "Numbers", r"scope: Numbers must give a mask \(\d+,\) bool, got \(5,\) int64"),
    ("schedule", "Nothing", "schedule: Nothing must have __call__"),
    ("schedule", "Rising", "schedule: Rising must give densities that never rise"),
    ("schedule", "Elsewhere", r"schedule: Elsewhere must give chains through every target, got .* without 0\.5"),
    ("schedule", "Flat", "schedule: Flat must give chains, a tuple of tuples"),
    ("schedule", "Beyond", r"schedule: Beyond must give densities in \(0, 1\]"),
    ("rewind", "Nothing", "rewind: Nothing must have anchor"),
    ("rewind", "NoRate", "rewind: NoRate must have replay_lr"),
    ("rewind", "Lost", "rewind: .*no weights .*somewhere"),
    ("rewind", "Half", r"rewind: Half must give \(\d+,\) numbers, one for each prunable weight, got shape \(7,\)"),
    ("dead", "Mute", "dead: Mute must have holds"),
    ("dead", "Holding", r"dead: Holding must give \(\d+,\) numbers"),
    ("granularity", "Nothing", r"granularity: Nothing must have groups\(layout\)"),
    ("gate", "Nothing", r"gate: Nothing must have __call__\(looks\)"),
    ("stop", "Nothing", r"stop: Nothing must have __call__\(looks\)"),
]


def wrong(folder: Path, kind: str, name: str) -> dict[str, Any]:
    (folder / "mine.py").write_text(WRONG)
    return {kind: f"mine:{name}", "densities": [0.5, 0.2]}


@pytest.mark.parametrize(("kind", "name", "told"), CASES)
def test_a_wrong_part_is_one_line_that_names_its_place(folder: Path, kind: str, name: str, told: str) -> None:
    finder = wrong(folder, kind, name)
    with pytest.raises(StudyError, match=f"searches.own.{told}"):
        tiny.run(folder / "lottery", searches={"own": finder})
    with pytest.raises(StudyError, match=f"finder.{told}"):
        federated.run(federated.study(finder=finder), folder / "federated")


def test_a_scope_that_revives_is_refused(folder: Path) -> None:
    finder = {**wrong(folder, "scope", "Back"), "densities": [0.2]}
    said = r"searches.own.scope: Back must keep no weight that is pruned, got \d+ pruned"
    with pytest.raises(StudyError, match=said):
        tiny.run(folder / "lottery", searches={"own": finder})
