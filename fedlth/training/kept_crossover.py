"""Below which density a linear layer's kept weights beat torch's dense product here: measured layer by layer.

As kernel/crossover.py does it for a network that the kernel runs whole; of layers of one form, one is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedlth.data.examples import Examples
from fedlth.kernel.crossover import HALF, THIN, met
from fedlth.kernel.kept_matrix import KeptMatrix, Scratch
from fedlth.kernel.step_time import cpu_seconds, in_turns
from fedlth.training.flat_model import FlatModel
from fedlth.training.kept_layers import BELOW, KeptLinear, exchangeable

Form = tuple[int, int, int]  # outputs, inputs, positions
_REPEATS = 2


def kept_below(model: FlatModel, batch: Examples, cpu_s: float) -> dict[str, float]:
    """Return the density of each layer that may go over its kept weights, in about `cpu_s` CPU seconds.

    A layer that a batch does not pass has none. Uses the module, which must train on the CPU.
    """
    forms = _forms(model, batch)
    runs = dict[tuple[Form, str], Callable[[], float]]()
    for form in sorted(set(forms.values())):
        runs[form, "dense"] = _timer(form, None)
        runs[form, "half"], runs[form, "thin"] = _timer(form, HALF), _timer(form, THIN)
    best = in_turns(runs, cpu_s) if runs else {}
    below = {form: met(*(best[form, what] for what in ("dense", "half", "thin"))) for form in set(forms.values())}
    return {name: BELOW if (found := below[form]) is None else found for name, form in forms.items()}


def _forms(model: FlatModel, batch: Examples) -> dict[str, Form]:
    """Return the form of each layer that one forward pass goes through, by the name of its weights."""
    seen, hooks = dict[str, Form](), []
    for name, layer in exchangeable(model.module, model.layout).items():

        def look(_: nn.Module, given: tuple[Any, ...], name: str = name, layer: nn.Linear = layer) -> None:
            if given and isinstance(given[0], Tensor):
                seen[name] = layer.out_features, layer.in_features, given[0].numel() // layer.in_features

        hooks.append(layer.register_forward_pre_hook(look))
    try:
        with torch.no_grad():
            model.forward.train(model.forward.images(batch).x)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: form for name, form in seen.items() if form[2]}


def _timer(form: Form, density: float | None) -> Callable[[], float]:
    """Return what takes the CPU seconds of a layer's forward and backward pass; density None: as torch has it."""
    outputs, inputs, positions = form
    rng = np.random.Generator(np.random.PCG64(0))
    layer = nn.Linear(inputs, outputs)
    layer.weight.grad = torch.zeros_like(layer.weight)
    x = torch.from_numpy(rng.standard_normal((positions, inputs), np.float32)).requires_grad_()
    slope = torch.from_numpy(rng.standard_normal((positions, outputs), np.float32))
    if density is not None:
        vars(layer)["forward"] = KeptLinear(layer, KeptMatrix(rng.random((outputs, inputs)) < density, Scratch()))

    def step() -> None:
        for _ in range(_REPEATS):
            layer(x).backward(slope)

    return lambda: cpu_seconds(step) / _REPEATS
