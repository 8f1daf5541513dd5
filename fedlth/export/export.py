"""Export a saved ticket: opened, written beside its final place, read again, compared, measured, and only then kept."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from fedlth.data.examples import tensors
from fedlth.errors import StudyError
from fedlth.experiment.saved_ticket import undisturbed
from fedlth.export.agreement import agreement
from fedlth.export.kernel_time import kernel_pass
from fedlth.export.measure import by_turns, memory_bytes
from fedlth.export.onnx_file import onnx
from fedlth.export.small_network import small
from fedlth.export.source import Source, client_of, opened, opened_file
from fedlth.export.weights import dense, dense_bytes, packed
from fedlth.export.written import Written
from fedlth.models.call import call
from fedlth.models.flops import layer_flops
from fedlth.storage.export_record import Exported, Size

FORMS: dict[str, Callable[[Source, Path], Written]] = {
    "onnx": onnx, "safetensors": dense, "compact": packed, "small": small,
}  # fmt: skip
MEASURES = "export.json"


def form_of(asked: tuple[str, ...]) -> str:
    """Return the one form that is asked for; raise StudyError at none, several or an unknown one."""
    if len(asked) != 1 or asked[0] not in FORMS:
        raise StudyError(f"tickets export: --to must be one of {', '.join(FORMS)}, got {', '.join(asked) or 'none'}")
    return asked[0]


def place_of(run: str | Path, client: int, form: str, parent: str | Path | None = None) -> Path:
    """Return the folder of one export, in `parent` or RUN/export/FORM; raise StudyError where something is there."""
    folder = (Path(parent) if parent is not None else Path(run) / "export" / form) / f"client-{client:04d}"
    return free(folder)


def free(folder: Path) -> Path:
    """Return a folder's path; raise StudyError where something is there already."""
    if folder.exists():
        raise StudyError(
            f"{folder}: must not be there yet, an export overwrites nothing; remove it or give another --out"
        )
    return folder


def export_ticket(
    run: str | Path, client: int | None = None, *, to: str, out: str | Path | None = None
) -> Exported:  # fmt: skip
    """Write a client's ticket in another form into a folder, RUN/export/FORM/client-NNNN where `out` names none.

    `run` is a run's folder; or, without a client, a file that describes itself, as `load_ticket` takes it.
    to: `onnx` (onnxruntime and others; extra onnx), `safetensors` (a plain state dict, and packed beside it), `compact`
    (packed alone) or `small` (the smaller network that a ticket of whole channels or heads is).
    Needs the run's data: what was written is read again and compared with the ticket on the client's whole test part,
    outputs within 1e-5 (relative to the largest where that is above 1), predictions equal. Of a file alone it is
    compared on random inputs. Measures both on one batch.
    Raises StudyError naming the place, and MissingExtra; then nothing is left in `out`.
    """
    where, form = Path(run), form_of((to,))
    number, parent = (client_of(where), where.parent) if client is None else (client, where)
    folder = place_of(parent, number, form) if out is None else free(Path(out))
    with undisturbed():
        source = opened_file(where) if client is None else opened(where, client)
        with kept_when_whole(folder) as part:
            written = FORMS[form](source, part)
            told = _compared(source, form, part, folder, written)
            measures = {name: value for name, value in asdict(told).items() if name != "folder"}
            (part / MEASURES).write_text(json.dumps(measures, indent=1) + "\n")
    return told


@contextmanager
def kept_when_whole(folder: Path) -> Iterator[Path]:
    """Give a folder to write in, which gets its name at the end; of one that fails nothing is left."""
    absent = [one for one in folder.parents if not one.exists()]
    part = folder.with_name(f"{folder.name}.part-{os.getpid()}")
    part.mkdir(parents=True)
    try:
        yield part
        free(folder)
        os.rename(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        for one in absent:
            with suppress(OSError):  # another process writes there
                one.rmdir()
        raise


def _compared(source: Source, form: str, part: Path, folder: Path, written: Written) -> Exported:
    """Compare and measure what was written."""
    module, batches = source.module, source.batches
    single = source.test.batch(slice(0, 1)).x  # a batch of another size
    found = agreement(
        f"{source.place}, as {form}", lambda x: call(module, x), written.forward, [*batches, single],
        classes=source.about.get("targets") != "numbers",
    )  # fmt: skip
    x = batches[0]
    asked = form != "small" and not source.mask.all()
    skipping = kernel_pass(source, x) if asked else "no zeros"
    passes: list[Callable[[], object]] = [lambda: call(module, x), lambda: written.forward(x)]
    times = by_turns(passes if isinstance(skipping, str) else [*passes, skipping])
    stored = sum(tensor.numel() for tensor in module.parameters())
    sizes = [
        Size(parameters=stored, file_bytes=len(dense_bytes(module)), flops=layer_flops(module, x)[1],
             latency_ms=times[0], memory_bytes=memory_bytes(module, x)),
        Size(parameters=written.stored, file_bytes=(part / written.files[0]).stat().st_size, flops=written.flops(x),
             latency_ms=times[1], memory_bytes=written.memory(x)),
    ]  # fmt: skip
    return Exported(
        folder=folder, files=written.files, client=source.client, form=form,
        density=float(np.mean(source.mask)) if source.mask.size else 1.0, kept=written.stored / stored,
        difference=found, examples=len(source.test), random=source.task is None,
        batch=tuple(tensors(x)[0].shape), threads=torch.get_num_threads(),
        opens=written.opens, ticket=sizes[0], export=sizes[1], layers=dict(written.layers),
        kernel_ms=None if isinstance(skipping, str) else times[2],
        kernel_why=skipping if isinstance(skipping, str) else "",
    )  # fmt: skip
