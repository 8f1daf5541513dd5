"""What a client does with what it received: the protocol, and the update that trains plain weights under a mask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import numpy as np

from fedlth.models.layout import Params
from fedlth.storage.client_state import ClientState
from fedlth.training.local_client import Cost, LocalClient
from fedlth.training.recipe import TrainingRecipe
from fedlth.training.request import TrainingResult
from fedlth.training.task import Task
from fedlth.wire.payload import Content

THETA_G, UPDATE = "theta_g", "update"  # the names of the global state on its way down, and of what comes up for it
NEXT_MASK = "next_mask"  # a bare mask, sent after an update: what the client shares from then on, where not the same
VALUES = ((UPDATE, "values"),)

# What came down, by name: the global state under THETA_G, in the exchange layout (or as scores). Its mask says what of
# it was sent: all, what everyone keeps, or what this client shares.
Inbox = Mapping[str, Content]


@dataclass(frozen=True)
class Update:
    """What a client's update made: the state to keep, what goes up by name, numbers of its own, rows of step 2.

    `cost` is what a device would train for it, without controls; None: every training of the visit.
    """

    state: ClientState
    contents: Mapping[str, Content] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    rows: tuple[dict[str, Any], ...] = ()
    cost: Cost | None = None


class ClientUpdate(Protocol):
    """A phase's client side; a frozen value. `sends` are (name, kind) of what it sends up.

    Three more methods may say more: `skips(round)` names what of it is not sent in a round, never all of it;
    `layout(name, task)` is the layout of a message of kind statistics, which no kind decides; `range(name, task)` the
    least and the most that each number of a message can honestly be, None where it can be anything.
    """

    @property
    def sends(self) -> tuple[tuple[str, str], ...]: ...

    def __call__(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Update: ...


def sends_in(update: ClientUpdate, round: int) -> tuple[tuple[str, str], ...]:
    """Return (name, kind) of what an update sends up in a round, as both ends know it."""
    skips = getattr(update, "skips", None)
    if skips is None:
        return update.sends
    skipped = skips(round)
    return tuple((name, kind) for name, kind in update.sends if name not in skipped)


@dataclass(frozen=True)
class Own:
    """A client's own model as whole params, and the mask that says what is alive in it."""

    params: Params
    mask: np.ndarray


class PersonalUpdate(ClientUpdate, Protocol):
    """An update that gives the client a model of its own: what the arms `own` and `own_tuned` evaluate.

    Attributes may say more: `granularity`, of what the method's masks are made where that is not single weights;
    `passes(task, visits)`, how many trainings an epoch is to a client after so many own visits, where it is not one,
    and `tune_passes` how many it is to `tune`, where that is another number; `whole_passes` and `whole_tune_passes`,
    how many of the whole network cost as many FLOPs, where some train a part of it; `own_pull`, that its objective has
    a pull, which takes the place of the study's; `obstacle(recipe)` why it cannot train by a recipe, "" where it can;
    `unfit(task)` why it cannot train on a task's data or model, "" where it can, and `remark(task)` what it does
    otherwise than it is known for there, "" for nothing;
    `keeps`, how many vectors as long as the model it leaves in a client's state, beside what does not cross;
    `frozen(task)`, the net under learnt masks; `weights(local, inbox, state)`, the client's model without its mask
    where the server has no whole model; `tunes_mask`, whether `tune` changes how much is kept; `private_mask`, whether
    clients have masks that no message names.
    """

    def own(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Own:
        """Return the client's model as it is after a download."""
        ...

    def tune(self, local: LocalClient, inbox: Inbox, state: ClientState, recipe: TrainingRecipe, /) -> Own:
        """Return the client's model after more of the method's own local training, nothing uploaded.

        `recipe` is that of every arm: its epochs, learning rate and schedule.
        """
        ...


def passes_of(update: object, task: Task, visits: int, *, tunes: bool = False, flops: bool = False) -> float:
    """Return how many trainings an epoch is to a client after so many own visits (`tunes`: in `tune`), usually one.

    `flops`: how many of the whole network cost as much.
    """
    for name in ("tune_passes", "passes") if tunes else ("passes",):
        if hasattr(update, name):
            found = getattr(update, f"whole_{name}", None) if flops else None
            return float((found or getattr(update, name))(task, visits))
    return 1.0


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
        self, local: LocalClient, params: Params, mask: np.ndarray, trained: TrainingResult | None, /
    ) -> tuple[Params, np.ndarray]: ...


@dataclass(frozen=True)
class Keep:
    """No prune."""

    snapshots: tuple[int, ...] = ()
    shrinking: ClassVar[Shrinking] = Shrinking()

    def __call__(
        self, local: LocalClient, params: Params, mask: np.ndarray, trained: TrainingResult | None, /
    ) -> tuple[Params, np.ndarray]:
        return params, mask


def received_params(content: Content) -> Params:
    """Return what was received as params in the exchange layout."""
    if content.floats is None or content.ints is None:
        raise ValueError("expected values, got a bare mask")
    return Params(content.floats, content.ints)


def private(local: LocalClient, state: ClientState) -> Params:
    """Return the client's whole params so far: theta_0, with its own personal tensors and norms where it has any.

    Methods with more of their own than what never crosses keep all that can change.
    """
    task, kept, home = local.task, state.vectors.get("private"), state.vectors.get("home")
    if kept is not None:
        return task.whole(Params(kept, state.vectors["private_ints"]))
    if home is not None:
        return task.home.put_into(task.theta_0, task.layout, Params(home, state.vectors["home_ints"]))
    return task.theta_0


def merged(local: LocalClient, inbox: Inbox, state: ClientState) -> Params:
    """Return whole params: what was shared as it came, personal tensors and local norms as the client left them."""
    return local.task.merge(received_params(inbox[THETA_G]), private(local, state))


def kept_private(local: LocalClient, state: ClientState, params: Params) -> ClientState:
    """Return the state with what does not cross of `params`, where anything does not."""
    if local.task.exchange is local.task.layout.moving:
        return state
    own = local.task.home.part_of(params, local.task.layout)
    return state.with_(vectors={"home": own.floats, "home_ints": own.ints})


def visited(local: LocalClient, state: ClientState, held: Own, metrics: Mapping[str, float]) -> Update:
    """Return how a visit ends: what is shared of the client's model goes up, all else stays in its state."""
    task, mask = local.task, held.mask
    sent, shared = task.shared_part(held.params), task.shared_mask(mask)
    new = replace(state, visits=state.visits + 1)
    if shared is not mask and not mask.all():
        new = new.with_(masks={"active": mask})  # of personal tensors only the client knows what is alive
    numbers = {**metrics, "density": int(np.count_nonzero(mask)) / mask.size}
    return Update(kept_private(local, new, held.params), {UPDATE: Content(shared, sent.floats, sent.ints)}, numbers)


@dataclass(frozen=True)
class MaskedUpdate:
    """Merge, maybe prune, train under the mask, maybe prune, send what is alive of what is shared."""

    before: Event = field(default_factory=Keep)
    after: Event = field(default_factory=Keep)
    sends: tuple[tuple[str, str], ...] = VALUES

    @property
    def shrinking(self) -> Shrinking | None:
        """How the mask shrinks; None where a prune does not say."""
        found: Shrinking | None = getattr(self.before if self.after == Keep() else self.after, "shrinking", None)
        return found

    def __call__(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Update:
        held = self.own(local, inbox, state)
        seen = local.visit_scores(held.params)
        params, mask = self.before(local, held.params, held.mask, None)
        recipe = self.recipe(local, local.recipe)
        trained = local.train(params, recipe=recipe, active=mask, snapshots=self.after.snapshots)
        params, mask = self.after(local, trained.params, mask, trained)
        update = visited(local, state, Own(params, mask), {"loss": trained.loss, **seen})
        return replace(update, contents={**update.contents, **self.also(local, params, mask)})

    def also(self, local: LocalClient, params: Params, mask: np.ndarray, /) -> Mapping[str, Content]:
        """Return what goes up beside the trained weights, which are whole `params` under `mask`."""
        return {}

    def own(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Own:
        mask = local.task.whole_mask(inbox[THETA_G].mask, state.masks.get("active", local.full))
        return Own(merged(local, inbox, state).masked(mask), mask)

    def tune(self, local: LocalClient, inbox: Inbox, state: ClientState, recipe: TrainingRecipe, /) -> Own:
        held = self.own(local, inbox, state)
        return Own(local.train(held.params, recipe=self.recipe(local, recipe), active=held.mask).params, held.mask)

    def recipe(self, local: LocalClient, recipe: TrainingRecipe, /) -> TrainingRecipe:
        """Return how it trains where all others train by `recipe`: here a method puts its own local objective."""
        return recipe
