"""The arms of step 2: the personal ticket, and everything that a claim about it must beat. Each in the same run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import numpy as np

from fedlth.methods.fedpm import frozen_weights
from fedlth.methods.step2 import Result, Step2
from fedlth.params import Params
from fedlth.tickets.controls import shuffled_mask
from fedlth.tickets.finder import Finder
from fedlth.tickets.rewind import ToInit
from fedlth.tickets.schedule import OneShot
from fedlth.tickets.search import find

Arm = Callable[[Step2], Iterator[Result]]


def global_model(step: Step2) -> Iterator[Result]:
    """The shared model as it came, untouched."""
    yield Result(arm="global", params=step.theta_g, mask=step.alive, start="theta_g")


def local_only(step: Step2) -> Iterator[Result]:
    """The client alone, from theta_0, for as many epochs as search and fine-tuning take together."""
    at = len(step.log)
    epochs = _total_epochs(step)
    params = step.train(step.anchor("theta_0"), step.local.full, epochs=epochs)
    yield Result(arm="local", params=params, mask=step.local.full, start="theta_0", epochs=epochs, flops=step.spent(at))


def dense(step: Step2) -> Iterator[Result]:
    """The dense twin: the whole model, as many fine-tuning epochs as the ticket's last training."""
    at = len(step.log)
    params = step.train(step.theta_g, step.local.full)
    yield Result(
        arm="dense", params=params, mask=step.local.full, start="theta_g", epochs=step.plan.epochs, flops=step.spent(at)
    )


def dense_total(step: Step2) -> Iterator[Result]:
    """The dense twin with the search's epochs given to it as well."""
    at, epochs = len(step.log), _total_epochs(step)
    params = step.train(step.theta_g, step.local.full, epochs=epochs)
    yield Result(
        arm="dense_total", params=params, mask=step.local.full, start="theta_g", epochs=epochs, flops=step.spent(at)
    )


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
        at = len(step.log)
        mask = step.finder.pick(np.abs(step.theta_g.floats[:size]), step.local.full, step.local.world.layout, target)
        params = step.train(step.theta_g, mask)
        yield Result(
            arm="global_mask", params=params, mask=mask, target=target, start="theta_g",
            epochs=step.plan.epochs, flops=step.spent(at),
        )  # fmt: skip


def random_ticket(step: Step2) -> Iterator[Result]:
    """A random mask of the ticket's layer counts; the best of three starts, chosen on validation data.

    A model that brings its weights has no third start: another draw would be theta_0 again.
    """
    for found in _found("random", step.finder, step):
        mask = _shuffled(step, found.mask, f"random@{found.target}")
        starts = {"theta_g": step.theta_g, "theta_0": step.anchor("theta_0")}
        if not step.local.world.brought:
            starts["reinit"] = _rescaled(step, step.local.fresh_init("random ticket"), mask)
        at = len(step.log)
        trained = {name: step.train(start, mask) for name, start in starts.items()}
        accuracy = {name: step.local.val_accuracy(params) for name, params in trained.items()}
        best = max(accuracy, key=lambda name: accuracy[name])
        yield replace(
            found, params=trained[best], mask=mask, start=best, flops=step.spent(at), held=False,
            search_epochs=(len(starts) - 1) * step.plan.epochs,
        )  # fmt: skip


def own(step: Step2) -> Iterator[Result]:
    """The method's own personal model, as the last download leaves it."""
    held = step.visit.own(step.local, step.received, step.state)
    yield Result(arm="own", params=held.params, mask=held.mask, start="own")


def own_tuned(step: Step2) -> Iterator[Result]:
    """The same after the fine-tuning epochs, by the method's own local training."""
    epochs = step.plan.epochs
    held = step.visit.tune(step.local, step.received, step.state, epochs)
    yield Result(
        arm="own_tuned", params=held.params, mask=held.mask, start="own", epochs=epochs,
        flops=step.flops(held.mask, epochs),
    )  # fmt: skip


def own_random(step: Step2) -> Iterator[Result]:
    """The control of `own_tuned`: a random mask of the same layer counts on the same start weights."""
    held = step.visit.own(step.local, step.received, step.state)
    mask = _shuffled(step, held.mask, "own_random")
    at = len(step.log)
    params = step.train(step.theta_g, mask)
    yield Result(
        arm="own_random", params=params, mask=mask, start="theta_g", epochs=step.plan.epochs,
        flops=step.spent(at),
    )  # fmt: skip


def frozen_random(step: Step2) -> Iterator[Result]:
    """The control of learnt masks: a random mask of the same layer counts on the same frozen weights."""
    held = step.visit.own(step.local, step.received, step.state)
    mask = _shuffled(step, held.mask, "frozen_random")
    params = frozen_weights(step.local.world).masked(mask)
    yield Result(arm="frozen_random", params=params, mask=mask, start="frozen")


ARMS: Mapping[str, Arm] = {
    "global": global_model,
    "local": local_only,
    "dense": dense,
    "dense_total": dense_total,
    "ticket": ticket,
    "ticket_0": ticket_0,
    "one_shot": one_shot,
    "global_mask": global_mask,
    "random": random_ticket,
    "own": own,
    "own_tuned": own_tuned,
    "own_random": own_random,
    "frozen_random": frozen_random,
}


def _found(arm: str, finder: Finder, step: Step2) -> Iterator[Result]:
    began, chain = len(step.log), 0
    search = find(
        finder,
        start=step.theta_g,
        start_name="theta_g",
        targets=step.targets,
        layout=step.local.world.layout,
        anchors=step.anchor,
        train=step.walk,
        rng=step.local.rng,
        network=step.network,
        val_accuracy=step.local.val_accuracy,
    )
    before = began
    for found in search:
        if found.chain != chain:
            began, chain = before, found.chain
        own = step.plan.epochs if getattr(finder.rewind, "trains", True) else 0
        epochs = sum(e for _, _, e in step.log[began:])
        yield Result(
            arm=arm, params=found.params, mask=found.mask, target=found.target, start=found.start, epochs=own,
            search_epochs=epochs - own, flops=step.spent(began), held=finder.dead.holds,
            cpu_s=(sum(step.cpu[began:]), step.cpu[-1] if own else 0.0),
        )  # fmt: skip
        before = len(step.log)


def _total_epochs(step: Step2) -> int:
    """Return the epochs of the longest search plus its last training."""
    return step.plan.epochs * max(1, step.finder.trainings(step.targets)[0])


def _shuffled(step: Step2, mask: np.ndarray, what: str) -> np.ndarray:
    """Return a random mask with the same count in every layer."""
    return shuffled_mask(mask, step.local.world.layout, step.local.rng(what), step.finder.granularity)


def _rescaled(step: Step2, params: Params, mask: np.ndarray) -> Params:
    """Scale each layer by 1 / sqrt(density), which keeps the variance of what a unit sums as in the dense net."""
    floats = params.floats.copy()
    for e in step.local.world.layout.prunable:
        alive = float(mask[e.slice].mean())
        if alive > 0:
            floats[e.slice] /= np.sqrt(alive)
    return replace(params, floats=floats)
