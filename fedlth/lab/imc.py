"""Spectral-gap one-shot pruning: our reconstruction of inertial manifold computing, not the paper's code or numbers.

Zhang et al. Validating the Lottery Ticket Hypothesis with Inertial Manifold Theory. NeurIPS 2021. Known from the paper:
a few SGD steps to an approximate minimum, the spectrum of the loss there, one cut at its gap, training of what is left.
Ours: where the gap may lie, and how directions become coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.func import hessian

from fedlth.data.examples import Examples
from fedlth.errors import StudyError
from fedlth.models.call import call_with
from fedlth.models.layout import Params
from fedlth.tickets.select import keep_top
from fedlth.training.flat_model import FlatModel

MOST_WEIGHTS = 2000


@dataclass(frozen=True, eq=False)
class Split:
    """Eigenvalues (d,), ascending, and the cut: `dropped` directions lie below the gap, d - dropped above it."""

    eigenvalues: np.ndarray
    dropped: int
    mask: np.ndarray

    @property
    def gap(self) -> float:
        return float(self.eigenvalues[self.dropped] - self.eigenvalues[self.dropped - 1])


def spectrum(model: FlatModel, at: Params, data: Examples) -> tuple[np.ndarray, np.ndarray]:
    """Return (eigenvalues ascending, eigenvectors in columns) of the loss's Hessian over the prunable weights.

    In float64 and in full, so only for small networks; raises StudyError beyond MOST_WEIGHTS.
    """
    layout, size = model.layout, model.layout.num_prunable
    if size > MOST_WEIGHTS:
        raise StudyError(f"imc: the full Hessian needs at most {MOST_WEIGHTS} prunable weights, got {size}")
    model.load(at)
    model.module.eval()
    x, y = data.tensor, data.y
    flat = torch.from_numpy(at.floats.astype(np.float64)).to(model.device)
    fixed = {e.name: flat[e.slice].view(e.shape) for e in layout.floats if not e.prunable}

    def loss(weights: Tensor) -> Tensor:
        named = {e.name: weights[e.slice].view(e.shape) for e in layout.prunable}
        return model.loss(call_with(model.module, {**fixed, **named}, x.double()), y)

    matrix: Tensor = hessian(loss)(flat[:size])
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return values.cpu().numpy(), vectors.cpu().numpy()


def split(
    eigenvalues: np.ndarray, eigenvectors: np.ndarray, weights: np.ndarray, *, least: float = 0.1, most: float = 0.9
) -> Split:
    """Cut at the largest gap that leaves a share between `least` and `most`, and turn directions into coordinates.

    A coordinate's worth is its mass in the directions above the gap, weighted by their curvature, times its weight
    squared: what the loss loses to second order, counting those directions only, when the weight goes. Without the
    limits the largest gap of a classifier's Hessian parts its few outliers from the rest.
    """
    size = eigenvalues.size
    gaps = np.diff(eigenvalues)
    low, high = max(1, round((1 - most) * size)), min(size - 1, round((1 - least) * size))
    dropped = low + int(np.argmax(gaps[low - 1 : high]))
    above = np.maximum(eigenvalues[dropped:], 0.0)
    worth = (eigenvectors[:, dropped:] ** 2 * above).sum(axis=1) * weights.astype(np.float64) ** 2
    return Split(eigenvalues, dropped, keep_top(worth, np.ones(size, bool), size - dropped))
