"""What step 2 costs: equal budgets for what is compared, each training counted once, the clock's share of it."""

from __future__ import annotations

from typing import Any

import pytest

from fedlth.experiment.experiment import Experiment
from fedlth.forecast import _kept_epochs
from fedlth.personalization.arms import ARMS
from fedlth.personalization.kept import keep_of
from fedlth.personalization.personalise import AS_LONG, Personalise, Refined, _reported
from fedlth.personalization.step2 import Result, Step2
from fedlth.study.sections import Tier
from tests import tiny
from tests.test_methods import step2_of


def results(step: Step2, *arms: str) -> list[Result]:
    return [found for arm in arms for found in ARMS[arm](step)]


def epochs(found: Result) -> float:
    return float(found.epochs) + float(found.search_epochs)


@pytest.mark.parametrize(
    ("finder", "spent"),
    [
        ({}, 3), ({"gate": {"name": "warm_up", "trainings": 5}}, 7),
        ({"gate": {"name": "val_accuracy", "at_least": 0.9999, "most": 5}}, None),
        ({"stop": {"name": "val_drop", "drop": 0.0}}, None),
        ({"rewind": {"name": "step", "step": 2}}, 3 - 2 * 2 / 3),
        ({"rewind": {"name": "step", "step": 2}, "schedule": "one_shot"}, 2 - 2 / 3),
    ],
)  # fmt: skip
def test_who_is_compared_with_a_search_trains_as_long(finder: dict[str, Any], spent: float | None) -> None:
    """Epochs of a client of three steps; a gate's and a stop's are whatever the search took."""
    step = step2_of(tiny.study(finder={"densities": [0.5, 0.2], **finder}))
    longest = max(map(epochs, results(step, "ticket")))
    assert spent is None or longest == pytest.approx(spent)
    for control in results(step, *sorted(AS_LONG)):
        assert epochs(control) == pytest.approx(longest), control.arm


def test_what_takes_the_length_of_an_open_search_comes_after_it() -> None:
    """In a run too: the arms' order is not the study's where only the search tells how long it is."""
    found = {}
    for gate in ("always", {"name": "warm_up", "trainings": 4}):
        step = step2_of(made := tiny.study(finder={"densities": [0.5], "gate": gate}))
        personalise = Personalise(
            own=step.method, finder=step.finder, arms=("local", "dense_total", "random", "ticket"),
            targets=step.targets, main=keep_of(made.finder), kept="ticket", space=Experiment.of(made).method.space,
        )  # fmt: skip
        update = personalise(step.local, step.inbox, step.state)
        found[str(gate)] = [(row["arm"], row["epochs"] + row["search_epochs"]) for row in update.rows]
    closed, opened = found.values()
    assert closed[:3] == [("local", 2), ("dense_total", 2), ("ticket", 2)]
    assert sorted(opened)[0] == ("dense_total", 5) and dict(opened)["local"] == dict(opened)["ticket"] == 5


def test_first_steps_count_where_no_dense_training_holds_them() -> None:
    """SNIP rewound to step 2 of 3 trains two dense steps and a sparse one; after a dense training they are its own."""
    late = {"rewind": {"name": "step", "step": 2}, "densities": [0.5]}
    step = step2_of(tiny.study(finder={"score": "snip", "schedule": {"name": "rescore", "steps": 1}, **late}))
    (ticket,) = results(step, "ticket")
    (one_shot,) = results(step, "one_shot")
    assert (epochs(ticket), epochs(one_shot)) == (pytest.approx(1), pytest.approx(1 + 1 / 3))
    (dense,) = results(step, "dense")
    assert ticket.flops[0] == pytest.approx(dense.flops[0])


@pytest.mark.parametrize(
    ("main", "schedule", "tier", "paid"),
    [
        (0.5, "iterative", 1.0, 2), (0.1, "iterative", 1.0, 4), ("capacity", "iterative", 0.5, 2),
        ("capacity", "iterative", 0.2, 3), ("auto", "iterative", 1.0, 4), ("auto", "iterative", 0.2, 4),
        ("capacity", "one_shot", 0.2, 2), ("auto", "one_shot", 1.0, 4), ("auto", "one_shot", 0.2, 3),
        (0.1, "one_shot", 1.0, 2),
    ],
)  # fmt: skip
def test_the_clock_pays_for_the_search_of_the_ticket_that_is_kept(
    main: float | str, schedule: str, tier: float, paid: int
) -> None:
    """In trainings of step 2, the dense one shared; who chooses among several finds those that it may keep."""
    finder = {"densities": [0.5, 0.2, 0.1], "main": main, "schedule": schedule}
    made = tiny.study(finder=finder, clients={"capacity": [{"share": 1.0, "density": tier, "name": "t"}]})
    step = step2_of(made)
    update = _reported(step.local, ARMS["ticket"](step), step.state, "ticket", keep_of(made.finder), False)
    assert float(update.cost.epochs) == paid
    assert _kept_epochs(Experiment.of(made), Tier(density=tier)) == paid


@pytest.mark.parametrize("main", [0.2, "auto", "capacity"])
def test_the_clock_pays_for_the_training_after_refinement(main: float | str) -> None:
    """Found: where each client has a density of its own it was free."""
    made = tiny.study(finder={"densities": [0.5, 0.2], "main": main})
    step = step2_of(made)
    update = Refined(main=keep_of(made.finder))(step.local, step.inbox, step.state)
    assert update.cost.flops == update.rows[0]["train_flops"] > 0
