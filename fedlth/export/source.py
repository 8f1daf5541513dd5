"""A saved ticket as an export takes it: the masked network, its mask, what describes it, the client's test part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fedlth.data.examples import Examples, Inputs
from fedlth.errors import StudyError
from fedlth.experiment.experiment import Experiment
from fedlth.experiment.saved_ticket import about, load_ticket, metadata
from fedlth.models.layout import Layout, Params, layout_of, read
from fedlth.storage import ticket_file
from fedlth.storage.header import read_header
from fedlth.storage.run_folder import RunFolder
from fedlth.training.task import Task


@dataclass(frozen=True, eq=False)
class Source:
    """One client's ticket. `mask` (num_prunable,) bool; `about` describes it, ready for JSON."""

    place: str
    client: int
    module: nn.Module
    layout: Layout
    mask: np.ndarray
    task: Task
    test: Examples
    about: Mapping[str, Any]

    @property
    def params(self) -> Params:
        return read(self.module, self.layout)

    @property
    def batches(self) -> list[Inputs]:
        """The client's whole test part, in batches of the study's size."""
        size = self.task.study.train.batch_size
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
    stored, meta = ticket_file.read(run / "tickets" / f"client-{client:04d}.safetensors")
    masks = {name.removesuffix("_mask"): bits for name, bits in stored.items() if ticket_file.is_mask(name, bits)}
    layout = layout_of(module, masks)
    bits = [np.unpackbits(masks[e.name], count=e.size) for e in layout.prunable]
    mask = np.concatenate(bits).astype(bool) if bits else np.zeros(0, bool)
    study = RunFolder(run).study()
    task = Experiment.of(study).task_of(client)
    test = task.part(client, "test").to("cpu")
    if not len(test):
        raise StudyError(f"{place}: must have test examples, on which an export is compared with the ticket, got none")
    described = _about(run, client, task, meta, mask, name=study.study)
    return Source(place, client, module, layout, mask, task, test, described)


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
