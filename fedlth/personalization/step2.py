"""What an arm of step 2 works with: start weights, training with shared data order, and the cost of what was done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fedlth.errors import StudyError
from fedlth.methods.client_update import Inbox
from fedlth.models.layout import Params
from fedlth.storage.client_state import ClientState
from fedlth.tickets.finder import Finder
from fedlth.tickets.search import Walked
from fedlth.training.budget import Budget
from fedlth.training.local_client import Cost, LocalClient
from fedlth.training.loss_probe import LossProbe
from fedlth.training.recipe import TrainingRecipe


@dataclass(frozen=True, kw_only=True)
class Result:
    """One row of step 2: a model and what it cost.

    `target` is the density asked for (1 where the method decides). `flops` are those of all trainings that lead
    here, forward and backward, counted dense and by what is alive; `epochs` those of the last training, or of the one
    that was chosen, `search_epochs` those of the others: all as really spent. `cpu_s` are the CPU seconds of the same
    trainings, and of the last of them: a fact of this machine, never of the result. `held`: dead weights may be other
    than zero. `diverged`: there is no such model, for a training did not end in numbers; `params` are where it began.
    `led`: a search's trainings one by one, where other models share some of them.
    """

    arm: str
    params: Params
    mask: np.ndarray
    target: float = 1.0
    start: str = ""
    epochs: float = 0
    search_epochs: float = 0
    flops: tuple[float, float] = (0.0, 0.0)
    held: bool = False
    cpu_s: tuple[float, float] = (0.0, 0.0)
    diverged: bool = False
    led: tuple[Cost, ...] = ()


def once(costs: Iterable[Cost]) -> Cost:
    """Sum what trainings took; one that is named twice, since two models share it, counts once."""
    return sum({id(cost): cost for cost in costs}.values(), Cost())


@dataclass(frozen=True)
class Step2:
    """One client's step 2.

    `method` is the update that has the method's own model, `inbox` what came down. `alive` is the mask of `theta_g`
    (dense, but for methods that learn masks). `train` is a pure function of (start bits, mask, epochs, replay).
    `known` remembers what every search begins with, the dense training from `theta_g` or its first steps, so that arms
    share it instead of paying twice, and nothing else: a model is as large as the number of arms and densities is not
    bounded. Its cost is told in full to each. `masks` holds what the arm `ticket` has found, as (target, mask, whether
    it diverged), for its random control, and `walked` how many steps were trained until each. All arms draw the same
    batches. `made` is what it cost to make `theta_g` of what came.
    """

    local: LocalClient
    method: Any
    inbox: Inbox
    state: ClientState
    theta_g: Params
    alive: np.ndarray
    anchors: Mapping[str, Params]
    finder: Finder
    targets: tuple[float, ...]
    known: dict[TrainingRecipe, tuple[Walked | str, Cost]] = field(default_factory=dict)
    masks: list[tuple[float, np.ndarray, bool]] = field(default_factory=list)
    walked: list[int] = field(default_factory=list)
    made: Cost = Cost()

    @property
    def recipe(self) -> TrainingRecipe:
        return self.local.personal_recipe

    @property
    def log(self) -> list[Cost]:
        return self.local.log

    def anchor(self, name: str) -> Params:
        """Return named weights; the round's own must have been sent."""
        if name == "reinit":
            return self.local.fresh_init("reinit")
        if name not in self.anchors:
            raise StudyError(f"finder.rewind: no weights named {name}; known: {', '.join(self.anchors)}")
        return self.anchors[name]

    def train(self, start: Params, mask: np.ndarray, budget: Budget | None = None) -> Params:
        return self.walk(start, mask, replay_lr=True, budget=budget).params

    def walk(
        self,
        start: Params,
        mask: np.ndarray,
        /,
        *,
        replay_lr: bool,
        held: bool = False,
        window: int = 0,
        first_step: int = 0,
        last_step: int | None = None,
        budget: Budget | None = None,
        dense_first: bool = True,
    ) -> Walked:
        """Train as a search asks; see tickets.search.TrainFn.

        `dense_first`: the search has the whole dense training, whose first steps need not be paid for again.
        """
        recipe = replace(
            self.recipe, replay_lr=replay_lr, budget=budget or self.recipe.budget,
            first_step=first_step, last_step=last_step,
        )  # fmt: skip
        size = self.local.num_train, recipe.batch_size
        steps = recipe.budget.total(*size)
        if last_step is not None and last_step >= steps and not mask.all():
            raise StudyError(
                f"finder.schedule.every: all moves must come before a training's end; client {self.local.client} has "
                f"{steps} steps, got a move at {last_step}"
            )
        if not held:  # a search's start is masked already, and a model as large as this one is not copied for nothing
            start = self._cleared(start if start.within(mask) else start.masked(mask), mask)
        shared = start is self.theta_g and bool(mask.all()) and recipe.budget == self.recipe.budget
        window = min(window, recipe.budget.passes(*size))
        found = self.known.get(recipe) if shared else None
        if found is None or (isinstance(found[0], Walked) and len(found[0].previous) < window):
            walked: Walked | str
            try:
                walked = self._walked(start, mask, recipe, held, window)
            except FloatingPointError as error:
                walked = str(error)
            found = walked, self.log.pop()
            if shared:
                self.known[recipe] = found
        if last_step is None or not mask.all() or not dense_first:
            self.log.append(found[1])
        if isinstance(found[0], str):
            raise FloatingPointError(found[0])
        return found[0]

    def _cleared(self, start: Params, mask: np.ndarray) -> Params:
        """Return a start without what a pruned unit has beside its weights, where the granularity knows of such."""
        clear = getattr(self.finder.granularity, "cleared", None)
        if clear is None or mask.all():
            return start
        found: Params = clear(start, mask, self.local.task.layout)
        return found

    def _walked(self, start: Params, mask: np.ndarray, recipe: TrainingRecipe, held: bool, window: int) -> Walked:
        passes = recipe.budget.passes(self.local.num_train, recipe.batch_size)
        epochs = passes - recipe.first_step // self.local.steps_of(recipe)
        ends = range(max(0, epochs - window), epochs)
        asked = tuple(e for e in ends if e)
        active, trainable = (None, self.local.task.layout.over_params(mask)) if held else (mask, None)
        done = self.local.train(start, recipe=recipe, active=active, trainable=trainable, snapshots=asked)
        seen = {0: start.floats, **done.snapshots}
        return Walked(done.params, tuple(seen[e][: mask.size].copy() for e in ends if e in seen))

    def network(self, at: Params) -> LossProbe:
        """Return the network at `at`."""
        return self.local.network(at)

    def spent(self, since: int) -> Cost:
        """Sum the log from position `since`; a training that several prunes of a search begin with counts once."""
        return once(self.log[since:])
