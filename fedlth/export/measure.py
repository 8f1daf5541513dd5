"""What a network takes on this machine: the time of a pass, two by turns, and the memory that one holds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing import reductions
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedlth.data.examples import Inputs, tensors
from fedlth.models.call import call

PASSES = 20
StorageRef: Any = reductions.StorageWeakRef  # has no types


@torch.inference_mode()
def by_turns(passes: Iterable[Callable[[], object]]) -> list[float]:
    """Return the median milliseconds of each pass; they take turns, so that what else the machine does meets all."""
    every = list(passes)
    times: list[list[float]] = [[] for _ in every]
    for _ in range(PASSES):
        for one, own in zip(every, times, strict=True):
            began = time.perf_counter()
            one()
            own.append(1e3 * (time.perf_counter() - began))
    return [statistics.median(own) for own in times]


def memory_bytes(module: nn.Module, x: Inputs) -> int:
    """Return the bytes of a network's tensors, one that has two names once, and of those that a pass holds beside."""
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*module.parameters(), *module.buffers())
    }
    return sum(held.values()) + peak_bytes(module, x)


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
