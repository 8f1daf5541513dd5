"""What prunes of a federation share: the next mask among the survivors, and the gate on validation data."""

from __future__ import annotations

import numpy as np

from fedlth.models.layout import Params
from fedlth.tickets.scope import Scope
from fedlth.tickets.score import Score
from fedlth.training.local_client import LocalClient


def shrink(
    score: Score, scope: Scope, local: LocalClient, *, start: Params, now: Params, mask: np.ndarray, density: float
) -> np.ndarray:
    """Return the mask of exactly `density`, picked among what `mask` holds alive, by `score` at `now`."""
    evidence = local.evidence(start=start, now=now, mask=mask, density=density)
    return scope(score(evidence), mask, local.task.layout, density)


def passes(local: LocalClient, params: Params, gate: float) -> bool:
    """Say whether the study's metric on validation data exceeds a gate; one below zero is open."""
    return gate < 0 or local.val_score(params) > gate
