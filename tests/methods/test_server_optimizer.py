"""FedAvgM, FedAdam, FedYogi: numbers on four elements, what they are without memory, and what is never stepped."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlth.engines.inprocess import InProcess
from fedlth.experiment.resolve import resolve
from fedlth.federation import session
from fedlth.methods.aggregate import Contribution, CountMean, FedAvg, join
from fedlth.methods.robust import JOINS, Median
from fedlth.methods.server_optimizer import Adam, Momentum, ServerOptimizer, Yogi
from fedlth.methods.table import METHODS
from fedlth.models.layout import Entry, Layout, Params
from fedlth.storage.run_folder import RunFolder
from fedlth.storage.server_state import ServerState
from fedlth.wire.payload import Content
from tests import tiny
from tests.methods.plain import ran, theta_of

FOUR = Layout((Entry("w", (4,), "param", 0, prunable=True),))
NORMED = {"name": "tests.tiny:Small", "options": {}}
NO_INTS = np.zeros(0, np.int64)


def state(floats: list[float], memory: Any = None, mask: Any = None) -> ServerState:
    return ServerState(Params(np.array(floats, np.float32), NO_INTS), memory or {}, mask)


def joined(rule: Any, before: ServerState, *came: tuple[list[float], int]) -> ServerState:
    mask = np.ones(4, bool) if before.mask is None else before.mask
    got = [Contribution(i, n, Content(mask, np.array(f, np.float32), NO_INTS)) for i, (f, n) in enumerate(came)]
    return join(rule, before, got, FOUR)


def test_momentum_on_four_elements() -> None:
    """Changes of 1 and then of 2: v is 1, then .5 + 2; a step is lr v."""
    rule = ServerOptimizer(Momentum(lr=2.0, beta=0.5))
    first = joined(rule, state([0, 1, 2, 3]), ([1, 2, 3, 4], 3))
    np.testing.assert_allclose(first.theta.floats, [2, 3, 4, 5])
    np.testing.assert_allclose(first.memory["velocity"], [1] * 4)
    second = joined(rule, first, ([4, 5, 6, 7], 3))
    np.testing.assert_allclose(second.theta.floats, [7, 8, 9, 10])
    np.testing.assert_allclose(second.memory["velocity"], [2.5] * 4)


@pytest.mark.parametrize("kind", [Adam, Yogi])
def test_adaptive_steps_on_four_elements(kind: Any) -> None:
    """Written out for two rounds of changes (.5, -.5, 0, 2), weighted by examples; v begins at tau^2."""
    rule = ServerOptimizer(kind(lr=0.1, beta_1=0.9, beta_2=0.99, tau=0.01))
    now, m, v = state([0, 0, 0, 0]), np.zeros(4), np.full(4, 1e-4)
    x, change = np.zeros(4), np.array([0.5, -0.5, 0, 2])
    for _ in range(2):
        low, high = (x + change - 1).tolist(), (x + change + 1 / 3).tolist()
        now = joined(rule, now, (low, 1), (high, 3))
        m = 0.9 * m + 0.1 * change
        square = change**2
        v = v - 0.01 * square * np.sign(v - square) if kind is Yogi else 0.99 * v + 0.01 * square
        x = x + 0.1 * m / (np.sqrt(v) + 0.01)
        np.testing.assert_allclose(now.theta.floats, x, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(now.memory["second_moment"], v, rtol=1e-4)


def test_momentum_without_memory_at_rate_one_is_fedavg_to_the_bit(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    old = draw.normal(size=4).astype(np.float32).tolist()
    came = [(draw.normal(size=4).tolist(), int(n)) for n in (3, 7, 11)]
    plain = joined(FedAvg(), state(old), *came)
    assert joined(ServerOptimizer(Momentum()), state(old), *came).theta.digest() == plain.theta.digest()
    for name, method in (
        ("a", {"name": "fedavg"}),
        ("m", {"name": "fedavgm", "beta": 0.0}),
        ("b", {"name": "fedavgm"}),
    ):
        ran(method, tmp_path / name, model=NORMED)
    digests = [tiny.digests(tmp_path / name)["theta_g"] for name in "amb"]
    assert digests[0] == digests[1] != digests[2]


def test_nothing_is_stepped_or_remembered_outside_the_states_mask() -> None:
    mask = np.array([True, False, True, True])
    for rule in (Momentum(lr=1.0, beta=0.9), Adam(lr=0.1), Yogi(lr=0.1)):
        stale = {name: np.full(4, 5.0, np.float32) for name in rule.start}
        new = joined(ServerOptimizer(rule), state([1, 0, 1, 1], stale, mask), ([2, 0, 2, 2], 1), ([3, 0, 3, 3], 1))
        assert new.theta.floats[1] == 0 and (new.theta.floats[[0, 2, 3]] != 1).all()
        for name, first in rule.start.items():
            assert new.memory[name][1] == np.float32(first), "what comes back begins anew"
            assert (new.memory[name][[0, 2, 3]] != np.float32(first)).all()


@dataclass(frozen=True)
class Silent:
    """A mean that does not say what nobody sent."""

    mean: Any

    def init(self, state: ServerState, layout: Layout, /) -> Any:
        return self.mean.init(state, layout)

    def add(self, so_far: Any, c: Contribution, /) -> None:
        self.mean.add(so_far, c)

    def result(self, so_far: Any, /) -> ServerState:
        new: ServerState = self.mean.result(so_far)
        return new


RULES = (Momentum(beta=0.9), Adam(lr=0.1), Yogi(lr=0.1))
MEANS = (CountMean(), CountMean(weighted=True), *(make() for make in JOINS.values()))


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize(
    "mean", [CountMean(), CountMean(weighted=True), *(make() for make in JOINS.values())], ids=repr
)
def test_what_nobody_sent_keeps_its_value_and_what_is_remembered_of_it(rule: Any, mean: Any) -> None:
    """Rounds without a holder of the last two, after one in which all four moved; then one in which they move again."""
    optimizer = ServerOptimizer(rule, mean)

    def round_of(before: ServerState, mask: list[int], by: float) -> ServerState:
        content = Content(
            np.array(mask, bool), (before.theta.floats + np.float32(by)) * np.array(mask, np.float32), NO_INTS
        )
        return join(optimizer, before, [Contribution(i, 3, content) for i in range(4)], FOUR)

    first = round_of(state([0, 1, 2, 3]), [1, 1, 1, 1], 1.0)
    now = first
    for _ in range(5):
        now = round_of(now, [1, 1, 0, 0], 0.5)
    assert (now.theta.floats[:2] > first.theta.floats[:2]).all()
    np.testing.assert_array_equal(now.theta.floats[2:], first.theta.floats[2:])
    for name, vector in now.memory.items():
        np.testing.assert_array_equal(vector[2:], first.memory[name][2:])
        assert (vector[:2] != first.memory[name][:2]).all()
    last, straight = round_of(now, [1, 1, 1, 1], 0.5), round_of(first, [1, 1, 1, 1], 0.5)
    np.testing.assert_array_equal(last.theta.floats[2:], straight.theta.floats[2:])


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_where_everything_is_sent_what_nobody_sent_changes_no_bit(rule: Any) -> None:
    draw, two = np.random.default_rng(0), [state([0.1, 1.2, 2.3, 3.4])] * 2
    for _ in range(4):
        masks = np.array([[1, 1, 0, 1], [0, 1, 1, 1], [1, 0, 1, 0]], bool)
        came = [
            Contribution(i, 1 + i, Content(mask, draw.normal(size=4).astype(np.float32) * mask, NO_INTS))
            for i, mask in enumerate(masks)
        ]
        means: tuple[Any, Any] = CountMean(), Silent(CountMean())
        two = [join(ServerOptimizer(rule, m), now, came, FOUR) for m, now in zip(means, two, strict=True)]
        assert two[0].theta.digest() == two[1].theta.digest()
        assert all(two[0].memory[n].tobytes() == v.tobytes() for n, v in two[1].memory.items())


@pytest.mark.parametrize("few", ["mean", "keep"])
def test_what_too_few_hold_to_be_believed_is_as_if_nobody_sent_it(few: str) -> None:
    """Three hold the first two, two of them the others: under `few: keep` those stay where they are."""
    rule = ServerOptimizer(Momentum(beta=0.5), Median(few=few))
    first = joined(rule, state([0, 0, 0, 0]), *[([1.0] * 4, 1)] * 3)
    masks = [np.array([1, 1, int(i < 2), int(i < 2)], bool) for i in range(3)]
    came = [Contribution(i, 1, Content(m, m.astype(np.float32), NO_INTS)) for i, m in enumerate(masks)]
    assert join(rule, first, came, FOUR).theta.floats.tolist() == [1.5, 1.5, *([1.5] * 2 if few == "mean" else [1] * 2)]


@pytest.mark.parametrize("name", ["fedavgm", "fedadam", "fedyogi"])
def test_statistics_and_counters_are_averaged_never_optimised(name: str, tmp_path: Path) -> None:
    """A step of Adam moves a running variance below zero within a few rounds; here it is the clients' mean."""
    one = {"model": NORMED, "federate": {"rounds": 1}, "train": {"epochs": 2}}
    experiment, folder = ran({"name": name, **({} if name == "fedavgm" else {"lr": 5.0})}, tmp_path / "r", **one)
    _, plain = ran({"name": "fedavg"}, tmp_path / "plain", **one)
    got, mean, size = theta_of(folder), theta_of(plain), experiment.layout.num_params
    np.testing.assert_array_equal(got.floats[size:], mean.floats[size:])
    np.testing.assert_array_equal(got.ints, mean.ints)
    assert got.ints.max() > 0, "num_batches_tracked counts on"
    many = {**one, "federate": {"rounds": 6}}
    _, longer = ran({"name": name}, tmp_path / "longer", **many)
    entry = next(e for e in experiment.layout.floats if e.name == "norm.running_var")
    assert (theta_of(longer).floats[entry.slice] > 0).all()
    memory = tiny.opened(longer).state.memory
    assert memory and all(vector.shape == (size,) for vector in memory.values())


def test_a_resumed_run_of_fedadam_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    made = tiny.of_method("fedadam", model=NORMED, federate={"rounds": 4, "clients_per_round": 2})
    tiny.run(made, tmp_path / "whole")
    folder = RunFolder(tmp_path / "stopped")
    folder.create(resolve(made)[0].study)
    for stop in (1, 3):
        tiny.opened(folder).run(stop_after=stop)
    held = tiny.opened(folder).state.memory
    assert {"first_moment", "second_moment"} == held.keys() and np.abs(held["first_moment"]).max() > 0
    session.resume(folder.root, InProcess())
    assert tiny.facts(tmp_path / "whole") == tiny.facts(folder.root)


def test_options_are_checked_and_kinds_differ(tmp_path: Path) -> None:
    thetas = set()
    for name, options in (("fedadam", {}), ("fedyogi", {}), ("fedadam", {"beta_1": 0.0}), ("fedadam", {"tau": 0.1})):
        out = tmp_path / f"{name}{len(thetas)}"
        ran({"name": name, **options}, out)
        thetas.add(tiny.digests(out)["theta_g"])
    assert len(thetas) == 4
    for name, wrong in (("fedavgm", {"beta": 1.0}), ("fedadam", {"tau": 0.0}), ("fedyogi", {"lr": -1.0})):
        with pytest.raises(Exception, match=f"method.{next(iter(wrong))}"):
            METHODS[name](**wrong)


def test_frozen_parameters_are_not_stepped() -> None:
    layout = Layout((replace(FOUR.entries[0], trainable=False),))
    came = [Contribution(0, 1, Content(np.ones(4, bool), np.ones(4, np.float32), NO_INTS))]
    new = join(ServerOptimizer(Adam(lr=1.0)), state([0] * 4), came, layout)
    np.testing.assert_array_equal(new.theta.floats, [1] * 4)
