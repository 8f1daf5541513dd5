"""Step 2 as a client update: the arms on the client's own data, one row a model, and the ticket that is kept."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from fedlth.methods.client_update import (
    THETA_G,
    ClientUpdate,
    Inbox,
    MaskedUpdate,
    Update,
    private,
    received_params,
)
from fedlth.methods.space import Space, Weights
from fedlth.personalization.arms import AS_LONG, OF_TICKETS, arm_of, tuned
from fedlth.personalization.kept import Keep, remembered, target_of
from fedlth.personalization.step2 import Result, Step2, once
from fedlth.storage.client_state import ClientState
from fedlth.storage.records import MetricRow
from fedlth.storage.typed_record import as_record
from fedlth.tickets.finder import Finder
from fedlth.training.local_client import Cost, LocalClient
from fedlth.wire import mask as bitmap
from fedlth.wire.payload import Content

log = logging.getLogger(__name__)
LONG_S = 20.0  # a client whose step 2 is longer is heard of on the way
EVALUATION = "evaluation"  # the whole global model, for controls beside a slice
TICKET = "ticket"  # a bare mask on its way up
NEED_NO_GLOBAL = frozenset({"own", "own_tuned", "local", "frozen_random"})


@dataclass(frozen=True, kw_only=True)
class Personalise:
    """Search, train and evaluate the `arms`; keep the model of the arm `kept` that the rule `main` picks.

    `own` has the method's own model. `space` is what the global state is. `sends` the ticket's mask where
    federated rounds inside the tickets follow.
    """

    own: ClientUpdate
    finder: Finder
    arms: tuple[str, ...]
    targets: tuple[float, ...]
    main: Keep
    kept: str | None
    space: Space = field(default_factory=Weights)
    sends: tuple[tuple[str, str], ...] = ()

    def __call__(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Update:
        return _reported(local, self._results(local, inbox, state), state, self.kept, self.main, bool(self.sends))

    def _results(self, local: LocalClient, inbox: Inbox, state: ClientState) -> Iterator[Result]:
        """Yield the models one at a time: each is let go, for it holds a whole model."""
        step = self.step2(local, inbox, state)
        last = OF_TICKETS | (AS_LONG if self.finder.open_ended else frozenset())
        for name in sorted(self.arms, key=last.__contains__):  # what takes the ticket's masks, or its search's length
            yield from arm_of(name)(step)

    def step2(self, local: LocalClient, inbox: Inbox, state: ClientState) -> Step2:
        """Return what the arms work with."""
        task, own = local.task, private(local, state)
        held, at = self.space.model(task, inbox.get(EVALUATION, inbox[THETA_G]), own), len(local.log)
        # What no round trains has the running statistics of theta_0, which are those of no data under no mask.
        theta_g = held.params if self.space.trains_weights else local.normalised(held.params, held.mask)
        anchors = {"theta_0": task.theta_0, "theta_g@0": task.theta_0, "theta_g": theta_g}
        for name, content in inbox.items():
            if name.startswith("theta_g@"):
                anchors[name] = task.merge(received_params(content), own)
        return Step2(
            local, self.own, inbox, state, theta_g, held.mask, anchors, self.finder, self.targets,
            made=sum(local.log[at:], Cost()),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Refined:
    """Evaluate the ticket after the federated rounds inside the tickets, trained once more on the client's own data."""

    main: Keep
    sends: tuple[tuple[str, str], ...] = ()

    def __call__(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Update:
        result = tuned("refined", local, MaskedUpdate(), inbox, state, target_of(self.main, state))
        return _reported(local, iter((result,)), state, "refined", self.main, mask=False)


def _reported(
    local: LocalClient, results: Iterator[Result], state: ClientState, arm: str | None, main: Keep, mask: bool
) -> Update:
    """Evaluate each model, keep one in the state; `mask`: send its mask up, in which the client goes on."""
    rows: list[MetricRow] = []
    kept: tuple[Result, int] | None = None
    led: dict[float, tuple[Cost, ...]] = {}  # by target density: the trainings that lead to that ticket
    heard_at = time.monotonic()
    for result in results:
        row = row_of(local, result)
        if time.monotonic() - heard_at >= LONG_S:
            log.info("client %d: %s at density %g is done", local.client, result.arm, result.target)
            heard_at = time.monotonic()
        if result.cpu_s[0]:
            times = {"cpu_s": result.cpu_s[0], "last_cpu_s": result.cpu_s[1]}
            local.work.append({"arm": result.arm, "target_density": result.target, **times})
        if result.arm == arm:
            led[result.target] = result.led or (Cost(*result.flops),)
            if kept is None or main.better(row, rows[kept[1]], local.capacity, local.task.judged):
                kept = result, len(rows)
        rows.append(row)
    if kept is None:
        return Update(state, rows=tuple(map(as_record, rows)), cost=Cost())
    found, place = kept
    allowed = main.allowed(local.capacity)
    tried = allowed if found.target in allowed else (found.target,)
    cost = once(one for target in tried for one in led.get(target, ()))  # who chooses among several has to find them
    if main.chooses and found.target in allowed:
        rows[place] = replace(rows[place], chosen=True)
        state = remembered(state, found.target)
    state = _with_ticket(local, state, replace(found, diverged=rows[place].diverged))
    told = tuple(map(as_record, rows))
    if not mask:
        return Update(state, rows=told, cost=cost)
    # Of a ticket that diverged too: refinement needs the mask alone, and trains the server's weights in it.
    shared = local.task.shared_mask(found.mask)
    state = state.without("owed")
    if shared is not found.mask:
        state = state.with_(masks={"active": found.mask})
    return Update(state, {TICKET: Content(shared, None, None)}, rows=told, cost=cost)


def _with_ticket(local: LocalClient, state: ClientState, kept: Result) -> ClientState:
    """Return the state with this ticket as the client's own; with none where it diverged."""
    if kept.diverged:
        return state.without("ticket").without("ticket_ints").without("ticket_dead")
    layout, moving = local.task.layout, local.task.moving_part(kept.params)
    own = layout.moving.mask_of(kept.mask, layout)
    values = np.concatenate((moving.floats[np.flatnonzero(own)], moving.floats[own.size :]))
    state = state.with_(masks={"ticket": kept.mask}, vectors={"ticket": values, "ticket_ints": moving.ints})
    if kept.held:
        state = state.with_(vectors={"ticket_dead": kept.params.floats[: kept.mask.size][~kept.mask]})
    return state


def row_of(local: LocalClient, result: Result) -> MetricRow:
    """Evaluate one finished model. Test data is read here alone; no training and no choice sees it.

    A model that diverged, or whose loss is not finite, counts as a uniform guess among the classes, or as the mean of
    the client's training targets. Its row says so for what training and validation show; of a test loss no ticket file
    and no choice may depend.
    """
    task, size = local.task, local.full.size
    if not (result.held or result.diverged) and ((result.params.floats[:size] != 0) & ~result.mask).any():
        raise AssertionError(f"arm {result.arm}: a pruned weight is not zero")
    judged, test_part, diverged = task.judged, task.part(local.client, "test"), result.diverged
    split, val = task.splits.clients[local.client], None
    if not diverged:
        test = local.evaluate(result.params, test_part)
        if len(split.val):
            val = local.evaluate(result.params, local.val_part)
            diverged = not math.isfinite(val.loss)
    if diverged and len(split.val):
        val = local.guess(local.val_part, judged.all)
    if diverged or not math.isfinite(test.loss):
        test = local.guess(test_part, judged.all)
    return MetricRow(
        client=local.client,
        unseen=local.client in task.splits.unseen,
        arm=result.arm,
        density=_share(result.mask),
        target_density=result.target,
        start=result.start,
        epochs=result.epochs,
        search_epochs=result.search_epochs,
        train_flops=result.flops[0],
        train_flops_effective=result.flops[1],
        val_accuracy=val.metrics.get("accuracy") if val else None,
        val_loss=val.loss if val else None,
        test_accuracy=test.metrics.get("accuracy"),
        test_loss=test.loss,
        num_train=len(split.train),
        num_val=len(split.val),
        num_test=len(split.test),
        ticket="" if result.mask.all() else bitmap.digest(result.mask),
        layer_density={e.name: _share(result.mask[e.slice]) for e in task.layout.prunable},
        diverged=diverged,
        val_metrics={name: val.metrics[name] for name in judged.named} if val else {},
        test_metrics={name: test.metrics[name] for name in judged.named},
    )


def _share(mask: np.ndarray) -> float:
    return int(np.count_nonzero(mask)) / mask.size
