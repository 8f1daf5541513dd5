"""theta_0's own mask, and the ticket's mask on other weights: each changes what it says, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlth import forecast
from fedlth.errors import StudyError
from fedlth.experiment.resolve import read, resolve
from fedlth.models.layout import Params
from fedlth.personalization.arms import ARMS
from fedlth.personalization.step2 import Result, Step2
from fedlth.rng import stream
from fedlth.tickets.controls import permuted_values
from fedlth.tickets.schedule import Linear, Shrink
from tests import tiny
from tests.test_methods import results, step2_of

CONTROLS = ("init_mask", "shuffled_values", "reinit")


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Params, np.ndarray]]:
    """Return a list that every training of step 2 adds its start and its mask to."""
    seen: list[tuple[Params, np.ndarray]] = []
    original = Step2.walk

    def spy(self: Step2, start: Params, mask: np.ndarray, /, **how: Any) -> Any:
        seen.append((start.masked(mask), mask))
        return original(self, start, mask, **how)

    monkeypatch.setattr(Step2, "walk", spy)
    return seen


@pytest.mark.parametrize(("rewind", "start"), [("init", "theta_0"), ("global", "theta_g")])
def test_theta_0s_own_mask_starts_where_the_ticket_does(
    rewind: str, start: str, starts: list[tuple[Params, np.ndarray]]
) -> None:
    step = step2_of(tiny.study(finder={"rewind": rewind}))
    for result, density in zip(results(step, "init_mask"), (0.5, 0.2), strict=True):
        began, mask = starts.pop(0)
        size, anchor = result.mask.size, step.anchor(start)
        wanted = step.finder.pick(np.abs(step.anchor("theta_0").floats[:size]), step.local.full, layout(step), density)
        assert np.array_equal(result.mask, wanted) and np.array_equal(mask, wanted)
        assert np.array_equal(began.floats, anchor.masked(wanted).floats) and result.start == start
        assert (result.epochs, result.search_epochs) == (1, 0)
    assert not starts


@pytest.mark.parametrize("rewind", ["none", "lr", {"name": "step", "step": 2}])
def test_where_the_ticket_keeps_trained_weights_so_does_theta_0s_own_mask(
    rewind: Any, starts: list[tuple[Params, np.ndarray]]
) -> None:
    """Those weights have to be trained first, and that is counted."""
    step = step2_of(tiny.study(finder={"rewind": rewind, "densities": [0.5]}))
    (result,) = results(step, "init_mask")
    mask = step.finder.pick(
        np.abs(step.anchor("theta_0").floats[: result.mask.size]), step.local.full, layout(step), 0.5
    )
    assert np.array_equal(result.mask, mask) and result.search_epochs > 0
    began = starts[-1][0].floats
    assert not np.array_equal(began, step.theta_g.masked(mask).floats)
    (ticket,) = results(step, "ticket")
    assert ticket.epochs == result.epochs


def layout(step: Step2) -> Any:
    return step.local.task.layout


def test_the_values_alone_are_shuffled(starts: list[tuple[Params, np.ndarray]]) -> None:
    step = step2_of(tiny.study(finder={"rewind": "init"}))
    tickets = [result.mask for result in results(step, "ticket")]
    starts.clear()
    found = results(step, "shuffled_values")
    assert [(r.target, r.start, r.epochs, r.search_epochs) for r in found] == [
        (d, "theta_0", 1, 0) for d in (0.5, 0.2)
    ]  # fmt: skip
    assert all(np.array_equal(r.mask, mask) for r, mask in zip(found, tickets, strict=True))
    theta_0, size = step.anchor("theta_0"), tickets[0].size
    whole = theta_0.floats.copy()
    whole[:size] = permuted_values(theta_0.floats[:size], layout(step), step.local.rng("shuffled values"))
    for (began, mask), ticket in zip(starts, tickets, strict=True):
        assert np.array_equal(mask, ticket) and np.array_equal(
            began.floats, Params(whole, theta_0.ints).masked(mask).floats
        )
    assert np.array_equal(whole[size:], theta_0.floats[size:]), "biases stay"
    for e in layout(step).prunable:
        assert np.array_equal(np.sort(whole[e.slice]), np.sort(theta_0.floats[e.slice]))
        assert (whole[e.slice] != theta_0.floats[e.slice]).mean() > 0.9


def test_permuted_values_stay_in_their_tensor() -> None:
    made = tiny.small_layout()
    weights = np.arange(made.num_prunable, dtype=np.float32)
    found = permuted_values(weights, made, stream(0, "any"))
    assert not np.array_equal(found, weights) and found.dtype == np.float32
    for e in made.prunable:
        assert set(found[e.slice]) == set(weights[e.slice])


def test_the_ticket_on_other_initial_weights(starts: list[tuple[Params, np.ndarray]]) -> None:
    step = step2_of(tiny.study(finder={"densities": [0.3]}))
    (found,) = results(step, "reinit")
    assert found.start == "reinit" and (found.epochs, found.search_epochs) == (1, 0)
    (ticket,) = step.masks
    assert np.array_equal(found.mask, ticket[1])
    other, (began, mask) = step.local.fresh_init("reinit"), starts[-1]
    assert np.array_equal(began.floats, other.masked(mask).floats)
    same = began.floats == step.anchor("theta_0").masked(mask).floats
    assert not same[: mask.size][mask].any()


def test_without_a_ticket_there_is_nothing_to_put_other_weights_under(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that diverged has no mask; its control is as little of a model."""
    step = step2_of(tiny.study(finder={"densities": [0.3]}, personalise={"lr": 1e18}))
    for arm in ("shuffled_values", "reinit"):
        (found,) = results(step, arm)
        assert found.diverged and found.epochs == 0 and found.target == 0.3


def test_controls_come_after_the_ticket_and_search_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the order in which the study names them."""
    arms = ["reinit", "random", "shuffled_values", "ticket"]
    made = tiny.study(personalise={"arms": arms}, finder={"densities": [0.3]})
    order: list[str] = []
    for name in arms:

        def noted(step: Step2, name: str = name, original: Any = ARMS[name]) -> Iterator[Result]:
            order.append(name)
            yield from original(step)

        monkeypatch.setitem(ARMS, name, noted)  # type: ignore[arg-type]
    step = step2_of(made)
    update = tiny.experiment(made).phase("personalise").update
    assert [r.arm for r in update._results(step.local, step.inbox, step.state)] == ["ticket", *arms[:3]]  # type: ignore[attr-defined]
    assert order == ["ticket", *arms[:3]]


def test_a_forecast_counts_them(tmp_path: Path) -> None:
    one = {"finder": {"densities": [0.5, 0.2]}}
    bare, more = (
        tiny.experiment(tiny.study(**one, personalise={"arms": arms}))
        for arms in (["ticket", "dense"], ["ticket", "dense", *CONTROLS])
    )
    assert forecast.step2_epochs(more) - forecast.step2_epochs(bare) == 2 * len(CONTROLS)
    alone = tiny.experiment(tiny.study(**one, personalise={"arms": ["reinit"]}))
    assert forecast.step2_epochs(alone) == 2 + forecast.step2_epochs(
        tiny.experiment(tiny.study(**one, personalise={"arms": ["ticket"]}))
    )
    made = tiny.study(**one, personalise={"arms": ["ticket", "dense", *CONTROLS], "epochs": 1}, workers=1)
    _, moved = forecast.foreseen(made), tiny.run(made, tmp_path / "r")
    spent: dict[str, list[float]] = {}
    for row in tiny.rows(moved.root, "metrics"):
        spent.setdefault(row["arm"], []).append(row["epochs"] + row["search_epochs"])
    assert all(spent[arm] == [1] * 8 for arm in CONTROLS)


def test_a_model_that_brings_its_weights_has_no_reinit() -> None:
    """Refused before anything trains, unless model.reinit_options draws others."""
    brings, arms = {"name": "tests.user_model:pretrained", "options": {}}, {"arms": ["ticket", "reinit"]}
    with pytest.raises(StudyError, match="personalise.arms: .* so reinit would be no control"):
        resolve(tiny.study(model=brings, personalise=arms))
    resolve(tiny.study(model={**brings, "reinit_options": {"trained": False}}, personalise=arms))
    resolve(tiny.study(model=brings, personalise={"arms": ["ticket", "init_mask", "shuffled_values"]}))


def test_the_finder_has_an_effect_on_them() -> None:
    notes = read(tiny.study(finder={"rewind": "init", "score": "magnitude"}, personalise={"arms": ["init_mask"]}))[1]
    assert any(note.startswith("finder.score: has no effect") for note in notes)
    assert not any("finder.rewind" in note for note in notes)
    assert not read(tiny.study(finder={"score": "magnitude"}, personalise={"arms": ["reinit"]}))[1]


def test_both_conventions_of_a_tenth() -> None:
    """BERT-Tickets' code takes a tenth of the original size a round, its Algorithm 1 a tenth of what remains."""
    (original,), (remaining,) = Linear(0.1)((0.5,)), Shrink(0.1)((0.5,))
    assert original == pytest.approx((0.9, 0.8, 0.7, 0.6, 0.5))
    assert remaining == pytest.approx((0.9, 0.81, 0.729, 0.6561, 0.59049, 0.531441, 0.5))
    size, targets = 1000, tuple(1 - k / 10 for k in range(1, 10))
    assert [round(d * size) for d in Linear(0.1)(targets)[0]] == [900, 800, 700, 600, 500, 400, 300, 200, 100]
    assert [round(d * size) for d in Shrink(0.1)((0.9**9,))[0]] == [900, 810, 729, 656, 590, 531, 478, 430, 387]
