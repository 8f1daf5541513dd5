"""What a model is worth on data, and where its loss would have it go: no weight moves here."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedlth.kernel import kernel
from fedlth.models.layout import Params
from fedlth.training import batch_requests
from fedlth.training.flat_model import FlatModel
from fedlth.training.loss import examined

EVALUATION_BATCH = 256


def evaluate(model: FlatModel, params: Params, data: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Return (accuracy, mean loss) of `params` on data; (0, 0) where there is none."""
    if not len(data[1]):
        return 0.0, 0.0
    x, y = data = examined(model.loss, *data)
    if model.table is not None and kernel.suits(model.table, params.floats):
        logits = torch.from_numpy(kernel.predict(model.table, params.floats, x.numpy()))
        return float((logits.argmax(-1) == y).double().mean()), float(model.loss(logits, y))
    if (found := batch_requests.evaluated(model, params, data)) is not None:
        return found
    with model.lock, torch.inference_mode():
        model.load(params)
        model.module.eval()
        x, right, loss_sum = model.forward.images(x), 0, 0.0
        for at in range(0, len(y), EVALUATION_BATCH):
            logits, target = model.forward.evaluate(x[at : at + EVALUATION_BATCH]), y[at : at + EVALUATION_BATCH]
            right += int((logits.argmax(-1) == target).sum())
            loss_sum += float(model.loss(logits, target)) * len(target)
    return right / y.numel(), loss_sum / len(y)


def gradient(model: FlatModel, params: Params, data: tuple[Tensor, Tensor]) -> np.ndarray:
    """Return (num_prunable,) float32: the gradient of the mean loss over all of `data`, in evaluation mode."""
    x, y = examined(model.loss, *data)
    x = model.forward.images(x)
    with model.lock:
        model.load(params)
        model.module.eval()
        model.grad.zero_()
        for at in range(0, len(y), EVALUATION_BATCH):
            target = y[at : at + EVALUATION_BATCH]
            logits = model.forward.evaluate(x[at : at + EVALUATION_BATCH])
            loss = model.loss(logits, target) * (len(target) / len(y))
            loss.backward()  # type: ignore[no-untyped-call]
        return model.in_order(model.grad[: model.layout.num_prunable])
