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

    from fedlth.methods.state import ClientState
    from fedlth.params import Layout, Params


def save(folder: Path, form: str, layout: Layout, state: ClientState, meta: Mapping[str, Any]) -> str:
    """Write the ticket in a client's state as `form` says (a study's `tickets`); return its digest."""
    from fedlth.params import Params  # a report reads tickets without torch

    path = folder / f"client-{int(meta['client']):04d}.safetensors"
    mask, values, ints = state.masks["ticket"], state.vectors["ticket"], state.vectors["ticket_ints"]
    if form != "dense":
        return _write_compact(path if form == "compact" else None, layout, mask, values, ints, meta)
    floats, kept = np.zeros(layout.num_floats, np.float32), int(np.count_nonzero(mask))
    floats[: mask.size][mask] = values[:kept]
    floats[mask.size :] = values[kept:]
    if "ticket_dead" in state.vectors:
        floats[: mask.size][~mask] = state.vectors["ticket_dead"]
    return write(path, layout, Params(floats, ints), mask, meta)


def _write_compact(
    path: Path | None, layout: Layout, mask: np.ndarray, values: np.ndarray, ints: np.ndarray, meta: Mapping[str, Any]
) -> str:
    """Write "<name>" as the kept values alone (kept,) and "<name>_mask" as packed bits; tied tensors stand once.

    The digest is blake2b-64 of the bits of mask, `values` (kept, then all other floats) and whole numbers.
    """
    bits = np.packbits(mask).tobytes() + values.tobytes() + ints.tobytes()
    digest = hashlib.blake2b(bits, digest_size=8).hexdigest()
    if path is None:
        return digest
    arrays: dict[str, np.ndarray] = {}
    rest = values.size - layout.num_floats
    at = 0
    for e in layout.entries:
        if e.prunable:
            own = mask[e.slice]
            kept = int(np.count_nonzero(own))
            held, at = values[at : at + kept], at + kept
            arrays[f"{e.name}_mask"] = np.packbits(own)
        else:
            held = ints[e.slice] if e.is_int else values[e.offset + rest : e.offset + rest + e.size]
            held = held.reshape(e.shape)
        arrays[e.name] = np.ascontiguousarray(held)
    _write(path, layout, arrays, mask, meta, "fedlth-ticket-compact-1", digest)
    return digest


def write(path: Path, layout: Layout, params: Params, mask: np.ndarray, meta: Mapping[str, Any]) -> str:
    """Write dense masked weights and buffers by name, "<name>_mask" as packed bits, and metadata; return its digest.

    Integer and bool buffers are written as int64. The digest is blake2b-64 of the bits of mask, weights and buffers.
    """
    arrays: dict[str, np.ndarray] = {}
    for e in layout.entries:
        for name in (e.name, *e.aliases):
            values = (params.ints if e.is_int else params.floats)[e.slice]
            arrays[name] = np.ascontiguousarray(values.reshape(e.shape))
        if e.prunable:
            arrays[f"{e.name}_mask"] = np.packbits(mask[e.slice])
    bits = np.packbits(mask).tobytes() + params.floats.tobytes() + params.ints.tobytes()
    digest = hashlib.blake2b(bits, digest_size=8).hexdigest()
    _write(path, layout, arrays, mask, meta, "fedlth-ticket-1", digest)
    return digest


def _write(
    path: Path, layout: Layout, arrays: Mapping[str, np.ndarray], mask: np.ndarray, meta: Mapping[str, Any],
    form: str, digest: str,
) -> None:  # fmt: skip
    told = {k: str(v) for k, v in meta.items()}
    told |= {
        "format": form,
        "density": repr(float(mask.mean())),
        "tied": json.dumps({alias: e.name for e in layout.entries for alias in e.aliases}),
        "shapes": json.dumps({name: list(e.shape) for e in layout.entries for name in (e.name, *e.aliases)}),
        "ticket": digest,
    }
    write_atomic(path, safetensors_bytes(arrays, told))


def opened(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Return a ticket's tensors by name in their full shapes, masks left out, whichever form the file has."""
    if metadata.get("format") != "fedlth-ticket-compact-1":
        return {name: a for name, a in arrays.items() if not _is_mask(name, arrays)}
    found = {}
    masks = {name.removesuffix("_mask"): a for name, a in arrays.items() if _is_mask(name, arrays)}
    tied = json.loads(metadata["tied"])
    for name, shape in json.loads(metadata["shapes"]).items():
        own = tied.get(name, name)
        whole = arrays[own]
        if own in masks:
            mask = np.unpackbits(masks[own], count=int(np.prod(shape, dtype=np.int64))).astype(bool)
            whole = np.zeros(mask.size, np.float32)
            whole[mask] = arrays[own]
        found[name] = whole.reshape(shape)
    return found


def _is_mask(name: str, arrays: Mapping[str, np.ndarray]) -> bool:
    return name.endswith("_mask") and name.removesuffix("_mask") in arrays


def load_ticket(run: str | Path, client: int) -> nn.Module:
    """Return a client's own model from a finished run, in evaluation mode.

    Raises StudyError where the run kept no ticket for this client.
    """
    import torch
    from safetensors import safe_open

    from fedlth.runfolder import RunFolder
    from fedlth.world import open_world

    path = Path(run) / "tickets" / f"client-{client:04d}.safetensors"
    if not path.is_file():
        raise StudyError(f"{path}: no ticket of client {client} in this run")
    with safe_open(path, framework="numpy") as file:
        arrays = opened({name: file.get_tensor(name) for name in file.keys()}, file.metadata())  # noqa: SIM118
    module = open_world(RunFolder(Path(run)).study().science()).module()
    wanted = module.state_dict().keys()
    state = {k: torch.from_numpy(v) for k, v in arrays.items() if k in wanted}
    module.load_state_dict(state, strict=False)
    return module.eval()
