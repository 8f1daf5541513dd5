"""A ticket on disk: plain safetensors that anyone opens without fedlth, and three lines to predict with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlth.errors import StudyError
from fedlth.store import safetensors_bytes, write_atomic

if TYPE_CHECKING:
    from torch import nn

    from fedlth.params import Layout


def write(path: Path, layout: Layout, floats: np.ndarray, mask: np.ndarray, meta: Mapping[str, Any]) -> str:
    """Write dense masked weights by name, "<name>_mask" as packed bits, and metadata; return the ticket's digest.

    The digest is blake2b-64 of the mask's bits and the weights' bits.
    """
    arrays: dict[str, np.ndarray] = {}
    shapes: dict[str, list[int]] = {}
    for e in layout.floats:
        for name in (e.name, *e.aliases):
            arrays[name] = np.ascontiguousarray(floats[e.slice].reshape(e.shape))
            shapes[name] = list(e.shape)
        if e.prunable:
            arrays[f"{e.name}_mask"] = np.packbits(mask[e.slice])
    digest = hashlib.blake2b(np.packbits(mask).tobytes() + floats.tobytes(), digest_size=8).hexdigest()
    told = {k: str(v) for k, v in meta.items()}
    told |= {
        "format": "fedlth-ticket-1",
        "density": repr(float(mask.mean())),
        "shapes": json.dumps(shapes),
        "ticket": digest,
    }
    write_atomic(path, safetensors_bytes(arrays, told))
    return digest


def load_ticket(run: str | Path, client: int) -> nn.Module:
    """Return a client's own model from a finished run, in evaluation mode.

    Raises StudyError where the run kept no ticket for this client.
    """
    from safetensors.torch import load_file

    from fedlth.runfolder import RunFolder
    from fedlth.world import open_world

    path = Path(run) / "tickets" / f"client-{client:04d}.safetensors"
    if not path.is_file():
        raise StudyError(f"{path}: no ticket of client {client} in this run")
    module = open_world(RunFolder(Path(run)).study().science()).module()
    wanted = module.state_dict().keys()
    state = {k: v for k, v in load_file(path).items() if k in wanted}
    module.load_state_dict(state, strict=False)
    return module.eval()
