"""Attacks on inputs within an L-infinity ball, in pixels of [0, 1]: FGSM and PGD.

Goodfellow et al., Explaining and Harnessing Adversarial Examples, ICLR 2015, arXiv 1412.6572; Madry et al., Towards
Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018, arXiv 1706.06083.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedlth.data.dataset import Dataset
from fedlth.data.examples import Examples
from fedlth.models.call import call
from fedlth.models.layout import Params
from fedlth.training.flat_model import FlatModel


def scale_of(dataset: Dataset) -> tuple[Tensor, Tensor]:
    """Return (mean, std), (C, 1, 1) each: a pixel p in [0, 1] is given to the network as (p - mean) / std."""
    shape = dataset.input_shape
    assert not isinstance(shape, dict)
    channels = shape[0]
    mean = torch.tensor(dataset.mean or (0.0,) * channels).reshape(-1, 1, 1)
    return mean, torch.tensor(dataset.std or (1.0,) * channels).reshape(-1, 1, 1)


def attacked(
    model: FlatModel, dataset: Dataset, x: Tensor, y: Tensor, *, kind: str, eps: float, steps: int
) -> Tensor:  # fmt: skip
    """Return x (n, C, H, W), scaled as `dataset` is, moved within eps so that the loss of the model as it stands grows.

    "fgsm": one step of eps. "pgd": `steps` steps of eps / 4 from x itself, each cut back to the ball; the last step's
    image counts. Pixels stay in [0, 1]. The module is left in evaluation mode, its gradients as they were.
    """
    if eps == 0:
        return x
    mean, std = scale_of(dataset)
    lowest, highest = (0.0 - mean) / std, (1.0 - mean) / std
    model.module.eval()
    size = eps if kind == "fgsm" else eps / 4
    moved = x
    for _ in range(1 if kind == "fgsm" else steps):
        probe = moved.detach().requires_grad_()
        (grad,) = torch.autograd.grad(model.loss(call(model.module, probe), y), probe)
        moved = moved + size / std * grad.sign()
        moved = torch.maximum(torch.minimum(moved, x + eps / std), x - eps / std)
        moved = torch.maximum(torch.minimum(moved, highest), lowest)
    return moved.detach()


def evaluate_attacked(
    model: FlatModel,
    dataset: Dataset,
    params: Params,
    data: Examples,
    *,
    kind: str,
    eps: float,
    steps: int = 10,
    crafted_on: Params | None = None,
) -> tuple[float, float]:
    """Return (accuracy, mean loss) of `params` on attacked data; the attack sees `crafted_on`, or `params` itself."""
    x, y = data.tensor, data.y
    right, total = 0, 0.0
    for at in range(0, len(y), 500):
        part, labels = x[at : at + 500], y[at : at + 500]
        model.load(params if crafted_on is None else crafted_on)
        part = attacked(model, dataset, part, labels, kind=kind, eps=eps, steps=steps)
        model.load(params)
        model.module.eval()
        with torch.inference_mode():
            logits = call(model.module, part)
            right += int((logits.argmax(-1) == labels).sum())
            total += float(model.loss(logits, labels)) * len(labels)
    return right / len(y), total / len(y)
