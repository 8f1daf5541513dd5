"""Masks of constant density that move: their first layers, what leaves and what comes back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedlth.errors import StudyError
from fedlth.methods.evolve import Evolve, RandomErk
from fedlth.training.local_client import LocalClient
from tests import tiny


def test_the_first_mask_is_exact_random_erk_and_each_clients_own() -> None:
    task = tiny.task()
    size = task.layout.num_prunable
    first, second = RandomErk(0.4)(task, 0), RandomErk(0.4)(task, 1)
    assert first.sum() == second.sum() == round(0.4 * size)
    assert (first != second).any()
    np.testing.assert_array_equal(first, RandomErk(0.4)(task, 0))
    same = RandomErk(0.4, same=True)
    np.testing.assert_array_equal(same(task, 0), same(task, 1))
    shares = [float(first[e.slice].mean()) / ((e.shape[0] + e.shape[1]) / e.size) for e in task.layout.prunable]
    open_layers = [s for s, e in zip(shares, task.layout.prunable, strict=True) if not first[e.slice].all()]
    assert max(open_layers) - min(open_layers) < 0.2, "densities in proportion to (inputs + outputs) / weights"
    assert RandomErk(1.0)(task, 0).all()


@pytest.mark.parametrize("by", ["gradient", "random"])
def test_it_keeps_every_layers_count_drops_the_smallest_and_follows_the_cosine(by: str) -> None:
    task = tiny.task(federate={"rounds": 4})
    mask = RandomErk(0.3)(task, 0)
    params = task.theta_0.masked(mask)
    evolve, moved = Evolve(0.5, by), []
    for round in (1, 2, 3, 4):
        local = LocalClient(task, 0, round, "federate")
        new = evolve(local, params, mask)
        for e in task.layout.prunable:
            here, old = new[e.slice], mask[e.slice]
            assert here.sum() == old.sum()
            size = np.abs(params.floats[e.slice])
            left = old & ~here
            if left.any():
                assert size[left].max() <= size[old & here & (size > 0)].max()
        moved.append(int((mask & ~new).sum()))
        np.testing.assert_array_equal(new, evolve(local, params, mask))
    assert moved[0] > moved[1] > moved[2] >= moved[3] > 0
    assert moved[0] <= 0.5 * mask.sum()


def test_what_comes_back_by_gradient_has_the_largest_on_one_batch() -> None:
    task = tiny.task()
    mask, local = RandomErk(0.3)(task, 0), LocalClient(task, 0, 1, "federate")
    params = task.theta_0.masked(mask)
    evolve = Evolve(0.5, "gradient")
    (slope,), new = map(np.abs, local.gradients(params, count=1)), evolve(local, params, mask)
    assert not np.array_equal(slope, np.abs(local.network(params).gradient(params.floats[: mask.size]))), "one batch"
    assert [cost.steps for cost in local.log] == [1, 1], "counted as a step of training"
    for e in task.layout.prunable:
        came, out = (new & ~mask)[e.slice], ~(new | mask)[e.slice]
        if came.any() and out.any():
            assert slope[e.slice][came].min() >= slope[e.slice][out].max()
    drawn = Evolve(0.5, "random")(local, params, mask)
    assert (drawn != new).any()
    assert (drawn != Evolve(0.5, "random")(replace(local, round=2), params, mask)).any()


def test_a_full_mask_and_no_drop_stay() -> None:
    task = tiny.task()
    local = LocalClient(task, 0, 1, "federate")
    assert Evolve()(local, task.theta_0, local.full).all()
    mask = RandomErk(0.3)(task, 0)
    np.testing.assert_array_equal(Evolve(0.0)(local, task.theta_0.masked(mask), mask), mask)
    with pytest.raises(StudyError, match="method.by"):
        Evolve(by="luck")
    with pytest.raises(StudyError, match="method.drop"):
        Evolve(drop=1.0)
