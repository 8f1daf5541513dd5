"""A ticket on disk: plain safetensors that anyone opens without fedlth, and three lines to predict with it."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlth.errors import StudyError
from fedlth.store import safetensors_bytes, write_atomic

if TYPE_CHECKING:
    from torch import nn

    from fedlth.methods.state import ClientState
    from fedlth.params import Layout, Params
    from fedlth.world import World


def inputs(world: World) -> dict[str, Any]:
    """Return what a ticket's metadata says of its network's inputs: with them the network is built without data."""
    dtype = "int64" if world.dataset.x_train.dtype.kind == "i" else "float32"
    shape = list(world.dataset.input_shape)
    return {"num_classes": world.dataset.num_classes, "input_shape": shape, "input_dtype": dtype}


def save(folder: Path, form: str, world: World, state: ClientState, meta: Mapping[str, Any]) -> str:
    """Write the ticket in a client's state as `form` says (a study's `tickets`); return its digest."""
    from fedlth.params import Params  # a report reads tickets without torch

    path = folder / f"client-{int(meta['client']):04d}.safetensors"
    mask, values = state.masks["ticket"], state.vectors["ticket"]
    floats, kept = np.zeros(world.layout.moving.num_floats, np.float32), int(np.count_nonzero(mask))
    floats[: mask.size][mask] = values[:kept]
    floats[mask.size :] = values[kept:]
    if "ticket_dead" in state.vectors:
        floats[: mask.size][~mask] = state.vectors["ticket_dead"]
    params = world.whole(Params(floats, state.vectors["ticket_ints"]))
    if form == "dense":
        return write(path, world.layout, params, mask, meta)
    return _write_compact(path if form == "compact" else None, world.layout, params, mask, meta)


def _write_compact(path: Path | None, layout: Layout, params: Params, mask: np.ndarray, meta: Mapping[str, Any]) -> str:
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
    }
    write_atomic(path, safetensors_bytes(arrays, told))


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


def load_ticket(run: str | Path, client: int) -> nn.Module:
    """Return a client's own model from a finished run, in evaluation mode, on the CPU.

    Needs the run's folder and the code of a user's model, no data. The caller's torch threads and the generators of
    torch, numpy and random stay as they are.
    Raises StudyError where the run kept no ticket for this client, and where the model's code no longer has exactly
    the ticket's tensors: names, shapes, which are whole numbers, which are one tensor under two names.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(run) / "tickets" / f"client-{client:04d}.safetensors"
    if not path.is_file():
        raise StudyError(f"{path}: no ticket of client {client} in this run{_why_none(Path(run), client)}")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = opened({name: file.get_tensor(name) for name in file.keys()}, metadata)  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise StudyError(f"{path}: a ticket is wanted, got {error}") from error
    with _undisturbed():
        return _filled(path, Path(run), arrays, metadata)


def _filled(path: Path, run: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> nn.Module:
    """Build the run's network and copy the ticket into it; every tensor of both is checked."""
    import torch

    from fedlth.data.sources import load
    from fedlth.params import layout_of
    from fedlth.runfolder import RunFolder
    from fedlth.world import initial_module

    study = RunFolder(run).study()
    if "input_shape" in metadata:
        num_classes, shape = int(metadata["num_classes"]), tuple(json.loads(metadata["input_shape"]))
    else:  # files of version 0.1 do not say what goes in: the data set does
        dataset = load(study.data.name, root=study.data.root, options=study.data.options)
        num_classes, shape = dataset.num_classes, dataset.input_shape
    module = initial_module(study, num_classes, shape)
    layout, place = layout_of(module, ()), f"{path}: {study.model.name}"
    entries = {name: e for e in layout.entries for name in (e.name, *e.aliases)}
    for name in sorted(entries.keys() | arrays.keys()):
        if name not in arrays:
            raise StudyError(f"{place} has a tensor {name}, the ticket does not: the model's code has changed")
        if name not in entries:
            raise StudyError(f"{place} has no tensor {name}, the ticket does: the model's code has changed")
        e, array = entries[name], arrays[name]
        if array.shape != e.shape or (array.dtype.kind == "i") != e.is_int:
            raise StudyError(
                f"{place}: tensor {name} is {_told(e.shape, e.is_int)}, that of the ticket "
                f"{_told(array.shape, array.dtype.kind == 'i')}: the model's code has changed"
            )
        if not np.array_equal(array, arrays[e.name]):
            raise StudyError(
                f"{place}: {name} is tied to {e.name}, in the ticket it is not: the model's code has changed"
            )
    tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    with torch.no_grad():
        for name in entries:
            tensors[name].copy_(torch.from_numpy(arrays[name]))
    return module.eval()


def _told(shape: tuple[int, ...], is_int: bool) -> str:
    return f"{'whole numbers' if is_int else 'float32'} {list(shape)}"


def _why_none(run: Path, client: int) -> str:
    """Say why a run has no ticket file of a client, as far as its folder tells."""
    from fedlth.methods.resolve import kept_arm
    from fedlth.runfolder import RunFolder

    seeds = sorted(inner.parent.name for inner in run.glob("seed-*/config.yaml"))
    if seeds:
        return f", it holds one run a seed: {', '.join(seeds)}"
    if not (run / "config.yaml").is_file():
        return ": it is no run's folder"
    study = RunFolder(run).study()
    header = run / "header.json"
    if study.tickets == "none":
        return ": it kept no files (tickets: none); tickets: dense or compact keeps them"
    if not 0 <= client < study.clients.count:
        return f", its clients are 0 to {study.clients.count - 1}"
    if not header.is_file() or not json.loads(header.read_bytes())["finished"]:
        return ", it has not finished"
    if kept_arm(study) is None:
        return f": no arm of method {study.method['name']} is a client's own"
    return ": this client failed, or it keeps its ticket itself"


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Put torch's threads and the global generators of torch, numpy and random back as they were."""
    import torch

    threads, dice, numbers = torch.get_num_threads(), random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)
        random.setstate(dice)
        np.random.set_state(numbers)
