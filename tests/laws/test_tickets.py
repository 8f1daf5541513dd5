"""The laws of every part of a finder: a new part is tested by being listed in its table."""

from __future__ import annotations

import itertools
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlth import rng
from fedlth.errors import StudyError
from fedlth.models.layout import Entry, Layout
from fedlth.study.parts import make
from fedlth.tickets.evidence import Evidence
from fedlth.tickets.granularity import GRANULARITIES
from fedlth.tickets.regrow import Constant
from fedlth.tickets.rewind import REWINDS, ToGlobal
from fedlth.tickets.schedule import SCHEDULES, Cubic, Iterative, Linear, Rescore, Shrink
from fedlth.tickets.scope import SCOPES, Global, HalfOutput, NOfM, survivors
from fedlth.tickets.score import SCORES, Inverted, Shuffled
from fedlth.tickets.select import apportion, is_tied, keep_top, keep_top_each
from tests.laws.fakes import FULL, IN_TENSORS, LAYOUT, SIZE, TABLES, evidence

EVERY_PART = [(kind, name) for kind, table in TABLES.items() for name in table]
TARGETS = (0.6, 0.3, 0.05)
EXACT = [name for name in SCOPES if name != "half_output"]  # half_output counts by its own ladder


@pytest.mark.parametrize(("kind", "name"), EVERY_PART)
def test_a_part_is_a_value_that_names_its_source(kind: str, name: str) -> None:
    one, other = (make(TABLES[kind], {"name": name}, kind) for _ in range(2))
    assert one == other and hash(one) == hash(other) and repr(one) == repr(other)
    again = pickle.loads(pickle.dumps(one))
    assert again == one and repr(again) == repr(one)
    with pytest.raises(AttributeError):
        one.anything = 1
    assert type(one).__doc__ and type(one).__name__ in repr(one)
    assert all(1 <= row <= 30 for row in type(one).rows)


@pytest.mark.parametrize("name", SCORES)
def test_a_score_is_deterministic_one_number_a_weight_and_touches_nothing(name: str) -> None:
    given_ = evidence(1)
    before = [a.copy() for a in (given_.init, given_.start, given_.now, given_.mask, given_.previous[0])]
    one, other = SCORES[name]()(given_), SCORES[name]()(evidence(1))
    assert one.shape == (SIZE,) and np.isfinite(one).all()
    np.testing.assert_array_equal(one, other)
    after = (given_.init, given_.start, given_.now, given_.mask, given_.previous[0])
    for array, was in zip(after, before, strict=True):
        np.testing.assert_array_equal(array, was)


def four_numbers(**more: Any) -> Evidence:
    return Evidence(
        layout=LAYOUT, init=np.float32([1, -2, 3, 0]), start=np.float32([1, 1, -1, 2]), now=np.float32([-3, 1, 0, 2]),
        mask=np.ones(4, bool), gradient=lambda w: np.float32([1, -1, 3, 0]), rng=rng.stream(0, "x"), **more,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("magnitude", [3, 1, 0, 2]),
        ("large_final", [3, 1, 0, 2]),
        ("small_final", [-3, -1, 0, -2]),
        ("large_init", [1, 2, 3, 0]),
        ("small_init", [-1, -2, -3, 0]),
        ("large_init_large_final", [1, 1, 0, 0]),
        ("small_init_small_final", [-3, -2, -3, -2]),
        ("magnitude_increase", [2, -1, -3, 2]),
        ("movement", [4, 0, 1, 0]),
        ("large_final_same_sign", [-3, -1, 0, -2]),
        ("snip", [1, 1, 3, 0]),
        ("inverted", [-3, -1, 0, -2]),
    ],
)
def test_scores_on_four_numbers(name: str, wanted: list[float]) -> None:
    assert SCORES[name]()(four_numbers()).tolist() == wanted


def test_same_sign_puts_a_turned_weight_below_every_other() -> None:
    given_ = Evidence(
        layout=LAYOUT, init=np.float32([1, -2, 3]), start=np.float32([1, -2, 3]), now=np.float32([0.1, 9, 2]),
        mask=np.ones(3, bool), gradient=np.tanh, rng=rng.stream(0, "x"),
    )  # fmt: skip
    assert np.argsort(-SCORES["large_final_same_sign"]()(given_)).tolist() == [2, 0, 1]


def test_slow_movement_weighs_the_newest_change_most() -> None:
    path = tuple(np.float32(w) for w in ([0, 0, 0, 0], [4, 0, 0, 1]))
    given_ = four_numbers(previous=path)
    change = np.abs(given_.now - path[1]), np.abs(path[1] - path[0])
    one = SCORES["slow_movement"](window=1)(given_)
    np.testing.assert_allclose(one, change[0])
    both = SCORES["slow_movement"](window=2, decay=0.5)(given_)
    np.testing.assert_allclose(both, (change[0] + 0.5 * change[1]) / 1.5, rtol=1e-6)
    with pytest.raises(StudyError, match="slow_movement needs the weights of earlier epochs"):
        SCORES["slow_movement"]()(four_numbers())


@pytest.mark.parametrize(
    "name", ["gradient_weight", "grasp", "synflow", "fisher", "gamma", "edge_popup", "biprop", "bernoulli"]
)
def test_a_score_without_its_network_says_so(name: str) -> None:
    part = SCORES[name]()
    with pytest.raises(StudyError, match=f"{type(part).__name__} needs the network"):
        part(evidence_without_network())


def evidence_without_network() -> Evidence:
    bare = evidence()
    return Evidence(
        layout=LAYOUT, init=bare.init, start=bare.start, now=bare.now, mask=bare.mask, gradient=np.tanh, rng=bare.rng
    )


@pytest.mark.parametrize(("score", "scope"), list(itertools.product(SCORES, EXACT)))
def test_the_count_is_exact_and_no_dead_weight_revives(score: str, scope: str) -> None:
    alive = np.random.default_rng(3).random(SIZE) < 0.7
    values = SCORES[score]()(evidence(2, mask=alive))
    for density in (1e-9, 0.01, 0.2, 0.5, 0.999, 1.0):
        mask = SCOPES[scope]()(values, alive, LAYOUT, density)
        assert mask.dtype == bool and mask.shape == (SIZE,)
        assert not (mask & ~alive).any()
        assert mask.sum() == min(survivors(LAYOUT, density), alive.sum())


@pytest.mark.parametrize("scope", EXACT)
@pytest.mark.parametrize("density", [1 / SIZE, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("value", [0.0, -1.0, np.inf])
def test_equal_scores_are_broken_by_position(scope: str, density: float, value: float) -> None:
    mask = SCOPES[scope]()(np.full(SIZE, value, np.float32), FULL, LAYOUT, density)
    assert mask.sum() == survivors(LAYOUT, density)
    if scope == "n_of_m":  # by position inside each run of four
        assert all(run[: run.sum()].all() for e in LAYOUT.prunable for run in runs_of(mask[e.slice], e.shape, 4))
        return
    for entry in LAYOUT.prunable:
        here = mask[entry.slice]
        assert here[: here.sum()].all(), "among equals the first positions win"


@pytest.mark.parametrize("scope", SCOPES)
def test_a_score_that_is_no_number_is_refused(scope: str) -> None:
    with pytest.raises(ValueError, match="not a number"):
        SCOPES[scope]()(np.full(SIZE, np.nan, np.float32), FULL, LAYOUT, 0.5)


@pytest.mark.parametrize("scope", ["layerwise", "erk"])
def test_no_layer_is_emptied_while_there_is_one_weight_for_each(scope: str) -> None:
    score = np.concatenate([np.full(e.size, float(i)) for i, e in enumerate(LAYOUT.prunable)])
    mask = SCOPES[scope]()(score, np.ones(SIZE, bool), LAYOUT, 2 / SIZE)
    assert [int(mask[e.slice].sum()) for e in LAYOUT.prunable] == [1, 1]


def test_the_floor_of_the_global_scope() -> None:
    score = np.concatenate([np.full(e.size, float(i)) for i, e in enumerate(LAYOUT.prunable)])
    assert [int(Global()(score, FULL, LAYOUT, 0.1)[e.slice].sum()) for e in LAYOUT.prunable][0] == 0
    floored = Global(floor=3)(score, FULL, LAYOUT, 0.1)
    assert floored.sum() == survivors(LAYOUT, 0.1) and floored[LAYOUT.prunable[0].slice].sum() == 3
    with pytest.raises(StudyError, match=r"finder\.scope\.floor: 9 of each layer"):
        Global(floor=9)(score, FULL, LAYOUT, 2 / SIZE)


def test_layerwise_keeps_the_same_share_and_global_the_best_of_all() -> None:
    score = np.concatenate([np.full(e.size, 10.0 * i) for i, e in enumerate(LAYOUT.prunable)])
    score += np.random.default_rng(0).random(SIZE)
    alive = np.ones(SIZE, bool)
    layerwise = SCOPES["layerwise"]()(score, alive, LAYOUT, 0.5)
    for entry in LAYOUT.prunable:
        assert abs(layerwise[entry.slice].sum() - 0.5 * entry.size) <= 1
    best = SCOPES["global"]()(score, alive, LAYOUT, 0.5)
    assert score[best].min() >= score[~best].max()


def lenet300_layout() -> Layout:
    """The weights of LeNet-300-100, named so that order by name is not the network's own."""
    shapes = {"0.weight": (300, 784), "10.weight": (10, 100), "2.weight": (100, 300)}
    places = {"0.weight": 0, "2.weight": 1, "10.weight": 2}
    entries, offset = [], 0
    for name, shape in shapes.items():
        entries.append(Entry(name, shape, "param", offset, prunable=True, place=places[name]))
        offset += entries[-1].size
    return Layout(tuple(entries))


def test_the_ladder_of_frankle_and_carbin_is_exact() -> None:
    layout, scope = lenet300_layout(), HalfOutput()
    (chain,) = Shrink(0.2)((0.8**20,))
    score = np.random.default_rng(0).random(layout.num_prunable)
    mask, counts = np.ones(layout.num_prunable, bool), [layout.num_prunable]
    for density in chain:
        kept = scope(score, mask, layout, density)
        assert not (kept & ~mask).any()
        mask = kept
        counts.append(int(mask.sum()))
    wanted = {
        0: 266200,
        1: 213060,
        2: 170538,
        3: 136511,
        4: 109282,
        7: 56094,
        9: 35981,
        11: 23093,
        15: 9537,
        16: 7650,
        20: 3179,
    }
    assert {rung: counts[rung] for rung in wanted} == wanted
    assert scope.counts(layout, 0.8)[1] == 900, "the output layer, by place and not by name, at half the rate"
    assert HalfOutput(output="2.weight").counts(layout, 0.8).tolist() == [188160, 800, 27000]
    between = scope.counts(layout, 0.7)
    assert (scope.counts(layout, 0.64) < between).all() and (between < scope.counts(layout, 0.8)).all()
    with pytest.raises(StudyError, match=r"finder\.scope\.output: must be one of 0\.weight"):
        HalfOutput(output="fc9").counts(layout, 0.8)


def runs_of(values: np.ndarray, shape: tuple[int, ...], m: int) -> list[np.ndarray]:
    """Return runs of m inputs of an output, at one place of the kernel."""
    rows = np.moveaxis(values.reshape(*shape[:2], -1), 1, 2).reshape(-1, shape[1])
    return [row[at : at + m] for row in rows for at in range(0, shape[1], m)]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2)])
def test_n_of_m_keeps_the_best_n_of_every_run_after_any_path(n: int, m: int) -> None:
    entries = (Entry("a", (6, 8), "param", 0, prunable=True), Entry("b", (3, 4, 3, 1), "param", 48, prunable=True))
    layout, mask = Layout(entries), np.ones(84, bool)
    score = np.random.default_rng(n).random(84)
    for density in (0.9, 0.75, n / m):
        mask = NOfM(m)(score, mask, layout, density)
        assert mask.sum() == survivors(layout, density)
    for e in entries:
        for kept, of in zip(runs_of(mask[e.slice], e.shape, m), runs_of(score[e.slice], e.shape, m), strict=True):
            assert kept.sum() == n and of[kept].min() > np.delete(of, np.flatnonzero(kept)).max()


@pytest.mark.parametrize("name", IN_TENSORS)
def test_groups_partition_each_tensor_and_spread_is_the_inverse_of_reduce(name: str) -> None:
    groups = GRANULARITIES[name]().groups(LAYOUT)
    count = groups.layout.num_prunable
    value = np.random.default_rng(0).random(count)
    np.testing.assert_allclose(groups.reduced(groups.spread(value)), value, rtol=1e-12)
    for coarse, fine in zip(groups.layout.prunable, LAYOUT.prunable, strict=True):
        assert coarse.name == fine.name and coarse.place == fine.place
        of = groups.spread(np.arange(count))[fine.slice]
        assert set(of) == set(range(coarse.offset, coarse.offset + coarse.size)), "none empty, none shared"


def test_what_the_groups_are() -> None:
    conv, head = LAYOUT.prunable
    assert (conv.shape, head.shape) == ((3, 1, 3, 3), (4, 108))
    sizes = {n: [e.size for e in GRANULARITIES[n]().groups(LAYOUT).layout.prunable] for n in IN_TENSORS}
    assert sizes == {"element": [27, 432], "row": [3, 4], "channel": [1, 108], "block": [3, 27]}
    rows = GRANULARITIES["row"]().groups(LAYOUT).spread(np.arange(7))[head.slice].reshape(head.shape)
    assert (rows == np.arange(3, 7)[:, None]).all()
    channels = GRANULARITIES["channel"]().groups(LAYOUT).spread(np.arange(109))[head.slice].reshape(head.shape)
    assert (channels == np.arange(1, 109)).all()
    tiles = GRANULARITIES["block"](height=2, width=54).groups(LAYOUT).spread(np.arange(100))[head.slice]
    tiles = tiles.reshape(head.shape)
    assert len(np.unique(tiles)) == 4 and (tiles[:2, :54] == tiles[0, 0]).all() and tiles[0, 54] != tiles[0, 0]


def test_inverted_keeps_what_the_other_drops() -> None:
    one, other = SCORES["large_init"]()(evidence(4)), Inverted("large_init")(evidence(4))
    kept, dropped = keep_top(one, FULL, 100), keep_top(other, FULL, SIZE - 100)
    np.testing.assert_array_equal(kept, ~dropped)
    assert Inverted({"name": "slow_movement", "window": 3}).window == 3 and Shuffled("snip").window == 0
    assert Inverted("snip") == Inverted({"name": "snip"}) != Inverted("grasp")


@pytest.mark.parametrize("scope", ["layerwise", "global", "erk"])
@pytest.mark.parametrize("granularity", ["element", "row"])
def test_shuffled_moves_the_mask_and_keeps_every_layers_count(scope: str, granularity: str) -> None:
    if scope == "erk" and granularity == "row":
        scope = "global"
    groups = GRANULARITIES[granularity]().groups(LAYOUT)
    alive = groups.spread(np.random.default_rng(5).random(groups.layout.num_prunable) < 0.8)
    at = {"mask": alive}
    one, other = (
        SCOPES[scope]()(
            groups.reduced(score(replaced(evidence(6, **at), groups))), groups.reduced(alive) > 0, groups.layout, 0.4
        )
        for score in (SCORES["magnitude"](), Shuffled("magnitude"))
    )
    assert not (groups.spread(other) & ~alive).any()
    for e in groups.layout.prunable:
        assert one[e.slice].sum() == other[e.slice].sum()
    if granularity == "element":
        assert (one != other).any()


def replaced(given_: Evidence, groups: Any) -> Evidence:
    from dataclasses import replace

    return replace(given_, groups=groups)


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


@given(st.data())
def test_keep_top_each_is_keep_top_in_every_place(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 40))
    score = np.array(data.draw(st.lists(st.integers(0, 3), min_size=size, max_size=size)), np.float32)
    alive = np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    place = np.array(data.draw(st.lists(st.integers(0, 3), min_size=size, max_size=size)))
    kept = np.array(data.draw(st.lists(st.integers(0, 12), min_size=4, max_size=4)))
    mask = keep_top_each(score, alive, place, kept)
    for p in range(4):
        here = place == p
        np.testing.assert_array_equal(mask[here], keep_top(score[here], alive[here], int(kept[p])))


def test_a_tie_is_seen() -> None:
    def tied(kept: int) -> bool:
        return is_tied(np.float32([3, 2, 2, 1]), lambda score: keep_top(score, np.ones(4, bool), kept))

    assert [tied(kept) for kept in range(5)] == [False, False, True, False, False]


@pytest.mark.parametrize("scope", SCOPES)
@given(st.data())
def test_a_scope_ties_equal_scores_and_no_others(scope: str, data: st.DataObject) -> None:
    density = data.draw(st.sampled_from((0.2, 0.5, 0.8)))

    def keep(score: np.ndarray) -> np.ndarray:
        return SCOPES[scope]()(score, FULL, LAYOUT, density)

    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    assert not is_tied(rng.permutation(SIZE).astype(np.float32), keep), "no two are equal"
    assert is_tied(np.zeros(SIZE, np.float32), keep)
    score = rng.permutation(SIZE).astype(np.float32)
    kept = keep(score)
    alone = next(e for e in LAYOUT.prunable if 0 < np.count_nonzero(kept[e.slice]) < e.size)
    score[alone.slice] = score[alone.slice].max()  # one layer's are alike
    assert is_tied(score, keep) or scope == "global"  # where they may all lie on one side of the cut


@pytest.mark.parametrize("targets", [TARGETS, (0.2,), (1.0,), (1.0, 0.5), (0.5, 0.49, 0.48)])
@pytest.mark.parametrize(
    "schedule",
    [
        *[s() for n, s in SCHEDULES.items() if n != "constant"],
        *[Iterative(3), Shrink(0.5), Shrink(0.01), Linear(0.3), Cubic(3), Rescore(1)],
    ],
)
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


def test_the_other_schedules_follow_their_laws() -> None:
    assert Linear(0.1)((0.1,))[0] == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert Linear(0.1)((0.55, 0.3))[0] == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.55, 0.5, 0.4, 0.3])
    (chain,) = Rescore(100)((0.01,))
    assert chain == pytest.approx([0.01 ** (k / 100) for k in range(1, 101)]) and len(chain) == 100
    assert Rescore(1)((0.5, 0.2)) == ((0.5,), (0.2,))
    assert Cubic(2)((0.2,))[0] == pytest.approx((0.2 + 0.8 / 8, 0.2))
    assert Constant(rounds=2)((0.5, 0.2)) == ((0.5,) * 3, (0.2,) * 3)


def test_what_moves_falls_along_a_cosine() -> None:
    shares = [Constant(rounds=4, drop=0.4).regrow.share(r) for r in range(4)]
    assert shares == pytest.approx([0.4 / 2 * (1 + np.cos(np.pi * r / 4)) for r in range(4)]) and shares[0] == 0.4


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_regrow_keeps_every_layers_count_drops_the_worst_and_brings_back_the_best(density: float) -> None:
    draw = np.random.default_rng(1)
    alive = draw.random(SIZE) < density
    score, growth = draw.random(SIZE), draw.random(SIZE)
    mask, stayed = Constant(rounds=3, drop=0.5).regrow(score, growth, alive, LAYOUT, 0)
    assert not (stayed & ~alive).any() and not (stayed & ~mask).any()
    for e in LAYOUT.prunable:
        was, here, old = alive[e.slice], mask[e.slice], stayed[e.slice]
        assert here.sum() == was.sum()
        moved = was.sum() - old.sum()
        assert moved == min(int(0.5 * was.sum()), e.size - was.sum())
        if moved:
            assert score[e.slice][old].min() > score[e.slice][was & ~old].max()
            assert growth[e.slice][here & ~old].min() > growth[e.slice][~here].max(initial=-1)


@pytest.mark.parametrize(
    ("table", "spec", "place"),
    [
        (SCHEDULES, {"name": "iterative", "rounds": 0}, "finder.schedule.rounds"),
        (SCHEDULES, {"name": "shrink", "rate": 1.0}, "finder.schedule.rate"),
        (REWINDS, {"name": "global", "round": -2}, "finder.rewind.round"),
        (SCHEDULES, {"name": "linear", "rate": 0.0}, "finder.schedule.rate"),
        (SCHEDULES, {"name": "cubic", "rounds": 0}, "finder.schedule.rounds"),
        (SCHEDULES, {"name": "rescore", "steps": 0}, "finder.schedule.steps"),
        (SCHEDULES, {"name": "constant", "rounds": 0}, "finder.schedule.rounds"),
        (SCHEDULES, {"name": "constant", "drop": 1.0}, "finder.schedule.drop"),
        (SCHEDULES, {"name": "constant", "by": "luck"}, "finder.schedule.by"),
        (SCHEDULES, {"name": "constant", "first": "luck"}, "finder.schedule.first"),
        (SCOPES, {"name": "global", "floor": -1}, "finder.scope.floor"),
        (SCOPES, {"name": "half_output", "rate": 0.0}, "finder.scope.rate"),
        (SCOPES, {"name": "n_of_m", "m": 1}, "finder.scope.m"),
        (REWINDS, {"name": "step", "step": 0}, "finder.rewind.step"),
        (REWINDS, {"name": "noise", "sigmas": -1.0}, "finder.rewind.sigmas"),
        (REWINDS, {"name": "frozen", "weights": "gold"}, "finder.rewind.weights"),
        (SCORES, {"name": "slow_movement", "window": 0}, "finder.score.window"),
        (SCORES, {"name": "slow_movement", "decay": 0.0}, "finder.score.decay"),
        (SCORES, {"name": "grasp", "temperature": 0.0}, "finder.score.temperature"),
        (SCORES, {"name": "large_init_large_final", "alpha": 0.0}, "finder.score.alpha"),
        (SCORES, {"name": "edge_popup", "epochs": 0}, "finder.score.epochs"),
        (SCORES, {"name": "edge_popup", "weights": "binary"}, "finder.score.weights"),
        (SCORES, {"name": "bernoulli", "lr": 0.0}, "finder.score.lr"),
        (SCORES, {"name": "inverted", "of": "nothing"}, "finder.score.of"),
        (GRANULARITIES, {"name": "block", "height": 0}, "finder.granularity.height"),
        (TABLES["gate"], {"name": "warm_up", "trainings": 0}, "finder.gate.trainings"),
        (TABLES["gate"], {"name": "early_bird", "fifo": 1}, "finder.gate.fifo"),
        (TABLES["gate"], {"name": "early_bird", "distance": 0.0}, "finder.gate.distance"),
        (TABLES["gate"], {"name": "adaptive", "decay": 1.0}, "finder.gate.decay"),
        (TABLES["gate"], {"name": "val_accuracy", "most": 0}, "finder.gate.most"),
    ],
)
def test_impossible_options_name_their_place(table: Any, spec: dict[str, Any], place: str) -> None:
    with pytest.raises(StudyError, match=place):
        make(table, spec, place.rpartition(".")[0])


def test_rewinds_name_their_anchor() -> None:
    assert {n: (r().anchor, r().replay_lr) for n, r in REWINDS.items()} == {
        "init": ("theta_0", True), "global": ("theta_g", True), "none": (None, False), "lr": (None, True),
        "step": (None, True), "reinit": ("reinit", True), "signed_constant": ("theta_0", True),
        "reshuffle": ("theta_0", True), "noise": ("theta_0", True), "frozen": ("theta_0", True),
    }  # fmt: skip
    assert ToGlobal(7).anchor == "theta_g@7" and ToGlobal(0).anchor == "theta_g@0"
