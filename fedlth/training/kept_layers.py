"""Linear layers and convolutions that go over their kept weights alone while a torch module trains inside a ticket.

What the kernel cannot train whole (a transformer, BatchNorm, a loop) has layers all the same whose zeros can be left
out: each gets a forward in the kernel's loops for the time of one training, as far as its ticket is thin enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from fedlth.errors import StudyError
from fedlth.kernel import kernel
from fedlth.kernel.kept_matrix import KeptMatrix, Scratch
from fedlth.models.layout import Entry, Layout
from fedlth.study.compute_section import Crossovers
from fedlth.training.flat_model import FlatModel
from fedlth.training.kept_forward import KeptForward, Layer, form_of, in_memory, kept_forward

BELOW = 0.25  # of a layer's weights kept: fewer, and their list beats the dense layer where nothing was measured


def lists_below(module: nn.Module, layout: Layout, measured: Crossovers | None, why: str) -> dict[str, float]:
    """Return the density below which each layer goes over its kept weights, by the name of its weights.

    Loads what is compiled for it. Raises StudyError where no layer can; why: what keeps the kernel from the network.
    """
    place = next(module.parameters()).device.type
    lacks = kernel.available() or ("" if place == "cpu" else f"the device is {place}")
    names = exchangeable(module, layout)
    if lacks or not names:
        none = f"; {lacks or 'and it has no plain linear layer or convolution to train by its kept weights alone'}"
        more = "" if lacks == why else none
        raise StudyError(f"compute: must be tuned or reference for this study, the kernel cannot run it: {why}{more}")
    KeptMatrix(np.ones((1, 1), bool), Scratch()).warm()
    if measured is None:
        return dict.fromkeys(names, BELOW)
    return {name: below for name, below in measured.sparse_below.items() if name in names}


def said(below: Mapping[str, float] | None) -> list[str]:
    """Say which layers go over their kept weights inside a ticket, and below which density."""
    layers = dict[float, list[str]]()
    for name, density in (below or {}).items():
        if density > 0:
            layers.setdefault(density, []).append(name)
    lines = [
        f"    below density {density:g}: {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}"
        for density, names in sorted(layers.items(), reverse=True)
    ]
    return ["  in torch, inside a ticket, these layers go over their kept weights alone:", *lines] if lines else []


def exchangeable(module: nn.Module, layout: Layout) -> dict[str, Layer]:
    """Return the layers that may go over their kept weights, by the name of their weights.

    A layer with a hook, of a subclass, or whose weights another one has too computes what a list would not.
    """
    layers = {f"{name}.weight" if name else "weight": layer for name, layer in module.named_modules()}
    found = {e.name: layers.get(e.name) for e in layout.prunable if not e.aliases}
    return {
        name: layer for name, layer in found.items()
        if isinstance(layer, Layer) and form_of(layer) is not None and _plain(layer)
    }  # fmt: skip


def _plain(layer: Layer) -> bool:
    hooks = (
        layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks,
        layer.weight._backward_hooks, getattr(layer.weight, "_post_accumulate_grad_hooks", None),
    )  # fmt: skip
    return not any(hooks) and "forward" not in vars(layer) and layer.weight.dtype == torch.float32


class Exchange:
    """The layers that go over their kept weights in one training, and the gradients of these weights.

    places (K,) int64: where the kept weights of those of them that are trained lie in the model's memory. slopes (K,):
    their gradients of a step. whole: each of these weights may move. others: the gradients of all other parameters.
    """

    def __init__(self, model: FlatModel, layers: Mapping[Entry, KeptForward], free: np.ndarray | None) -> None:
        for e, one in layers.items():
            one.trained = free is None or bool(free[e.slice].any())
        self.grad, self.all = model.grad, list(layers.values())
        self.dense = [one.layer.weight.grad for one in self.all]
        self.trained = [one for one in self.all if one.trained]
        listed = [e.offset + one.matrix.kept.astype(np.int64) for e, one in layers.items() if one.trained]
        self.places = torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *listed]))
        self.whole = free is None or bool(model.arranged(free)[self.places].all())
        self.apart = False
        self._leave(torch.zeros(len(self.places)))
        trained, ends = model.layout.trained, [e.slice for e in layers]
        starts = [trained.start, *(one.stop for one in ends)]
        stops = [*(one.start for one in ends), trained.stop]
        self.others = [model.grad[a:b] for a, b in zip(starts, stops, strict=True) if a < b]

    def leave_in(self, slopes: Tensor, weights: Tensor) -> None:
        """Let the gradients be left in `slopes` (K,) alone, and in `weights` the kept weights as a pass saw them."""
        self.apart, at = True, 0
        self._leave(slopes)
        for one in self.trained:
            one.matrix.w = weights[at : at + len(one.slopes)].numpy()
            at += len(one.slopes)

    def _leave(self, slopes: Tensor) -> None:
        self.slopes, at = slopes, 0
        for one in self.trained:
            one.slopes = slopes[at : at + len(one.slopes)].numpy()
            at += len(one.slopes)

    def begin(self) -> None:
        """Begin a step with gradients of zero."""
        for one in (self.slopes, *self.others):
            one.zero_()

    def end(self) -> None:
        """Add what torch has found for these weights itself, where a module uses them beside the layer's forward.

        The gradients then go to their places among those of all parameters, unless they are wanted apart.
        """
        for one in self.all:
            found, one.layer.weight.grad = one.layer.weight.grad, None
            if found is not None and one.trained:
                like = torch.empty_like(one.layer.weight).copy_(found)
                one.slopes += in_memory(like).numpy()[one.matrix.kept]
        if not self.apart:
            self.grad.index_copy_(0, self.places, self.slopes)


@contextmanager
def exchanged(
    model: FlatModel, below: Mapping[str, float], active: np.ndarray, free: np.ndarray | None
) -> Iterator[Exchange]:
    """Let the layers that a mask leaves thin enough go over their kept weights.

    below: the density of each layer that may, by the name of its weights. active (num_prunable,) bool: those outside
    are zero, and get no gradient. free (num_params,) bool: what moves, None for all.
    """
    scratch, found = Scratch(), dict[Entry, KeptForward]()
    layers = exchangeable(model.module, model.layout)
    for e in model.layout.prunable:
        layer, mask = layers.get(e.name), active[e.slice]
        if layer is not None and np.count_nonzero(mask) < below.get(e.name, 0.0) * e.size:
            found[e] = kept_forward(layer, mask.reshape(e.shape), scratch)
    exchange = Exchange(model, found, free)
    try:
        model.grad.zero_()
        for one in exchange.all:
            one.layer.weight.grad, vars(one.layer)["forward"] = None, one
        yield exchange
    finally:
        for one, dense in zip(exchange.all, exchange.dense, strict=True):
            vars(one.layer).pop("forward", None)
            one.layer.weight.grad = dense
