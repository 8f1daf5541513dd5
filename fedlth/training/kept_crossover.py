"""Below which density a layer's kept weights beat torch's dense product here: measured layer by layer.

As kernel/crossover.py does it for a network that the kernel runs whole; of layers of one form, one is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedlth.data.examples import Examples
from fedlth.kernel.crossover import HALF, THIN, met
from fedlth.kernel.kept_form import LINEAR, Convolution
from fedlth.kernel.kept_matrix import Scratch
from fedlth.kernel.step_time import cpu_seconds, in_turns
from fedlth.training.flat_model import FlatModel
from fedlth.training.kept_forward import Layer, form_of, kept_forward
from fedlth.training.kept_layers import BELOW, exchangeable

_REPEATS = 2


@dataclass(frozen=True)
class Form:
    """A layer and its input in a step, (positions, inputs) or (N, C, height, width)."""

    weight: tuple[int, ...]
    layer: Convolution
    input: tuple[int, ...]
    channels_last: bool


def kept_below(model: FlatModel, batch: Examples, cpu_s: float) -> dict[str, float]:
    """Return the density of each layer that may go over its kept weights, in about `cpu_s` CPU seconds.

    A layer that a batch does not pass has none. Uses the module, which must train on the CPU.
    """
    forms = forms_of(model, batch)
    runs = dict[tuple[Form, str], Callable[[], float]]()
    for form in sorted(set(forms.values()), key=repr):
        runs[form, "dense"] = timer(form, None)
        runs[form, "half"], runs[form, "thin"] = timer(form, HALF), timer(form, THIN)
    best = in_turns(runs, cpu_s) if runs else {}
    below = {form: met(*(best[form, what] for what in ("dense", "half", "thin"))) for form in set(forms.values())}
    return {name: BELOW if (found := below[form]) is None else found for name, form in forms.items()}


def forms_of(model: FlatModel, batch: Examples) -> dict[str, Form]:
    """Return the form of each layer that one forward pass goes through, by the name of its weights."""
    seen, hooks = dict[str, Form](), []
    for name, layer in exchangeable(model.module, model.layout).items():

        def look(_: nn.Module, given: tuple[Any, ...], name: str = name, layer: Layer = layer) -> None:
            if given and isinstance(given[0], Tensor) and given[0].numel():
                seen[name] = _form(layer, given[0])

        hooks.append(layer.register_forward_pre_hook(look))
    try:
        with torch.no_grad():
            model.forward.train(model.forward.images(batch).x)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _form(layer: Layer, x: Tensor) -> Form:
    found = form_of(layer)
    assert found is not None
    linear = isinstance(layer, nn.Linear)
    shape = (x.numel() // x.shape[-1], x.shape[-1]) if linear else tuple(x.shape)
    last = not linear and not (layer.weight.is_contiguous() and x.is_contiguous())
    return Form(tuple(layer.weight.shape), found, shape, last)


def timer(form: Form, density: float | None) -> Callable[[], float]:
    """Return what takes the CPU seconds of a layer's forward and backward pass; density None: as torch has it."""
    rng = np.random.Generator(np.random.PCG64(0))
    layer, x = _layer(form), torch.from_numpy(rng.standard_normal(form.input, np.float32))
    if form.channels_last:
        layer, x = layer.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)  # type: ignore[call-overload]
    layer.weight.grad = torch.zeros_like(layer.weight)
    slope = torch.ones_like(layer(x)).normal_()
    x.requires_grad_()
    if density is not None:
        layer.weight.grad = None
        vars(layer)["forward"] = kept_forward(layer, rng.random(form.weight) < density, Scratch())

    def step() -> None:
        for _ in range(_REPEATS):
            layer(x).backward(slope)

    return lambda: cpu_seconds(step) / _REPEATS


def _layer(form: Form) -> Layer:
    """Return a layer of a form with random weights."""
    outputs, inputs, *_ = form.weight
    one = form.layer
    if one == LINEAR and len(form.weight) == 2:
        return nn.Linear(inputs, outputs)
    return nn.Conv2d(
        inputs * one.groups, outputs, one.window, stride=one.stride, padding=one.padding, dilation=one.dilation,
        groups=one.groups,
    )  # fmt: skip
