"""R5: the server's rules against brute force, and what each does with a weight that not everyone holds."""

from __future__ import annotations

import math
import pickle
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlth.methods.aggregate import Contribution, CountMean, FedAvg, MaskMean, join
from fedlth.methods.hermes import OverlapMean
from fedlth.methods.robust import JOINS, Median, MultiKrum, TrimmedMean, WithoutOutliers, krum
from fedlth.models.layout import Entry, Layout, Params
from fedlth.storage.server_state import ServerState
from fedlth.wire.payload import Content
from tests.tiny import small_layout

LAYOUT = small_layout()
SIZE = LAYOUT.num_prunable
RULES = [FedAvg(), CountMean(), CountMean("zero"), CountMean("zero", weighted=True), OverlapMean()]
ROBUST = [
    TrimmedMean(), TrimmedMean(0.4), TrimmedMean(uncovered="zero"), Median(), Median("keep"), krum(),
    krum(over="dense"), MultiKrum(), MultiKrum(keep=2), WithoutOutliers(),
]  # fmt: skip
FOUR = Layout((Entry("w", (4,), "param", 0, prunable=True),))


def contribution(
    client: int, seed: int, *, mask: np.ndarray | None = None, examples: int | None = None
) -> Contribution:
    draw = np.random.default_rng([client, seed])
    mask = draw.random(SIZE) < 0.5 if mask is None else mask
    floats = draw.normal(size=LAYOUT.num_floats).astype(np.float32)
    floats[:SIZE][~mask] = 0
    ints = np.full(LAYOUT.num_ints, client, np.int64)
    count = int(draw.integers(1, 50)) if examples is None else examples
    return Contribution(client, count, Content(mask, floats, ints))


def joined(rule: Any, before: Params, got: Iterable[Contribution], layout: Layout = LAYOUT) -> Params:
    new = join(rule, ServerState(before), got, layout)
    assert not new.memory
    return new.theta


def old(seed: int = 9) -> Params:
    draw = np.random.default_rng(seed)
    return Params(draw.normal(size=LAYOUT.num_floats).astype(np.float32), np.zeros(LAYOUT.num_ints, np.int64))


def brute(before: Params, got: list[Contribution], *, keep: bool, weighted: bool) -> np.ndarray:
    out = np.zeros(LAYOUT.num_floats, np.float32)
    for i in range(LAYOUT.num_floats):
        holders = [c for c in got if i >= SIZE or c.content.mask[i]]
        total = sum((c.num_examples if weighted else 1) for c in holders)
        if not holders:
            out[i] = before.floats[i] if keep else 0
            continue
        out[i] = sum(float(c.content.floats[i]) * (c.num_examples if weighted else 1) for c in holders) / total
    return out


@given(st.integers(0, 1000), st.integers(1, 5), st.booleans(), st.booleans())
def test_count_mean_equals_brute_force(seed: int, clients: int, keep: bool, weighted: bool) -> None:
    got = [contribution(c, seed) for c in range(clients)]
    rule = CountMean("keep" if keep else "zero", weighted)
    np.testing.assert_array_equal(
        joined(rule, old(), got, LAYOUT).floats, brute(old(), got, keep=keep, weighted=weighted)
    )


def test_all_ones_masks_make_count_mean_the_plain_mean() -> None:
    full = np.ones(SIZE, bool)
    equal = [contribution(c, 1, mask=full, examples=7) for c in range(4)]
    plain = np.mean([c.content.floats.astype(np.float64) for c in equal], axis=0).astype(np.float32)
    np.testing.assert_array_equal(joined(CountMean(), old(), equal, LAYOUT).floats, plain)
    np.testing.assert_array_equal(joined(FedAvg(), old(), equal, LAYOUT).floats, plain)
    uneven = [contribution(c, 1, mask=full) for c in range(4)]
    np.testing.assert_allclose(
        joined(CountMean(weighted=True), old(), uneven, LAYOUT).floats,
        joined(FedAvg(), old(), uneven, LAYOUT).floats,
        rtol=1e-6,
    )


@pytest.mark.parametrize("rule", [*RULES, *(r for r in ROBUST if r != Median("keep"))], ids=repr)
def test_a_single_client_returns_itself_where_it_holds(rule: Any) -> None:
    one = contribution(3, 5)
    new = joined(rule, old(), [one], LAYOUT)
    held = np.ones(LAYOUT.num_floats, bool)
    held[:SIZE] = one.content.mask
    np.testing.assert_array_equal(new.floats[held], one.content.floats[held])
    np.testing.assert_array_equal(new.ints, one.content.ints)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_contributions_are_taken_one_by_one(rule: Any) -> None:
    came: list[weakref.ref[Contribution]] = []

    def stream() -> Iterator[Contribution]:
        for client in range(6):
            assert sum(one() is not None for one in came) <= 2, "memory must not grow with the number of clients"
            one = contribution(client, 2)
            came.append(weakref.ref(one))
            yield one
            del one

    new = joined(rule, old(), stream())
    assert len(came) == 6
    assert new.digest() == joined(rule, old(), [contribution(c, 2) for c in range(6)]).digest()


@pytest.mark.parametrize("rule", [*RULES, *ROBUST, MaskMean()], ids=repr)
def test_a_rule_is_a_value_and_touches_nothing(rule: Any) -> None:
    assert pickle.loads(pickle.dumps(rule)) == rule and hash(rule)
    got, before = [contribution(c, 2) for c in range(3)], old()
    copies = [c.content.floats.copy() for c in got]
    layout, kept = LAYOUT, before.digest()
    if isinstance(rule, MaskMean):  # scores are of prunable weights alone
        layout = LAYOUT.select(lambda e: e.prunable)
        before = Params(before.floats[:SIZE].copy(), before.ints)
        kept = before.digest()
    new = joined(rule, before, got, layout)
    assert new.floats.dtype == np.float32 and before.digest() == kept
    for c, was in zip(got, copies, strict=True):
        np.testing.assert_array_equal(c.content.floats, was)


def test_the_laws_cover_every_rule_of_the_table() -> None:
    assert {type(build()) for build in JOINS.values()} == {type(rule) for rule in ROBUST}


def robust_by_hand(rule: Any, got: list[Contribution], i: int) -> float | None:
    """Return a coordinate by one sort in Python, None where nobody holds it."""
    values = sorted(float(c.content.floats[i]) for c in got if i >= SIZE or c.content.mask[i])
    if not values:
        return None
    if isinstance(rule, Median):
        half = len(values) // 2
        return values[half] if len(values) % 2 else (values[half - 1] + values[half]) / 2
    cut = min(math.ceil(rule.share * len(values) - 1e-9), (len(values) - 1) // 2)
    kept = values[cut : len(values) - cut]
    return sum(kept) / len(kept)


@given(st.integers(0, 1000), st.integers(1, 9), st.sampled_from([TrimmedMean(), TrimmedMean(0.4), Median()]))
def test_trimmed_mean_and_median_equal_brute_force(seed: int, clients: int, rule: Any) -> None:
    got = [contribution(c, seed) for c in range(clients)]
    wanted = [robust_by_hand(rule, got, i) for i in range(LAYOUT.num_floats)]
    kept = [float(old().floats[i]) if value is None else value for i, value in enumerate(wanted)]
    np.testing.assert_allclose(joined(rule, old(), got).floats, np.float32(kept), rtol=1e-6)


@pytest.mark.parametrize("rule", ROBUST, ids=repr)
def test_of_equal_updates_a_robust_rule_makes_that_update(rule: Any) -> None:
    one = contribution(1, 4, mask=np.ones(SIZE, bool))
    same = [Contribution(c, 10 * c + 1, one.content) for c in range(5)]
    np.testing.assert_array_equal(joined(rule, old(), same).floats, one.content.floats)


@pytest.mark.parametrize("rule", ROBUST, ids=repr)
def test_no_client_weighs_more_for_its_examples(rule: Any) -> None:
    got = [contribution(c, 6) for c in range(6)]
    claimed = [Contribution(c.client, 10**9, c.content) if c.client == 2 else c for c in got]
    assert joined(rule, old(), got).digest() == joined(rule, old(), claimed).digest()


@pytest.mark.parametrize("rule", [TrimmedMean(), Median(), krum(), MultiKrum()], ids=repr)
def test_a_minority_that_is_far_away_moves_nothing_far(rule: Any) -> None:
    """Two of nine: what comes out lies between what the honest ones sent."""
    honest = [contribution(c, 8, mask=np.ones(SIZE, bool)) for c in range(7)]
    ones, claimed = np.ones(SIZE, bool), np.full(LAYOUT.num_ints, 2**40, np.int64)
    far = [Content(ones, np.full(LAYOUT.num_floats, value, np.float32), claimed) for value in (1e6, -1e6)]
    bad = [Contribution(7 + i, 1, content) for i, content in enumerate(far)]
    if isinstance(rule, TrimmedMean):
        rule = TrimmedMean(2 / 9)
    new = joined(rule, old(), [*honest, *bad])
    floats = np.stack([c.content.floats for c in honest])
    assert (new.floats >= floats.min(0) - 1e-6).all() and (new.floats <= floats.max(0) + 1e-6).all()
    if not isinstance(rule, MultiKrum):
        assert new.ints.max(initial=0) <= 6, "a counter is nobody's claim"


def test_averaging_the_overlap_is_five_rules() -> None:
    """Both hold the first, one the second and third, nobody the fourth."""
    a = Contribution(0, 1, Content(np.array([1, 1, 0, 0], bool), np.float32([2, 4, 0, 0]), np.zeros(0, np.int64)))
    b = Contribution(1, 3, Content(np.array([1, 0, 1, 0], bool), np.float32([6, 0, 8, 0]), np.zeros(0, np.int64)))
    before = Params(np.float32([9, 9, 9, 9]), np.zeros(0, np.int64))
    results = {repr(r): joined(r, before, [a, b], FOUR).floats.tolist() for r in RULES}
    assert results == {
        repr(CountMean()): [4, 4, 8, 9],  # LotteryFL, Sub-FedAvg: holders' mean, uncovered keeps
        repr(CountMean("zero")): [4, 4, 8, 0],
        repr(CountMean("zero", weighted=True)): [5, 4, 8, 0],  # FedDST
        repr(FedAvg()): [5, 1, 6, 0],  # zeros count
        repr(OverlapMean()): [4, 9, 9, 9],  # Hermes: what all hold, the rest keeps
    }


def test_mask_mean_is_the_logit_of_the_share_within_its_clamp() -> None:
    masks = [np.array(m, bool) for m in ([1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 0, 1], [1, 0, 0, 1])]
    got = [Contribution(i, 1, Content(m, None, None)) for i, m in enumerate(masks)]
    new = joined(MaskMean(), Params(np.zeros(4, np.float32), np.zeros(0, np.int64)), got, FOUR)
    theta = 1 / (1 + np.exp(-new.floats.astype(np.float64)))
    assert theta == pytest.approx([0.99, 0.5, 0.01, 0.5], abs=1e-6)


def test_counters_take_the_largest_and_a_bare_mask_is_no_value() -> None:
    got = [contribution(c, 2) for c in (1, 4, 2)]
    assert joined(FedAvg(), old(), got, LAYOUT).ints.tolist() == [4] * LAYOUT.num_ints
    with pytest.raises(ValueError, match="bare mask"):
        joined(FedAvg(), old(), [Contribution(0, 1, Content(np.ones(SIZE, bool), None, None))], LAYOUT)
