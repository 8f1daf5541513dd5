"""Views: what the network sees of the trained weights, the gradient back to them, and who can train so."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from fedlth.training import batch_requests, kernel_backend
from fedlth.training.flat_model import FlatModel
from fedlth.training.local_client import LocalClient
from fedlth.training.pull import Proximal
from fedlth.training.request import drawn_request
from fedlth.training.view import IDENTITY, Given, Gradient, elementwise
from tests import tiny

HALF_STEPS = {"train": {"steps": 6, "momentum": 0.5, "weight_decay": 0.01, "batch_size": 16, "lr": 0.1}}


@dataclass(frozen=True)
class Times:
    """Every weight `factor` times."""

    factor: float

    @contextmanager
    def opened(self, model: FlatModel, request: Given, /) -> Iterator[Gradient]:
        yield elementwise(lambda w: w * self.factor, lambda w: torch.full_like(w, self.factor))

    def used(self, alive: np.ndarray, request: Given, /) -> Iterable[tuple[np.ndarray, int]]:
        yield alive, request.num_examples


@dataclass(frozen=True)
class Steps(Times):
    """Notes which steps of the whole run it was asked for."""

    @contextmanager
    def opened(self, model: FlatModel, request: Given, /) -> Iterator[Gradient]:
        seen: list[int] = []

        def gradient(weights: Any, step: int, ask: Any, /) -> tuple[Any, float]:
            seen.append(step)
            found = ask(weights)
            return found.gradient, float(step)

        yield gradient
        first = request.recipe.first_step
        assert seen == list(range(first, first + len(request.rates)))


def local(**sections: Any) -> LocalClient:
    return LocalClient(tiny.task(**{**HALF_STEPS, **sections}), 0, 1, "federate")


@pytest.mark.parametrize("compute", ["reference", "tuned"])
def test_a_view_of_once_each_weight_is_no_view(compute: str) -> None:
    """Bit for bit, under momentum, decay, a mask, a pull, clipping and snapshots."""
    one = local(
        compute=compute, model={"name": "lenet5", "options": {}}, data={"name": "tests.training.test_view:images"}
    )
    size = one.full.size
    active = np.arange(size) % 3 != 0
    more: dict[str, Any] = {"active": active, "snapshots": (1,), "anchor": one.task.theta_0}
    recipe = replace(one.recipe, clip_norm=0.5, pull=Proximal(mu=0.1))
    plain = one.train(one.task.theta_0, recipe=recipe, **more)
    seen = one.train(one.task.theta_0, recipe=replace(recipe, view=Times(1.0)), **more)
    assert plain.params.digest() == seen.params.digest() and plain.loss == seen.loss
    assert {k: v.tobytes() for k, v in plain.snapshots.items()} == {k: v.tobytes() for k, v in seen.snapshots.items()}


def images() -> dict[str, Any]:
    made = tiny.images()
    return made | {key: np.pad(made[key], ((0, 0), (0, 0), (2, 2), (2, 2))) for key in ("x_train", "x_test")}


def test_the_gradient_comes_back_through_the_view() -> None:
    """Of w = 2 v a step in v is twice the step in w, and w moves four times as far."""
    one = local(train={"steps": 1, "momentum": 0.0, "lr": 0.1}, compute="reference")
    start = one.task.theta_0
    twice = replace(start, floats=2 * start.floats)
    plain = one.train(twice, recipe=one.recipe).params.floats - twice.floats
    moved = one.train(start, recipe=replace(one.recipe, view=Times(2.0))).params.floats - start.floats
    assert np.abs(plain).max() > 0
    np.testing.assert_allclose(moved, 2 * plain, rtol=1e-3, atol=1e-7)


def test_what_is_trained_comes_out_not_what_was_seen() -> None:
    one = local(train={"steps": 1, "lr": 1e-9}, compute="reference")
    found = one.train(one.task.theta_0, recipe=replace(one.recipe, view=Times(2.0)))
    np.testing.assert_allclose(found.params.floats, one.task.theta_0.floats, atol=1e-6)


def test_a_view_is_given_the_step_of_the_whole_run() -> None:
    one = local(compute="reference")
    recipe = replace(one.recipe, view=Steps(1.0))
    one.train(one.task.theta_0, recipe=recipe)
    one.train(one.task.theta_0, recipe=replace(recipe, first_step=2, last_step=5))


def test_kernel_and_cohorts_have_no_view() -> None:
    one = local()
    recipe = replace(one.recipe, view=Times(1.0))
    assert kernel_backend.lacks(one.recipe) == "" and kernel_backend.lacks(recipe) == "view Times"
    request = drawn_request(one.task.theta_0, one.train_part, recipe, order=one.rng("order"), torch_seed=0)
    assert batch_requests.lacks(request) == "a cohort has no view Times"
    assert batch_requests.lacks(replace(request, recipe=one.recipe)) == ""


def test_the_usual_view_is_the_weights_and_costs_what_is_alive() -> None:
    one = local()
    assert one.recipe.view == IDENTITY and not one.recipe.views
    half = np.arange(one.full.size) % 2 == 0
    one.train(one.task.theta_0, recipe=one.recipe, active=half)
    request = drawn_request(one.task.theta_0, one.train_part, one.recipe, order=one.rng("order"), torch_seed=0)
    assert (one.log[0].flops, one.log[0].alive_flops) == one.flops(half, request.num_examples)
