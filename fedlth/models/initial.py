"""A model's initial weights: as theta_0 draws them, drawn anew, or brought by the model itself."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from fedlth.data.factory import load_factory
from fedlth.data.ragged import Shape
from fedlth.errors import StudyError
from fedlth.models.layout import Entry, Layout, Params, layout_of, read
from fedlth.models.registry import build
from fedlth.models.seed import seed_torch


@contextmanager
def torch_stream(seed: int) -> Iterator[None]:
    """Seed torch's process-global generator inside, and put it back after."""
    with torch.random.fork_rng(devices=[]):
        seed_torch(seed)
        yield


def drawn(name: str, *, num_classes: int, input_shape: Shape, options: Mapping[str, object], seed: int) -> nn.Module:
    """Build a network from a stream of its own: what stands in no state dict is then equal in every process too."""
    load_factory(name)  # first: importing a user's model may draw from torch's generator, or seed it
    with torch_stream(seed):
        return build(name, num_classes=num_classes, input_shape=input_shape, options=options)


def redrawn(module: nn.Module, layout: Layout) -> Params:
    """Return another draw's weights.

    Raises StudyError where the module has other tensors than `layout`.
    """
    if layout_of(module, [e.name for e in layout.prunable]).digest("") != layout.digest(""):
        raise StudyError("model.reinit_options: must give a model of the same tensors, got others")
    return read(module, layout)


def brought(name: str, layout: Layout, theta_0: Params, second: Params) -> str:
    """Say which prunable tensors a second draw has in common with theta_0, "" where none.

    A tensor of one value everywhere (zeros of a residual branch) is an initialisation too, and counts as drawn.
    """
    same = [e.name for e in layout.prunable if _again(e, theta_0, second)]
    if not same:
        return ""
    shown = ", ".join(same[:3]) + (f" and {len(same) - 3} more" if len(same) > 3 else "")
    return f"model {name} brings its own weights: another draw gives {shown} of theta_0 again"


def fixed(layout: Layout, theta_0: Params, second: Params) -> tuple[Entry, ...]:
    """Return the parameters that another draw, `second`, gives again, and those that nothing trains."""
    params = (e for e in layout.floats if e.role == "param")
    return tuple(e for e in params if not e.trainable or _again(e, theta_0, second))


def _again(e: Entry, theta_0: Params, second: Params) -> bool:
    one, other = theta_0.floats[e.slice], second.floats[e.slice]
    return np.array_equal(one, other) and bool(np.ptp(other) > 0)


def digest_of(entries: Iterable[Entry], params: Params) -> str:
    """Return the hex blake2b-128 of the names and the exact bits of some float tensors of a model."""
    state = hashlib.blake2b(digest_size=16)
    for e in entries:
        state.update(f"{e.name} {e.shape} ".encode())
        state.update(np.ascontiguousarray(params.floats[e.slice], "<f4").data)
    return state.hexdigest()


def refuse(brought: str, place: str) -> None:
    """Raise StudyError naming the place where `brought` says that a model brings its weights."""
    if brought:
        raise StudyError(
            f"{place}: {brought}, so reinit would be no control; give the options with which the model draws them at "
            "random (such as pretrained: false) as model.reinit_options"
        )
