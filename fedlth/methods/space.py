"""What the global state is: weights, scores of masks over frozen weights, or thresholds of whole rows of weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol

import numpy as np

from fedlth import rng
from fedlth.methods.client_update import Own, received_params
from fedlth.models.layout import Layout, Params
from fedlth.tickets.granularity import Row
from fedlth.training.local_client import LocalClient
from fedlth.training.task import Task
from fedlth.wire.payload import Content


class Space(Protocol):
    """What the server keeps between rounds, and what a round sends down; a frozen value.

    `name` is for people, `kind` that of its messages. `trains_weights`: clients train weights by the study's recipe.
    `bounds` say why a forecast is at most what is foreseen, (down, up); "" where trial visits tell it.
    """

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str: ...

    @property
    def trains_weights(self) -> bool: ...

    @property
    def bounds(self) -> tuple[str, str]: ...

    def layout(self, exchange: Layout, /) -> Layout:
        """Return the layout of the state, made from that of the exchanged model."""
        ...

    def initial(self, task: Task, /) -> Params:
        """Return round 0's state; both ends have it from the study alone, so that it costs no bytes."""
        ...

    def model(self, task: Task, content: Content, private: Params, /) -> Own:
        """Return the state as a whole model, and what is alive in it; `private` has what does not cross."""
        ...

    def reply(self, state: Params, layout: Layout, kind: str, draw: np.random.Generator, /) -> Content | None:
        """Return what a client might answer with, a message of `kind`, for forecasts; None where only a visit tells."""
        ...


@dataclass(frozen=True)
class Weights:
    """The exchanged part of the model."""

    name: ClassVar[str] = "weights"
    kind: ClassVar[str] = "values"
    trains_weights: ClassVar[bool] = True
    bounds: ClassVar[tuple[str, str]] = ("", "")

    def layout(self, exchange: Layout, /) -> Layout:
        return exchange

    def initial(self, task: Task, /) -> Params:
        return task.shared_part(task.theta_0)

    def model(self, task: Task, content: Content, private: Params, /) -> Own:
        everything = np.ones(task.layout.num_prunable, bool)
        return Own(task.merge(received_params(content), private), task.whole_mask(content.mask, everything))

    def reply(self, state: Params, layout: Layout, kind: str, draw: np.random.Generator, /) -> Content | None:
        return None


FROZEN = ("auto", "signed", "theta_0")


@dataclass(frozen=True)
class Frozen:
    """The net that masks are learnt over, the same at both ends without a byte.

    "signed": FedPM's, each prunable weight plus or minus its layer's Kaiming constant, the rest theta_0's. "theta_0":
    the initial weights as they are. "auto": theta_0 where the model brings trained weights, else "signed".
    """

    which: str = "signed"

    def __call__(self, task: Task, /) -> Params:
        own = self.which == "theta_0" or (self.which == "auto" and bool(task.model.brought))
        return task.theta_0 if own else frozen_weights(task)

    def under(self, local: LocalClient, mask: np.ndarray, /) -> Own:
        """Return the net under a mask (num_prunable,), as it is evaluated and kept.

        Nothing trains it, so that the running statistics of norms are theta_0's: they are taken anew under the mask.
        """
        return Own(local.normalised(self(local.task).masked(mask), mask), mask)


def frozen_weights(task: Task) -> Params:
    """Return the frozen net: each prunable weight plus or minus its layer's Kaiming constant sqrt(2 / fan_in).

    Signs come from a stream of the run's seed, so seed and mask are the whole model. The rest is theta_0's.
    """
    floats = task.theta_0.floats.copy()
    signs = rng.stream(task.study.seed, "signed constant")
    for e in task.layout.prunable:
        floats[e.slice] = np.where(signs.random(e.size) < 0.5, -1.0, 1.0) * math.sqrt(2 / e.fan_in)
    return replace(task.theta_0, floats=floats)


@dataclass(frozen=True)
class Scores:
    """A score for each prunable weight of a frozen net: the sigmoid is how likely the weight is there.

    At first the sigmoids are uniform in (0, 1): where FedPM starts.
    """

    frozen: Frozen = field(default_factory=Frozen)
    name: ClassVar[str] = "scores"
    kind: ClassVar[str] = "scores"
    trains_weights: ClassVar[bool] = False
    bounds: ClassVar[tuple[str, str]] = (
        "scores as undecided as after the first round",
        "a bit for every weight of a mask",
    )

    def layout(self, exchange: Layout, /) -> Layout:
        return exchange.select(lambda e: e.prunable)

    def initial(self, task: Task, /) -> Params:
        draw = rng.stream(task.study.seed, "first scores").uniform(0.01, 0.99, task.layout.num_prunable)
        return Params(np.log(draw / (1 - draw)).astype(np.float32), np.zeros(0, np.int64))

    def model(self, task: Task, content: Content, private: Params, /) -> Own:
        """Return the net of the weights that are more likely there than not (no dice in an evaluation)."""
        mask = received(content) > 0
        return Own(self.frozen(task).masked(mask), mask)

    def reply(self, state: Params, layout: Layout, kind: str, draw: np.random.Generator, /) -> Content | None:
        chance = chances(state.floats[: layout.num_prunable])
        return Content(draw.random(chance.size) < chance, None, None) if kind == "mask" else None


@dataclass(frozen=True)
class Thresholds:
    """A threshold for each row (output unit or filter) of every prunable tensor, at first zero.

    A row is alive where the mean |weight| of it is above its threshold. Weights stay with the clients, which all begin
    at theta_0.
    """

    name: ClassVar[str] = "thresholds"
    kind: ClassVar[str] = "thresholds"
    trains_weights: ClassVar[bool] = True
    bounds: ClassVar[tuple[str, str]] = ("thresholds that are noise", "thresholds that are noise")

    def layout(self, exchange: Layout, /) -> Layout:
        return exchange.rows

    def initial(self, task: Task, /) -> Params:
        return Params(np.zeros(task.exchange.rows.num_floats, np.float32), np.zeros(0, np.int64))

    def model(self, task: Task, content: Content, private: Params, /) -> Own:
        """Return what a client begins with that has not taken part yet."""
        found = follow(task.layout, task.theta_0, received(content))
        mask = above(task.layout, found.floats, received(content))
        return Own(found.masked(mask), mask)

    def reply(self, state: Params, layout: Layout, kind: str, draw: np.random.Generator, /) -> Content | None:
        if kind != self.kind:
            return None
        noise = draw.normal(0, 1e-2, layout.num_floats).astype(np.float32)
        return Content(np.ones(0, bool), noise, state.ints)


def above(layout: Layout, weights: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Return (num_prunable,) bool: the weights of rows whose mean size exceeds their threshold (num_rows,)."""
    rows = Row().groups(layout)
    return rows.spread(rows.reduced(np.abs(weights[: layout.num_prunable])) > thresholds)


def follow(layout: Layout, params: Params, change: np.ndarray) -> Params:
    """Return params whose rows have moved against a change (num_rows,) of their thresholds.

    Each weight of a row goes down by change / fan-in, with the sign of the row's sum: the row's mean size falls by
    about that where its threshold rose.
    """
    rows, size = Row().groups(layout), layout.num_prunable
    assert rows.of is not None
    count = np.bincount(rows.of)
    sign = np.sign(np.bincount(rows.of, weights=params.floats[:size].astype(np.float64)))
    floats = params.floats.copy()
    floats[:size] -= (change * sign / count)[rows.of].astype(np.float32)
    return replace(params, floats=floats)


def received(content: Content) -> np.ndarray:
    """Return the numbers of a message that must carry some."""
    if content.floats is None:
        raise ValueError("expected scores or thresholds, got a bare mask")
    return content.floats


def chances(scores: np.ndarray) -> np.ndarray:
    """Return how likely each weight is there, float64."""
    found: np.ndarray = 1 / (1 + np.exp(-scores.astype(np.float64)))
    return found


SPACES: tuple[Space, ...] = (Weights(), Scores(), Thresholds())  # of the kinds that a message may have in any method
