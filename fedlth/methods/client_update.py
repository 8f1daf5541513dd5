"""What a sampled client does with what it received: the visits that train plain weights under a mask."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol

import numpy as np

from fedlth.models.layout import Params
from fedlth.storage.client_state import ClientState
from fedlth.training.local_client import Local
from fedlth.training.recipe import TrainingRecipe
from fedlth.training.request import TrainingResult
from fedlth.wire.payload import Content


@dataclass(frozen=True)
class Visited:
    """A visit's outcome: what to send (in the recipe's space), the state to keep, numbers to report."""

    kind: str
    content: Content
    state: ClientState
    metrics: dict[str, float]


@dataclass(frozen=True)
class Own:
    """A client's own model as whole params, and the mask that says what is alive in it."""

    params: Params
    mask: np.ndarray


class Visit(Protocol):
    """A method's client side. `sends` is the kind it uploads.

    Two attributes may say more: `granularity`, of what the method's masks are made where that is not single weights;
    `passes(world, visits)`, how many trainings an epoch is to a client after so many own visits, where it is not one.
    """

    @property
    def sends(self) -> str: ...

    def __call__(self, local: Local, received: Content, state: ClientState, /) -> Visited: ...

    def own(self, local: Local, received: Content, state: ClientState, /) -> Own:
        """Return the client's model as it stands after a download."""
        ...

    def tune(self, local: Local, received: Content, state: ClientState, recipe: TrainingRecipe, /) -> Own:
        """Return the client's model after more of the method's own local training, nothing uploaded.

        `recipe` is that of every arm: its epochs, learning rate and schedule.
        """
        ...


@dataclass(frozen=True)
class Shrinking:
    """How a client's mask shrinks over its own visits, known before anything runs: what a forecast needs.

    `densities` are those before the first prune, after the first, ...; a prune may come every `every` visits. `sure`
    False: a prune may also not happen, as accuracy decides.
    """

    densities: tuple[float, ...] = (1.0,)
    every: int = 1
    sure: bool = True

    def prunes(self, visits: int) -> int:
        """Return how many prunes lie behind a client after so many visits, if all happen."""
        return min(visits // self.every, len(self.densities) - 1)


def geometric(rate: float, density: float) -> tuple[float, ...]:
    """Return the densities of a mask that loses `rate` of its survivors at each prune, down to exactly `density`."""
    found = [1.0]
    while found[-1] > density * (1 + 1e-9):
        found.append(max(density, found[-1] * (1 - rate)))
    return tuple(found)


class Event(Protocol):
    """A prune that may happen before or after the local training."""

    @property
    def snapshots(self) -> tuple[int, ...]: ...

    def __call__(
        self, local: Local, params: Params, mask: np.ndarray, trained: TrainingResult | None, /
    ) -> tuple[Params, np.ndarray]: ...


@dataclass(frozen=True)
class Keep:
    """No prune."""

    snapshots: tuple[int, ...] = ()
    shrinking: ClassVar[Shrinking] = Shrinking()

    def __call__(
        self, local: Local, params: Params, mask: np.ndarray, trained: TrainingResult | None, /
    ) -> tuple[Params, np.ndarray]:
        return params, mask


def received_params(content: Content) -> Params:
    """Return what was received as params in the exchange layout."""
    if content.floats is None or content.ints is None:
        raise ValueError("values were wanted, a bare mask came")
    return Params(content.floats, content.ints)


def private(local: Local, state: ClientState) -> Params:
    """Return the client's whole params so far: theta_0, with its own norms where the buffer policy keeps them local."""
    kept = state.vectors.get("private")
    return local.world.theta_0 if kept is None else local.world.whole(Params(kept, state.vectors["private_ints"]))


@dataclass(frozen=True)
class MaskedVisit:
    """Merge, maybe prune, train under the mask, maybe prune, send what is alive."""

    before: Event = field(default_factory=Keep)
    after: Event = field(default_factory=Keep)
    sends: str = "values"

    @property
    def shrinking(self) -> Shrinking | None:
        """How the mask shrinks; None where a prune does not say."""
        found: Shrinking | None = getattr(self.before if self.after == Keep() else self.after, "shrinking", None)
        return found

    def __call__(self, local: Local, received: Content, state: ClientState, /) -> Visited:
        held = self.own(local, received, state)
        val_accuracy = local.val_accuracy(held.params)
        params, mask = self.before(local, held.params, held.mask, None)
        trained = local.train(params, recipe=local.recipe, active=mask, snapshots=self.after.snapshots)
        params, mask = self.after(local, trained.params, mask, trained)
        sent = local.world.shared_part(params)
        metrics = {
            "loss": trained.loss,
            "val_accuracy": val_accuracy,
            "density": int(np.count_nonzero(mask)) / mask.size,
        }
        new = replace(state, visits=state.visits + 1)
        if not mask.all() or "active" in state.masks:
            new = new.with_(masks={"active": mask})
        if local.world.exchange is not local.world.layout.moving:
            own = local.world.moving_part(params)
            new = new.with_(vectors={"private": own.floats, "private_ints": own.ints})
        return Visited(self.sends, Content(mask, sent.floats, sent.ints), new, metrics)

    def own(self, local: Local, received: Content, state: ClientState, /) -> Own:
        mask = state.masks.get("active", local.full)
        return Own(local.world.merge(received_params(received), private(local, state)).masked(mask), mask)

    def tune(self, local: Local, received: Content, state: ClientState, recipe: TrainingRecipe, /) -> Own:
        held = self.own(local, received, state)
        return Own(local.train(held.params, recipe=recipe, active=held.mask).params, held.mask)
