"""Robust rules: numbers on four elements, what too few holders mean, and in the place of which rules they may stand."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlth.errors import StudyError
from fedlth.experiment.resolve import resolve
from fedlth.forecast import forecast
from fedlth.methods.aggregate import Aggregate, Contribution, CountMean, FedAvg, join
from fedlth.methods.client_update import MaskedUpdate
from fedlth.methods.mask_outliers import distances, jaccard_distance, outliers
from fedlth.methods.method import FederatedMethod, Phase
from fedlth.methods.robust import Held, Median, MultiKrum, TrimmedMean, WithoutOutliers, holds_round, in_place_of, krum
from fedlth.models.layout import Entry, Layout, Params
from fedlth.storage.server_state import ServerState
from fedlth.wire.payload import Content
from tests import tiny

FOUR = Layout((Entry("w", (4,), "param", 0, prunable=True),))
BIASED = Layout((Entry("w", (3,), "param", 0, prunable=True), Entry("b", (1,), "param", 3)))
NONE = np.zeros(0, np.int64)


def sent(client: int, mask: list[int], floats: list[float], examples: int = 1) -> Contribution:
    return Contribution(client, examples, Content(np.array(mask, bool), np.float32(floats), NONE))


def joined(rule: Any, got: list[Contribution], layout: Layout = FOUR, old: float = 9.0) -> list[float]:
    before = ServerState(Params(np.full(4, old, np.float32), NONE))
    return [float(value) for value in join(rule, before, got, layout).theta.floats]


# All five hold the first weight, two the second, one the third, nobody the fourth.
FIVE = [
    sent(0, [1, 1, 1, 0], [1, 1, 5, 0]), sent(1, [1, 1, 0, 0], [2, 3, 0, 0]), sent(2, [1, 0, 0, 0], [3, 0, 0, 0]),
    sent(3, [1, 0, 0, 0], [4, 0, 0, 0]), sent(4, [1, 0, 0, 0], [100, 0, 0, 0]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        (CountMean(), [22, 2, 5, 9]),
        (TrimmedMean(), [3, 2, 5, 9]),
        (TrimmedMean(few="keep"), [3, 9, 9, 9]),  # one or two holders have no middle
        (TrimmedMean(uncovered="zero"), [3, 2, 5, 0]),
        (TrimmedMean(few="keep", uncovered="zero"), [3, 9, 9, 0]),
        (Median(), [3, 2, 5, 9]),
        (Median(few="keep"), [3, 9, 9, 9]),
        (krum(), [3, 9, 9, 9]),  # client 2 has the two nearest others; what it does not hold keeps its value
        (MultiKrum(keep=3), [3, 3, 9, 9]),  # of 1, 2 and 3: client 0 lies farther from both of its nearest
        (MultiKrum(), [2.5, 2, 5, 9]),  # all but one
    ],
    ids=repr,
)
def test_by_hand(rule: Any, wanted: list[float]) -> None:
    assert joined(rule, FIVE) == wanted


def test_how_many_are_trimmed() -> None:
    def first(share: float, values: list[float]) -> float:
        return joined(TrimmedMean(share), [sent(i, [1, 0, 0, 0], [v, 0, 0, 0]) for i, v in enumerate(values)])[0]

    assert first(0.2, [1, 9, 2]) == 2 and first(0.2, [1, 9]) == 5 and first(0.2, [7]) == 7
    assert first(0.2, [0, 1, 2, 3, 10]) == 2 and first(0.2, [-9, 0, 1, 2, 3, 30]) == 1.5  # ceil(1.2) = 2 of each end
    assert first(0.49, [0, 1, 2, 9]) == 1.5  # never all


def test_krum_compares_what_both_hold_or_what_no_mask_covers() -> None:
    """The first two agree in what they share, but for another coordinate that one of them alone holds."""
    got = [sent(0, [1, 0, 0], [1, 0, 0, 0]), sent(1, [1, 1, 0], [3, 9, 0, 0]), sent(2, [0, 0, 1], [0, 0, 9, 4])]
    before = ServerState(Params(np.zeros(4, np.float32), NONE))
    scores = {on: MultiKrum(0.2, 1, on)._scores(Held(before, BIASED, got)).tolist() for on in ("shared", "dense")}
    assert scores == {"shared": [2, 2, 16], "dense": [0, 0, 16]}  # one nearest other: (2^2 + 0) / 2, or 0
    with pytest.raises(StudyError, match=r"federate.join.over must be shared where all that is joined is prunable"):
        krum(over="dense").init(before, FOUR)
    apart = [sent(0, [1, 0, 0, 0], [1, 0, 0, 0]), sent(1, [0, 1, 0, 0], [0, 1, 0, 0])]
    assert joined(krum(), apart) == [1, 9, 9, 9], "nothing in common: the first client"


def test_a_mask_far_from_all_others_is_an_outlier_and_may_be_left_out() -> None:
    draw = np.random.default_rng(0)
    common = draw.random(200) < 0.5
    masks = {c: common ^ (draw.random(200) < 0.1) for c in range(6)}
    assert outliers(masks) == {}
    wrong = draw.random(200) < 0.5
    found = outliers({**masks, 6: wrong, 7: wrong})
    assert list(found) == [6, 7] and all(0.5 < d < 0.8 for d in found.values()), "colluders are near each other alone"
    assert not outliers({c: m for c, m in masks.items() if c < 2} | {6: wrong}), "three have no majority to be held to"
    assert jaccard_distance(np.zeros(3, bool), np.zeros(3, bool)) == 0
    assert distances({0: np.array([1, 1, 0, 0], bool), 1: np.array([1, 0, 1, 0], bool)})[0] == pytest.approx(2 / 3)
    got = [sent(c, [1, 1, 0, 0], [1, 1, 0, 0]) for c in range(4)] + [sent(4, [0, 0, 1, 1], [0, 0, 7, 7])]
    assert joined(WithoutOutliers(), got) == [1, 1, 9, 9] and joined(CountMean(), got) == [1, 1, 7, 7]


# In the place of which rule


@dataclass(frozen=True)
class Half:
    """Moves half the way to a mean, and remembers how often it did."""

    mean: Aggregate = field(default_factory=FedAvg)

    def init(self, state: ServerState, layout: Layout, /) -> Any:
        return state, self.mean.init(state, layout)

    def add(self, so_far: Any, c: Contribution, /) -> None:
        self.mean.add(so_far[1], c)

    def result(self, so_far: Any, /) -> ServerState:
        state, mean = so_far[0], self.mean.result(so_far[1]).theta
        count = state.memory.get("count", np.zeros(1, np.int64)) + 1
        return ServerState(Params((state.theta.floats + mean.floats) / 2, mean.ints), {"count": count})


@dataclass(frozen=True)
class Odd:
    """No mean at all."""

    def init(self, state: ServerState, layout: Layout, /) -> Any:
        return state

    def add(self, so_far: Any, c: Contribution, /) -> None: ...

    def result(self, so_far: Any, /) -> ServerState:
        state: ServerState = so_far
        return state


def half() -> FederatedMethod:
    return with_join(Half())


def odd() -> FederatedMethod:
    return with_join(Odd())


def with_join(rule: Any) -> FederatedMethod:
    phase = Phase(name="federate", update=MaskedUpdate(), join=rule)
    return FederatedMethod(name="made", paper="", summary="", phases=(phase,), arms=("global",))


def test_it_stands_for_the_mean_alone_or_for_the_mean_inside() -> None:
    assert in_place_of(CountMean(), Median(), "x") == Median()
    zero = Median(uncovered="zero")
    assert in_place_of(CountMean("zero"), Median(), "x") == zero
    assert in_place_of(FedAvg(), Median(), "x") == zero, "where nobody holds a weight, a mean of zeros is zero"
    assert in_place_of(Half(), Median(), "x") == Half(zero)
    made = tiny.study(method={"name": "tests.methods.test_robust:half"}, federate={"join": "median"})
    (phase,) = tiny.experiment(made).federated_phases
    assert repr(phase.join) == repr(Half(zero))
    assert joined(Half(Median()), FIVE) == [6, 5.5, 7, 9]


def test_a_server_optimizer_goes_on_from_a_robust_mean_and_keeps_its_memory(tmp_path: Path) -> None:
    made = tiny.of_method("fedadam", federate={"rounds": 2, "clients_per_round": 3, "join": "median"})
    (phase,) = tiny.experiment(made).federated_phases
    rule: Any = phase.join
    assert rule.mean == Median(uncovered="zero") and holds_round(rule)
    folder = tiny.run(made, tmp_path / "r")
    assert folder.load_state(folder.progress().theta).memory


@pytest.mark.parametrize(
    ("method", "federate", "says"),
    [
        ("tests.methods.test_robust:odd", {"join": "median"}, "its part Odd is no mean, and has no field `mean`"),
        ("spafl", {"join": "without_outliers"}, "must be another rule for method spafl, whose messages have no masks"),
        (
            "fedpm",
            {"join": {"name": "krum", "over": "dense"}},
            "shared where all that is joined is prunable, got 'dense'",
        ),
        ("fedavg", {"join": "mode"}, "federate.join.name: must be one of trimmed_mean, median, krum"),
        (
            "fedavg",
            {"join": {"name": "trimmed_mean", "share": 0.5}},
            "federate.join.share must be in (0, 0.5), got 0.5",
        ),
        ("fedavg", {"join": {"name": "median", "few": "drop"}}, "federate.join.few must be mean or keep, got 'drop'"),
        ("fedavg", {"join": {"name": "multi_krum", "keep": -1}}, "federate.join.keep must be at least 0, got -1"),
        ("fedavg", {"join": {"name": "krum", "over": "all"}}, "federate.join.over must be shared or dense, got 'all'"),
    ],
)
def test_where_it_makes_no_sense_it_is_refused(method: str, federate: dict[str, Any], says: str) -> None:
    with pytest.raises(StudyError) as caught:
        resolve(tiny.study(method={"name": method}, federate=federate))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_refinement_joins_by_the_same_rule_and_check_says_what_it_holds() -> None:
    made = tiny.study(federate={"join": "krum"}, refine={"rounds": 1, "clients_per_round": 2})
    found = {phase.name: phase.join for phase in tiny.experiment(made).phases}
    assert found["federate"] == krum(uncovered="zero") and found["refine"] == krum() and found["personalise"] is None
    assert "server: MultiKrum holds a round's updates at once: 2 x 0.00 = 0.0 MB" in forecast(made)
    assert "holds a round's updates" not in forecast(tiny.study())


def test_where_nothing_is_sent_it_is_noted() -> None:
    notes = resolve(tiny.study(method="local", federate={"join": "median", "rounds": 1}))[1]
    assert any(note.startswith("federate: has no effect") for note in notes)


@pytest.mark.parametrize(("count", "said"), [(4, True), (6, True), (7, False), (20, False)])
def test_too_few_updates_for_krums_guarantee_are_told(count: int, said: bool) -> None:
    assert bool(MultiKrum(0.3 if count < 7 else 0.2).doubt(count)) == said
