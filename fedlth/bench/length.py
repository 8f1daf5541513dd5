"""How long every client alone trains in a bench: as many epochs, or steps, as a client of the others has in all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fedlth.experiment.experiment import Experiment
from fedlth.study.schema import Study

ONE_TRAINING = {"schedule": {"name": "rescore", "steps": 1}}  # a finder whose search trains nothing
KEPT = ("densities", "main")


def whole_length(study: Study, tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sections by which a study of `local`, whose plain tree is given, trains so long; {} where it does.

    In all: a client's mean visits in the rounds, times what it trains in each, search and fine-tuning, rounded up. What
    is in epochs here and in steps there has no sum before the data are known: nothing changes then.
    """
    experiment = Experiment.of(study)
    train, own, finder = study.train, study.personalise, experiment.finder
    unit, other = ("steps", "epochs") if own.steps else ("epochs", "steps")
    searches, (learned, _) = finder.trainings(study.finder.densities)[0], finder.learned(study.finder.densities)
    once, after = getattr(train, unit), getattr(own, unit)
    if once is None or after is None or (learned and unit == "steps"):
        return {}
    visits = study.federate.rounds * experiment.per_round(study.federate) / experiment.taking_part
    alone = (after * searches + learned) or after
    whole = math.ceil(visits * once + alone - 1e-9)
    if whole == alone:
        return {}
    personalise = {key: value for key, value in tree.get("personalise", {}).items() if key != other}
    finder_kept = {key: value for key, value in tree.get("finder", {}).items() if key in KEPT}
    return {"personalise": {**personalise, unit: whole}, "finder": {**finder_kept, **ONE_TRAINING}}
