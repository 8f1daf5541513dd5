"""What a model is worth on data, and where its loss would have it go: no weight moves here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fedlth.data.examples import Examples
from fedlth.kernel import kernel
from fedlth.models.layout import Params
from fedlth.training import batch_requests
from fedlth.training.flat_model import FlatModel
from fedlth.training.loss import examined
from fedlth.training.metrics import METRICS, Metric, Scores, counted, rows, scored

EVALUATION_BATCH = 256
ACCURACY = (METRICS["accuracy"],)


def evaluate(model: FlatModel, params: Params, data: Examples, metrics: tuple[Metric, ...] = ACCURACY) -> Scores:
    """Return the mean loss of `params` on data (over examples, or all positions with a class), and each metric's value.

    All are 0 where there are no data. Raises ValueError where a user's metric is not finite, and where no example has a
    target that counts.
    """
    if not len(data):
        return Scores(0.0, dict.fromkeys((m.name for m in metrics), 0.0))
    data = examined(model.loss, data)
    if not int(counted(data.y).sum()):
        raise ValueError(f"none of the {len(data)} examples to evaluate on has a target that counts")
    if model.table is not None and kernel.suits(model.table, params.floats):
        logits = torch.from_numpy(kernel.predict(model.table, params.floats, data.tensor.numpy()))
        states = {m: m.add(None, *rows(logits, data.y)) for m in metrics}
        return scored(states, float(model.loss(logits, data.y)))
    if (found := batch_requests.evaluated(model, params, data, metrics)) is not None:
        return found
    with model.lock, torch.inference_mode():
        model.load(params)
        model.module.eval()
        data, loss_sum, states = model.forward.images(data), 0.0, dict.fromkeys(metrics)
        for places in _batches(data):
            part = data.batch(places)
            outputs = model.forward.evaluate(part.x)
            told = rows(outputs, part.y)
            states = {m: m.add(state, *told) for m, state in states.items()}
            loss_sum += float(model.loss(outputs, part.y)) * int(counted(part.y).sum())
    return scored(states, loss_sum / int(counted(data.y).sum()))


def _batches(data: Examples) -> Sequence[torch.Tensor | slice]:
    """Return the positions of each batch: ragged examples by length, since padding costs what a text does."""
    parts = [slice(at, at + EVALUATION_BATCH) for at in range(0, len(data), EVALUATION_BATCH)]
    if data.longest is None:
        return parts
    order = torch.from_numpy(np.argsort(data.longest, kind="stable")).to(data.y.device)
    return [order[part] for part in parts]


def gradient(model: FlatModel, params: Params, data: Examples) -> np.ndarray:
    """Return (num_prunable,) float32: the gradient of the mean loss over all of `data`, in evaluation mode."""
    data = model.forward.images(examined(model.loss, data))
    with model.lock, model.all_differentiable():
        model.load(params)
        model.module.eval()
        model.grad.zero_()
        total = int(counted(data.y).sum())
        for places in _batches(data):
            part = data.batch(places)
            loss = model.loss(model.forward.evaluate(part.x), part.y) * (int(counted(part.y).sum()) / total)
            loss.backward()  # type: ignore[no-untyped-call]
        return model.in_order(model.grad[: model.layout.num_prunable])
