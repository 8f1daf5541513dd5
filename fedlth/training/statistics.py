"""The running statistics of norm layers, taken anew on data: what adaptive batch normalisation is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from fedlth.data.examples import Examples
from fedlth.models.call import call
from fedlth.models.layout import Params
from fedlth.training.flat_model import FlatModel


def has_any(model: FlatModel) -> bool:
    """Say whether a norm of the module has running statistics."""
    return bool(_norms(model.module))


def normalised(model: FlatModel, params: Params, data: Examples, batches: Sequence[np.ndarray]) -> Params:
    """Return params whose running statistics are the plain mean over these batches; no weight moves.

    All else is in evaluation mode: no dropout is drawn.
    """
    norms = _norms(model.module)
    with model.lock, torch.no_grad():
        model.load(params)
        model.module.eval()
        momenta = [norm.momentum for norm in norms]
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a cumulative mean
                norm.train()
            for part in batches:
                call(model.module, data.batch(torch.from_numpy(part)).x)
            return model.save()
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
            model.module.eval()


def _norms(module: nn.Module) -> list[nn.modules.batchnorm._NormBase]:
    found = (m for m in module.modules() if isinstance(m, nn.modules.batchnorm._NormBase))
    return [m for m in found if m.track_running_stats and m.running_mean is not None]
