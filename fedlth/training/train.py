"""Masked local training of one client: a request goes to the first backend that can run it."""

from __future__ import annotations

import math

import numpy as np

from fedlth.training import batch_requests, kernel_backend, torch_backend
from fedlth.training.flat_model import FlatModel
from fedlth.training.request import TrainingRequest, TrainingResult


def train(model: FlatModel, request: TrainingRequest) -> TrainingResult:
    """Do what a request asks; a loss or a weight that is not finite at the end raises FloatingPointError.

    Of a noisy training the weights alone decide, and the loss is not told: it is of the examples, and has no noise.
    """
    if not kernel_backend.obstacle(model, request):
        result = kernel_backend.train(model, request)
    elif not batch_requests.obstacle(request):
        result = batch_requests.train(model, request)
    else:
        result = torch_backend.train(model, request)
    noisy = request.recipe.dp is not None
    if not ((noisy or math.isfinite(result.loss)) and np.isfinite(result.params.floats).all()):
        told = "" if noisy else f": loss {result.loss}"
        raise FloatingPointError(f"training diverged{told} at learning rate {request.recipe.lr}")
    return result
