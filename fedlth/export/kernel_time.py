"""What our own kernel, which skips zeros, takes for a pass of a ticket: the dense kernels of torch skip none."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from fedlth.data.examples import Inputs
from fedlth.export.agreement import MOST
from fedlth.export.source import Source
from fedlth.kernel import kernel
from fedlth.models.call import call


def kernel_pass(source: Source, x: Inputs) -> Callable[[], object] | str:
    """Return what runs a batch in the kernel, or why nothing does."""
    if not isinstance(x, Tensor):
        return "its inputs are several tensors"
    if source.task is None:
        return "it is measured where the ticket's run is"
    model = source.task.model
    table = model.table
    if isinstance(table, str):
        return table
    # The study's own layout: what is prunable by it, in its order; the ticket's values are the module's.
    tensors = dict(source.module.named_parameters(remove_duplicate=False)) | dict(source.module.named_buffers())
    floats = np.empty(model.layout.num_floats, np.float32)
    for e in model.layout.floats:
        floats[e.slice] = tensors[e.name].detach().numpy().reshape(-1)
    images = x.numpy()
    with kernel.told_of_compiling():
        found = kernel.predict(table, floats, images)
    wanted = call(source.module, x).detach().numpy()
    if not np.abs(found - wanted).max() <= MOST * max(1.0, float(np.abs(wanted).max())):
        return "it gives other outputs there"
    return lambda: kernel.predict(table, floats, images)
