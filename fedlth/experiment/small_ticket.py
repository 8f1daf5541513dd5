"""A ticket that has lost whole heads and channels leaves as a smaller network: checked, measured, then written."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.multiprocessing import reductions
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedlth.data.examples import Inputs, tensors
from fedlth.errors import StudyError
from fedlth.experiment.experiment import Experiment
from fedlth.experiment.saved_ticket import load_ticket, undisturbed
from fedlth.models.call import call
from fedlth.models.flops import layer_flops
from fedlth.models.small import load_small, smaller
from fedlth.models.transformer import Transformer
from fedlth.storage.run_folder import RunFolder
from fedlth.storage.small_record import Size, SmallTicket

MOST = 1e-5  # that outputs may differ, relative to the largest where that is above 1
PASSES = 20
StorageRef: Any = reductions.StorageWeakRef  # has no types
MEASURED = "small.json"


def save_small(run: str | Path, client: int, folder: str | Path | None = None) -> SmallTicket:
    """Write a client's ticket as the smaller network that it is, into RUN/small/client-NNNN where no folder is named.

    `from_pretrained` of transformers opens it where all layers are alike and kept all heads, `load_small` always.
    Needs the run's data: outputs are compared on the client's whole test part first, within 1e-5, and what was written
    is read again. Raises StudyError, before anything is written, where they differ or nothing whole is pruned.
    """
    where, place = Path(run), f"{run}: client {client}"
    out = Path(folder) if folder is not None else where / "small" / f"client-{client:04d}"
    module = load_ticket(where, client)
    if not isinstance(module, Transformer) or not module.counts:
        raise StudyError(f"{place}: only a transformer of a form with heads and channels (model: hf) leaves smaller")
    small = smaller(module)
    if small.counts == module.counts:
        raise StudyError(
            f"{place}: no head and no channel is pruned as a whole; finder.granularity: heads_and_channels finds such "
            "tickets"
        )
    with undisturbed():
        task = Experiment.of(RunFolder(where).study()).task_of(client)
        part, size = task.part(client, "test").to("cpu"), task.study.train.batch_size
        batches = [part.batch(slice(at, at + size)).x for at in range(0, len(part), size)]
        found = [difference(module, small, x) for x in batches]
        if not all(one <= MOST for one in found):
            raise StudyError(f"{place}: the smaller network's outputs must not differ by {MOST:g}, got {max(found):g}")
        small.save_pretrained(out)
        again = load_small(out)
        if any(difference(small, again, x) for x in batches):
            raise StudyError(f"{out}: must give the same outputs when it is read again, got others")
        whole, less = measured(module, small, batches[0])
        first = next(iter(batches[0].values())) if isinstance(batches[0], dict) else batches[0]
        told = SmallTicket(
            folder=out, client=client, units=small.counts, of=module.counts, kept=less.parameters / whole.parameters,
            plain=small.plain, difference=max(found), batches=len(batches), batch=list(first.shape),
            threads=torch.get_num_threads(), ticket=whole, small=less,
        )  # fmt: skip
    measures = {name: value for name, value in asdict(told).items() if name != "folder"}
    (out / MEASURED).write_text(json.dumps(measures, indent=1) + "\n")
    return told


@torch.inference_mode()
def difference(one: nn.Module, other: nn.Module, x: Inputs) -> float:
    """Return the largest difference of two networks' outputs, relative to the largest output where that is above 1."""
    wanted, got = call(one, x), call(other, x)
    return float((wanted - got).abs().max() / wanted.abs().max().clamp(min=1))


def measured(one: Transformer, other: Transformer, x: Inputs) -> tuple[Size, Size]:
    """Measure two networks on a batch, by turns."""
    times: tuple[list[float], list[float]] = ([], [])
    with torch.inference_mode():
        for _ in range(PASSES):
            for module, own in zip((one, other), times, strict=True):
                began = time.perf_counter()
                call(module, x)
                own.append(1e3 * (time.perf_counter() - began))
    first, second = (_size(module, x, own) for module, own in zip((one, other), times, strict=True))
    return first, second


def _size(module: Transformer, x: Inputs, times: list[float]) -> Size:
    state = module.plain_state()
    weights = sum(tensor.nbytes for tensor in state.values())
    return Size(
        parameters=sum(tensor.numel() for tensor in module.parameters()),
        file_bytes=len(save(state, metadata={"format": "pt"})),
        flops=layer_flops(module, x)[1],
        latency_ms=statistics.median(times),
        memory_bytes=weights + peak_bytes(module, x),
    )


class _Held(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the most bytes of tensors that live at once, of those that operators make."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first operator imports all of torch's compiler

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.given = {StorageRef(tensor.untyped_storage()) for tensor in given}
        self.live: dict[Any, int] = {}
        self.most: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.live = {ref: size for ref, size in self.live.items() if not ref.expired()}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if (ref := StorageRef(storage)) not in self.given:
                    self.live[ref] = storage.nbytes()
        self.most = max(self.most, sum(self.live.values()))
        return out


def peak_bytes(module: nn.Module, x: Inputs) -> int:
    """Return the most bytes of tensors that a forward pass holds at once beside weights and inputs."""
    held = _Held([*module.parameters(), *module.buffers(), *tensors(x)])
    with torch.no_grad(), held:
        call(module, x)
    return held.most
