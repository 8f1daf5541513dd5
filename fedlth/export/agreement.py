"""Whether what was written computes what the ticket does, on the client's whole test part."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedlth.data.examples import Inputs
from fedlth.errors import StudyError

MOST = 1e-5  # that outputs may differ, relative to the largest where that is above 1
Forward = Callable[[Inputs], Tensor]  # a batch's inputs -> its outputs (N, ...)


def difference(wanted: Tensor, got: Tensor) -> float:
    """Return the largest difference of outputs, relative to the largest output where that is above 1."""
    if wanted.shape != got.shape:
        return float("inf")
    return float((wanted - got).abs().max() / wanted.abs().max().clamp(min=1))


@torch.inference_mode()
def agreement(place: str, ticket: Forward, export: Forward, batches: Sequence[Inputs], *, classes: bool) -> float:
    """Return the largest difference of outputs over batches; of `classes`, predictions must be equal too.

    Raises StudyError that names the place where they differ by more than 1e-5.
    """
    found = []
    for x in batches:
        wanted, got = ticket(x), export(x)
        found.append(difference(wanted, got))
        if not found[-1] <= MOST:
            raise StudyError(f"{place}: outputs must not differ from the ticket's by {MOST:g}, got {found[-1]:g}")
        if classes and not torch.equal(wanted.argmax(-1), got.argmax(-1)):
            raise StudyError(
                f"{place}: predictions must be the ticket's, got others where two outputs are as good as equal"
            )
    return max(found)
