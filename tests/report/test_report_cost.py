"""What a ticket costs: measured and counted from the run itself, and no number where there is none."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from fedlth.report.cost import Cost, cost_text, costs
from fedlth.report.facts import read_group
from fedlth.report.results import results_of
from fedlth.storage.records import TimeRow, Work
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
    work = [one for row in group[0].times for one in row.work]
    trained = [one for one in work if one.density == 1 and one.epochs == 2]
    assert len(trained) == 4 and cpu.search == pytest.approx(sum(one.cpu_s for one in trained) / 4)
    assert "of 1 epoch." in cost_text(results) and "GFLOP" in cost_text(results)
    # two sentences that may disagree each say by what they count
    assert ": in CPU time, as measured, a ticket" in cost_text(results)
    assert ": in FLOPs, as counted, a ticket has paid for its search after" in cost_text(results)
    without = tuple(replace(facts, times=()) for facts in group)
    assert [cost.unit for cost in costs(results_of(without))] == ["GFLOP"]


def test_a_dense_run_has_no_ticket_to_pay_for_but_evaluations(tmp_path: Path) -> None:
    tiny.run(tiny.of_method("fedavg_ft", personalise={"epochs": 1}), tmp_path / "r")
    group = read_group(tmp_path / "r")
    work = [one for row in group[0].times if row.phase == "federate" for one in row.work]
    evaluated = sum(one.cpu_s for one in work if one.evaluated is not None)
    share = 100 * evaluated / sum(one.cpu_s for one in work)
    assert 0 < share < 100
    text = cost_text(results_of(group))
    assert text.startswith("Of the CPU time") and f"evaluation takes {share:.1f} % in step 1, " in text
    assert cost_text(results_of(tuple(replace(facts, times=()) for facts in group))) == ""


def test_the_cpu_cost_is_told_for_any_number_of_clients(tmp_path: Path) -> None:
    """Row 6: with six clients at density .2 the mean of their targets is not .2, and the sentence was lost."""
    finder, personalise = {"densities": [0.2]}, {"arms": ["dense", "ticket"], "epochs": 1, "clients_per_wave": 6}
    made = tiny.of_method("two_step", finder=finder, personalise=personalise, clients={"count": 6, "unseen": 0.0})
    tiny.run(made, tmp_path / "r")
    results = results_of(read_group(tmp_path / "r"))
    assert [cost.unit for cost in costs(results)] == ["CPU s", "GFLOP"]
    assert "CPU s a client" in cost_text(results)


def test_a_client_counts_once_however_often_it_was_sampled(tmp_path: Path) -> None:
    personalise = {"arms": ["dense", "ticket"], "epochs": 1}
    tiny.run(tiny.of_method("two_step", finder={"densities": [0.2]}, personalise=personalise), tmp_path / "r")
    (facts,) = read_group(tmp_path / "r")
    often, rare = (
        TimeRow(round=1, phase="personalise", client=client, work=[
            *[Work(density=1.0, epochs=1, cpu_s=dense)] * times, Work(density=0.2, epochs=1, cpu_s=1.0),
            Work(arm="ticket", target_density=0.2, cpu_s=5.0, last_cpu_s=1.0),
        ])
        for client, dense, times in ((0, 2.0, 9), (1, 4.0, 1))
    )  # fmt: skip
    cpu = costs(results_of([replace(facts, times=(often, rare))]))[0]
    assert (cpu.dense, cpu.ticket, cpu.search) == (3.0, 1.0, 4.0)


def test_a_model_that_nothing_searched_for_has_no_search_to_pay(tmp_path: Path) -> None:
    tiny.run(tiny.of_method("lotteryfl"), tmp_path / "r")
    results = results_of(read_group(tmp_path / "r"))
    assert results.main is not None and results.main.target_density < 1 and costs(results) == ()


def test_where_no_training_was_timed_evaluation_is_not_all_of_it(tmp_path: Path) -> None:
    tiny.run(tiny.of_method("fedpm", personalise={"arms": ["global"]}), tmp_path / "r")
    told = cost_text(results_of(read_group(tmp_path / "r")))
    assert "in step 1" in told and "step 2" not in told, "its scores are trained in step 1, in step 2 nothing is"
    tiny.run(tiny.of_method("local", personalise={"arms": ["global"]}), tmp_path / "none")
    assert cost_text(results_of(read_group(tmp_path / "none"))) == ""
