"""Who hears from whom where clients send to one another and no server averages: the senders of a client, by round."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from fedlth.errors import wrong
from fedlth.study.parts import make


class Topology(Protocol):
    """A client's neighbours in one round; a frozen value, a pure function of its arguments."""

    def __call__(self, client: int, others: Sequence[int], rng: np.random.Generator, /) -> Sequence[int]:
        """Return those of `others` that send to `client`.

        `others` are the clients of the federation, sorted, without this one and the unseen; `rng` is drawn for this
        client and round alone.
        """
        ...


@dataclass(frozen=True)
class Ring:
    """The client before and the client after, by number, the last beside the first."""

    def __call__(self, client: int, others: Sequence[int], rng: np.random.Generator, /) -> Sequence[int]:
        if not others:
            return ()
        place = sum(other < client for other in others)
        return sorted({others[place - 1], others[place % len(others)]})


@dataclass(frozen=True)
class RandomNeighbours:
    """`count` others, drawn anew for each client and round; all where there are no more."""

    count: int = 10

    def __post_init__(self) -> None:
        if self.count < 1:
            raise wrong("method.topology.count", "at least 1", self.count)

    def __call__(self, client: int, others: Sequence[int], rng: np.random.Generator, /) -> Sequence[int]:
        count = min(self.count, len(others))
        return sorted(others[int(i)] for i in rng.choice(len(others), size=count, replace=False))


@dataclass(frozen=True)
class Full:
    """Everyone else."""

    def __call__(self, client: int, others: Sequence[int], rng: np.random.Generator, /) -> Sequence[int]:
        return list(others)


TOPOLOGIES: Mapping[str, Callable[..., Topology]] = {"ring": Ring, "random": RandomNeighbours, "full": Full}


def topology_of(spec: str | dict[str, Any]) -> Topology:
    """Return the topology that `method.topology` names."""
    spec = {"name": spec} if isinstance(spec, str) else spec
    found: Topology = make(TOPOLOGIES, spec, "method.topology", has="__call__(client, others, rng)")
    return found
