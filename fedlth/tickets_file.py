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

    from fedlth.params import Layout, Params


def write(path: Path, layout: Layout, params: Params, mask: np.ndarray, meta: Mapping[str, Any]) -> str:
    """Write dense masked weights and buffers by name, "<name>_mask" as packed bits, and metadata; return its digest.

    Integer and bool buffers are written as int64. The digest is blake2b-64 of the bits of mask, weights and buffers.
    """
    arrays: dict[str, np.ndarray] = {}
    shapes: dict[str, list[int]] = {}
    for e in layout.entries:
        for name in (e.name, *e.aliases):
            values = (params.ints if e.is_int else params.floats)[e.slice]
            arrays[name] = np.ascontiguousarray(values.reshape(e.shape))
            shapes[name] = list(e.shape)
        if e.prunable:
            arrays[f"{e.name}_mask"] = np.packbits(mask[e.slice])
    bits = np.packbits(mask).tobytes() + params.floats.tobytes() + params.ints.tobytes()
    digest = hashlib.blake2b(bits, digest_size=8).hexdigest()
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
