"""Every part of a finder in a federated study: chosen by name in `finder:`, run by a client on real networks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from fedlth import catalogue
from fedlth.errors import StudyError
from fedlth.experiment.experiment import finder_of
from fedlth.experiment.resolve import read
from fedlth.forecast import trainings
from fedlth.personalization.arms import ARMS
from fedlth.personalization.step2 import Result, Step2
from fedlth.study import schema
from fedlth.tickets.scope import survivors
from fedlth.training.batches import window
from fedlth.training.local_client import LocalClient
from fedlth.training.optimizer import Sgd
from tests import tiny
from tests.laws.fakes import TABLES
from tests.test_methods import step2_of

NORMED = {"model": {"name": "tests.test_finders:Normed", "options": {}, "prunable": ["conv*.weight"]}}
NEEDS: dict[tuple[str, str], dict[str, Any]] = {
    ("score", "gamma"): {"granularity": "row", "scope": "global"},
    ("score", "edge_popup"): {"schedule": {"name": "rescore", "steps": 1}, "rewind": "frozen"},
    ("score", "bernoulli"): {"schedule": {"name": "rescore", "steps": 1}, "rewind": "frozen"},
    ("score", "biprop"): {
        "schedule": {"name": "rescore", "steps": 1}, "rewind": {"name": "frozen", "weights": "binary"},
    },
    ("schedule", "rescore"): {"score": "synflow", "scope": "global"},
    ("schedule", "constant"): {"score": "magnitude", "rewind": "none", "scope": "erk"},
    ("rewind", "step"): {"rewind": {"name": "step", "step": 2}},
}  # fmt: skip
OF_TRANSFORMERS = ("granularity", "heads_and_channels")  # tests/text/test_small_tickets.py
EVERY_PART = [(kind, name) for kind, table in TABLES.items() for name in table if (kind, name) != OF_TRANSFORMERS]


class Normed(tiny.Small):
    pass


def study(kind: str, name: str, **sections: Any) -> schema.Study:
    parts = {kind: name, **NEEDS.get((kind, name), {})}
    more = NORMED if name == "gamma" else {}
    finder = {**parts, "densities": [0.5, 0.2], **sections.pop("finder", {})}
    return tiny.study(finder=finder, **more, **sections)


def tickets(made: schema.Study) -> tuple[Step2, list[Result]]:
    step = step2_of(made)
    return step, list(ARMS["ticket"](step))


@pytest.mark.parametrize(("kind", "name"), EVERY_PART)
def test_every_part_finds_a_ticket_on_a_client(kind: str, name: str) -> None:
    made = study(kind, name)
    assert schema.build(made.model_dump(mode="json")) == made
    step, found = tickets(made)
    _, again = tickets(made)
    layout, size = step.local.task.layout, step.local.full.size
    groups = step.finder.granularity.groups(layout)
    for target, one, same in zip((0.5, 0.2), found, again, strict=True):
        kept = groups.reduced(one.mask) > 0
        if name == "half_output":
            assert kept.sum() == step.finder.scope.counts(layout, target).sum()  # type: ignore[attr-defined]
        elif name != "val_drop":
            assert kept.sum() == survivors(groups.layout, target)
        assert one.target == target and one.params.digest() == same.params.digest()
        assert np.isfinite(one.params.floats).all()
        assert one.held or not one.params.floats[:size][~one.mask].any()
        assert one.flops[0] >= one.flops[1] > 0 and one.search_epochs >= 0
    if kind != "gate" and name != "val_drop":
        learned = 3 * len(found) if hasattr(step.finder.score, "epochs") else 0
        chains = len(step.finder.schedule((0.5, 0.2)))
        shared = (chains - 1) * step.finder.dense_first  # each chain's cost is told in full, the dense one in each
        expected = (trainings("ticket", tiny.experiment(made)) + shared) * made.personalise.epochs + learned
        # A ticket that goes on from step 2 of 3 does not train the two steps before, which the dense training paid for.
        spared = 2 * len(found) if name == "step" else 0
        steps = sum(cost.steps for cost in step.log)
        assert steps == expected * step.local.steps_an_epoch - spared, "the forecast knows every training"


def test_the_listing_names_every_part_with_its_paper_and_its_rows() -> None:
    text = catalogue.listing("finders")
    for kind, table in TABLES.items():
        assert kind in text
        for name, part in table.items():
            (line,) = [
                ln for ln in text.splitlines() if ln.startswith(f"  {name} ") and (part.__doc__ or "")[:30] in ln
            ]
            if part.rows:
                assert line.endswith(f"[{', '.join(map(str, part.rows))}]")
            if name not in ("element", "random"):  # nobody's invention
                assert "arXiv" in line or "20" in line or "1988" in line, line


def test_frozen_tickets_keep_their_weights_bit_for_bit() -> None:
    step, found = tickets(study("score", "edge_popup"))
    theta_0, size = step.local.task.theta_0, step.local.full.size
    for one in found:
        assert one.epochs == 0 and one.search_epochs == 3
        got = one.params.floats[:size][one.mask]
        np.testing.assert_array_equal(np.sign(got), np.sign(theta_0.floats[:size][one.mask]))
        np.testing.assert_array_equal(one.params.floats[size:], theta_0.floats[size:])


def test_step_k_is_where_the_dense_run_stood_and_the_rates_go_on() -> None:
    made = study("rewind", "step", personalise={"epochs": 2, "schedule": "cosine"}, finder={"densities": [0.5]})
    step, (one,) = tickets(made)
    dense = step.recipe
    to_k = step.local.train(step.theta_g, recipe=replace(dense, last_step=2)).params
    expected = step.local.train(to_k.masked(one.mask), recipe=replace(dense, first_step=2), active=one.mask).params
    np.testing.assert_array_equal(one.params.floats, expected.floats)
    whole = step.local.train(step.theta_g, recipe=dense).params
    resumed = step.local.train(to_k, recipe=replace(dense, first_step=2)).params
    momentum_free = replace(dense, optimizer=Sgd())
    pieces = step.local.train(
        step.local.train(step.theta_g, recipe=replace(momentum_free, last_step=2)).params,
        recipe=replace(momentum_free, first_step=2),
    ).params
    plain = step.local.train(step.theta_g, recipe=momentum_free).params
    np.testing.assert_array_equal(pieces.floats, plain.floats)
    assert resumed.digest() != whole.digest(), "the momentum is rebuilt at a rewind"
    with pytest.raises(StudyError, match=r"finder\.rewind\.step: must lie inside a training's \d+ steps, got 9999"):
        tickets(study("rewind", "step", finder={"rewind": {"name": "step", "step": 9999}}))


def test_a_mask_moves_inside_one_training_by_the_gradient_of_that_moment() -> None:
    schedule = {"name": "constant", "rounds": 2, "every": 2, "drop": 0.4}
    finder = {"rewind": "none", "densities": [0.4]}
    sections = {"personalise": {"epochs": 2, "schedule": "cosine"}, "train": {"momentum": 0.0}}
    step, (one,) = tickets(study("schedule", "constant", finder={**finder, "schedule": schedule}, **sections))
    size, local = step.local.full.size, step.local
    regrow = step.finder.schedule.regrow  # type: ignore[attr-defined]
    at, mask = step.theta_g, None
    for move, (first, last) in enumerate(((0, 2), (2, 4), (4, None))):
        if mask is None:
            draw = local.rng("first@0.400000").random(size)
            mask = stayed = step.finder.pick(draw, local.full, local.task.layout, 0.4)
        else:
            grown = np.abs(step.network(at).gradient(at.floats[:size]))
            mask, stayed = regrow(np.abs(at.floats[:size]), grown, mask, local.task.layout, move - 1)
        at = local.train(
            at.masked(stayed), recipe=replace(step.recipe, first_step=first, last_step=last), active=mask
        ).params
    np.testing.assert_array_equal(one.mask, mask)
    np.testing.assert_array_equal(one.params.floats, at.floats)
    assert one.search_epochs == 0 and one.epochs == 2, "it is one training"
    assert one.flops[0] == pytest.approx(step.local.flops(one.mask, 2 * step.local.num_train)[0]), "and costs one"
    still, (same,) = tickets(
        study("schedule", "constant", finder={**finder, "schedule": {**schedule, "drop": 1e-9}}, **sections)
    )
    plain = still.local.train(still.theta_g.masked(same.mask), recipe=still.recipe, active=same.mask).params
    np.testing.assert_array_equal(same.params.floats, plain.floats)
    with pytest.raises(StudyError, match=r"finder\.schedule\.every: all moves must come before .* client 0 has \d+"):
        tickets(study("schedule", "constant", finder={**finder, "schedule": {**schedule, "every": 500}}))


def test_a_run_cut_in_steps_is_the_run() -> None:
    epochs = [[np.array([10 * e + i]) for i in range(3)] for e in range(3)]
    flat = [int(b[0]) for parts in epochs for b in parts]
    for first in range(9):
        for last in range(first + 1, 10):
            got = window(epochs, first, last)
            assert all(got) and [int(b[0]) for parts in got for b in parts] == flat[first:last]
    recipe = tiny.recipe(epochs=3, batch_size=1, lr=1.0, schedule="cosine", first_step=4)
    assert recipe.rate(4, 9) == pytest.approx(1.0 * (0.01 + 0.99 * 0.5)), "the schedule is the whole run's"


def test_slow_movement_sees_the_epochs_before_the_last() -> None:
    made = study(
        "score", "slow_movement", personalise={"epochs": 3}, finder={"score": {"name": "slow_movement", "window": 2}}
    )
    step, _ = tickets(made)
    walked = step.walk(step.theta_g, step.local.full, replay_lr=True, window=2)
    ends = step.local.train(step.theta_g, recipe=step.recipe, snapshots=(1, 2)).snapshots
    for got, epoch in zip(walked.previous, (1, 2), strict=True):
        np.testing.assert_array_equal(got, ends[epoch][: got.size])
    whole = step.walk(step.theta_g, step.local.full, replay_lr=True, window=9)
    assert len(whole.previous) == 3
    np.testing.assert_array_equal(whole.previous[0], step.theta_g.floats[: step.local.full.size])


@pytest.mark.parametrize("dead", ["init", "zero_if_shrunk"])
def test_dead_weights_that_hold_a_value_never_move_and_stand_in_the_saved_ticket(tmp_path: Path, dead: str) -> None:
    made = study("dead", dead, finder={"rewind": "init"}, personalise={"arms": ["ticket"]})
    tiny.run(made, tmp_path / "r")
    task = tiny.experiment(made).task
    with safe_open(tmp_path / "r" / "tickets" / "client-0000.safetensors", "numpy") as file:
        for e in task.layout.prunable:
            mask = np.unpackbits(file.get_tensor(f"{e.name}_mask"), count=e.size).astype(bool)
            got, init = file.get_tensor(e.name).reshape(-1), task.theta_0.floats[e.slice]
            same = got[~mask] == init[~mask]
            assert same.all() if dead == "init" else (same | (got[~mask] == 0)).all()
            assert (got[~mask] != 0).sum() > 0
    import torch

    from fedlth.experiment.saved_ticket import load_ticket

    row = next(r for r in tiny.rows(tmp_path / "r", "metrics") if r["client"] == 0 and r["target_density"] == 0.2)
    part = task.part(0, "test")
    with torch.inference_mode():
        right = int((load_ticket(tmp_path / "r", 0)(part.tensor).argmax(-1) == part.y).sum())
    assert right / len(part) == row["test_accuracy"]
    with pytest.raises(StudyError, match="refine.rounds: must be 0 where dead weights are not zero"):
        read(study("dead", dead, refine={"rounds": 1, "clients_per_round": 2}))


def test_a_structured_ticket_has_a_structured_control() -> None:
    made = study("granularity", "row", personalise={"arms": ["ticket", "random", "global_mask"]})
    step = step2_of(made)
    groups = step.finder.granularity.groups(step.local.task.layout)
    own = [r.mask for r in ARMS["ticket"](step)]
    for arm in ("random", "global_mask"):
        for one, ticket in zip(ARMS[arm](step), own, strict=True):
            kept = groups.reduced(one.mask)
            assert set(np.unique(kept)) <= {0.0, 1.0} and kept.sum() == groups.reduced(ticket).sum()


def test_a_whole_study_of_unusual_parts(tmp_path: Path) -> None:
    finder = {
        "score": {"name": "shuffled", "of": {"name": "fisher", "per_cost": False}},
        "schedule": {"name": "linear", "rate": 0.25},
        "scope": {"name": "global", "floor": 2},
        "rewind": {"name": "noise", "sigmas": 1.0},
        "gate": {"name": "warm_up"},
        "stop": {"name": "val_drop", "drop": 0.9},
        "densities": [0.5, 0.2],
    }
    made = tiny.study(
        finder=finder, personalise={"arms": ["ticket", "random"]}, refine={"rounds": 1, "clients_per_round": 2}
    )
    tiny.run(made, tmp_path / "r")
    tiny.run(made, tmp_path / "again")
    assert tiny.facts(tmp_path / "r") == tiny.facts(tmp_path / "again")
    rows = [r for r in tiny.rows(tmp_path / "r", "metrics") if r["arm"] == "ticket"]
    size = tiny.experiment(made).task.layout.num_prunable
    assert {round(r["density"] * size) for r in rows} == {round(0.5 * size), round(0.2 * size)}


def test_controls_act_and_leave_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each control differs from the plain ticket in what it says, and in nothing else."""
    step, plain = tickets(study("score", "magnitude"))
    layout = step.local.task.layout
    counts = lambda r: [int(r.mask[e.slice].sum()) for e in layout.prunable]  # noqa: E731
    for name in ("random", "inverted", "shuffled"):
        _, control = tickets(study("score", name))
        for one, other in zip(plain, control, strict=True):
            assert (one.mask != other.mask).any() and counts(one) == counts(other)
            assert (one.start, one.epochs, one.search_epochs) == (other.start, other.epochs, other.search_epochs)
    _, fresh = tickets(study("rewind", "reinit", finder={"densities": [0.5]}))
    np.testing.assert_array_equal(fresh[0].mask, plain[0].mask)
    starts: list[np.ndarray] = []
    original = LocalClient.train

    def spy(self: LocalClient, start: Any, **more: Any) -> Any:
        starts.append(start.floats)
        return original(self, start, **more)

    monkeypatch.setattr(LocalClient, "train", spy)
    tickets(study("rewind", "reinit", finder={"densities": [0.5]}))
    assert not np.array_equal(starts[-1], step.local.task.theta_0.masked(plain[0].mask).floats)
    assert ((starts[-1][: plain[0].mask.size] != 0) == plain[0].mask).all()


def test_finders_of_a_study_are_what_it_says() -> None:
    made = tiny.study(finder={"score": "snip", "granularity": {"name": "block", "height": 2}, "gate": "warm_up"})
    text = repr(finder_of(made))
    assert "Snip()" in text and "Block(height=2, width=4)" in text and "WarmUp(trainings=2)" in text


@pytest.mark.parametrize("score", ["slow_movement", "edge_popup", {"name": "inverted", "of": "slow_movement"}])
def test_a_method_refuses_scores_that_it_cannot_serve(score: Any) -> None:
    with pytest.raises(StudyError, match=r"method\.score must be one that neither looks back over epochs nor learns"):
        read(tiny.study(method={"name": "lotteryfl", "score": score}))


@pytest.mark.parametrize("score", ["fisher", "gradient_weight", "grasp", "synflow", "shuffled"])
def test_a_method_prunes_by_any_other_score(tmp_path: Path, score: str) -> None:
    made = tiny.of_method("lotteryfl", federate={"rounds": 2, "clients_per_round": 2})
    made = made.model_copy(update={"method": {**made.method, "score": score}})
    tiny.run(made, tmp_path / "r")
    rows = [r for r in tiny.rows(tmp_path / "r", "ledger") if r["kind"] == "values" and r["receiver"] == "server"]
    assert min(r["density"] for r in rows) < 1


def test_an_arm_that_the_parts_forbid_is_refused_before_the_run() -> None:
    with pytest.raises(StudyError, match=r"finder\.rewind: must be frozen"):
        read(study("score", "edge_popup", personalise={"arms": ["ticket_0"]}))


@pytest.mark.parametrize("parts", [{"dead": "init", "rewind": {"name": "step", "step": 2}}, {"score": "slow_movement"}])
def test_the_kernel_trains_what_the_reference_trains(parts: dict[str, Any]) -> None:
    pytest.importorskip("numba")
    found = []
    for compute in ("reference", "sparse"):
        made = tiny.study(finder={**parts, "densities": [0.5]}, compute=compute, personalise={"epochs": 2})
        found.append(tickets(made)[1][0])
    # Weights that lie on the cut may change places with the last bit of a training.
    assert (found[0].mask != found[1].mask).sum() <= 2
    np.testing.assert_allclose(found[0].params.floats, found[1].params.floats, atol=0.3)
    assert np.median(np.abs(found[0].params.floats - found[1].params.floats)) < 1e-5


def test_early_bird_draws_whole_channels_once_their_scales_have_settled() -> None:
    parts = {
        "score": "gamma", "granularity": "row", "schedule": "one_shot", "scope": "global", "rewind": "none",
        "gate": {"name": "early_bird", "most": 12}, "densities": [0.67],
    }  # fmt: skip
    made = tiny.study(finder=parts, **NORMED)
    step, (one,) = tickets(made)
    looks = one.search_epochs  # one epoch a look
    assert 5 <= looks < 12, "five masks at the least, and not because time was up"
    rows = one.mask.reshape(3, 9)
    assert rows.all(axis=1).sum() == 2 and (~rows).all(axis=1).sum() == 1
    gammas = next(e for e in step.local.task.layout.floats if e.norm and e.name.endswith("weight"))
    dense = step.theta_g
    for _ in range(looks):
        dense = step.local.train(dense, recipe=replace(step.recipe, replay_lr=False), active=step.local.full).params
    scale = np.abs(dense.floats[gammas.slice])
    assert not rows[int(np.argmin(scale))].any(), "the channel of the smallest scale goes"


def test_the_random_control_has_its_dead_at_zero_whatever_the_tickets_hold() -> None:
    step = step2_of(study("dead", "init", personalise={"arms": ["ticket", "random"]}))
    size = step.local.full.size
    for one in ARMS["random"](step):
        assert not one.held and not one.params.floats[:size][~one.mask].any()
    assert all(one.held for one in ARMS["ticket"](step))
