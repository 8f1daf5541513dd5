"""What a study trains: its searches round by round, and its arms under the searches' masks, as rows of facts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from fedlth.lab.bench import Bench
from fedlth.lab.controls import MASKS
from fedlth.lab.search import Round, finder_of, rounds
from fedlth.lab.training import Run
from fedlth.models.layout import Params
from fedlth.study.parts import make
from fedlth.tickets.dead import DEADS
from fedlth.tickets.finder import Finder
from fedlth.tickets.rewind import REWINDS, ToInit, changed

Row = dict[str, Any]


def searched(bench: Bench, name: str) -> Iterator[Row]:
    """Yield one row a round of a search."""
    for one in rounds(bench, name):
        yield {**_row(bench, name, one.number, one.mask, one.run), "trainings": one.trainings}


def trained(bench: Bench, name: str) -> Iterator[Row]:
    """Yield one row a round of an arm."""
    arm = bench.study.arms[name]
    for one in rounds(bench, arm.of):
        if arm.rounds and one.number not in arm.rounds:
            continue
        mask, run = controlled(bench, name, one)
        yield _row(bench, name, one.number, mask, run)


def controlled(bench: Bench, name: str, one: Round) -> tuple[np.ndarray, Run]:
    """Train an arm at one round of its search; return its mask and the training."""
    arm, place = bench.study.arms[name], f"arms.{name}"
    search = bench.study.searches[arm.of]
    finder = finder_of(search, f"searches.{arm.of}")
    # What the arm does not name is as in its search, or it would change two things at once.
    config = bench.train_config({**search.train, **arm.train})
    groups = finder.granularity.groups(bench.layout)
    control = make(MASKS, arm.mask, f"{place}.mask")
    # The streams have the round, not the arm: two arms that shuffle see the same shuffle. Groups, as a shuffle of
    # single weights would give a ticket of channels back the channels that it has lost.
    mask = groups.spread(control(groups.reduced(one.mask) > 0, groups.layout, bench.rng("mask", one.number)))
    # Round 0 of a search has nothing behind it to go back to: it trains theta_0.
    inherited = ToInit() if one.number == 0 else finder.rewind
    rewind = inherited if arm.start is None else make(REWINDS, arm.start, f"{place}.start")
    dice = bench.rng(f"search/{arm.of}/rewind") if arm.start is None else bench.rng("start", one.number)
    dead = finder.dead if arm.dead is None else make(DEADS, arm.dead, f"{place}.dead")
    steps = int(getattr(rewind, "steps", 0))
    if steps:
        origin = bench.trained(bench.theta_0, bench.full, replace(config, last=steps)).final
    elif rewind.anchor is None:
        origin = left(finder, one)
        config = replace(config, constant_lr=not rewind.replay_lr and one.number > 0)
    else:
        origin = bench.model.fresh("reinit") if rewind.anchor == "reinit" else bench.theta_0
    start = changed(rewind, origin, mask, bench.layout, dice).masked(mask)
    if dead.holds:
        first = origin if steps or rewind.anchor else bench.theta_0  # as a search does
        held = dead(first.floats[: mask.size], one.fallen)
        start.floats[: mask.size][~mask] = held[~mask]
    if not getattr(rewind, "trains", True):
        return mask, bench.untrained(start, mask)
    return mask, bench.trained(start, mask, replace(config, first=steps), free=dead.holds)


def left(finder: Finder, one: Round) -> Params:
    """Return what is there to go on from: the weights that were scored, and at zero what a moving mask brought back."""
    moved = one.number > 0 and getattr(finder.schedule, "regrow", None) is not None
    return one.start.masked(one.mask) if moved else one.before


def _row(bench: Bench, arm: str, number: int, mask: np.ndarray, run: Run) -> Row:
    stop = run.early_stop
    return {
        "kind": "training",
        "arm": arm,
        "seed": bench.seed,
        "round": number,
        "kept": int(np.count_nonzero(mask)),
        "size": int(mask.size),
        "layer_kept": {e.name: int(np.count_nonzero(mask[e.slice])) for e in bench.layout.prunable},
        "early_stop": stop.iteration,
        "validation_loss": stop.loss,
        "validation_accuracy": stop.accuracy,
        "test_accuracy": run.test,
        "final_validation_accuracy": run.curve[-1].accuracy,
        "final_test_accuracy": run.test_final,
        "curve": [[p.iteration, p.loss, p.accuracy] for p in run.curve],
        **({"diverged": True} if run.diverged else {}),
    }
