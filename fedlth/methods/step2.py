"""What an arm of step 2 works with: start weights, training with shared data order, and the cost of what was done."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from fedlth.errors import StudyError
from fedlth.methods.local import Local
from fedlth.methods.state import ClientState
from fedlth.methods.visit import Visit
from fedlth.network import DataNetwork
from fedlth.params import Params
from fedlth.tickets.finder import Finder
from fedlth.tickets.search import Walked
from fedlth.train import Plan, batches
from fedlth.wire.payload import Content


@dataclass(frozen=True, kw_only=True)
class Result:
    """One row of step 2: a model and what it cost.

    `target` is the density asked for (1 where the method decides). `flops` are those of all trainings that lead
    here, forward and backward, counted dense and by what is alive. `cpu_s` are the CPU seconds of the same trainings,
    and of the last of them: a fact of this machine, never of the result. `held`: dead weights may be other than zero.
    """

    arm: str
    params: Params
    mask: np.ndarray
    target: float = 1.0
    start: str = ""
    epochs: int = 0
    search_epochs: int = 0
    flops: tuple[float, float] = (0.0, 0.0)
    held: bool = False
    cpu_s: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Step2:
    """One client's step 2.

    `alive` is the mask of `theta_g` (dense but for methods that learn masks). `train` is a pure function of (start
    bits, mask, epochs, replay) and remembers: the dense twin is also the first training of every search, so arms
    share it instead of paying twice. All arms draw the same batches.
    """

    local: Local
    visit: Visit
    received: Content
    state: ClientState
    theta_g: Params
    alive: np.ndarray
    anchors: Mapping[str, Params]
    finder: Finder
    targets: tuple[float, ...]
    known: dict[bytes, Walked] = field(default_factory=dict)
    log: list[tuple[float, float, int]] = field(default_factory=list)
    cost: dict[bytes, float] = field(default_factory=dict)
    cpu: list[float] = field(default_factory=list)

    @property
    def plan(self) -> Plan:
        s = self.local.world.study
        p = s.personalise
        return replace(self.local.plan, epochs=p.epochs, lr=p.lr or s.train.lr, schedule=p.schedule)

    def anchor(self, name: str) -> Params:
        """Return named weights; the round's own must have been sent."""
        if name == "reinit":
            return self.local.fresh_init("reinit")
        if name not in self.anchors:
            raise StudyError(f"finder.rewind: no weights named {name}; known: {', '.join(self.anchors)}")
        return self.anchors[name]

    def train(self, start: Params, mask: np.ndarray, replay_lr: bool = True, epochs: int | None = None) -> Params:
        return self.walk(start, mask, replay_lr=replay_lr, epochs=epochs).params

    def walk(
        self,
        start: Params,
        mask: np.ndarray,
        /,
        *,
        replay_lr: bool,
        held: bool = False,
        window: int = 0,
        first_step: int = 0,
        last_step: int | None = None,
        epochs: int | None = None,
    ) -> Walked:
        """Train as a search asks; see tickets.search.TrainFn."""
        plan = replace(
            self.plan, replay_lr=replay_lr, epochs=epochs or self.plan.epochs, first_step=first_step,
            last_step=last_step,
        )  # fmt: skip
        steps = plan.epochs * self._steps_an_epoch(plan)
        if last_step is not None and last_step >= steps and not mask.all():
            raise StudyError(
                f"finder.schedule.every: all moves must come before a training's end; client {self.local.client} has "
                f"{steps} steps, got a move at {last_step}"
            )
        start = start if held else start.masked(mask)
        # sha256, which CPUs have instructions for: three times as fast as blake2b on a whole model.
        state = hashlib.sha256(f"{plan}/{held}".encode() + np.packbits(mask).tobytes())
        state.update(start.floats.data)
        state.update(start.ints.data)
        key = state.digest()
        window = min(window, plan.epochs)
        if key not in self.known or len(self.known[key].previous) < window:
            self.known[key] = self._walked(start, mask, plan, held, window)
            self.cost[key] = float(self.local.work[-1]["cpu_s"])
        if last_step is None or not mask.all():  # the first steps of the dense training are paid for there
            alive = mask | (start.floats[: mask.size] != 0) if held else mask
            dense, effective = self.flops(alive, plan.epochs)
            share = ((last_step or steps) - first_step) / steps
            # The parts of one training are one training: the last has its epochs.
            self.log.append((share * dense, share * effective, 0 if last_step else plan.epochs))
            self.cpu.append(self.cost[key])
        return self.known[key]

    def _walked(self, start: Params, mask: np.ndarray, plan: Plan, held: bool, window: int) -> Walked:
        epochs = plan.epochs - plan.first_step // self._steps_an_epoch(plan)
        ends = range(max(0, epochs - window), epochs)
        asked = tuple(e for e in ends if e)
        if held:
            done = self.local.train(start, plan=plan, update=mask, snapshots=asked)
        else:
            done = self.local.train(start, plan=plan, mask=mask, snapshots=asked)
        seen = {0: start.floats, **done.snapshots}
        return Walked(done.params, tuple(seen[e][: mask.size].copy() for e in ends if e in seen))

    def _steps_an_epoch(self, plan: Plan) -> int:
        return len(batches(self.local.num_train, plan.batch_size, self.local.rng("steps")))

    def network(self, at: Params) -> DataNetwork:
        """Return the network at `at`; what it learns is paid for here."""

        def learned(alive: np.ndarray, epochs: int) -> None:
            self.log.append((*self.flops(alive, epochs), epochs))
            self.cpu.append(float("nan"))  # not a training of weights, and not timed as one

        return self.local.network(at, learned)

    def flops(self, mask: np.ndarray, epochs: int) -> tuple[float, float]:
        """Return training FLOPs (dense, by what is alive): 3 forwards an example, the usual count."""
        world = self.local.world
        dense = float(world.flops[""])
        dead = sum(world.flops[e.name] * (1 - _share(mask[e.slice])) for e in world.layout.prunable)
        scale = 3.0 * self.local.num_train * epochs
        return dense * scale, (dense - dead) * scale

    def spent(self, since: int) -> tuple[float, float]:
        """Sum the log from position `since`."""
        part = self.log[since:]
        return sum(d for d, _, _ in part), sum(e for _, e, _ in part)


def _share(mask: np.ndarray) -> float:
    return int(np.count_nonzero(mask)) / mask.size
