"""What the laws of finder parts are tested on: a small layout, made-up evidence, a network that is arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedlth import rng
from fedlth.models.layout import Params
from fedlth.study.parts import make
from fedlth.tickets.dead import DEADS
from fedlth.tickets.evidence import Evidence, Lesson
from fedlth.tickets.finder import Finder
from fedlth.tickets.gate import GATES, STOPS
from fedlth.tickets.granularity import GRANULARITIES
from fedlth.tickets.rewind import REWINDS
from fedlth.tickets.schedule import SCHEDULES
from fedlth.tickets.scope import SCOPES
from fedlth.tickets.score import SCORES
from fedlth.tickets.search import Found, Walked, find
from tests.tiny import small_layout

LAYOUT = small_layout()
IN_TENSORS = [name for name in GRANULARITIES if name != "heads_and_channels"]  # whose laws are in test_heads.py
SIZE = LAYOUT.num_prunable
FULL = np.ones(SIZE, bool)
TABLES: dict[str, Any] = {
    "score": SCORES, "schedule": SCHEDULES, "scope": SCOPES, "rewind": REWINDS, "granularity": GRANULARITIES,
    "dead": DEADS, "gate": GATES, "stop": STOPS,
}  # fmt: skip


@dataclass(frozen=True)
class FakeNetwork:
    """Smooth functions of the weights, different for every question."""

    shift: float = 0.0

    def gradient(self, weights: np.ndarray, /) -> np.ndarray:
        return np.tanh(weights + np.float32(self.shift)) + np.sin(np.arange(weights.size, dtype=np.float32))

    def hessian_gradient(self, weights: np.ndarray, /, *, temperature: float) -> np.ndarray:
        return np.cos(weights.astype(float)) / temperature

    def squared_gradient(self, weights: np.ndarray, /) -> np.ndarray:
        return np.sin(weights.astype(float)) ** 2

    def flow(self, weights: np.ndarray, /) -> np.ndarray:
        return 1.0 + np.abs(weights.astype(float)) ** 2

    def gammas(self) -> np.ndarray:
        out = np.zeros(SIZE, np.float32)
        for e in LAYOUT.prunable:
            out[e.slice] = np.repeat(np.arange(1.0, e.shape[0] + 1), e.size // e.shape[0])
        return out

    def flops(self) -> np.ndarray:
        return np.linspace(1, 2, SIZE)

    def learn(self, weights: np.ndarray, lesson: Lesson, /) -> np.ndarray:
        return np.abs(weights + np.linspace(0, 1, SIZE, dtype=np.float32))


def evidence(
    seed: int = 0, *, now: np.ndarray | None = None, mask: np.ndarray | None = None, density: float = 0.5
) -> Evidence:
    draw = np.random.default_rng(seed)
    init, start, end, before = (draw.normal(size=SIZE).astype(np.float32) for _ in range(4))
    return Evidence(
        layout=LAYOUT, init=init, start=start, now=end if now is None else now,
        mask=FULL if mask is None else mask, gradient=np.tanh, rng=rng.stream(seed, "x"), density=density,
        previous=(before,), at_start=FakeNetwork(), at_now=FakeNetwork(0.5),
    )  # fmt: skip


def finder(**parts: Any) -> Finder:
    """Return a finder of the study's defaults with some parts given, by name, by spec or as themselves."""
    names = {
        "score": "magnitude", "schedule": "iterative", "scope": "layerwise", "rewind": "init",
        "granularity": "element", "dead": "zero", "gate": "always", "stop": "target",
    }  # fmt: skip
    built = {}
    for kind, part in {**names, **parts}.items():
        spec = {"name": part} if isinstance(part, str) else part
        built[kind] = make(TABLES[kind], spec, f"finder.{kind}") if isinstance(spec, dict) else spec
    return Finder(**built)


def params(value: float) -> Params:
    draw = np.random.default_rng(int(value))
    return Params(draw.normal(value, 1, LAYOUT.num_floats).astype(np.float32), np.zeros(LAYOUT.num_ints, np.int64))


ANCHORS = {"theta_0": params(1), "theta_g": params(2), "reinit": params(3)}


@dataclass(frozen=True)
class Call:
    """One training that a search asked for."""

    start: Params
    mask: np.ndarray
    replay_lr: bool
    held: bool
    window: int
    first_step: int
    last_step: int | None


def walk(
    chosen: Finder, targets: tuple[float, ...], val_accuracy: Callable[[Params], float] | None = None
) -> tuple[list[Found], list[Call]]:
    """Search with a training that adds 0.1 to what is alive; return what was found and every training asked for."""
    calls: list[Call] = []

    def train(
        start: Params, mask: np.ndarray, /, *, replay_lr: bool, held: bool = False, window: int = 0,
        first_step: int = 0, last_step: int | None = None,
    ) -> Walked:  # fmt: skip
        calls.append(Call(start, mask, replay_lr, held, window, first_step, last_step))
        floats = start.floats.copy()
        floats[:SIZE][mask] += np.float32(0.1)
        if not held:
            assert not start.floats[:SIZE][~mask].any(), "a training starts with its dead weights at zero"
        return Walked(Params(floats, start.ints), (start.floats[:SIZE].copy(),) * window)

    found = find(
        chosen, start=ANCHORS["theta_g"], start_name="theta_g", targets=targets, layout=LAYOUT,
        anchors=lambda name: ANCHORS[name], train=train, rng=lambda what: rng.stream(0, what),
        network=lambda at: FakeNetwork(), val_accuracy=val_accuracy,
    )  # fmt: skip
    return list(found), calls
