"""finder.main: which of a client's tickets is kept, by validation or by capacity, and what then follows it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlth import api
from fedlth.engines.inprocess import InProcess
from fedlth.errors import StudyError
from fedlth.experiment.resolve import read, resolve
from fedlth.experiment.saved_ticket import load_ticket
from fedlth.federation import session
from fedlth.federation.forecast_bytes import forecast_bytes
from fedlth.personalization.kept import At, Best, Keep, Largest
from fedlth.report.build import read_results, write_report
from fedlth.report.choice import chosen_choices, main_choice
from fedlth.report.compare import compare
from fedlth.report.diff import diff
from fedlth.report.facts import read_group
from fedlth.report.headline import rivals, summary_text
from fedlth.storage.client_state import ClientState
from fedlth.storage.records import MetricRow
from fedlth.study.schema import Study
from fedlth.study.sections import Tier
from fedlth.training.metrics import judged
from tests import tiny
from tests.test_personal import started

DENSITIES = (0.5, 0.3, 0.1)


def row(density: float, val: float, diverged: bool = False) -> MetricRow:
    return MetricRow(
        client=0, unseen=False, arm="ticket", density=density, target_density=density, val_accuracy=val,
        test_accuracy=1 - val, num_train=8, diverged=diverged,
    )  # fmt: skip


def kept(keep: Keep, rows: Sequence[MetricRow], most: float = 1.0) -> float:
    tier, best = Tier(density=most), rows[0]
    for one in rows[1:]:
        best = one if keep.better(one, best, tier, judged(None, (), "classes")) else best
    return best.target_density


# (validation at .5, .3, .1), the most that the tier carries, what is kept
CHOICES = [
    ((0.9, 0.8, 0.7), 1.0, 0.5),
    ((0.7, 0.9, 0.8), 1.0, 0.3),
    ((0.9, 0.9, 0.8), 1.0, 0.3),
    ((0.9, 0.9, 0.9), 1.0, 0.1),
    ((0.9, 0.7, 0.8), 0.4, 0.1),
    ((0.9, 0.8, 0.7), 0.3, 0.3),
    ((0.9, 0.8, 0.7), 0.1, 0.1),
]


@pytest.mark.parametrize(("val", "most", "wanted"), CHOICES)
@pytest.mark.parametrize("order", [1, -1])
def test_auto_keeps_the_best_on_validation_that_the_tier_carries(
    val: tuple[float, ...], most: float, wanted: float, order: int
) -> None:
    rows = [row(d, v) for d, v in zip(DENSITIES, val, strict=True)][::order]
    assert kept(Best(DENSITIES), rows, most) == wanted


def test_a_ticket_that_diverged_is_never_the_best() -> None:
    rows = [row(0.5, 0.1), row(0.3, 0.9, diverged=True), row(0.1, 0.25, diverged=True)]
    assert kept(Best(DENSITIES), rows) == 0.5
    assert kept(Best(DENSITIES), [replace(r, diverged=True, val_accuracy=0.25) for r in rows]) == 0.1


def test_capacity_keeps_the_largest_that_the_tier_carries() -> None:
    rows = [row(d, v) for d, v in zip(DENSITIES, (0.1, 0.2, 0.9), strict=True)]
    for most, wanted in ((1.0, 0.5), (0.5, 0.5), (0.49, 0.3), (0.1, 0.1)):
        assert kept(Largest(DENSITIES), rows, most) == kept(Largest(DENSITIES), rows[::-1], most) == wanted
    assert kept(At(0.3), rows) == 0.3 and kept(At(0.7), rows) == 0.5, "without its density, the first"


TIERS = [{"clients": [0], "density": 0.3, "name": "small"}]


def study(main: str = "auto", **more: Any) -> Study:
    sections: dict[str, Any] = {
        "finder": {"main": main, "densities": list(DENSITIES)},
        "clients": {"capacity": TIERS},
        "federate": {"rounds": 3, "clients_per_round": 2},
        "refine": {"rounds": 2, "clients_per_round": 2},
    }
    return tiny.study(**{**sections, **more})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.run(study(), tmp_path_factory.mktemp("auto") / "run").root


def by_client(out: Path, arm: str) -> dict[int, list[dict[str, Any]]]:
    found: dict[int, list[dict[str, Any]]] = {}
    for one in tiny.rows(out, "metrics"):
        if one["arm"] == arm:
            found.setdefault(one["client"], []).append(one)
    return found


def chosen(out: Path, arm: str = "ticket") -> dict[int, float]:
    return {c: one["target_density"] for c, rows in by_client(out, arm).items() for one in rows if one.get("chosen")}


def test_what_is_chosen_is_saved_refined_and_loaded(run: Path) -> None:
    for client, rows in by_client(run, "ticket").items():
        allowed = [r for r in rows if r["target_density"] <= (0.3 if client == 0 else 1)]
        best = max(allowed, key=lambda r: (r["val_accuracy"], -r["target_density"]))
        assert [r for r in rows if r.get("chosen")] == [best]
        module = load_ticket(run, client)
        alive = sum(int((p != 0).sum()) for p in module.parameters() if p.ndim > 1)
        assert alive <= best["density"] * 816
    assert chosen(run) == chosen(run, "refined") and sorted(chosen(run)) == [0, 1, 2, 3]
    assert {one["density"] for rows in by_client(run, "refined").values() for one in rows} == {
        r["density"] for rows in by_client(run, "ticket").values() for r in rows if r.get("chosen")
    }
    assert not any(r.get("chosen") for r in tiny.rows(run, "metrics") if r["arm"] not in ("ticket", "refined"))


def test_the_choice_is_in_the_clients_state(run: Path) -> None:
    progress = tiny.opened(session.RunFolder(run)).progress
    for client, density in chosen(run).items():
        state = session.RunFolder(run).clients.get(client, progress.versions[str(client)])
        assert ClientState.from_bytes(state).vectors["ticket_target"] == [density]


@pytest.mark.parametrize("after", [3, 4, 5, 6, 7])
def test_a_stop_anywhere_changes_nothing(run: Path, after: int, tmp_path: Path) -> None:
    started(study(), tmp_path / "cut", after=after)
    session.resume(tmp_path / "cut", InProcess())
    assert tiny.facts(tmp_path / "cut") == tiny.facts(run) and diff(run, tmp_path / "cut") == []


def test_capacity_gives_each_tier_its_density(tmp_path: Path) -> None:
    tiny.run(study("capacity"), tmp_path / "r")
    assert chosen(tmp_path / "r") == {0: 0.3, 1: 0.5, 2: 0.5, 3: 0.5} == chosen(tmp_path / "r", "refined")
    rows = [r for r in tiny.rows(tmp_path / "r", "ledger") if r["phase"] == "refine" and r["kind"] == "values"]
    assert {round(r["density"], 2) for r in rows} <= {0.3, 0.5}
    foreseen = forecast_bytes(tiny.experiment(study("capacity")), 1.0)
    assert not any("choose" in bound for bound in foreseen.down.bounds)


def test_a_number_stays_as_it_was(tmp_path: Path) -> None:
    tiny.run(study(finder={"main": 0.3, "densities": list(DENSITIES)}), tmp_path / "r")
    assert b"chosen" not in (tmp_path / "r" / "metrics.jsonl").read_bytes()
    assert {r["target_density"] for rows in by_client(tmp_path / "r", "refined").values() for r in rows} == {0.3}


def test_the_forecast_is_a_bound(run: Path) -> None:
    foreseen = forecast_bytes(tiny.experiment(study()), 1.0)
    assert any("largest density that each client may choose" in bound for bound in foreseen.down.bounds)
    rows = tiny.rows(run, "ledger")
    assert sum(r["payload_bytes"] for r in rows if r["sender"] == "server") <= foreseen.down.size
    assert sum(r["payload_bytes"] for r in rows if r["receiver"] == "server") <= foreseen.up.size


def test_the_report_treats_all_arms_alike(run: Path) -> None:
    results = read_results(run)
    (facts,) = results.group
    own = {c.arm: c for c in chosen_choices(results.group)}
    assert own.keys() == {"ticket", "refined", "global_mask", "random"} and facts.chosen == chosen(run)
    assert results.main == own["ticket"] == main_choice(results.group)
    summary = results.summary(own["random"])
    rows = [r for c, of in by_client(run, "random").items() for r in of if r["target_density"] == chosen(run)[c]]
    assert summary is not None and len(rows) == 4
    assert summary.mean == pytest.approx(np.mean([r["test_accuracy"] for r in rows]))
    assert {one.choice for one in rivals(results) if one.choice.arm in ("random", "global_mask")} == {
        own["random"], own["global_mask"]
    }  # fmt: skip
    text = summary_text(results)
    assert "at each client's own density" in text and "The densities that clients keep" in text
    page = write_report(run).read_text()
    assert "The densities that clients keep" in page and (run / "tables" / "chosen.csv").exists()


def test_runs_are_compared_at_what_they_keep(run: Path, tmp_path: Path) -> None:
    tiny.run(study("capacity"), tmp_path / "other")
    found = compare([run, tmp_path / "other"])
    assert found.reference.choice.chosen and found.contrasts[0].pairs == 4
    assert found.reference.mean == pytest.approx(
        np.mean([r["test_accuracy"] for of in by_client(run, "ticket").values() for r in of if r.get("chosen")])
    )
    assert read_group(run)[0].chosen == chosen(run)


def test_tune_scores_what_is_kept(tmp_path: Path) -> None:
    made = study(refine={"rounds": 0}, tune={"lr": [0.1, 0.05], "rounds": 1}, out=str(tmp_path / "r"), workers=1)
    api.run(made)
    told = json.loads((tmp_path / "r" / "tune" / "chosen.json").read_bytes())["val_accuracy"]
    for lr in ("0.1", "0.05"):
        rows = [r for r in tiny.rows(tmp_path / "r" / "tune" / f"lr-{lr}", "metrics") if r.get("chosen")]
        assert told[lr] == pytest.approx(np.mean([r["val_accuracy"] for r in rows]))


def test_what_cannot_be_chosen_is_refused() -> None:
    for main in ("auto", "capacity"):
        with pytest.raises(StudyError, match=rf"finder.main: {main} needs one of finder.densities .* 0.05 of tag"):
            resolve(study(main, clients={"capacity": [{"share": 0.5, "density": 0.05, "name": "tag"}]}))
        finder = {"main": main, "densities": list(DENSITIES), "stop": {"name": "val_drop"}}
        with pytest.raises(StudyError, match="finder.stop: must be target where finder.main is"):
            resolve(study(finder=finder, refine={"rounds": 0}))


def test_a_choice_without_effect_is_noted() -> None:
    alone = read(study(finder={"main": "auto", "densities": [0.2]}, refine={"rounds": 0}))[1]
    assert "finder.main: has no effect, finder.densities has one density" in alone
    arms = {"arms": ["global", "global_mask"]}
    without = read(study(personalise=arms, refine={"rounds": 0}))[1]
    assert any(note.startswith("finder.main: has no effect, only the arm ticket") for note in without)


@pytest.mark.parametrize("change", ["two", "none", "worse", "too dense", "other arm", "unasked"])
def test_a_client_cannot_choose_otherwise(change: str, tmp_path: Path) -> None:
    """The door holds a choice against the rows that come with it."""
    from fedlth.federation import client_step as module
    from fedlth.wire import metrics as coded

    encode = coded.encode

    def lying(record: Any) -> bytes:
        rows = record.get("rows")
        if rows and rows[0]["client"] == 0:
            tickets = [r for r in rows if r["arm"] == "ticket"]
            best = next((r for r in tickets if r.get("chosen")), None)
            others = [r for r in tickets if r is not best]
            if change in ("none", "worse", "too dense", "other arm") and best:
                del best["chosen"]
            if change == "two" or change == "unasked":
                others[0]["chosen"] = True
            if change == "worse":
                next(r for r in others if r["target_density"] < 0.5)["chosen"] = True
            if change == "too dense":
                tickets[0]["chosen"] = True
            if change == "other arm":
                next(r for r in rows if r["arm"] == "random" and r["target_density"] == 0.1)["chosen"] = True
        return encode(record)

    more: dict[str, Any] = {"refine": {"rounds": 0}}
    if change == "unasked":
        more["finder"] = {"main": 0.1, "densities": list(DENSITIES)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.metrics, "encode", lying)
        tiny.run(study(**more), tmp_path / "r")
    failed = [f for r in tiny.rows(tmp_path / "r", "rounds") for f in r["failed"]]
    assert [f["client"] for f in failed] == [0] and "chosen must" in failed[0]["reason"]
