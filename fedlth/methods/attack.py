"""Hostile clients (`attack` of a study): what they change of what they are about to send, or of what they train on.

They do a client's work as all others do, know what a client knows (its state, its data, what it was sent, the study),
and act in the federated rounds alone, on every message that a round has them send. Colluders share a random stream.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from fedlth import rng
from fedlth.data.examples import Examples
from fedlth.errors import wrong
from fedlth.methods.client_update import UPDATE, Update
from fedlth.models.layout import Layout
from fedlth.training.local_client import LocalClient
from fedlth.wire.payload import Content


@dataclass(frozen=True)
class Aim:
    """What an attack knows beside the client: the message's kind and layout, and what came down as the global state.

    `own_mask`: a client may send other weights than it was sent. `name` is the message's. `range`: the least and the
    most that each number of it may be, else it is refused; None for anything.
    """

    kind: str
    layout: Layout
    received: Content
    own_mask: bool = False
    name: str = UPDATE
    range: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def moves_state(self) -> bool:
        """Say whether the message is the state that came, moved; a change, a score or a statistic is none."""
        return self.name == UPDATE and self.kind in ("values", "thresholds")

    def stream(self, what: str) -> str:
        """Name a random stream of this message."""
        return what if self.name == UPDATE else f"{what} {self.name}"


class Attack(Protocol):
    """A frozen value: what a hostile client sends in the place of its honest message.

    An attribute `poison(examples, num_classes)` may return other training examples than the client has.
    """

    def __call__(self, local: LocalClient, content: Content, aim: Aim, /) -> Content: ...


def _old(aim: Aim) -> np.ndarray:
    """Return the parameters that came, (num_params,) float64; 0 for what is no new value of them, such as scores."""
    cut, came = aim.layout.num_params, aim.received.floats
    if not aim.moves_state or came is None:
        return np.zeros(cut)
    found: np.ndarray = came[:cut].astype(np.float64)
    return found


def _moved(content: Content, aim: Aim) -> np.ndarray:
    """Return how far the parameters that are sent lie from what came, (num_params,) float64; 0 where none is sent."""
    assert content.floats is not None
    away: np.ndarray = (content.floats[: aim.layout.num_params] - _old(aim)) * aim.layout.over_params(content.mask)
    return away


def _sent(content: Content, aim: Aim, moved: np.ndarray) -> Content:
    """Return the content with parameters that lie `moved` (num_params,) from what came; buffers stay honest."""
    assert content.floats is not None
    floats = content.floats.copy()
    places = aim.layout.over_params(content.mask)
    floats[: aim.layout.num_params] = ((_old(aim) + moved) * places).astype(np.float32)
    return replace(content, floats=floats)


@dataclass(frozen=True)
class SignFlip:
    """Send the update with its sign turned, `scale` times as long; of a mask the weights that it leaves out."""

    scale: float = 1.0

    def __post_init__(self) -> None:
        _check_scale(self.scale)

    def __call__(self, local: LocalClient, content: Content, aim: Aim, /) -> Content:
        if content.floats is None:
            return replace(content, mask=~content.mask)
        return _sent(content, aim, -self.scale * _moved(content, aim))


@dataclass(frozen=True)
class Gaussian:
    """Send normal noise in the place of the update, `scale` times as large as it; of a mask a random one as large."""

    scale: float = 10.0

    def __post_init__(self) -> None:
        _check_scale(self.scale)

    def __call__(self, local: LocalClient, content: Content, aim: Aim, /) -> Content:
        draw = local.rng(aim.stream("attack"))
        if content.floats is None:
            return replace(content, mask=draw.permutation(content.mask))
        moved = _moved(content, aim)
        if not moved.size:
            return content  # statistics of a model without norms
        size = math.sqrt(float(np.mean(moved**2)))
        return _sent(content, aim, draw.normal(0.0, self.scale * size, moved.size))


@dataclass(frozen=True)
class LabelFlip:
    """Train on examples of class y as if they were of the last class but y; what is sent is trained honestly.

    Tolpegin, Truex, Gursoy, Liu, ESORICS 2020, arXiv 2007.08432; the classes that Fang et al. swap (arXiv 1911.11815).
    """

    def __call__(self, local: LocalClient, content: Content, aim: Aim, /) -> Content:
        return content

    def poison(self, examples: Examples, num_classes: int) -> Examples:
        """Return the same inputs with wrong labels; a position without a label has none."""
        y = examples.y
        return replace(examples, y=y.where(y < 0, num_classes - 1 - y))


@dataclass(frozen=True)
class ColludingMask:
    """Colluders send one mask, random and of `density`, and one set of values, `scale` times as large as theta_0's.

    Both are drawn anew each round, for each message. Where a client may send only what it was sent, its mask stays, and
    the values are one set. Of bare masks the mask alone is sent.
    """

    density: float = 0.5
    scale: float = 1.0

    def __post_init__(self) -> None:
        _check_scale(self.scale)
        if not 0 < self.density <= 1:
            raise wrong("attack.density", "in (0, 1]", self.density)

    def __call__(self, local: LocalClient, content: Content, aim: Aim, /) -> Content:
        draw = rng.stream(local.task.study.seed, aim.stream("colluders"), local.round)
        size, mask = aim.layout.num_prunable, content.mask
        drawn = np.zeros(size, bool)
        drawn[draw.permutation(size)[: round(self.density * size)]] = True
        if aim.own_mask or content.floats is None:
            mask = drawn
        if content.floats is None:
            return replace(content, mask=mask)
        cut, start = aim.layout.num_params, local.task.theta_0.floats[: local.task.layout.num_params]
        values = draw.normal(0.0, self.scale * math.sqrt(float(np.mean(start.astype(np.float64) ** 2))), cut)
        floats = content.floats.copy()
        floats[:cut] = (values * aim.layout.over_params(mask)).astype(np.float32)
        return Content(mask, floats, content.ints)


def _check_scale(scale: float) -> None:
    if not 0 < scale < math.inf:
        raise wrong("attack.scale", "above 0", scale)


ATTACKS: Mapping[str, Callable[..., Attack]] = {
    "sign_flip": SignFlip,
    "gaussian": Gaussian,
    "label_flip": LabelFlip,
    "colluding_mask": ColludingMask,
}


def attacked(
    attack: Any, local: LocalClient, update: Update, sends: tuple[tuple[str, str], ...], aim: Callable[[str, str], Aim]
) -> Update:
    """Return an update as a hostile client sends it: each of its messages, whose (name, kind) `aim` is asked for."""
    made, sent = update.contents, dict[str, Content]()
    for name, kind in sends:
        if name in made:
            aimed = aim(name, kind)
            sent[name] = _within(attack(local, made[name], aimed), aimed)
    return replace(update, contents={**made, **sent})


def _within(content: Content, aim: Aim) -> Content:
    """Return the content with its numbers drawn into their range: what lies outside would cost the attacker alone."""
    if content.floats is None or aim.range is None:
        return content
    floats = np.clip(content.floats, *aim.range).astype(np.float32)
    floats[: content.mask.size] *= content.mask
    return replace(content, floats=floats)
