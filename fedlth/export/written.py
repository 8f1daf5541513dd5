"""What a form of export wrote, as it is checked and measured: read again from its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedlth.data.examples import Inputs
from fedlth.export.agreement import Forward
from fedlth.export.measure import memory_bytes
from fedlth.models.call import call
from fedlth.models.flops import layer_flops


@dataclass(frozen=True, eq=False)
class Written:
    """`forward` runs what was read again. `files`: names in the folder, the measured one first.

    `stored`: how many numbers of parameters the files hold. `opens` says what opens them, `layers` what a smaller
    network has left of each. `memory` of a pass in bytes, `flops` of one an example, both on a batch's inputs.
    """

    forward: Forward
    files: tuple[str, ...]
    stored: int
    opens: str
    memory: Callable[[Inputs], int]
    flops: Callable[[Inputs], int]
    layers: Mapping[str, str] = field(default_factory=dict)


def of_module(
    module: nn.Module, files: tuple[str, ...], stored: int, opens: str, layers: Mapping[str, str] | None = None
) -> Written:
    """Return what was written where it is a torch module again."""
    return Written(
        lambda x: call(module, x), files, stored, opens, lambda x: memory_bytes(module, x),
        lambda x: layer_flops(module, x)[1], layers or {},
    )  # fmt: skip


def refilled(module: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of a network with the tensors of `state`, which must be exactly its own."""
    again = deepcopy(module)
    with torch.no_grad():
        for tensor in again.state_dict().values():
            tensor.zero_()  # nothing of the ticket is left that `state` does not bring
    again.load_state_dict(dict(state), strict=True)
    return again.eval()
