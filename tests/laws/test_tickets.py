"""The laws of every score, schedule, scope and rewind in the tables: a new part is tested by being listed."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlth import rng
from fedlth.errors import StudyError
from fedlth.params import Params
from fedlth.parts import make
from fedlth.tickets.evidence import Evidence
from fedlth.tickets.finder import Finder, find
from fedlth.tickets.rewind import REWINDS, ToGlobal
from fedlth.tickets.schedule import SCHEDULES, Iterative, Shrink
from fedlth.tickets.scope import SCOPES, survivors
from fedlth.tickets.score import SCORES
from fedlth.tickets.select import apportion, keep_top
from tests.tiny import small_layout

LAYOUT = small_layout()
SIZE = LAYOUT.num_prunable
TABLES = {"score": SCORES, "schedule": SCHEDULES, "scope": SCOPES, "rewind": REWINDS}
EVERY_PART = [(kind, name) for kind, table in TABLES.items() for name in table]
TARGETS = (0.6, 0.3, 0.05)


def evidence(seed: int = 0, *, now: np.ndarray | None = None, mask: np.ndarray | None = None) -> Evidence:
    draw = np.random.default_rng(seed)
    init, start, end = (draw.normal(size=SIZE).astype(np.float32) for _ in range(3))
    return Evidence(
        layout=LAYOUT, init=init, start=start, now=end if now is None else now,
        mask=np.ones(SIZE, bool) if mask is None else mask, gradient=lambda w: np.tanh(w), rng=rng.stream(seed, "x"),
    )  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), EVERY_PART)
def test_a_part_is_a_value(kind: str, name: str) -> None:
    one, other = (make(TABLES[kind], {"name": name}, kind) for _ in range(2))
    assert one == other and hash(one) == hash(other) and repr(one) == repr(other)
    again = pickle.loads(pickle.dumps(one))
    assert again == one and repr(again) == repr(one)
    with pytest.raises(AttributeError):
        one.anything = 1
    assert type(one).__doc__ and type(one).__name__ in repr(one)


@pytest.mark.parametrize("name", SCORES)
def test_a_score_is_deterministic_one_number_a_weight_and_touches_nothing(name: str) -> None:
    given_ = evidence(1)
    before = [a.copy() for a in (given_.init, given_.start, given_.now, given_.mask)]
    one, other = SCORES[name]()(given_), SCORES[name]()(evidence(1))
    assert one.shape == (SIZE,) and np.isfinite(one).all()
    np.testing.assert_array_equal(one, other)
    for array, was in zip((given_.init, given_.start, given_.now, given_.mask), before, strict=True):
        np.testing.assert_array_equal(array, was)


def test_scores_on_four_numbers() -> None:
    at = Evidence(
        layout=LAYOUT, init=np.float32([1, -2, 3, 0]), start=np.float32([1, 1, -1, 2]), now=np.float32([-3, 1, 0, 2]),
        mask=np.ones(4, bool), gradient=lambda w: np.float32([1, -1, 3, 0]), rng=rng.stream(0, "x"),
    )  # fmt: skip
    assert SCORES["magnitude"]()(at).tolist() == [3, 1, 0, 2]
    assert SCORES["magnitude_increase"]()(at).tolist() == [2, -1, -3, 2]
    assert SCORES["movement"]()(at).tolist() == [4, 0, 1, 0]
    assert SCORES["snip"]()(at).tolist() == [1, 1, 3, 0]


@pytest.mark.parametrize("density", [1e-9, 0.01, 0.2, 0.5, 0.999, 1.0])
@pytest.mark.parametrize(("score", "scope"), list(itertools.product(SCORES, SCOPES)))
def test_the_count_is_exact_and_no_dead_weight_revives(score: str, scope: str, density: float) -> None:
    alive = np.random.default_rng(3).random(SIZE) < 0.7
    mask = SCOPES[scope]()(SCORES[score]()(evidence(2)), alive, LAYOUT, density)
    assert mask.dtype == bool and mask.shape == (SIZE,)
    assert not (mask & ~alive).any()
    assert mask.sum() == min(survivors(LAYOUT, density), alive.sum())


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("density", [0.1, 0.5])
def test_equal_scores_are_broken_by_position(scope: str, density: float) -> None:
    alive = np.ones(SIZE, bool)
    mask = SCOPES[scope]()(np.zeros(SIZE, np.float32), alive, LAYOUT, density)
    assert mask.sum() == survivors(LAYOUT, density)
    for entry in LAYOUT.prunable:
        here = mask[entry.slice]
        assert here[: here.sum()].all(), "among equals the first positions win"


@pytest.mark.parametrize("scope", ["layerwise", "erk"])
def test_no_layer_is_emptied_while_there_is_one_weight_for_each(scope: str) -> None:
    score = np.concatenate([np.full(e.size, float(i)) for i, e in enumerate(LAYOUT.prunable)])
    mask = SCOPES[scope]()(score, np.ones(SIZE, bool), LAYOUT, 2 / SIZE)
    assert [int(mask[e.slice].sum()) for e in LAYOUT.prunable] == [1, 1]


def test_layerwise_keeps_the_same_share_and_global_the_best_of_all() -> None:
    score = np.concatenate([np.full(e.size, 10.0 * i) for i, e in enumerate(LAYOUT.prunable)])
    score += np.random.default_rng(0).random(SIZE)
    alive = np.ones(SIZE, bool)
    layerwise = SCOPES["layerwise"]()(score, alive, LAYOUT, 0.5)
    for entry in LAYOUT.prunable:
        assert abs(layerwise[entry.slice].sum() - 0.5 * entry.size) <= 1
    best = SCOPES["global"]()(score, alive, LAYOUT, 0.5)
    assert score[best].min() >= score[~best].max()


@given(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=40), st.data())
def test_keep_top_equals_a_stable_sort(values: list[float], data: st.DataObject) -> None:
    score = np.round(np.array(values, np.float32))  # rounding makes ties
    alive = np.array(data.draw(st.lists(st.booleans(), min_size=score.size, max_size=score.size)))
    kept = data.draw(st.integers(0, score.size))
    mask = keep_top(score, alive, kept)
    order = [i for i in np.argsort(-score, kind="stable") if alive[i]][:kept]
    assert sorted(np.flatnonzero(mask)) == sorted(order)


def test_keep_top_at_its_ends() -> None:
    score, alive = np.float32([3, 1, 2]), np.array([True, False, True])
    assert keep_top(score, alive, 0).tolist() == [False] * 3
    assert keep_top(score, alive, 2).tolist() == alive.tolist()
    assert keep_top(score, alive, 3).tolist() == alive.tolist()
    assert keep_top(np.float32([np.inf, -np.inf, 0]), np.ones(3, bool), 2).tolist() == [True, False, True]
    with pytest.raises(ValueError, match="not a number"):
        keep_top(np.float32([np.nan, 0, 0]), alive, 1)


@given(
    st.integers(0, 200),
    st.lists(st.tuples(st.integers(0, 100), st.integers(0, 50)), min_size=1, max_size=8),
)
def test_apportion_is_exact_bounded_and_fair(total: int, layers: list[tuple[int, int]]) -> None:
    weights, limits = np.array([float(w) for w, _ in layers]), np.array([n for _, n in layers])
    counts = apportion(total, weights, limits)
    assert counts.sum() == min(total, limits.sum())
    assert (counts >= 0).all() and (counts <= limits).all()
    open_ = (counts < limits) & (weights > 0)
    if weights.sum() > 0:
        for i, j in itertools.permutations(np.flatnonzero(open_), 2):
            assert counts[i] + 1 >= counts[j] * min(1.0, weights[i] / weights[j]) - 1e-6 - 1


@given(st.integers(0, 60), st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_apportion_by_sizes_is_within_one_of_the_share(total: int, sizes: list[int]) -> None:
    limits = np.array(sizes)
    total = min(total, int(limits.sum()))
    exact = total * limits / limits.sum()
    assert (np.abs(apportion(total, limits.astype(float), limits) - exact) < 1 + 1e-9).all()


@pytest.mark.parametrize("targets", [TARGETS, (0.2,), (1.0,), (1.0, 0.5), (0.5, 0.49, 0.48)])
@pytest.mark.parametrize("schedule", [*[s() for s in SCHEDULES.values()], Iterative(3), Shrink(0.5), Shrink(0.01)])
def test_schedules_fall_and_hit_every_target_once(schedule: Any, targets: tuple[float, ...]) -> None:
    chains = schedule(targets)
    for chain in chains:
        assert all(later < earlier for earlier, later in itertools.pairwise(chain)), "strictly falling"
        assert all(0 < d <= 1 for d in chain)
    hit = [d for chain in chains for d in chain if d in targets]
    assert sorted(hit) == sorted(targets), "each target exactly, and once"


def test_shrink_follows_the_power_law_and_stops_exactly() -> None:
    (chain,) = Shrink(0.2)((0.1,))
    assert chain[:-1] == pytest.approx([0.8**k for k in range(1, 11)]) and chain[-1] == 0.1
    (chain,) = Iterative(2)((0.25,))
    assert chain == pytest.approx((0.5, 0.25))


@pytest.mark.parametrize(
    ("table", "spec", "place"),
    [
        (SCHEDULES, {"name": "iterative", "rounds": 0}, "finder.schedule.rounds"),
        (SCHEDULES, {"name": "shrink", "rate": 1.0}, "finder.schedule.rate"),
        (REWINDS, {"name": "global", "round": -2}, "finder.rewind.round"),
    ],
)
def test_impossible_options_name_their_place(table: Any, spec: dict[str, Any], place: str) -> None:
    with pytest.raises(StudyError, match=place):
        make(table, spec, place.rpartition(".")[0])


def test_rewinds_name_their_anchor() -> None:
    assert {n: (r().anchor, r().replay_lr) for n, r in REWINDS.items()} == {
        "init": ("theta_0", True), "global": ("theta_g", True), "none": (None, False), "lr": (None, True),
    }  # fmt: skip
    assert ToGlobal(7).anchor == "theta_g@7" and ToGlobal(0).anchor == "theta_g@0"


def params(value: float) -> Params:
    draw = np.random.default_rng(int(value))
    return Params(draw.normal(value, 1, LAYOUT.num_floats).astype(np.float32), np.zeros(LAYOUT.num_ints, np.int64))


def walk(finder: Finder, targets: tuple[float, ...]) -> tuple[list[Any], list[tuple[Params, np.ndarray, bool]]]:
    anchors = {"theta_0": params(1), "theta_g": params(2)}
    calls: list[tuple[Params, np.ndarray, bool]] = []

    def train(start: Params, mask: np.ndarray, replay: bool) -> Params:
        calls.append((start, mask, replay))
        return Params(np.where(start.floats == 0, 0, start.floats + np.float32(0.1)), start.ints)

    streams: Callable[[str], np.random.Generator] = lambda what: rng.stream(0, what)  # noqa: E731
    found = find(
        finder, start=anchors["theta_g"], start_name="theta_g", targets=targets, layout=LAYOUT,
        anchors=lambda name: anchors[name], train=train, gradient=np.tanh, rng=streams,
    )  # fmt: skip
    return list(found), calls


@pytest.mark.parametrize(
    ("score", "schedule", "scope", "rewind"), list(itertools.product(SCORES, SCHEDULES, SCOPES, REWINDS))
)
def test_every_finder(score: str, schedule: str, scope: str, rewind: str) -> None:
    finder = Finder(SCORES[score](), SCHEDULES[schedule](), SCOPES[scope](), REWINDS[rewind]())
    assert pickle.loads(pickle.dumps(finder)) == finder and hash(finder)
    found, calls = walk(finder, TARGETS)
    again, _ = walk(finder, TARGETS)
    assert [f.target for f in found] == list(TARGETS)
    for ticket, same in zip(found, again, strict=True):
        assert ticket.mask.sum() == survivors(LAYOUT, ticket.target)
        assert not ticket.params.floats[:SIZE][~ticket.mask].any(), "dead weights are zero"
        np.testing.assert_array_equal(ticket.mask, same.mask)
        assert ticket.params.digest() == same.params.digest()
    start, first, replay = calls[0]
    assert first.all() and replay and start.digest() == params(2).digest(), "a search begins with the dense training"
    before = np.ones(SIZE, bool)
    for start, mask, replay in calls:
        if mask.all():  # another chain
            before = mask
            continue
        assert not (mask & ~before).any(), "never revives a dead weight"
        before = mask
        assert not start.floats[:SIZE][~mask].any()
        assert replay is REWINDS[rewind]().replay_lr
        anchor = {"init": params(1), "global": params(2)}.get(rewind)
        if anchor is not None:
            assert start.digest() == anchor.masked(mask).digest(), "rewinds to exactly what it names"
    counts = {ticket.target: ticket.trainings for ticket in found}
    if schedule == "one_shot":
        assert set(counts.values()) == {1}
    else:
        assert list(counts.values()) == sorted(counts.values()) and counts[TARGETS[-1]] == len(calls) - 1
