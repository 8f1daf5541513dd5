"""The division that PFLlib's data set generator makes, example by example, so that its tables can be repeated.

Zhang, Liu, Hua, Wang, Song, Xue, Ma, Guan, Cao: PFLlib, JMLR 2025, arXiv 2312.04992; its utils/dataset_utils.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedlth.data.limits import MAX_TRIES, check_above_zero, check_count
from fedlth.data.parts import Parts
from fedlth.errors import StudyError, wrong

EXDIR_MIN = 10


@dataclass(frozen=True)
class Pfllib:
    """Divide pooled data as PFLlib does, test parts included: `dir` (Dirichlet), `pat` (n classes) or `exdir`.

    dir: each class by its own Dirichlet(alpha) draw, of which clients that have their even share already get nothing.
    pat: `class_per_client` classes each, dealt in order, in equal parts (`balance`) or in random ones. With all classes
    it is PFLlib's iid division.
    exdir: `class_per_client` classes each, drawn, and of each class a Dirichlet(alpha) draw among its holders.
    batch_size and train_ratio decide the smallest client, and train_ratio which part of each client is for training.
    numpy_seed: of numpy's older generator, 1 in PFLlib. A study's `partition.seed` decides what else is drawn.
    """

    kind: str = "dir"
    alpha: float = 0.1
    class_per_client: int = 2
    balance: bool = False
    batch_size: int = 10
    train_ratio: float = 0.75
    numpy_seed: int = 1
    by_key: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.kind not in ("dir", "pat", "exdir"):
            raise wrong("partition.kind", "dir, pat or exdir", self.kind)
        check_above_zero("partition.alpha", self.alpha)
        check_count("partition.class_per_client", self.class_per_client)
        check_count("partition.batch_size", self.batch_size)
        check_count("partition.numpy_seed", self.numpy_seed, 0)
        if not 0 < self.train_ratio < 1:
            raise wrong("partition.train_ratio", "in (0, 1)", self.train_ratio)

    def __call__(
        self, labels: np.ndarray, keys: np.ndarray | None, num_clients: int, rng: np.random.Generator
    ) -> list[Parts]:
        if labels.ndim != 1:
            raise StudyError("partition: pfllib must have one label for each example, got one for each position")
        classes, labels = np.unique(labels, return_inverse=True)  # a class that nobody has is none to deal
        num_classes = classes.size
        if self.kind != "dir" and self.class_per_client > num_classes:
            raise wrong("partition.class_per_client", f"at most the {num_classes} classes", self.class_per_client)
        draws = np.random.RandomState(self.numpy_seed)
        divide: Callable[[np.ndarray, int, int, np.random.RandomState], list[np.ndarray]] = {
            "dir": self._dir, "pat": self._pat, "exdir": self._exdir,
        }[self.kind]  # fmt: skip
        owned = divide(labels, num_classes, num_clients, draws)
        for client, own in enumerate(owned):
            if int(self.train_ratio * len(own)) < 1:
                raise StudyError(f"partition: client {client} must have training examples, got {len(own)} in all")
        return [self._split(own, draws) for own in owned]

    def _split(self, own: np.ndarray, draws: np.random.RandomState) -> Parts:
        """Split as sklearn's train_test_split does: of a permutation the first are for test."""
        num_test = len(own) - int(self.train_ratio * len(own))
        order = own[draws.permutation(len(own))]
        return Parts(np.sort(order[num_test:]), None, np.sort(order[:num_test]))

    def _least(self, size: int, num_clients: int) -> int:
        """Return the examples that every client must have: one batch of test data, where there are enough."""
        return int(min(self.batch_size / (1 - self.train_ratio), size / num_clients / 2))

    def _dir(self, labels: np.ndarray, num_classes: int, n: int, draws: np.random.RandomState) -> list[np.ndarray]:
        holders = [list(range(n))] * num_classes
        return self._dealt(labels, holders, n, draws, self._least(len(labels), n))

    def _dealt(
        self, labels: np.ndarray, holders: list[list[int]], n: int, draws: np.random.RandomState, least: int
    ) -> list[np.ndarray]:
        """Deal each class by a Dirichlet draw among its holders who have room, until every client has `least`."""
        best = 0
        for _ in range(MAX_TRIES):
            own: list[list[np.ndarray]] = [[] for _ in range(n)]
            sizes = np.zeros(n, np.int64)
            for label, holding in enumerate(holders):
                pool = np.flatnonzero(labels == label)
                draws.shuffle(pool)
                shares = draws.dirichlet(np.repeat(self.alpha, n)) * (sizes < len(labels) / n)
                shares = shares * np.isin(np.arange(n), holding)
                if not shares.sum() > 0:
                    raise StudyError(f"partition: no client can hold more of class {label}; raise alpha")
                bounds = (np.cumsum(shares / shares.sum()) * len(pool)).astype(np.int64)[:-1]
                if len(holding) < n and bounds[-1] != len(pool):
                    # Rounding may leave the end of a class to the last client, who may not hold it: its last holder
                    # gets it.
                    bounds[holding[-1] :] = len(pool)
                for client, part in enumerate(np.split(pool, bounds)):
                    own[client].append(part)
                    sizes[client] += len(part)
            if sizes.min() >= least:
                return [np.concatenate(part) for part in own]
            best = max(best, int(sizes.min()))
        raise StudyError(
            f"partition: pfllib {self.kind} with alpha {self.alpha} and {n} clients must leave each at least {least} "
            f"examples, got at best {best} in {MAX_TRIES} draws; raise alpha, or lower the clients"
        )

    def _exdir(self, labels: np.ndarray, num_classes: int, n: int, draws: np.random.RandomState) -> list[np.ndarray]:
        least = max(self.class_per_client * n // num_classes // 2, 1)
        for _ in range(MAX_TRIES):
            holders: list[list[int]] = [[] for _ in range(num_classes)]
            for client in range(n):
                for label in draws.choice(num_classes, self.class_per_client, replace=False):
                    holders[label].append(client)
            if min(map(len, holders)) >= least:
                break
        else:
            raise StudyError(
                f"partition: pfllib exdir must give each class {least} holders, got fewer in {MAX_TRIES} draws; "
                "raise class_per_client or the clients"
            )
        owned = self._dealt(labels, holders, n, draws, EXDIR_MIN)
        for own in owned:
            draws.shuffle(own)
        return owned

    def _pat(self, labels: np.ndarray, num_classes: int, n: int, draws: np.random.RandomState) -> list[np.ndarray]:
        left = [self.class_per_client] * n
        own: list[list[np.ndarray]] = [[] for _ in range(n)]
        holding = int(np.ceil((n / num_classes) * self.class_per_client))
        for label in range(num_classes):
            chosen = [client for client in range(n) if left[client] > 0][:holding]
            if not chosen:
                break
            pool = np.flatnonzero(labels == label)
            even = len(pool) / len(chosen)
            if self.balance:
                sizes = [int(even)] * (len(chosen) - 1)
            else:
                low = int(max(even / 10, self._least(len(labels), n) / num_classes))
                if low >= int(even):
                    raise StudyError(
                        f"partition: pfllib pat must have more examples of class {label} for {len(chosen)} clients, "
                        f"got {len(pool)}"
                    )
                sizes = draws.randint(low, int(even), len(chosen) - 1).tolist()
            bounds = np.cumsum(sizes, dtype=np.int64)
            for client, part in zip(chosen, np.split(pool, bounds), strict=True):
                own[client].append(part)
                left[client] -= 1
        return [np.concatenate(part) if part else np.zeros(0, np.int64) for part in own]
