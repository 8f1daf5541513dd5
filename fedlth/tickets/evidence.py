"""What a score may look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedlth.errors import StudyError
from fedlth.models.layout import Layout
from fedlth.tickets.granularity import Groups


class Network(Protocol):
    """A network and its training data, as scores ask them. All that is no prunable weight is as it stood.

    Every `weights` and every answer is (num_prunable,) over the prunable prefix of the layout.
    """

    def gradient(self, weights: np.ndarray, /) -> np.ndarray:
        """Return the gradient of the mean training loss, float32."""
        ...

    def hessian_gradient(self, weights: np.ndarray, /, *, temperature: float) -> np.ndarray:
        """Return H g, float64: Hessian times gradient of the loss of logits / temperature."""
        ...

    def squared_gradient(self, weights: np.ndarray, /) -> np.ndarray:
        """Return the mean over examples of the squared gradient of one example's loss, float64."""
        ...

    def flow(self, weights: np.ndarray, /) -> np.ndarray:
        """Return d R / d |w|, float64, R the sum of the logits at an input of ones, every weight made positive."""
        ...

    def gammas(self) -> np.ndarray:
        """Return |gamma| of the norm layer that follows each weight's output unit, float32."""
        ...

    def flops(self) -> np.ndarray:
        """Return the forward FLOPs an example that each weight costs, float64."""
        ...

    def learn(self, weights: np.ndarray, lesson: Lesson, /) -> np.ndarray:
        """Return the scores (float32, higher is kept) that a training of masks over frozen `weights` ends with."""
        ...


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """A training of masks over weights that never change. `alive` and `density` say what a mask may hold.
    It lasts `epochs`, and `steps` more.

    `rule` is how scores become a mask in the forward pass: "edge_popup", "biprop", "bernoulli" or
    "threshold".
    """

    rule: str
    alive: np.ndarray
    density: float
    epochs: int
    lr: float
    steps: int = 0
    momentum: float = 0.0
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Evidence:
    """All arrays are (num_prunable,) float32 over the prunable prefix of `layout`.

    `init` is theta_0, `start` is where this training began, `now` is where it ended, `mask` says what is alive.
    `gradient` returns the loss gradient at given weights on the client's own training data. `density` is what the
    score will be cut to. `previous` holds the weights after the last epochs before `now`, oldest first, as many as
    the score's `window` asks for. `groups` says which weights stay or go as one. `at_start` and `at_now` are the
    network with all its other tensors as they stood.
    """

    layout: Layout
    init: np.ndarray
    start: np.ndarray
    now: np.ndarray
    mask: np.ndarray
    gradient: Callable[[np.ndarray], np.ndarray]
    rng: np.random.Generator
    density: float = 1.0
    previous: tuple[np.ndarray, ...] = ()
    groups: Groups | None = None
    at_start: Network | None = None
    at_now: Network | None = None


def needed(network: Network | None, part: object) -> Network:
    """Return the network that a part asks for; raise StudyError where whoever searches has none to hand."""
    if network is None:
        raise StudyError(f"finder: {type(part).__name__} needs the network, which is not available here")
    return network
