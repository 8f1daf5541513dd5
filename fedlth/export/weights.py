"""A ticket's weights as safetensors: dense under the model's own names, and packed, kept weights and a bitmap each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from fedlth.export.source import Source
from fedlth.export.written import Written, of_module, refilled
from fedlth.storage import ticket_file
from fedlth.storage.store import safetensors_bytes, write_atomic

DENSE, SPARSE, TICKET = "model.safetensors", "sparse.safetensors", "ticket.safetensors"


def dense(source: Source, folder: Path) -> Written:
    """Write a plain state dict, zeros included, for `load_state_dict(strict=True)`; beside it the packed form."""
    write_atomic(folder / DENSE, dense_bytes(source.module, source.metadata))
    packed(source, folder, SPARSE)
    again = refilled(source.module, load_file(folder / DENSE))
    stored = sum(tensor.numel() for tensor in source.module.parameters())
    return of_module(again, (DENSE, SPARSE), stored, "safetensors.torch.load_file and load_state_dict(strict=True)")


def dense_bytes(module: nn.Module, metadata: Mapping[str, str] | None = None) -> bytes:
    """Return a network's state dict as a file; a tensor of two names stands twice, as a strict load asks for both."""
    state = module.state_dict()
    arrays = {name: np.array(tensor.detach().numpy(), order="C") for name, tensor in state.items()}
    return safetensors_bytes(arrays, {**(metadata or {}), "format": "pt"})


def packed(source: Source, folder: Path, name: str = TICKET) -> Written:
    """Write what a run's compact tickets are, complete: also what nothing trains, and what describes the network."""
    layout, params = source.layout, source.params
    # A finder may leave other values than zero where a ticket has no weight: those are the network's too.
    held = source.mask | (params.floats[: source.mask.size] != 0)
    path = folder / name
    ticket_file.write_compact(path, layout, params, held, source.metadata)
    arrays = ticket_file.opened(*ticket_file.read(path))
    again = refilled(source.module, {n: torch.from_numpy(np.array(array)) for n, array in arrays.items()})
    stored = layout.num_params - held.size + int(np.count_nonzero(held))
    return of_module(again, (name,), stored, "numpy and safetensors: the reader in docs/export.md")
