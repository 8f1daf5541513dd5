"""What a training step costs: CPU seconds of the calling thread, from step to step of trainings that take turns.

CPU seconds, since the clock's are those of whatever else the machine does; the least of several turns, since a busy
cache only ever adds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

from fedlth.kernel import compact

_Key = TypeVar("_Key")

TRAINING_STEPS = 20  # a training's, over which what it prepares once is spread
_TURN_S, _MOST_TURNS = 0.04, 5


class _Enough(Exception):
    """The steps that were wanted have been taken."""


@dataclass
class StepTimer:
    """One kind of training: `train` calls what it is given at the beginning of each step, `prepare` comes before.

    A call trains a few steps, more the next time where they were short, and returns the CPU seconds of one.
    """

    train: Callable[[Callable[[], None]], object]
    prepare: Callable[[], object] | None = None
    steps: int = 1

    def __call__(self) -> float:
        begun: list[float] = []

        def step() -> None:
            begun.append(time.thread_time())
            if len(begun) > self.steps:
                raise _Enough

        compact.forget()
        prepared = 0.0 if self.prepare is None else cpu_seconds(self.prepare)
        with suppress(_Enough):
            self.train(step)
        took = [b - a for a, b in zip(begun, begun[1:], strict=False)]
        each = median(took[1:] or took)  # the first finds cold caches
        self.steps = min(TRAINING_STEPS, max(1, math.ceil(_TURN_S / max(each, 1e-6))))
        return each + prepared / TRAINING_STEPS


def cpu_seconds(work: Callable[[], object]) -> float:
    """Return the CPU seconds that this thread takes for some work."""
    began = time.thread_time()
    work()
    return time.thread_time() - began


def in_turns(runs: Mapping[_Key, Callable[[], float]], cpu_s: float) -> dict[_Key, float]:
    """Return the least that each run says, in turns: in about so many CPU seconds, but one turn at least."""
    began, best = time.thread_time(), dict.fromkeys(runs, math.inf)
    for turn in range(1 + _MOST_TURNS):
        if turn > 1 and time.thread_time() - began > cpu_s:
            break
        for key, run in runs.items():
            took = run()
            if turn:  # the first compiles, and touches memory
                best[key] = min(best[key], took)
    return best
