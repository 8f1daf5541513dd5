"""Statistics and bytes on cases that a hand can check."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_run import message

from fedlth.report.choice import Choice
from fedlth.report.compare import holm, signed_rank
from fedlth.report.facts import Facts, read_run
from fedlth.report.intervals import interval
from fedlth.report.measure import Shown
from fedlth.report.presets import Cell
from fedlth.report.statistics import difference, summarise_arm
from fedlth.report.traffic import Flow, traffic
from fedlth.report.units import bounds, percent, points, scaled
from fedlth.storage.header import ACCURACY
from fedlth.storage.records import MetricRow

OURS, THEIRS = Choice("ticket", 0.5), Choice("global", 1.0)


@pytest.fixture
def four(fake: Path) -> Facts:
    """Four clients, the last unseen: ticket .9 .8 .7 .4, global .5 .8 .8 .1, examples 10 10 10 70."""
    rows = []
    for client, (ours, theirs) in enumerate(zip((0.9, 0.8, 0.7, 0.4), (0.5, 0.8, 0.8, 0.1), strict=True)):
        base = MetricRow(client, client == 3, "ticket", 0.5, 0.5, 0.6, ours, (10, 10, 10, 70)[client])
        rows += [base, replace(base, arm="global", density=1.0, target_density=1.0, test_accuracy=theirs)]
    return replace(read_run(fake), metrics=tuple(rows))


def test_four_clients(four: Facts) -> None:
    found = summarise_arm([four], OURS)
    assert found.mean == pytest.approx(0.7)
    assert found.standard_deviation == pytest.approx(np.sqrt((0.04 + 0.01 + 0 + 0.09) / 3))
    assert found.tail == pytest.approx(0.4 + 0.3 * 0.3)  # rank 0.1 * 3 between the two lowest
    assert found.worst_decile == 0.4
    assert found.hurt_global == 0.25  # the third; the second is equal, and equal is not hurt
    assert found.hurt_local is None
    assert found.unseen == pytest.approx(0.4)
    assert summarise_arm([four], THEIRS).hurt_global is None


def test_a_difference_is_paired_by_client(four: Facts) -> None:
    found = difference([four], OURS, THEIRS)
    assert found is not None and found.mean == pytest.approx((0.4 + 0 - 0.1 + 0.3) / 4)
    moved = replace(four, metrics=tuple(reversed(four.metrics)))
    assert difference([moved], OURS, THEIRS) == found
    assert difference([four], OURS, Choice("local", 1.0)) is None


def test_seeds_count_alike(four: Facts) -> None:
    better = replace(four, metrics=tuple(replace(row, test_accuracy=1.0) for row in four.metrics))
    found = summarise_arm([four, better], OURS)
    assert found.mean == pytest.approx(0.85) and found.num_seeds == 2 and found.worst_decile == pytest.approx(0.7)


def test_the_worst_decile_is_rounded_up() -> None:
    assert Shown(ACCURACY).worst_decile(np.arange(11.0)) == 0.5
    assert Shown(ACCURACY).worst_decile(np.arange(10.0)) == 0.0


def test_an_interval_is_the_same_each_time_and_covers_the_mean() -> None:
    values = np.random.default_rng(0).normal(0.7, 0.1, 50)
    one = interval([values])
    assert one == interval([values.copy()])
    assert one.low < values.mean() < one.high
    standard_error = values.std(ddof=1) / np.sqrt(50)
    assert (one.high - one.low) == pytest.approx(3.92 * standard_error, rel=0.1)


def test_an_interval_over_seeds_knows_their_spread() -> None:
    rng = np.random.default_rng(0)
    alike = [rng.normal(0.7, 0.01, 40) for _ in range(4)]
    apart = [values + shift for values, shift in zip(alike, (-0.1, -0.05, 0.05, 0.1), strict=True)]
    narrow, wide = interval(alike), interval(apart)
    assert wide.high - wide.low > 5 * (narrow.high - narrow.low)


@pytest.mark.parametrize("values", [[0.5, 0.5, 0.5], [0.2, 0.4], [0.1, 0.1, 0.1, 0.9]])
def test_an_interval_of_few_values_stays_within_them(values: list[float]) -> None:
    found = interval([np.array(values)])
    assert min(values) <= found.low <= found.high <= max(values)


def test_an_interval_of_one_value_is_not_known() -> None:
    assert bounds(interval([np.array([0.5])])) == "–"


def test_holm_on_four() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_signed_rank() -> None:
    p_value, effect = signed_rank(np.array([1.0, 2.0, 3.0, -4.0]))
    assert effect == pytest.approx((6 - 4) / 10) and p_value == pytest.approx(0.875)
    assert signed_rank(np.zeros(4)) == (1.0, 0.0)
    assert signed_rank(np.full(30, 0.1))[1] == 1.0


def test_four_messages_and_more(fake: Path) -> None:
    base = read_run(fake)
    rows = (
        message(0, "server", "client:1", 100, broadcast=True, framed_bytes=110),
        message(0, "server", "client:2", 100, broadcast=True, framed_bytes=110),
        message(0, "client:1", "server", 30, kind="mask"),
        message(0, "client:2", "server", 30, status="refused: shape"),
        message(1, "server", "client:1", 50, phase="personalise"),
    )
    header = replace(base.header, dense_payload_bytes=100)
    found = traffic(replace(base, header=header, ledger=rows))
    assert found.unicast == Flow(5, 60, 250)
    assert found.once == Flow(4, 60, 150)
    assert found.refused == Flow(1, 30, 0)
    assert found.framed_bytes is None
    assert found.by_kind == {"mask": Flow(1, 30, 0), "values": Flow(4, 30, 250)}
    assert found.by_client == {1: Flow(3, 30, 150), 2: Flow(2, 30, 100)}
    assert [one.cumulative_bytes for one in found.by_round] == [260, 310]
    # both clients federate, both ways; client 1 personalises, down only
    assert (found.dense_up_bytes, found.dense_down_bytes) == (200, 300)


def test_a_broadcast_counts_once_whatever_its_rows_are_called(fake: Path) -> None:
    """Row 4: install, values, evaluation and resync are what one payload was to different clients."""
    kinds = ("install", "values", "evaluation", "resync", "scores")
    rows = [
        message(1, "server", f"client:{c}", 100, kind=kind, broadcast=True) for c, kind in enumerate(kinds)
    ]  # fmt: skip
    rows += [message(1, "server", "client:9", 60), message(1, "server", "client:9", 60)]  # slices of its own
    rows += [message(1, "server", "client:9", 40, name="theta_g@0", broadcast=True)]
    rows += [message(2, "server", "client:1", 100, kind="values", broadcast=True)]
    facts = replace(read_run(fake), ledger=tuple(rows))
    assert traffic(facts).once == Flow(5, 0, 100 + 60 + 60 + 40 + 100)
    counted = replace(facts, ledger=(*rows, message(1, "client:1", "server", 9)))
    size = sum(layer.size for layer in facts.header.layers)
    assert Cell()(counted).down_bytes == 4 * size * 5, "the preset counts as the account does"


def test_an_interval_of_values_equal_but_for_rounding_is_a_point() -> None:
    values = np.array([0.9 - 0.8, 0.8 - 0.7, 0.7 - 0.6])
    assert 0 < np.ptp(values) < 1e-12
    found = interval([values])
    assert found.low == found.high == pytest.approx(0.1)


def test_numbers_as_people_read_them() -> None:
    assert [percent(0.8714), percent(None), percent(float("nan"))] == ["87.1", "–", "–"]
    assert [points(0.031), points(-0.031), points(-0.0001)] == ["+3.1", "−3.1", "0.0"]
    sizes = (0, 999, 1000, 12_345_678, 999_950, 9_996)
    assert [scaled(size, "B") for size in sizes] == ["0 B", "999 B", "1.00 kB", "12.3 MB", "1.00 MB", "10.0 kB"]
