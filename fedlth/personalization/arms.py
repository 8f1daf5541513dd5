"""The arms of step 2: the personal ticket, and everything that a claim about it must beat. Each in the same run."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from fedlth.errors import StudyError, wrong
from fedlth.methods.client_update import ClientUpdate, Inbox, Own
from fedlth.models.layout import Params
from fedlth.personalization.step2 import Result, Step2
from fedlth.storage.client_state import ClientState
from fedlth.study.parts import imported
from fedlth.tickets.controls import permuted_values, recounted_mask, shuffled_mask
from fedlth.tickets.criteria import LargeInit
from fedlth.tickets.finder import Finder
from fedlth.tickets.gate import Always, AtTarget
from fedlth.tickets.granularity import Element, Granularity
from fedlth.tickets.rewind import ToInit
from fedlth.tickets.schedule import OneShot, Rescore
from fedlth.tickets.search import find
from fedlth.training.budget import Budget
from fedlth.training.local_client import Cost, LocalClient, plain_number

Arm = Callable[[Step2], Iterator[Result]]


def global_model(step: Step2) -> Iterator[Result]:
    """The shared model as it came, untouched."""
    yield _untrained("global", Own(step.theta_g, step.alive), "theta_g", step.made)


def local_only(step: Step2) -> Iterator[Result]:
    """The client alone, from theta_0, for as many epochs as search and fine-tuning take together."""
    yield trained(step, "local", "theta_0", step.local.full, budget=_whole_budget(step))


def dense(step: Step2) -> Iterator[Result]:
    """The dense twin: the whole model, as many fine-tuning epochs as the ticket's last training."""
    yield _under(step, "dense", step.local.full)


def dense_total(step: Step2) -> Iterator[Result]:
    """The dense twin with the search's epochs given to it as well."""
    yield _under(step, "dense_total", step.local.full, budget=_whole_budget(step))


def ticket(step: Step2) -> Iterator[Result]:
    """The personal ticket, as the study's finder finds it."""
    yield from _found("ticket", step.finder, step)


def ticket_0(step: Step2) -> Iterator[Result]:
    """The same search, rewound to theta_0."""
    yield from _found("ticket_0", replace(step.finder, rewind=ToInit()), step)


def one_shot(step: Step2) -> Iterator[Result]:
    """The same score and rewind, pruned once instead of step by step."""
    yield from _found("one_shot", replace(step.finder, schedule=OneShot()), step)


def global_mask(step: Step2) -> Iterator[Result]:
    """The global model's own magnitude mask: not personal at all, and it costs no mask bytes. The hard control."""
    size = step.local.full.size
    for target in step.targets:
        mask = step.finder.pick(np.abs(step.theta_g.floats[:size]), step.local.full, step.local.task.layout, target)
        yield trained(step, "global_mask", "theta_g", mask, target=target)


def at_init(finder: Finder) -> Finder:
    """Return the finder that prunes theta_0 by its own magnitudes: no training, no gate; then it goes on as this one.

    A rewind to trained weights has to train them first.
    """
    schedule = OneShot() if finder.rewind.anchor is None else Rescore(steps=1)
    return replace(finder, score=LargeInit(), schedule=schedule, gate=Always(), stop=AtTarget())


def init_mask(step: Step2) -> Iterator[Result]:
    """theta_0's own magnitude mask, trained from where the ticket is: both ends know it, so it costs no mask bytes.

    "Pruning theta_0 directly" of Chen et al., BERT-Tickets, NeurIPS 2020, arXiv 2007.12223.
    """
    yield from _found("init_mask", at_init(step.finder), step)


def shuffled_values(step: Step2) -> Iterator[Result]:
    """The ticket's mask on the weights that it rewinds to, the values of each prunable tensor in another order.

    BERT-Tickets' shuffled theta_0. A rewind to trained weights has those of theta_g here.
    """
    start, size = step.finder.rewind.anchor or "theta_g", step.local.full.size
    floats = step.anchor(start).floats.copy()
    floats[:size] = permuted_values(floats[:size], step.local.task.layout, step.local.rng("shuffled values"))
    yield from _under_ticket(step, "shuffled_values", start, replace(step.anchor(start), floats=floats))


def reinit(step: Step2) -> Iterator[Result]:
    """The ticket's mask on another draw of the initialisation (model.reinit_options), not rescaled."""
    yield from _under_ticket(step, "reinit", "reinit", step.anchor("reinit"))


def _under_ticket(step: Step2, arm: str, start: str, begin: Params) -> Iterator[Result]:
    """Train other weights under each of the ticket's masks; where the search diverged there is no such mask."""
    for target, mask, diverged in _masks(step):
        if diverged:
            yield Result(arm=arm, params=begin, mask=mask, target=target, start=start, diverged=True)
        else:
            yield trained(step, arm, start, mask, target=target, begin=begin)


def _masks(step: Step2) -> list[tuple[float, np.ndarray, bool]]:
    """Return what the arm `ticket` has found, searched for where it has not run."""
    if not step.masks:
        deque(_found("ticket", step.finder, step), maxlen=0)
    return step.masks


def random_ticket(step: Step2) -> Iterator[Result]:
    """A random mask of the ticket's layer counts; the best of its starts, chosen on validation data.

    They are theta_g, theta_0 where rounds have left it, and another draw where the model does not bring its weights.
    Where the ticket's search diverged before it had a mask, the counts are those of a random score's.
    """
    layout, full = step.local.task.layout, step.local.full
    for target, counted, diverged in _masks(step):
        mask = _shuffled(step, counted, f"random@{target}", step.finder.granularity)
        if diverged:
            drawn = step.finder.pick(step.local.rng(f"random@{target}").random(full.size), full, layout, target)
            mask = mask if np.count_nonzero(drawn) == np.count_nonzero(counted) else drawn
        yield _best_start(step, mask, target)


def _best_start(step: Step2, mask: np.ndarray, target: float) -> Result:
    """Train a mask from each start and return the best on validation data; one that diverges is last."""
    theta_0 = step.anchor("theta_0")
    starts = {"theta_g": step.theta_g}
    if not np.array_equal(theta_0.floats, step.theta_g.floats):
        starts["theta_0"] = theta_0
    if not step.local.task.model.brought:
        starts["reinit"] = _rescaled(step, step.local.fresh_init("random ticket"), mask)
    at, best, best_score = len(step.log), None, -math.inf
    for name, start in starts.items():
        found = trained(step, "random", name, mask, target=target, begin=start)
        score = -math.inf if found.diverged else step.local.val_score(found.params)
        if best is None or score > best_score:
            best, best_score = found, score
    assert best is not None
    all_of = step.spent(at)  # of equal trainings
    searched = plain_number(all_of.epochs * (len(starts) - 1) / len(starts))
    flops, cpu_s = (all_of.flops, all_of.alive_flops), (all_of.cpu_s, best.cpu_s[1])
    return replace(best, search_epochs=searched, flops=flops, cpu_s=cpu_s)


def own(step: Step2) -> Iterator[Result]:
    """The method's own personal model, as the last download leaves it."""
    at = len(step.log)
    yield _untrained("own", step.method.own(step.local, step.inbox, step.state), "own", step.spent(at))


def own_tuned(step: Step2) -> Iterator[Result]:
    """The same after the fine-tuning epochs, by the method's own local training."""
    yield tuned("own_tuned", step.local, step.method, step.inbox, step.state)


def own_random(step: Step2) -> Iterator[Result]:
    """The control of `own_tuned`: a random mask of the same layer counts on the same start weights."""
    own_mask, searched = _tuned_mask(step)
    mask = _shuffled(step, own_mask, "own_random", granularity_of(step.method))
    yield _searched(_under(step, "own_random", mask), searched)


def own_global_mask(step: Step2) -> Iterator[Result]:
    """The hard control of `own_tuned`: theta_g's own largest weights, as many in each layer."""
    own_mask, searched = _tuned_mask(step)
    score = np.abs(step.theta_g.floats[: own_mask.size])
    mask = recounted_mask(own_mask, score, step.local.task.layout, granularity_of(step.method))
    yield _searched(trained(step, "own_global_mask", "theta_g", mask), searched)


def frozen_random(step: Step2) -> Iterator[Result]:
    """The control of learnt masks: a random mask of the same layer counts on the same frozen weights."""
    held = step.method.own(step.local, step.inbox, step.state)
    mask = _shuffled(step, held.mask, "frozen_random", granularity_of(step.method))
    at = len(step.log)
    params = step.local.normalised(step.method.frozen(step.local.task).masked(mask), mask)
    yield _untrained("frozen_random", Own(params, mask), "frozen", step.spent(at))


ARMS: Mapping[str, Arm] = {
    "global": global_model,
    "local": local_only,
    "dense": dense,
    "dense_total": dense_total,
    "ticket": ticket,
    "ticket_0": ticket_0,
    "one_shot": one_shot,
    "global_mask": global_mask,
    "init_mask": init_mask,
    "shuffled_values": shuffled_values,
    "reinit": reinit,
    "random": random_ticket,
    "own": own,
    "own_tuned": own_tuned,
    "own_random": own_random,
    "own_global_mask": own_global_mask,
    "frozen_random": frozen_random,
}
AS_LONG = frozenset({"local", "dense_total"})  # arms that train as long as the whole search
OF_TICKETS = frozenset({"shuffled_values", "reinit", "random"})  # controls that take the masks which `ticket` has found
REWOUND = OF_TICKETS | {"ticket", "one_shot", "init_mask"}  # arms that go where the finder's rewind says


def row_name(name: str) -> str:
    """Return the name that an arm's rows carry: that of the function, for your own."""
    return name.rpartition(":")[2]


def arm_of(name: str) -> Arm:
    """Return the arm of this name, or your own `package.module:arm`; raise StudyError naming the place."""
    if ":" in name:
        own: Arm = imported(name, "personalise.arms")
        if not callable(own):
            raise wrong("personalise.arms", "callables that take a Step2 and yield Results", name)
        return own
    if name not in ARMS:
        raise StudyError(f"personalise.arms: must be among {', '.join(ARMS)} or package.module:arm, got {name!r}")
    return ARMS[name]


def tuned(arm: str, local: LocalClient, method: Any, inbox: Inbox, state: ClientState, target: float = 1.0) -> Result:
    """Return a method's own model after its own training of step 2."""
    held, at, diverged = method.own(local, inbox, state), len(local.log), False
    try:
        held = method.tune(local, inbox, state, local.personal_recipe)
    except FloatingPointError:
        diverged = True
    cost = sum(local.log[at:], Cost())
    return Result(
        arm=arm, params=held.params, mask=held.mask, target=target, start="own",
        epochs=plain_number(cost.epochs), flops=(cost.flops, cost.alive_flops), cpu_s=(cost.cpu_s, cost.cpu_s),
        diverged=diverged,
    )  # fmt: skip


def _untrained(arm: str, held: Own, start: str, cost: Cost) -> Result:
    """Return a model that step 2 does not train; what it cost is a pass for the statistics of norms, or nothing."""
    return Result(
        arm=arm, params=held.params, mask=held.mask, start=start, search_epochs=plain_number(cost.epochs),
        flops=(cost.flops, cost.alive_flops), cpu_s=(cost.cpu_s, 0.0),
    )  # fmt: skip


def granularity_of(method: ClientUpdate) -> Granularity:
    """Return of what a method's masks are made: single weights, where it does not say otherwise."""
    made: Granularity = getattr(method, "granularity", Element())
    return made


def trained(
    step: Step2, arm: str, start: str, mask: np.ndarray, *, target: float = 1.0, budget: Budget | None = None,
    begin: Params | None = None,
) -> Result:  # fmt: skip
    """Train a mask once, from the weights named `start` or given as `begin`."""
    at, diverged = len(step.log), False
    params = step.anchor(start) if begin is None else begin
    try:
        params = step.train(params, mask, budget=budget)
    except FloatingPointError:
        diverged = True
    cost = step.spent(at)
    return Result(
        arm=arm, params=params, mask=mask, target=target, start=start, epochs=plain_number(cost.epochs),
        flops=(cost.flops, cost.alive_flops), cpu_s=(cost.cpu_s, cost.cpu_s), diverged=diverged,
    )  # fmt: skip


def _under(step: Step2, arm: str, mask: np.ndarray, *, budget: Budget | None = None) -> Result:
    """Train a control's mask from theta_g, or from the client's own weights where the server has no whole model."""
    weights = getattr(step.method, "weights", None)
    if weights is None:
        return trained(step, arm, "theta_g", mask, budget=budget)
    begin: Params = weights(step.local, step.inbox, step.state)
    return trained(step, arm, "own", mask, budget=budget, begin=begin.masked(mask))


def _found(arm: str, finder: Finder, step: Step2) -> Iterator[Result]:
    began, chain = len(step.log), 0
    search = find(
        finder,
        start=step.theta_g,
        start_name="theta_g",
        targets=step.targets,
        layout=step.local.task.layout,
        anchors=step.anchor,
        train=partial(step.walk, dense_first=finder.dense_first),
        rng=step.local.rng,
        network=step.network,
        val_accuracy=step.local.val_score,
        normalised=step.local.normalised,
    )
    before = began
    for found in search:
        if found.chain != chain:
            began, chain = before, found.chain
        whole, last = step.spent(began), Cost()
        if getattr(finder.rewind, "trains", True) and step.log[began:]:
            last = whole if finder.moves else step.log[-1]  # the parts of one training are one training
        if arm == "ticket":
            step.masks.append((found.target, found.mask, bool(found.diverged)))
            step.walked.append(whole.steps)
        yield Result(
            arm=arm, params=found.params, mask=found.mask, target=found.target, start=found.start,
            epochs=plain_number(last.epochs), search_epochs=plain_number(whole.epochs - last.epochs),
            flops=(whole.flops, whole.alive_flops), held=finder.dead.holds and not found.diverged,
            cpu_s=(whole.cpu_s, last.cpu_s), diverged=bool(found.diverged), led=tuple(step.log[began:]),
        )  # fmt: skip
        before = len(step.log)


def _whole_budget(step: Step2) -> Budget:
    """Return the budget of the longest search and its last training, as it was spent where only the search tells."""
    once, finder = step.recipe.budget, step.finder
    if finder.open_ended and step.walked:
        return replace(once, epochs=0, steps=max(step.walked) // once.repeats)
    learned, trainings = Budget(epochs=finder.learned(step.targets)[0]), finder.trainings(step.targets)[0]
    skipped = getattr(finder.rewind, "steps", 0) * (trainings - 1) if finder.dense_first else 0
    return once.times(trainings) + learned + Budget(steps=-skipped) or once


def _tuned_mask(step: Step2) -> tuple[np.ndarray, Cost]:
    """Return the mask that `own_tuned` ends with, and what it cost to find where tuning moves it."""
    held, at = step.method.own(step.local, step.inbox, step.state), len(step.log)
    if getattr(step.method, "tunes_mask", False):
        with suppress(FloatingPointError):
            held = step.method.tune(step.local, step.inbox, step.state, step.recipe)
    return held.mask, step.spent(at)


def _searched(found: Result, searched: Cost) -> Result:
    """Return a result with the cost of what its mask's counts were taken from."""
    flops = found.flops[0] + searched.flops, found.flops[1] + searched.alive_flops
    cpu_s = found.cpu_s[0] + searched.cpu_s, found.cpu_s[1]
    return replace(found, search_epochs=plain_number(searched.epochs), flops=flops, cpu_s=cpu_s)


def _shuffled(step: Step2, mask: np.ndarray, what: str, granularity: Granularity) -> np.ndarray:
    """Return a random mask with the same count in every layer, of whole groups where the mask is of groups."""
    return shuffled_mask(mask, step.local.task.layout, step.local.rng(what), granularity)


def _rescaled(step: Step2, params: Params, mask: np.ndarray) -> Params:
    """Scale each layer by 1 / sqrt(density), which keeps the variance of what a unit sums as in the dense net."""
    floats = params.floats.copy()
    for e in step.local.task.layout.prunable:
        alive = float(mask[e.slice].mean())
        if alive > 0:
            floats[e.slice] /= np.sqrt(alive)
    return replace(params, floats=floats)
