"""The search: what any composition of parts does to masks and weights, and what each part changes alone."""

from __future__ import annotations

import itertools
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedlth import rng
from fedlth.errors import StudyError
from fedlth.models.layout import Params
from fedlth.tickets.gate import EarlyBird, Look, Proposal, mask_distance
from fedlth.tickets.granularity import GRANULARITIES
from fedlth.tickets.rewind import REWINDS, changed
from fedlth.tickets.schedule import SCHEDULES
from fedlth.tickets.scope import SCOPES, survivors
from fedlth.tickets.score import SCORES
from fedlth.tickets.search import find
from tests.laws.fakes import ANCHORS, FULL, IN_TENSORS, LAYOUT, SIZE, TABLES, FakeNetwork, finder, params, walk

TARGETS = (0.6, 0.3, 0.05)
QUICK: dict[str, Any] = {"rescore": {"name": "rescore", "steps": 3}, "constant": {"name": "constant", "rounds": 2}}
LEARNED = {"edge_popup": "signed_constant", "biprop": "binary", "bernoulli": "signed_constant"}


def rewind_for(score: str, rewind: str) -> Any:
    return {"name": "frozen", "weights": LEARNED[score]} if score in LEARNED else rewind


def compositions() -> list[dict[str, Any]]:
    """Every pair of schedule, scope and rewind, every score x schedule, and every other part x schedule."""
    some: list[dict[str, Any]] = [{"schedule": t, "scope": c} for t in SCHEDULES for c in SCOPES]
    some += [{"schedule": t, "rewind": r} for t in SCHEDULES for r in REWINDS]
    some += [{"schedule": "shrink", "scope": c, "rewind": r} for c in SCOPES for r in REWINDS]
    some += [{"score": s, "schedule": t, "rewind": rewind_for(s, "init")} for s in SCORES for t in SCHEDULES]
    some = [one for one in some if one.get("score") != "slow_movement" or one["schedule"] not in QUICK]
    for kind in ("granularity", "dead", "gate", "stop"):
        names = IN_TENSORS if kind == "granularity" else TABLES[kind]
        some += [{kind: name, "schedule": t} for name in names for t in SCHEDULES]
    for one in some:
        if one["schedule"] in ("rescore", "constant"):
            one |= {part: plain for part, plain in (("gate", "always"), ("stop", "target")) if part in one}
        if "granularity" in one and one["schedule"] == "rescore":
            one["targets"] = (0.6, 0.3)
    return some


def name_of(parts: dict[str, Any]) -> str:
    return "-".join(p["name"] if isinstance(p, dict) else str(p) for p in parts.values())


@pytest.mark.parametrize("parts", compositions(), ids=name_of)
def test_every_finder(parts: dict[str, Any]) -> None:
    parts = dict(parts)
    targets = parts.pop("targets", TARGETS)
    schedule = parts["schedule"]
    chosen = finder(**{**parts, "schedule": QUICK.get(schedule, schedule)})
    assert pickle.loads(pickle.dumps(chosen)) == chosen and hash(chosen)
    measure = lambda p: 0.7  # noqa: E731
    found, calls = walk(chosen, targets, measure)
    again, _ = walk(chosen, targets, measure)
    assert [f.target for f in found] == list(targets)
    groups = chosen.granularity.groups(LAYOUT)
    for ticket, same in zip(found, again, strict=True):
        kept = groups.reduced(ticket.mask)
        assert set(np.unique(kept)) <= {0.0, 1.0}, "whole groups"
        if parts.get("scope") == "half_output":
            assert kept.sum() == chosen.scope.counts(LAYOUT, ticket.target).sum()
        else:
            assert kept.sum() == survivors(groups.layout, ticket.target)
        if not chosen.dead.holds:
            assert not ticket.params.floats[:SIZE][~ticket.mask].any(), "dead weights are zero"
        np.testing.assert_array_equal(ticket.mask, same.mask)
        assert ticket.params.digest() == same.params.digest()
    if chosen.dense_first:
        first = calls[0]
        assert first.mask.all() and first.replay_lr and first.start.digest() == params(2).digest()
    else:
        assert not any(c.mask.all() for c in calls if c.last_step is None), "nothing dense is trained"
    before = FULL
    for call in calls:
        assert call.mask.any() and call.window == chosen.window * (call.last_step is None)
        if call.mask.all():
            before = FULL
            continue
        if schedule == "constant" and call.mask.sum() == before.sum():
            assert (call.mask & ~before).any() or (call.mask == before).all(), "only a schedule that regrows revives"
        elif schedule in ("one_shot", "rescore", "constant"):
            pass  # another chain
        else:
            assert not (call.mask & ~before).any(), "never revives a dead weight"
        before = call.mask
        assert call.replay_lr is chosen.rewind.replay_lr
    assert all(
        np.array_equal(ANCHORS[n].floats, params(i).floats) for i, n in enumerate(("theta_0", "theta_g", "reinit"), 1)
    ), "anchors are copied, never written"


def test_constant_density_moves_its_mask_and_starts_what_comes_back_at_zero() -> None:
    for by in ("gradient", "random"):
        found, calls = walk(finder(schedule={"name": "constant", "rounds": 3, "by": by}, rewind="none"), (0.3,))
        assert len(calls) == 4 and found[0].trainings == 3
        assert len({c.mask.tobytes() for c in calls}) == 4, "it moved each time"
        for one, next_ in itertools.pairwise(calls):
            back = next_.mask & ~one.mask
            assert back.any() and not next_.start.floats[:SIZE][back].any()
            for e in LAYOUT.prunable:
                assert one.mask[e.slice].sum() == next_.mask[e.slice].sum()
    start = ANCHORS["theta_g"].floats[:SIZE]
    for first in ("random", "score"):
        _, calls = walk(finder(schedule={"name": "constant", "first": first}, rewind="none"), (0.3,))
        by_score = SCOPES["layerwise"]()(np.abs(start), FULL, LAYOUT, 0.3)
        assert np.array_equal(calls[0].mask, by_score) is (first == "score")
    layers = [[int(c.mask[e.slice].sum()) for e in LAYOUT.prunable] for c in calls]
    assert all(count == layers[0] for count in layers)


def test_a_mask_that_moves_inside_one_training() -> None:
    schedule = {"name": "constant", "rounds": 2, "every": 7}
    chosen = finder(schedule=schedule, rewind="none", scope="erk")
    found, calls = walk(chosen, (0.3, 0.1))
    assert chosen.trainings((0.3, 0.1)) == (1, 2) and [f.trainings for f in found] == [0, 0]
    assert [(c.first_step, c.last_step) for c in calls] == [(0, 7), (7, 14), (14, None)] * 2
    assert all(c.replay_lr for c in calls), "the rates go on"
    for one, next_ in itertools.pairwise(calls[:3]):
        back, began = next_.mask & ~one.mask, next_.start.floats[:SIZE]
        assert back.any() and not began[back].any()
        stayed = one.mask & next_.mask & (began != 0)  # what was dropped may come back at once, and begins at zero
        np.testing.assert_array_equal(began[stayed], one.start.floats[:SIZE][stayed] + np.float32(0.1))
        assert stayed.sum() > back.sum()
    with pytest.raises(StudyError, match=r"finder\.rewind: must be none under Constant\(.*inside one training"):
        finder(schedule=schedule, rewind="init")


def test_rescore_scores_masked_start_weights_and_trains_nothing_before() -> None:
    found, calls = walk(finder(score="synflow", schedule={"name": "rescore", "steps": 5}, scope="global"), (0.3, 0.1))
    assert len(calls) == 2 and [f.trainings for f in found] == [0, 0] and [f.chain for f in found] == [0, 1]
    one_shot, _ = walk(finder(score="snip", schedule={"name": "rescore", "steps": 1}, scope="global"), (0.3,))
    start = ANCHORS["theta_g"].floats[:SIZE]
    wanted = SCOPES["global"]()(np.abs(FakeNetwork().gradient(start) * start), FULL, LAYOUT, 0.3)
    np.testing.assert_array_equal(one_shot[0].mask, wanted)


@pytest.mark.parametrize("rewind", [n for n in REWINDS if n != "frozen"])
def test_where_survivors_start(rewind: str) -> None:
    second = walk(finder(schedule="one_shot", rewind=rewind), (0.3,))[1][-1]
    mask = second.mask
    theta_0, theta_g, other = (ANCHORS[n].masked(mask).floats for n in ("theta_0", "theta_g", "reinit"))
    trained = ANCHORS["theta_g"].floats.copy()
    trained[:SIZE] += np.float32(0.1)
    trained[:SIZE][~mask] = 0
    exact = {"init": theta_0, "global": theta_g, "reinit": other, "none": trained, "lr": trained, "step": trained}
    if rewind in exact:
        np.testing.assert_array_equal(second.start.floats, exact[rewind])
    else:
        assert (second.start.floats[:SIZE][mask] != theta_0[:SIZE][mask]).any(), "it acts"
        np.testing.assert_array_equal(second.start.floats[SIZE:], theta_0[SIZE:])


def test_step_k_is_the_dense_run_cut_there_and_gone_on_from() -> None:
    _, calls = walk(finder(schedule="one_shot", rewind={"name": "step", "step": 7}), (0.3,))
    dense, to_k, ticket = calls
    assert (dense.last_step, dense.first_step) == (None, 0)
    assert (
        (to_k.last_step, to_k.first_step) == (7, 0) and to_k.mask.all() and to_k.start.digest() == dense.start.digest()
    )
    assert (ticket.last_step, ticket.first_step) == (None, 7)


def start_of(name: str, **options: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rewind = REWINDS[name](**options)
    mask = np.random.default_rng(9).random(SIZE) < 0.5
    origin = ANCHORS["theta_0"]
    return changed(rewind, origin, mask, LAYOUT, rng.stream(0, "rewind")).floats[:SIZE], origin.floats[:SIZE], mask


def test_signed_constant_keeps_signs_and_has_one_size_a_layer() -> None:
    got, theta_0, _ = start_of("signed_constant")
    np.testing.assert_array_equal(np.sign(got), np.sign(theta_0))
    for e in LAYOUT.prunable:
        np.testing.assert_allclose(np.abs(got[e.slice]), theta_0[e.slice].std(), rtol=1e-5)


def test_reshuffle_keeps_each_layers_surviving_values() -> None:
    got, theta_0, mask = start_of("reshuffle")
    for e in LAYOUT.prunable:
        here = mask[e.slice]
        np.testing.assert_array_equal(np.sort(got[e.slice][here]), np.sort(theta_0[e.slice][here]))
    assert (got[mask] != theta_0[mask]).any()


@pytest.mark.parametrize("sigmas", [0.0, 0.5, 3.0])
def test_noise_is_in_units_of_the_layers_spread(sigmas: float) -> None:
    got, theta_0, _ = start_of("noise", sigmas=sigmas)
    for e in LAYOUT.prunable:
        measured = (got - theta_0)[e.slice].std() / theta_0[e.slice].std()
        assert measured == pytest.approx(sigmas, rel=0.35), "27 draws in the small layer"


def test_frozen_is_never_trained_and_has_the_values_that_it_names() -> None:
    for weights in ("init", "kaiming", "signed_constant", "binary"):
        found, calls = walk(finder(schedule="one_shot", rewind={"name": "frozen", "weights": weights}), (0.3,))
        assert len(calls) == 1 and found[0].trainings == 1, "the dense training for the score, nothing after"
        mask, got = found[0].mask, found[0].params.floats[:SIZE]
        theta_0 = ANCHORS["theta_0"].floats[:SIZE]
        np.testing.assert_array_equal(np.sign(got[mask]), np.sign(theta_0[mask]))
        for e in LAYOUT.prunable:
            here, values = mask[e.slice], theta_0[e.slice]
            constant = np.sqrt(2 / (e.size // e.shape[0]))
            scaled = values * constant / values.std()
            size = {
                "init": np.abs(values[here]),
                "kaiming": np.abs(scaled[here]),
                "signed_constant": constant,
                "binary": np.abs(scaled[here]).mean(),
            }[weights]
            np.testing.assert_allclose(np.abs(got[e.slice][here]), size, rtol=1e-5)


@pytest.mark.parametrize("dead", ["zero", "init", "zero_if_shrunk"])
def test_what_dead_weights_hold(dead: str) -> None:
    found, calls = walk(finder(schedule="shrink", dead=dead, rewind="init"), (0.3,))
    plain, _ = walk(finder(schedule="shrink", rewind="init"), (0.3,))
    np.testing.assert_array_equal(found[0].mask, plain[0].mask)  # magnitude sees only what is alive
    mask, theta_0 = found[0].mask, ANCHORS["theta_0"].floats[:SIZE]
    np.testing.assert_array_equal(found[0].params.floats[:SIZE][mask], plain[0].params.floats[:SIZE][mask])
    held = found[0].params.floats[:SIZE][~mask]
    assert all(c.held is (dead != "zero") for c in calls[1:]) and not calls[0].held
    if dead == "zero":
        assert not held.any()
    elif dead == "init":
        np.testing.assert_array_equal(held, theta_0[~mask])
    else:
        zeroed = held == 0
        assert 0 < zeroed.sum() < held.size
        np.testing.assert_array_equal(held[~zeroed], theta_0[~mask][~zeroed])


def test_zero_if_shrunk_is_zero_where_training_made_it_smaller() -> None:
    rule = TABLES["dead"]["zero_if_shrunk"]()
    assert rule(np.float32([1, -1, 2, 0]), np.float32([0.5, -2, -1, 3])).tolist() == [0, -1, 0, 0]


def test_a_granularity_keeps_whole_groups_of_highest_mean() -> None:
    found, calls = walk(finder(schedule="one_shot", granularity="row", scope="global"), (0.5,))
    groups = GRANULARITIES["row"]().groups(LAYOUT)
    trained = np.abs(ANCHORS["theta_g"].floats[:SIZE] + np.float32(0.1))
    best = np.argsort(-groups.reduced(trained), kind="stable")[: survivors(groups.layout, 0.5)]
    np.testing.assert_array_equal(np.flatnonzero(groups.reduced(found[0].mask)), np.sort(best))


def looks(masks: list[np.ndarray], tied: tuple[int, ...] = ()) -> list[Look]:
    return [
        Look(1.0, 0, ANCHORS["theta_0"], lambda p: 0.0, lambda m=m, i=i: Proposal(m, lambda: i in tied))
        for i, m in enumerate(masks)
    ]


def test_early_bird_draws_once_five_masks_lie_close() -> None:
    base = np.arange(100) < 50
    moved = base.copy()
    moved[[0, 99]] = moved[[99, 0]]  # distance 0.02
    far = ~base
    gate = EarlyBird()
    assert not gate(looks([base] * 4)), "not before five masks"
    assert gate(looks([base] * 5)) and gate(looks([far, base, moved, base, moved, base]))
    assert not gate(looks([base, base, far, base, base])), "one of the four is far"
    assert not gate(looks([base] * 5, tied=(0,))), "all scores alike at init say nothing"
    assert gate(looks([base] * 6, tied=(0,)))
    assert gate(looks([base, far] * 25)), "but not more often than `most`"


def test_mask_distance_is_a_distance_in_the_unit_interval() -> None:
    draw = np.random.default_rng(0)
    one, other, third = (draw.random(40) < 0.5 for _ in range(3))
    assert mask_distance(one, one) == 0 and mask_distance(one, ~one) == 1
    assert mask_distance(one, other) == mask_distance(other, one)
    assert mask_distance(one, third) <= mask_distance(one, other) + mask_distance(other, third)


def test_gates_train_on_until_they_open() -> None:
    plain = len(walk(finder(schedule="shrink"), (0.3,))[1])
    found, calls = walk(finder(schedule="shrink", gate={"name": "warm_up", "trainings": 4}), (0.3,))
    assert len(calls) == plain + 3 and all(c.mask.all() for c in calls[:4]) and not calls[4].mask.all()
    assert found[0].trainings == plain + 2
    rising = iter([0.2, 0.3, 0.6])
    _, calls = walk(finder(schedule="one_shot", gate="val_accuracy"), (0.3,), lambda p: next(rising))
    assert len(calls) == 4, "0.6 passes 0.5 at the third look"
    _, calls = walk(finder(schedule="one_shot", gate={"name": "val_accuracy", "most": 3}), (0.3,), lambda p: 0.0)
    assert len(calls) == 4
    _, calls = walk(
        finder(schedule="one_shot", gate={"name": "adaptive", "at_least": 0.5, "decay": 0.5}), (0.3,), lambda p: 0.2
    )
    assert len(calls) == 4, "0.2 passes 0.5, 0.25, 0.125 at the third look"
    with pytest.raises(StudyError, match="needs validation accuracy"):
        walk(finder(gate="val_accuracy"), (0.3,))


def test_a_stop_gives_the_last_good_ticket_for_what_was_not_reached() -> None:
    falling = {1.0: 0.9, 0.6: 0.895, 0.3: 0.5, 0.05: 0.1}

    def measure(p: Params) -> float:
        alive = float(np.mean(p.floats[:SIZE] != 0))
        return falling[min(falling, key=lambda d: abs(d - alive))]

    found, calls = walk(finder(stop="val_drop"), TARGETS, measure)
    assert [f.target for f in found] == list(TARGETS)
    assert [int(f.mask.sum()) for f in found] == [survivors(LAYOUT, 0.6)] * 3
    assert len(calls) == 3 and found[0].trainings == 1 and found[1].trainings == 2, "what went too far was paid for"
    on, _ = walk(finder(stop={"name": "val_drop", "drop": 1.0}), TARGETS, measure)
    assert [int(f.mask.sum()) for f in on] == [survivors(LAYOUT, t) for t in TARGETS]


def test_what_a_search_will_cost_is_known_before() -> None:
    for schedule, rewind in itertools.product(SCHEDULES, ("init", "step", "frozen")):
        chosen = finder(schedule=QUICK.get(schedule, schedule), rewind=rewind)
        _, calls = walk(chosen, TARGETS)
        dense = [c for c in calls if c.mask.all() and c.last_step is None]
        masked = [c for c in calls if not c.mask.all()]
        assert chosen.trainings(TARGETS)[1] == bool(dense) + len(masked), schedule
        assert chosen.trainings(TARGETS)[0] <= chosen.trainings(TARGETS)[1]


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"scope": "erk", "granularity": "row"}, r"finder\.granularity: must be element under the scope Erk"),
        ({"scope": "n_of_m", "granularity": "channel"}, r"finder\.granularity: must be element under the scope NOfM"),
        ({"score": "edge_popup"}, r"finder\.rewind: must be frozen with weights 'signed_constant'"),
        ({"score": "biprop", "rewind": "frozen"}, r"finder\.rewind: must be frozen with weights 'binary'"),
        ({"schedule": "rescore", "score": "slow_movement"}, r"finder\.score: must not look back under Rescore"),
        ({"schedule": "rescore", "gate": "warm_up"}, r"finder\.gate: must be always under Rescore"),
        ({"schedule": "rescore", "stop": "val_drop"}, r"finder\.stop: must be target under Rescore"),
        ({"score": {"name": "shuffled", "of": "edge_popup"}}, r"finder\.rewind: must be frozen with weights"),
        ({"score": {"name": "inverted", "of": "biprop"}}, r"finder\.rewind: must be frozen with weights 'binary'"),
    ],
)
def test_parts_that_cannot_go_together_say_so(parts: dict[str, Any], says: str) -> None:
    with pytest.raises(StudyError, match=says):
        finder(**parts)


@pytest.mark.parametrize("control", ["shuffled", "inverted"])
def test_a_control_asks_for_what_its_original_asks_for(control: str) -> None:
    learned = SCORES[control](of="edge_popup")
    assert (learned.weights, learned.epochs) == ("signed_constant", 3) and learned.window == 0
    assert SCORES[control](of="slow_movement").window == SCORES["slow_movement"]().window > 0
    assert not hasattr(SCORES[control](), "epochs") and pickle.loads(pickle.dumps(learned)) == learned


def test_a_score_cannot_write_into_what_it_looks_at() -> None:
    def writes(evidence: Any, /) -> np.ndarray:
        for name in ("init", "start", "now", "mask"):
            with pytest.raises(ValueError, match="read-only"):
                getattr(evidence, name)[:] = 7
        return np.abs(evidence.now)

    walk(replace(finder(), score=writes), (0.5,))


def test_a_search_without_a_network_serves_what_needs_none() -> None:
    from tests.laws.fakes import Walked

    def train(start: Params, mask: np.ndarray, /, **more: Any) -> Walked:
        return Walked(start)

    common: dict[str, Any] = {
        "start": ANCHORS["theta_g"], "start_name": "theta_g", "targets": (0.3,), "layout": LAYOUT,
        "anchors": lambda name: ANCHORS[name], "train": train, "rng": lambda what: rng.stream(0, what),
    }  # fmt: skip
    assert next(find(finder(), **common)).mask.sum() == survivors(LAYOUT, 0.3)
    with pytest.raises(StudyError, match="Snip needs the network"):
        next(find(finder(score="snip"), **common))
