"""A global model that still trains, and is of no use: seen by those who were sent it, and then undone.

The server has no data. What it has are the visits of the next round: before it trained, each client judged on
validation data what the round before had joined, and the training that went on from there had a loss. Where most of
them say that the model has collapsed, both rounds are undone: the server returns to the last good state.

Collapsed means, by the medians of a round's clients (of two middle ones the one that speaks for the model, so that of
two clients both must say so), with share = `federate.roll_back`:

1. of the lead over guessing that the last three good rounds had at least, at most this share is left, and the training
   loss is hardly better than guessing, and no lower than in any of them; or
2. the training loss is at least 1 / share times that of guessing, and the score no better than in the last good round.

Both ask for a loss that no training in order has, the first for a lead that was steady, too. An accuracy alone falls to
nothing in healthy federations: with few classes a client, what others trained last has forgotten theirs. Where no guess
is known (real numbers, a loss or metric of the user's own) the loss of the last good round takes its place, in the
second rule alone.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from statistics import median_high, median_low

from fedlth.experiment.experiment import Experiment
from fedlth.methods.method import Phase
from fedlth.storage.checkpoint import Health
from fedlth.storage.records import VisitRecord
from fedlth.training.loss import CrossEntropy

LEAD = 0.1  # of what can be gained over guessing: less is no lead that could be lost
LEAST = 2  # clients who must say so, or one could undo the work of all others
STEADY = 3  # rounds that a lead must have been there for
NEARLY = 0.9  # of a guess: a network that is dead but for its last biases learns how common the classes are


def health_of(
    experiment: Experiment, phase: Phase, visits: Sequence[tuple[int, VisitRecord]], before: Collection[str]
) -> Health | None:
    """Return what the visits of a round say of the model that was sent; None where too few of them can.

    A client that keeps a part of the model to itself judges the whole only once it has one: `before` names those who
    had been visited.
    """
    if not experiment.one_metric:
        return None
    judged, whole = experiment.judged, experiment.task.exchange is experiment.task.layout.moving
    alone = not whole or hasattr(phase.update, "weights")
    found = []
    for client, visit in visits:
        value = visit.val_accuracy if judged.main.name == "accuracy" else visit.val_metric
        if value is not None and visit.loss is not None and (str(client) in before or not alone):
            found.append((judged.score(value), float(visit.loss)))
    if len(found) < LEAST:
        return None
    scores, losses = zip(*found, strict=True)
    return Health(phase.name, float(median_high(scores)), float(median_low(losses)), len(found))


def collapsed(experiment: Experiment, before: Sequence[Health], now: Health | None) -> str:
    """Return why a model has collapsed, by what was seen of it and of the good ones `before`; "" where it has not."""
    share = experiment.study.federate.roll_back
    if not share or not before or now is None or before[-1].phase != now.phase:
        return ""
    last, task, judged = before[-1], experiment.task, experiment.judged
    guess = math.log(task.dataset.num_classes) if isinstance(task.loss, CrossEntropy) else None
    chance = judged.main.chance(task.dataset.num_classes)
    lost = False
    if guess is not None and chance is not None and len(before) >= STEADY:
        low, best = judged.score(chance), max(map(judged.score, judged.main.range))
        lead = min(one.score for one in before) - low
        lost = lead >= LEAD * (best - low) and now.score <= low + share * lead
        lost = lost and now.loss >= max(NEARLY * guess, *(one.loss for one in before))
    known = last.loss if guess is None else guess
    if lost or (known > 0 and now.loss >= known / share and now.score <= last.score):
        named = judged.main.name.rpartition(":")[2]
        then, there = (f"{judged.score(one.score):.4g}" for one in (last, now))
        return (
            f"most of {now.clients} clients saw {named} {there} and trained at a loss of {now.loss:.4g}, after {named} "
            f"{then} and {last.loss:.4g} in the last good round"
        )
    return ""


def followed(before: Sequence[Health], now: Health | None) -> tuple[Health, ...]:
    """Return what is known of the last good rounds of a phase after one more."""
    if now is None:
        return tuple(before)
    return (*(one for one in before if one.phase == now.phase), now)[-STEADY:]
