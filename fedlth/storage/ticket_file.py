"""A ticket on disk: plain safetensors that anyone opens without fedlth."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlth.errors import StudyError
from fedlth.storage.store import content_digest, safetensors_bytes, write_atomic

if TYPE_CHECKING:
    from fedlth.models.layout import Layout, Params


def path_of(folder: Path, client: int) -> Path:
    """Return where a client's ticket lies."""
    return folder / f"client-{client:04d}.safetensors"


def save(
    folder: Path, form: str, layout: Layout, params: Params, mask: np.ndarray, meta: Mapping[str, Any], *,
    frozen: Mapping[str, str] | None = None,
) -> str:  # fmt: skip
    """Write one client's ticket as `form` says (a study's `tickets`); return its digest.

    `frozen` names what nothing trains where the model's own code gives it: a compact file then has that in place of
    the values.
    """
    path = path_of(folder, int(meta["client"]))
    if form == "dense":
        return write(path, layout, params, mask, meta)
    if frozen:
        left_out = set(json.loads(frozen["frozen"]))
        part = layout.select(lambda e: e.name not in left_out)
        layout, params, meta = part, part.part_of(params, layout), {**meta, **frozen}
    return write_compact(path if form == "compact" else None, layout, params, mask, meta)


def write_compact(path: Path | None, layout: Layout, params: Params, mask: np.ndarray, meta: Mapping[str, Any]) -> str:
    """Write "<name>" as the kept values alone (kept,) and "<name>_mask" as packed bits; tied tensors stand once.

    The digest is blake2b-64 of the bits of mask, kept values, all other floats and whole numbers.
    """
    kept, rest = params.floats[: mask.size][mask], params.floats[mask.size :]
    bits = np.packbits(mask).tobytes() + kept.tobytes() + rest.tobytes() + params.ints.tobytes()
    digest = hashlib.blake2b(bits, digest_size=8).hexdigest()
    if path is None:
        return digest
    arrays: dict[str, np.ndarray] = {}
    for e in layout.entries:
        values = (params.ints if e.is_int else params.floats)[e.slice]
        if e.prunable:
            arrays[e.name] = values[mask[e.slice]]
            arrays[f"{e.name}_mask"] = np.packbits(mask[e.slice])
        else:
            arrays[e.name] = values.reshape(e.shape)
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
            arrays[name] = values.reshape(e.shape)
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
        "content": content_digest(arrays, digest),
    }
    write_atomic(path, safetensors_bytes(arrays, told))


def read(path: Path, *, tensors: bool = True) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return what a ticket's file holds, names sorted, and its metadata; raise StudyError where it cannot be read.

    Tensors that are not those that were written are refused; files of version 0.1 do not say which these were.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            names = sorted(file.keys()) if tensors else []
            found, metadata = {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise StudyError(f"{path}: expected a ticket, got {error}") from error
    if tensors and "content" in metadata and metadata["content"] != content_digest(found, metadata.get("ticket", "")):
        raise StudyError(f"{path}: damaged: its tensors are not those that were written")
    return found, metadata


def opened(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Return a ticket's tensors by name in their full shapes, masks left out, whichever form the file has."""
    masks = {name.removesuffix("_mask"): a for name, a in arrays.items() if is_mask(name, a)}
    if metadata.get("format") != "fedlth-ticket-compact-1":
        return {name: a for name, a in arrays.items() if not is_mask(name, a)}
    found = {}
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


def is_mask(name: str, array: np.ndarray) -> bool:
    """Say whether a tensor of a ticket's file is a mask; a model's own tensor may be called "..._mask" as well."""
    return name.endswith("_mask") and array.dtype == np.uint8
