"""Masked local training of one client: a request goes to the first backend that can run it."""

from __future__ import annotations

import math

import numpy as np

from fedlth.training import batch_requests, kernel_backend, torch_backend
from fedlth.training.flat_model import FlatModel
from fedlth.training.request import TrainingRequest, TrainingResult


def train(model: FlatModel, request: TrainingRequest) -> TrainingResult:
    """Do what a request asks; a loss or a weight that is not finite at the end raises FloatingPointError."""
    if not kernel_backend.obstacle(model, request):
        result = kernel_backend.train(model, request)
    elif not batch_requests.obstacle(request):
        result = batch_requests.train(model, request)
    else:
        result = torch_backend.train(model, request)
    if not (math.isfinite(result.loss) and np.isfinite(result.params.floats).all()):
        raise FloatingPointError(f"training diverged: loss {result.loss} at learning rate {request.recipe.lr}")
    return result
