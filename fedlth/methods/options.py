"""What the recipes of methods share: arms that most are compared with, the phases of most, options that are checked."""

from __future__ import annotations

import math
from typing import Any

from fedlth.errors import wrong
from fedlth.methods.aggregate import Aggregate, CountMean, FedAvg
from fedlth.methods.client_update import ClientUpdate, MaskedUpdate
from fedlth.methods.method import Phase
from fedlth.study.parts import make
from fedlth.tickets.score import SCORES

OWN = ("global", "local", "dense", "own", "own_tuned")
TRAIN, BY_EXAMPLES, BY_HOLDERS = MaskedUpdate(), FedAvg(), CountMean()


def averaged(update: ClientUpdate = TRAIN, join: Aggregate = BY_EXAMPLES) -> Phase:
    """Return a phase in which everyone gets the global model, and sends all that it shares."""
    return Phase(name="federate", update=update, join=join)


def sliced(update: ClientUpdate, join: Aggregate = BY_HOLDERS) -> Phase:
    """Return a phase in which each client gets what it shares, and sends what it then shares."""
    return Phase(name="federate", update=update, join=join, down="slice", own_mask=True)


def score_of(spec: str | dict[str, Any]) -> Any:
    """Return the score that `method.score` names: one that can be asked in the middle of a federation."""
    spec = {"name": spec} if isinstance(spec, str) else spec
    score = make(SCORES, spec, "method.score", has="__call__(evidence)")
    if getattr(score, "window", 0) or hasattr(score, "weights"):
        raise wrong(
            "method.score", "one that neither looks back over epochs nor learns a mask of frozen weights", score
        )
    return score


def check(**options: tuple[object, bool, str]) -> None:
    """Raise StudyError at the first option that does not fit: name = (value, whether it fits, what is wanted)."""
    for name, (value, fits, wanted) in options.items():
        if not fits:
            raise wrong(f"method.{name}", wanted, value)


def share_of(value: float) -> tuple[float, bool, str]:
    """Return what `check` wants of a share of something: above 0 and below 1."""
    return value, 0 < value < 1, "in (0, 1)"


def density_of(value: float) -> tuple[float, bool, str]:
    return value, 0 < value <= 1, "in (0, 1]"


def positive(value: float) -> tuple[float, bool, str]:
    return value, 0 < value < math.inf, "above 0"


def at_least(least: float, value: float) -> tuple[float, bool, str]:
    return value, least <= value < math.inf, f"at least {least:g}"
