"""A saved ticket as an export takes it: the masked network, its mask, what describes it, inputs to compare it on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedlth.data.examples import Examples, Inputs
from fedlth.errors import StudyError
from fedlth.experiment.experiment import Experiment
from fedlth.experiment.saved_ticket import about, load_ticket, metadata
from fedlth.models.layout import Layout, Params, layout_of, read
from fedlth.storage import ticket_file
from fedlth.storage.header import read_header
from fedlth.storage.run_folder import RunFolder
from fedlth.training.task import Task

RANDOM = 32  # inputs, where a file alone is at hand
OF_FILE = ("format", "density", "tied", "shapes", "ticket", "content", "frozen", "frozen_values")  # of its own form
TEXTS = ("model", "targets", "scale", "task", "study", "method", "arm", "data")  # all else is JSON


@dataclass(frozen=True, eq=False)
class Source:
    """One client's ticket. `mask` (num_prunable,) bool; `about` describes it, ready for JSON.

    `test` is the client's test part; of a file alone there is no `task`, and they are random inputs.
    """

    place: str
    client: int
    module: nn.Module
    layout: Layout
    mask: np.ndarray
    task: Task | None
    test: Examples
    about: Mapping[str, Any]

    @property
    def model(self) -> str:
        """The name of the network's model."""
        return str(self.about["model"])

    @property
    def params(self) -> Params:
        return read(self.module, self.layout)

    @property
    def batches(self) -> list[Inputs]:
        """The client's whole test part, in batches of the study's size; random inputs are one batch."""
        size = len(self.test) if self.task is None else self.task.study.train.batch_size
        return [self.test.batch(slice(at, at + size)).x for at in range(0, len(self.test), size)]

    @property
    def metadata(self) -> dict[str, str]:
        """What describes the ticket, as a file's metadata: text as it is, all else as JSON."""
        return metadata(self.about)


def opened(run: Path, client: int) -> Source:
    """Open a client's ticket, and the data to compare outputs on.

    Raises StudyError where the run has no ticket of the client, or the client no test examples.
    """
    module, place = load_ticket(run, client), f"{run}: client {client}"
    layout, mask, meta = _masked(module, ticket_file.path_of(run / "tickets", client))
    study = RunFolder(run).study()
    task = Experiment.of(study).task_of(client)
    test = task.part(client, "test").to("cpu")
    if not len(test):
        raise StudyError(f"{place}: must have test examples, on which an export is compared with the ticket, got none")
    described = _about(run, client, task, meta, mask, name=study.study)
    return Source(place, client, module, layout, mask, task, test, described)


def client_of(file: Path) -> int:
    """Return whose ticket a file is; raise StudyError where it is none, or does not say so."""
    meta = ticket_file.read(file, tensors=False)[1]
    if not meta.get("client", "").isdecimal():
        raise StudyError(f"{file}: must be a ticket's file that says whose it is, got client {meta.get('client')!r}")
    return int(meta["client"])


def opened_file(file: Path) -> Source:
    """Open a ticket's file that describes itself, with random inputs of its network's shape to compare outputs on.

    Raises StudyError where the file is none, or where the network's inputs are whole numbers, whose range it lacks.
    """
    module, client = load_ticket(file), client_of(file)
    layout, mask, meta = _masked(module, file)
    try:
        about = {name: _read(name, value) for name, value in meta.items() if name not in OF_FILE}
    except ValueError as error:
        raise StudyError(f"{file}: expected metadata of a ticket, got {error}") from error
    shapes, dtypes = about["input_shape"], about["input_dtype"]
    if {"int64"} & set(dtypes.values() if isinstance(dtypes, dict) else [dtypes]):
        raise StudyError(f"{file}: has inputs of whole numbers, of a range that no file says; export it from its run")
    generator = torch.Generator().manual_seed(0)

    def drawn(shape: list[int]) -> Tensor:
        return torch.randn(RANDOM, *shape, generator=generator)

    x: Inputs = {name: drawn(own) for name, own in shapes.items()} if isinstance(shapes, dict) else drawn(shapes)
    random = Examples(x, torch.zeros(RANDOM, dtype=torch.int64))
    about |= {"density": float(mask.mean()) if mask.size else 1.0, "ticket": meta.get("ticket", "")}
    return Source(f"{file}: client {client}", client, module, layout, mask, None, random, about)


def _read(name: str, value: str) -> Any:
    """Return what a file's metadata says, of JSON its value."""
    text = name in TEXTS or (name == "input_dtype" and not value.startswith("{"))
    return value if text else json.loads(value)


def _masked(module: nn.Module, file: Path) -> tuple[Layout, np.ndarray, dict[str, str]]:
    """Return a network's layout under the masks of a ticket's file, the mask of all, and the file's metadata."""
    stored, meta = ticket_file.read(file)
    masks = {name.removesuffix("_mask"): bits for name, bits in stored.items() if ticket_file.is_mask(name, bits)}
    layout = layout_of(module, masks)
    bits = [np.unpackbits(masks[e.name], count=e.size) for e in layout.prunable]
    return layout, np.concatenate(bits).astype(bool) if bits else np.zeros(0, bool), meta


def _about(
    run: Path, client: int, task: Task, meta: Mapping[str, str], mask: np.ndarray, *, name: str
) -> dict[str, Any]:
    """Describe a ticket: what makes its network, what goes in and comes out, where it is from.

    `name` is the study's, which that of a task is without.
    """
    data, told = task.dataset, about(task)
    counts = read_header(run).client_labels
    if data.targets == "classes" and client < len(counts):
        told["client_classes"] = [label for label, count in enumerate(counts[client]) if count]
    told |= {"study": name, "data": data.name, "client": client, "arm": meta.get("arm", "ticket")}
    return told | {"density": float(mask.mean()) if mask.size else 1.0, "ticket": meta.get("ticket", "")}
