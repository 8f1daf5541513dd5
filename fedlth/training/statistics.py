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

REFUSED = (
    "model: {layer} has running statistics that are no torch norm's, so that they cannot be taken anew, and {what} has "
    "no others; GroupNorm needs none"
)


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
            for count, part in enumerate(batches, 1):
                for norm in norms:
                    if isinstance(norm, nn.modules.instancenorm._InstanceNorm):  # which counts no batches
                        norm.momentum = 1 / count
                call(model.module, data.batch(torch.from_numpy(part)).x)
            return model.save()
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
            model.module.eval()


def unknown(module: nn.Module) -> str:
    """Name the first module with running statistics that are not taken as torch's norms take them; "" for none."""
    known = _norms(module)
    for name, one in module.named_modules():
        buffers = {own for own, _ in one.named_buffers(recurse=False)}
        if buffers & {"running_mean", "running_var"} and not any(one is norm for norm in known):
            return f"{name or 'the model'} ({type(one).__name__})"
    return ""


def _norms(module: nn.Module) -> list[nn.modules.batchnorm._NormBase]:
    found = (m for m in module.modules() if isinstance(m, nn.modules.batchnorm._NormBase))
    return [m for m in found if m.track_running_stats and m.running_mean is not None]
