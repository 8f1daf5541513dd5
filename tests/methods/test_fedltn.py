"""FedLTN: the ladder of densities, prunes after training without rewind, momentum, local norms, dense rounds first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlth.experiment.resolve import read
from fedlth.methods.aggregate import Contribution, CountMean, join
from fedlth.methods.fedltn import PruneAfter, accelerated
from fedlth.models.layout import Entry, Layout, Params
from fedlth.storage.server_state import ServerState
from fedlth.training.local_client import LocalClient
from fedlth.wire.payload import Content
from tests import tiny
from tests.test_methods import final_theta, manual_fedavg

FOUR = Layout((Entry("w", (3,), "param", 0, prunable=True), Entry("m", (1,), "buffer", 3)))


def test_each_prune_cuts_more_than_the_one_before() -> None:
    assert accelerated(0.2, 1.0, 0.5) == pytest.approx((1, 0.8, 0.64, 0.512, 0.5))
    assert accelerated(0.2, 1.5, 0.1) == pytest.approx((1, 0.8, 0.56, 0.308, 0.1001, 0.1))
    assert accelerated(0.5, 3.0, 0.1) == pytest.approx((1, 0.5, 0.1)), "a rate above 1 ends at the target"


def test_momentum_is_on_what_holders_average() -> None:
    """Two hold the first, one the second, nobody the third, which keeps its value and its velocity; no buffer."""
    join_of = tiny.experiment(tiny.study(method={"name": "fedltn", "momentum": 0.5})).method.phases[-1].join
    assert join_of is not None
    theta = Params(np.zeros(4, np.float32), np.zeros(0, np.int64))
    state = join(join_of, ServerState(theta), [sent(1, 2, 4, 8)], FOUR)
    np.testing.assert_array_equal(state.theta.floats, [1, 2, 4, 8])
    state = join(join_of, state, [sent(1, 4, 0, 9, mask=(1, 1, 0)), sent(3, 0, 0, 9, mask=(1, 0, 0))], FOUR)
    np.testing.assert_array_equal(state.theta.floats, [2.5, 5, 4, 9])
    np.testing.assert_array_equal(state.memory["velocity"], [1.5, 3, 4])
    state = join(join_of, state, [sent(2.5, 5, 6, 9)], FOUR)
    np.testing.assert_array_equal(state.theta.floats, [3.25, 6.5, 8, 9])
    plain = tiny.experiment(tiny.study(method={"name": "fedltn", "momentum": 0.0})).method
    assert {phase.join for phase in plain.phases} == {CountMean()}


def sent(*values: float, mask: tuple[int, ...] = (1, 1, 1)) -> Contribution:
    return Contribution(0, 1, Content(np.array(mask, bool), np.array(values, np.float32), np.zeros(0, np.int64)))


@pytest.mark.parametrize("method", [{"density": 1.0}, {"val_accuracy": 1.0}], ids=str)
def test_without_a_prune_and_momentum_it_is_unweighted_fedavg_to_the_bit(
    tmp_path: Path, method: dict[str, Any]
) -> None:
    made = tiny.study(
        method={"name": "fedltn", "momentum": 0.0, "jump_start": 0, **method}, federate={"rounds": 3},
        partition={"name": "dirichlet", "alpha": 1.0},
    )  # fmt: skip
    tiny.run(made, tmp_path / "r")
    assert final_theta(tmp_path / "r") == manual_fedavg(made, weighted=False).digest()


def test_it_prunes_globally_after_training_and_never_rewinds() -> None:
    task = tiny.task()
    local = LocalClient(task, 0, 1, "federate")
    trained = local.train(task.theta_0, recipe=local.recipe).params
    size = task.layout.num_prunable
    params, mask = PruneAfter((1.0, 0.8, 0.3), -1.0)(local, trained, local.full, None)
    assert mask.sum() == round(0.8 * size)
    np.testing.assert_array_equal(params.floats, trained.masked(mask).floats)
    sizes = np.abs(trained.floats[:size])
    assert sizes[mask].min() >= sizes[~mask].max(), "all layers in one list"
    _, mask = PruneAfter((1.0, 0.8, 0.3), -1.0)(local, params, mask, None)
    assert mask.sum() == round(0.3 * size)
    same = PruneAfter((1.0, 0.8, 0.3), -1.0)(local, params.masked(mask), mask, None)[1]
    assert same is mask


def test_norms_stay_local_unless_the_study_says_otherwise() -> None:
    model = {"name": "tests.test_methods:normed", "options": {}}
    own = read(tiny.of_method("fedltn", model=model))[0]
    assert own.study.model.buffers == "local_all" and not any(e.norm for e in own.task.exchange.entries)
    said = read(tiny.of_method("fedltn", model={**model, "buffers": "aggregate"}))[0]
    assert said.study.model.buffers == "aggregate"
    assert read(tiny.of_method("lotteryfl", model=model))[0].study.model.buffers == "aggregate"


def test_a_jump_start_is_dense_rounds_before_the_first_prune(tmp_path: Path) -> None:
    tiny.run(tiny.of_method("fedltn", model={"name": "tests.test_methods:normed", "options": {}}), tmp_path / "r")
    rows = [r for r in tiny.rows(tmp_path / "r", "ledger") if r["name"] == "update"]
    assert {r["density"] for r in rows if r["phase"] == "jump_start"} == {1.0}
    assert {r["phase"] for r in rows} == {"jump_start", "federate"}
    assert all(r["density"] < 1 for r in rows if r["phase"] == "federate")
    plain = read(tiny.study(method={"name": "fedltn", "jump_start": 0}))[0]
    assert [p.name for p in plain.federated_phases] == ["federate"]
