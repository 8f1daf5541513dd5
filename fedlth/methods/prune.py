"""What prunes of a federation share: the next mask among the survivors, the rewind, the gate on validation data."""

from __future__ import annotations

import numpy as np

from fedlth.models.layout import Params
from fedlth.tickets.scope import Scope
from fedlth.tickets.score import Score
from fedlth.training.local_client import LocalClient
from fedlth.training.task import Task


def shrink(
    score: Score, scope: Scope, local: LocalClient, *, start: Params, now: Params, mask: np.ndarray, density: float
) -> np.ndarray:
    """Return the mask of exactly `density`, picked among what `mask` holds alive, by `score` at `now`."""
    evidence = local.evidence(start=start, now=now, mask=mask, density=density)
    return scope(score(evidence), mask, local.task.layout, density)


def passes(local: LocalClient, params: Params, gate: float) -> bool:
    """Say whether the study's metric on validation data exceeds a gate; one below zero is open."""
    return gate < 0 or local.val_score(params) > gate


def rewound(params: Params, task: Task, mask: np.ndarray) -> Params:
    """Return theta_0's parameters under `mask`; buffers are statistics of data, not weights, and stay."""
    floats, weights = params.floats.copy(), task.layout.num_params
    floats[:weights] = task.theta_0.floats[:weights]
    return Params(floats, params.ints).masked(mask)
