"""What a client of a cohort asks for, a training or an evaluation, and how it asks."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from fedlth.training.lockstep import ASK

if TYPE_CHECKING:
    from fedlth.models.layout import Params
    from fedlth.training.train import Bound, Plan


class _Shares(threading.local):
    """The CPU seconds that others spent on what this thread has asked for."""

    cpu_s = 0.0


_shares = _Shares()


def cpu_seconds() -> float:
    """Return this thread's CPU seconds so far, with its share of what its cohort did for it while it waited."""
    return time.thread_time() + _shares.cpu_s


@dataclass(frozen=True, eq=False)
class Model:
    """One client's values for the module that all clients of a cohort share."""

    bound: Bound
    params: Params


@dataclass(frozen=True, kw_only=True, eq=False)
class Training:
    """One client's training: `epochs` of batches, a learning rate a step; `mask` and `update` as in `train.train`.

    Whoever does the work notes this client's share of its CPU seconds in `cpu_s`.
    """

    model: Model
    x: Tensor
    y: Tensor
    epochs: list[list[np.ndarray]]
    rates: np.ndarray
    momentum: float
    weight_decay: float
    mask: np.ndarray | None
    update: np.ndarray | None
    snapshots: tuple[int, ...]
    cpu_s: list[float] = field(default_factory=list)

    @property
    def size(self) -> int:
        """The examples that it trains on, each as often as it is seen."""
        return sum(len(part) for parts in self.epochs for part in parts)


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """One client's evaluation, on a part that is not empty; `cpu_s` as in a training."""

    model: Model
    x: Tensor
    y: Tensor
    cpu_s: list[float] = field(default_factory=list)

    @property
    def size(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Done:
    """Where a training ended: floats (F,), the last epoch's mean loss, floats after the epochs that were asked for."""

    floats: np.ndarray
    loss: float
    snapshots: dict[int, np.ndarray] = field(default_factory=dict)


def trained(
    bound: Bound, start: Params, data: tuple[Tensor, Tensor], plan: Plan, epochs: list[list[np.ndarray]],
    rates: Sequence[float], mask: np.ndarray | None, update: np.ndarray | None, snapshots: tuple[int, ...],
) -> Done | None:  # fmt: skip
    """Ask for a training with those of the cohort that this call is in; None outside one."""
    ask = ASK.get()
    if ask is None:
        return None
    asked = Training(
        model=Model(bound, start), x=data[0], y=data[1], epochs=epochs, rates=np.array(rates), momentum=plan.momentum,
        weight_decay=plan.weight_decay, mask=mask, update=update, snapshots=snapshots,
    )  # fmt: skip
    try:
        done: Done = ask(asked)
    finally:
        _shares.cpu_s += sum(asked.cpu_s)
    return done


def evaluated(bound: Bound, params: Params, data: tuple[Tensor, Tensor]) -> tuple[float, float] | None:
    """Ask for an evaluation with those of the cohort that this call is in; None outside one."""
    ask = ASK.get()
    if ask is None:
        return None
    asked = Evaluation(model=Model(bound, params), x=data[0], y=data[1])
    try:
        found: tuple[float, float] = ask(asked)
    finally:
        _shares.cpu_s += sum(asked.cpu_s)
    return found
