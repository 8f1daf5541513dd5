"""What a model is worth on data, and where its loss would have it go: no weight moves here."""

from __future__ import annotations

import numpy as np
import torch

from fedlth.data.examples import Examples
from fedlth.kernel import kernel
from fedlth.models.layout import Params
from fedlth.training import batch_requests
from fedlth.training.flat_model import FlatModel
from fedlth.training.loss import examined

EVALUATION_BATCH = 256


def evaluate(model: FlatModel, params: Params, data: Examples) -> tuple[float, float]:
    """Return (accuracy, mean loss) of `params` on data; (0, 0) where there is none."""
    if not len(data):
        return 0.0, 0.0
    data = examined(model.loss, data)
    y = data.y
    if model.table is not None and kernel.suits(model.table, params.floats):
        logits = torch.from_numpy(kernel.predict(model.table, params.floats, data.tensor.numpy()))
        return float((logits.argmax(-1) == y).double().mean()), float(model.loss(logits, y))
    if (found := batch_requests.evaluated(model, params, data)) is not None:
        return found
    with model.lock, torch.inference_mode():
        model.load(params)
        model.module.eval()
        data, right, loss_sum = model.forward.images(data), 0, 0.0
        for at in range(0, len(data), EVALUATION_BATCH):
            part = data.batch(slice(at, at + EVALUATION_BATCH))
            logits, target = model.forward.evaluate(part.x), part.y
            right += int((logits.argmax(-1) == target).sum())
            loss_sum += float(model.loss(logits, target)) * len(target)
    return right / y.numel(), loss_sum / len(y)


def gradient(model: FlatModel, params: Params, data: Examples) -> np.ndarray:
    """Return (num_prunable,) float32: the gradient of the mean loss over all of `data`, in evaluation mode."""
    data = model.forward.images(examined(model.loss, data))
    with model.lock:
        model.load(params)
        model.module.eval()
        model.grad.zero_()
        for at in range(0, len(data), EVALUATION_BATCH):
            part = data.batch(slice(at, at + EVALUATION_BATCH))
            loss = model.loss(model.forward.evaluate(part.x), part.y) * (len(part) / len(data))
            loss.backward()  # type: ignore[no-untyped-call]
        return model.in_order(model.grad[: model.layout.num_prunable])
