"""A client's saved ticket, back as a torch module: three lines to predict with it."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedlth.data.ragged import Shape, named
from fedlth.data.sources import load
from fedlth.errors import StudyError
from fedlth.experiment.experiment import Experiment
from fedlth.models.initial import digest_of
from fedlth.models.layout import Layout, Params, layout_of, read
from fedlth.storage import ticket_file
from fedlth.storage.client_state import ClientState
from fedlth.storage.run_folder import RunFolder
from fedlth.study.sections import Model
from fedlth.study.validate import validated
from fedlth.training.client_tasks import own_study
from fedlth.training.model_context import initial_module
from fedlth.training.task import Task
from fedlth.wire import payload
from fedlth.wire.codec import CODECS
from fedlth.wire.payload import Content
from fedlth.wire.reference import Reference


def inputs(task: Task) -> dict[str, Any]:
    """Return what a ticket's metadata says of its network's inputs: with them the network is built without data."""
    x, shape = task.dataset.x_train, task.dataset.input_shape
    dtypes = {name: "int64" if array.dtype.kind == "i" else "float32" for name, array in named(x).items()}
    told: dict[str, Any] = {"num_classes": task.dataset.num_classes}
    if task.name:
        told["task"] = task.name  # by which the study tells the network's options
    if isinstance(shape, dict):
        return told | {"input_shape": json.dumps(shape), "input_dtype": json.dumps(dtypes)}
    return told | {"input_shape": list(shape), "input_dtype": dtypes["x"]}


def origin(experiment: Experiment, client: int, arm: str) -> dict[str, Any]:
    """Return what a ticket's metadata says of where it is from."""
    study = experiment.study
    return {"study": study.study, "method": experiment.method.name, "seed": study.seed, "client": client, "arm": arm}


def about(task: Task) -> dict[str, Any]:
    """Describe a ticket's network: what builds it, what goes in and comes out; with it a file needs no run."""
    study, data = task.study, task.dataset
    told: dict[str, Any] = {"model": study.model.name, "options": study.model.options, "seed": study.seed}
    told |= inputs(task) | {"targets": data.targets}
    if data.mean:
        told |= {"scale": "x / 255, then (x - mean) / std, by channel", "mean": data.mean, "std": data.std}
    names = study.data.options.get("labels")
    if isinstance(names, (list, tuple)) and len(names) == data.num_classes:
        told["classes"] = list(names)
    return told


def metadata(about: Mapping[str, Any]) -> dict[str, str]:
    """Return a description as a file's metadata: text as it is, all else as JSON."""
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in about.items()}


def kept_ticket(task: Task, state: ClientState) -> tuple[Params, np.ndarray]:
    """Return the ticket in a client's state: whole params, and its mask (num_prunable,) bool."""
    mask, values, moving = state.masks["ticket"], state.vectors["ticket"], task.layout.moving
    own = moving.mask_of(mask, task.layout)  # of weights that nothing trains, a state has the mask alone
    floats, kept = np.zeros(moving.num_floats, np.float32), int(np.count_nonzero(own))
    floats[: own.size][own] = values[:kept]
    floats[own.size :] = values[kept:]
    whole = task.whole(Params(floats, state.vectors["ticket_ints"]))
    if own.size != mask.size:
        whole = whole.masked(mask)
    if "ticket_dead" in state.vectors:
        whole = replace(whole, floats=whole.floats.copy())
        whole.floats[: mask.size][~mask] = state.vectors["ticket_dead"]
    return whole, mask


def frozen(task: Task) -> dict[str, str]:
    """Name what nothing trains, and its values, where the model's code alone gives them: no file then needs them.

    Weights under a mask are left in the file.
    """
    found = [e for e in task.layout.floats if e.role == "param" and not (e.trainable or e.prunable)]
    own = digest_of(found, read(task.model.module(), task.layout))
    if not found or own != digest_of(found, task.theta_0):
        return {}
    return {"frozen": json.dumps([e.name for e in found]), "frozen_values": own}


def _with_frozen(
    arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str], layout: Layout, own: Params
) -> dict[str, np.ndarray]:
    """Return a ticket's tensors with those that nothing trains as the network has them; none where it lacks one."""
    left_out = set(json.loads(metadata["frozen"]))
    theirs = {n: own.floats[e.slice].reshape(e.shape) for e in layout.floats for n in (e.name, *e.aliases)}
    tied = {n for e in layout.entries if e.name in left_out for n in e.aliases}
    return {**{n: theirs.get(n, np.zeros(0)) for n in left_out | tied if n not in arrays}, **arrays}


def mask_bytes(task: Task, mask: np.ndarray) -> dict[str, int]:
    """Return what the mask costs a receiver that has theta_0; nothing of a model that has to be sent first."""
    if task.study.model.theta_0 is None:
        return {}
    sent = payload.encode(
        "mask", task.layout, Content(mask, None, None), codec=CODECS["lossless"],
        reference=Reference(task.theta_0.floats),
    )  # fmt: skip
    return {"mask_bytes": len(sent)}


def load_ticket(run: str | Path, client: int | None = None) -> nn.Module:
    """Return a client's own model from a finished run, in evaluation mode, on the CPU.

    `run` is its folder; or, without a client, a file that describes itself, as a device keeps its own
    (STATE-DIR/RUN/client-NNNN.safetensors) and as `export_ticket` writes for `compact`.
    Needs the code of a user's model, no data. The caller's torch threads and the generators of
    torch, numpy and random stay as they are.
    Raises StudyError where the run kept no ticket for this client, and where the model's code no longer has exactly
    the ticket's tensors: names, shapes, which are whole numbers, which are one tensor under two names.
    """
    if client is None:
        path = Path(run)
        if not path.is_file():
            raise StudyError(f"{path}: must be a ticket's file where no client is named")
    else:
        path = ticket_file.path_of(Path(run) / "tickets", client)
        if not path.is_file():
            raise StudyError(f"{path}: no ticket of client {client} in this run{_why_none(Path(run), client)}")
    tensors, told = ticket_file.read(path)
    try:
        arrays = ticket_file.opened(tensors, told)
    except (KeyError, ValueError) as error:
        raise StudyError(f"{path}: expected a ticket, got {error}") from error
    with undisturbed():
        return _filled(path, None if client is None else Path(run), arrays, told)


def network_of(path: Path, run: Path | None, metadata: Mapping[str, str]) -> tuple[Model, nn.Module]:
    """Return a ticket's model and its network as the run began with it; most tickets need no data."""
    if run is None:
        if not metadata.keys() >= {"model", "options", "input_shape", "num_classes"}:
            raise StudyError(f"{path}: does not describe its network; load_ticket(RUN, CLIENT) takes that from the run")
        given = {"name": metadata["model"], "options": json.loads(metadata["options"])}
        spec = validated(Model, given, f"{path}: model")
        return spec, initial_module(spec, int(metadata["num_classes"]), _shape(metadata), int(metadata["seed"]))
    study = RunFolder(run).study()
    if name := metadata.get("task"):
        if name not in study.tasks:
            raise StudyError(f"{path}: is of task {name}, which the run's study does not have")
        study = own_study(study, study.tasks[name])
    if "input_shape" in metadata:
        shape, num_classes = _shape(metadata), int(metadata["num_classes"])
    else:  # files of version 0.1 do not say what goes in: the data set does
        dataset = load(study.data.name, root=study.data.root, options=study.data.options)
        num_classes, shape = dataset.num_classes, dataset.input_shape
    return study.model, initial_module(study.model, num_classes, shape, study.seed)


def _shape(metadata: Mapping[str, str]) -> Shape:
    told = json.loads(metadata["input_shape"])
    return {n: tuple(own) for n, own in told.items()} if isinstance(told, dict) else tuple(told)


def _filled(path: Path, run: Path | None, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> nn.Module:
    """Build the run's network and copy the ticket into it; every tensor of both is checked."""
    spec, module = network_of(path, run, metadata)
    layout, place = layout_of(module, ()), f"{path}: {spec.name}"
    own = read(module, layout)
    if "frozen" in metadata:
        arrays = _with_frozen(arrays, metadata, layout, own)
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
    if "frozen" in metadata:
        left_out = [e for e in layout.floats if e.name in json.loads(metadata["frozen"])]
        if digest_of(left_out, own) != metadata["frozen_values"]:
            raise StudyError(f"{place}: what nothing trains has other values than in the run: other files, or versions")
    tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    with torch.no_grad():
        for name in entries:
            tensors[name].copy_(torch.from_numpy(arrays[name]))
    return module.eval()


def _told(shape: tuple[int, ...], is_int: bool) -> str:
    return f"{'whole numbers' if is_int else 'float32'} {list(shape)}"


def _why_none(run: Path, client: int) -> str:
    """Say why a run has no ticket file of a client, as far as its folder tells."""
    seeds = sorted(inner.parent.name for inner in run.glob("seed-*/config.yaml"))
    if seeds:
        return f", it holds one run a seed: {', '.join(seeds)}"
    if not (run / "config.yaml").is_file():
        return ": it is not a run's folder"
    study, header = RunFolder(run).study(), RunFolder(run).header()
    if study.tickets == "none":
        return ": it kept no files (tickets: none); tickets: dense or compact keeps them"
    if not 0 <= client < study.clients.count:
        return f", its clients are 0 to {study.clients.count - 1}"
    if header is None or not header.finished:
        return ", it has not finished"
    if Experiment.of(study).kept_arm is None:
        return f": no arm of method {study.method['name']} is a client's own"
    return ": this client failed, or it keeps its ticket itself"


@contextmanager
def undisturbed() -> Iterator[None]:
    """Put torch's threads and the global generators of torch, numpy and random back as they were."""
    threads, dice, numbers = torch.get_num_threads(), random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)
        random.setstate(dice)
        np.random.set_state(numbers)
