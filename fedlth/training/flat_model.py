"""A module over one flat vector: what every training, evaluation and probe works on."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from fedlth.kernel.table import LayerTable
from fedlth.models.layout import Entry, Layout, Params
from fedlth.training.loss import Loss, cross_entropy
from fedlth.training.tuned import Tuned, as_written


class FlatModel:
    """A module whose parameters and float buffers are views into one flat tensor, so that a step is five calls.

    With a `table`, training and evaluation run in the compute kernel instead; with `tuned` they take its forwards of
    the module and its memory format; with `kept`, trainings inside a mask leave out the zeros of the layers that it
    names, each below the density that stands there. All are equal up to float32 rounding. `loss` is what evaluations
    and probes ask; a training has its recipe's. Of one FlatModel, the kernel's training and evaluation may run in many
    threads at once; training and evaluation in the module hold `lock`.
    """

    def __init__(
        self,
        module: nn.Module,
        layout: Layout,
        device: str,
        table: LayerTable | None = None,
        tuned: Tuned | None = None,
        loss: Loss = cross_entropy,
        kept: Mapping[str, float] | None = None,
    ) -> None:
        self.loss = loss
        self.kept = kept
        self.table = table
        self.module = module.to(device)
        self.forward = tuned or as_written(self.module)
        self.lock = threading.RLock()
        self.layout = layout
        self.device = device
        self.flat = torch.zeros(layout.num_floats, device=device)
        self.grad = torch.zeros(layout.num_params, device=device)
        named: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
        named.update(module.named_buffers(remove_duplicate=False))
        self.ints = [(e, named[e.name]) for e in layout.ints]
        self.buffers = {e.name: named[e.name] for e in layout.entries if e.role == "buffer"}
        for e in layout.floats:
            tensor = named[e.name]
            tensor.data = self._view(self.flat, e)
            if e.trainable or e.prunable:
                tensor.grad = self._view(self.grad, e)
        self.frozen = [named[e.name] for e in layout.prunable if not e.trainable]

    def _moved(self, e: Entry) -> bool:
        return self.forward.channels_last and e.role == "param" and len(e.shape) == 4

    def _view(self, flat: Tensor, e: Entry) -> Tensor:
        """Return an entry of a flat tensor in the module's memory format, as the entry's shape."""
        if not self._moved(e):
            return flat[e.slice].view(e.shape)
        outputs, inputs, height, width = e.shape
        return flat[e.slice].view(outputs, height, width, inputs).permute(0, 3, 1, 2)

    def arranged(self, values: np.ndarray) -> Tensor:
        """Return a prefix of the flat vector, given in the layout's order, in the order of the module's memory."""
        out = torch.from_numpy(values)
        if any(map(self._moved, self.layout.floats)):
            given, out = out, out.clone()
            for e in self.layout.floats:
                if self._moved(e) and e.slice.stop <= len(out):
                    self._view(out, e).copy_(given[e.slice].view(e.shape))
        return out.to(self.device)

    def in_memory_order(self, e: Entry, samples: Tensor) -> Tensor:
        """Return an entry's values of B examples, (B, *shape), as (B, size) in the order of the module's memory."""
        return (samples.permute(0, 1, 3, 4, 2) if self._moved(e) else samples).reshape(len(samples), -1)

    def in_order(self, values: Tensor) -> np.ndarray:
        """Return a copy of a prefix of a flat tensor in the layout's order: the inverse of `arranged`."""
        out: np.ndarray = values.cpu().numpy().copy()
        for e in self.layout.floats:
            if self._moved(e) and e.slice.stop <= len(out):
                out[e.slice] = self._view(values, e).cpu().numpy().reshape(-1)
        return out

    @contextmanager
    def all_differentiable(self) -> Iterator[None]:
        """Let prunable weights have a gradient that no training changes: a score of masks over them asks for it."""
        try:
            for tensor in self.frozen:
                tensor.requires_grad_(True)
            yield
        finally:
            for tensor in self.frozen:
                tensor.requires_grad_(False)

    def load(self, params: Params) -> None:
        self.flat.copy_(self.arranged(params.floats))
        for e, tensor in self.ints:
            tensor.copy_(torch.from_numpy(params.ints[e.slice].reshape(e.shape)))

    def save(self) -> Params:
        for name, tensor in self.buffers.items():
            if self.module.get_buffer(name) is not tensor:
                raise RuntimeError(f"model: buffer {name} was replaced; write into it in place: self.{name}.copy_(...)")
        ints = np.zeros(self.layout.num_ints, np.int64)
        for e, tensor in self.ints:
            ints[e.slice] = tensor.detach().cpu().reshape(-1).numpy()
        return Params(self.in_order(self.flat), ints)
