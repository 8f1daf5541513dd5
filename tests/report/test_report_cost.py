"""What a ticket costs: measured and counted from the run itself, and no number where there is none."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from fedlth.report.cost import Cost, cost_text, costs
from fedlth.report.facts import read_group
from fedlth.report.results import results_of
from tests import tiny


def test_rounds_until_a_search_is_paid() -> None:
    assert Cost("CPU s", dense=3.0, ticket=1.0, search=8.0).rounds(epochs=2) == 2.0
    assert Cost("CPU s", dense=1.0, ticket=1.0, search=8.0).rounds(epochs=1) == math.inf


def test_a_run_tells_what_its_tickets_cost(tmp_path: Path) -> None:
    finder = {"schedule": "one_shot", "densities": [0.5]}
    arms = {"arms": ["dense", "ticket"], "epochs": 2}
    tiny.run(tiny.of_method("two_step", finder=finder, personalise=arms), tmp_path / "r")
    group = read_group(tmp_path / "r")
    results = results_of(group)
    cpu, flops = costs(results)
    assert (cpu.unit, flops.unit) == ("CPU s", "GFLOP")
    # One shot after the dense training of two epochs: the search is that training, shared with the dense arm.
    assert flops.search == pytest.approx(2 * flops.dense) and flops.ticket < flops.dense
    work = [one for row in group[0].times for one in row.get("work", [])]
    trained = [one for one in work if one.get("density") == 1 and one["epochs"] == 2]
    assert len(trained) == 4 and cpu.search == pytest.approx(sum(one["cpu_s"] for one in trained) / 4)
    assert "of 1 epoch." in cost_text(results) and "GFLOP" in cost_text(results)


def test_without_times_only_flops_are_told(tmp_path: Path) -> None:
    finder = {"schedule": "one_shot", "densities": [0.5]}
    tiny.run(tiny.of_method("two_step", finder=finder, personalise={"arms": ["ticket"], "epochs": 1}), tmp_path / "r")
    group = tuple(replace(facts, times=()) for facts in read_group(tmp_path / "r"))
    assert [cost.unit for cost in costs(results_of(group))] == ["GFLOP"]


def test_a_dense_run_has_no_ticket_to_pay_for_but_evaluations(tmp_path: Path) -> None:
    tiny.run(tiny.of_method("fedavg_ft", personalise={"epochs": 1}), tmp_path / "r")
    group = read_group(tmp_path / "r")
    work = [one for row in group[0].times if row["phase"] == "federate" for one in row.get("work", ())]
    evaluated = sum(one["cpu_s"] for one in work if "evaluated" in one)
    share = 100 * evaluated / sum(one["cpu_s"] for one in work)
    assert 0 < share < 100
    text = cost_text(results_of(group))
    assert text.startswith("Of the CPU time") and f"evaluation takes {share:.1f} % in step 1, " in text
    assert cost_text(results_of(tuple(replace(facts, times=()) for facts in group))) == ""
