"""How train examples are divided among clients: one frozen part a scheme, and the table that names them.

Every part is called with labels (N,) or (N, T), or real numbers, keys (N,) or None, num_clients and a generator, and
returns one sorted int64 index array a client, or `Parts` where it also says which examples are for validation or test.
Arrays are disjoint; a part that leaves examples out says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from fedlth.data.label_partition import Classes, Shards, one_label_each
from fedlth.data.leaf import Leaf
from fedlth.data.limits import MAX_TRIES, check_above_zero, check_count
from fedlth.data.partition_file import FromFile
from fedlth.data.parts import Parts
from fedlth.data.pfllib import Pfllib
from fedlth.errors import StudyError


class Partition(Protocol):
    """Divide the train examples; `by_key` says that a client's test part follows keys instead of labels."""

    by_key: ClassVar[bool]

    def __call__(
        self, labels: np.ndarray, keys: np.ndarray | None, num_clients: int, rng: np.random.Generator
    ) -> Sequence[np.ndarray | Parts]: ...


@dataclass(frozen=True)
class Iid:
    """Deal the shuffled examples evenly; sizes differ by at most one."""

    by_key: ClassVar[bool] = False

    def __call__(
        self, labels: np.ndarray, keys: np.ndarray | None, num_clients: int, rng: np.random.Generator
    ) -> list[np.ndarray]:
        return [np.sort(part) for part in np.array_split(rng.permutation(len(labels)), num_clients)]


@dataclass(frozen=True)
class Dirichlet:
    """Divide each class over the clients by its own Dirichlet(alpha) draw (Hsu, Qi, Brown, 2019, arXiv 1909.06335).

    Draws are repeated whole until every client has `min_samples`, so the law is the plain one, conditioned.
    """

    alpha: float
    min_samples: int = 10
    by_key: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_above_zero("partition.alpha", self.alpha)
        check_count("partition.min_samples", self.min_samples)

    def __call__(
        self, labels: np.ndarray, keys: np.ndarray | None, num_clients: int, rng: np.random.Generator
    ) -> list[np.ndarray]:
        one_label_each("dirichlet", labels)
        classes, sizes = np.unique(labels, return_counts=True)

        def draw() -> np.ndarray:
            return np.stack([_cuts(_shares(rng, self.alpha, num_clients), size) for size in sizes])

        cuts = _until(draw, self.min_samples, len(labels), num_clients, f"dirichlet alpha {self.alpha}")
        parts: list[list[np.ndarray]] = [[] for _ in range(num_clients)]
        for label, bounds in zip(classes, cuts, strict=True):
            pool = rng.permutation(np.flatnonzero(labels == label))
            for client in range(num_clients):
                parts[client].append(pool[bounds[client] : bounds[client + 1]])
        return [np.sort(np.concatenate(part)) for part in parts]


@dataclass(frozen=True)
class QuantitySkew:
    """Deal iid examples in sizes drawn from Dirichlet(alpha) (Li, Diao, Chen, He, ICDE 2022, arXiv 2102.02079)."""

    alpha: float
    min_samples: int = 10
    by_key: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_above_zero("partition.alpha", self.alpha)
        check_count("partition.min_samples", self.min_samples)

    def __call__(
        self, labels: np.ndarray, keys: np.ndarray | None, num_clients: int, rng: np.random.Generator
    ) -> list[np.ndarray]:
        size = len(labels)

        def draw() -> np.ndarray:
            return _cuts(_shares(rng, self.alpha, num_clients), size)[None]

        bounds = _until(draw, self.min_samples, size, num_clients, f"quantity alpha {self.alpha}")[0]
        order = rng.permutation(size)
        return [np.sort(order[bounds[i] : bounds[i + 1]]) for i in range(num_clients)]


@dataclass(frozen=True)
class NaturalKey:
    """Give each client the examples of one key: the largest keys, clients in sorted key order.

    Equal sizes are taken in key order; keys below `min_samples` are never taken; the rest is left out.
    `clients_per_key` clients in a row share a key, each with an even part of its shuffled examples.
    """

    min_samples: int = 2
    clients_per_key: int = 1
    by_key: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_count("partition.min_samples", self.min_samples)
        check_count("partition.clients_per_key", self.clients_per_key)

    def __call__(
        self, labels: np.ndarray, keys: np.ndarray | None, num_clients: int, rng: np.random.Generator
    ) -> list[np.ndarray]:
        if keys is None:
            raise StudyError("partition: natural must have a data set with natural keys, got one without")
        wanted, odd = divmod(num_clients, self.clients_per_key)
        if odd:
            raise StudyError(
                f"partition.clients_per_key: must divide the {num_clients} clients, got {self.clients_per_key}"
            )
        names, owner, sizes = np.unique(keys, return_inverse=True, return_counts=True)
        enough = int((sizes >= self.min_samples).sum())
        if enough < wanted:
            raise StudyError(
                f"partition: natural with {num_clients} clients, {self.clients_per_key} a key, and min_samples "
                f"{self.min_samples} must have {wanted} keys of that size, got {enough} of {len(names)}"
            )
        taken = np.sort(np.argsort(-sizes, kind="stable")[:wanted])
        held = [np.flatnonzero(owner == key) for key in taken]
        if self.clients_per_key == 1:
            return held
        dealt = [np.array_split(rng.permutation(indices), self.clients_per_key) for indices in held]
        return [np.sort(part) for parts in dealt for part in parts]


@dataclass(frozen=True)
class Own:
    """Give each client the examples that are on its own machine (data.own): their key is the client's number."""

    by_key: ClassVar[bool] = True

    def __call__(
        self, labels: np.ndarray, keys: np.ndarray | None, num_clients: int, rng: np.random.Generator
    ) -> list[np.ndarray]:
        if keys is None:
            raise StudyError("partition: own must have data that live with the clients (data.own), got others")
        return [np.flatnonzero(keys == client) for client in range(num_clients)]


PARTITIONS: dict[str, type] = {
    "iid": Iid,
    "dirichlet": Dirichlet,
    "shards": Shards,
    "classes": Classes,
    "quantity": QuantitySkew,
    "natural": NaturalKey,
    "file": FromFile,
    "pfllib": Pfllib,
    "leaf": Leaf,
    "own": Own,
}


def _shares(rng: np.random.Generator, alpha: float, num_clients: int) -> np.ndarray:
    """Return (num_clients,) shares that sum to one.

    Where numpy's draw leaves float64, the limit stands in for it: equal shares for alpha so large that its sum
    overflows, one owner for alpha so small that all shares round to zero.
    """
    shares = rng.dirichlet(np.full(num_clients, float(alpha)))
    if np.isfinite(shares).all() and abs(float(shares.sum()) - 1) < 1e-6:
        return shares
    return np.full(num_clients, 1 / num_clients) if alpha > 1 else np.eye(num_clients)[rng.integers(num_clients)]


def _cuts(shares: np.ndarray, size: int) -> np.ndarray:
    """Return (num_clients + 1,) int64 bounds that divide `size` examples by `shares`, from 0 to exactly `size`."""
    bounds = np.rint(np.cumsum(shares) * size).astype(np.int64)
    bounds[-1] = size
    return np.concatenate([[0], np.minimum(bounds, size)])


def _until(draw: Callable[[], np.ndarray], min_samples: int, size: int, num_clients: int, what: str) -> np.ndarray:
    """Return the first draw of bounds (rows, num_clients + 1) that leaves every client `min_samples` examples."""
    must = f"partition: {what} with {num_clients} clients must leave each at least {min_samples} of {size} examples"
    if num_clients * min_samples > size:
        raise StudyError(f"{must}, which are {num_clients * min_samples}; lower the clients or min_samples")
    best = 0
    for _ in range(MAX_TRIES):
        bounds = draw()
        smallest = int(np.diff(bounds, axis=1).sum(0).min())
        if smallest >= min_samples:
            return bounds
        best = max(best, smallest)
    raise StudyError(
        f"{must}, got at best {best} in {MAX_TRIES} draws; raise alpha, or lower the clients or min_samples"
    )
