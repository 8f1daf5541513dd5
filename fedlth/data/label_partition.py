"""Partitions that give each client a fixed number of label groups: LotteryFL's shards, and exactly n classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedlth.data.limits import check_count, check_share
from fedlth.errors import StudyError, wrong


@dataclass(frozen=True)
class Shards:
    """Deal shards of the label-sorted train set, `shards_per_client` each (LotteryFL, Li et al., arXiv 2008.03371).

    A client's first shard is whole, later ones keep int(unbalance * shard_size) examples. Two shards may share a
    label, as in the released code. Shards nobody drew, and what truncation cuts, are left out.
    """

    shard_size: int
    shards_per_client: int = 2
    unbalance: float = 1.0
    by_key: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_count("partition.shard_size", self.shard_size)
        check_count("partition.shards_per_client", self.shards_per_client)
        check_share("partition.unbalance", self.unbalance)

    def __call__(
        self, labels: np.ndarray, keys: np.ndarray | None, num_clients: int, rng: np.random.Generator
    ) -> list[np.ndarray]:
        one_label_each("shards", labels)
        wanted, there = num_clients * self.shards_per_client, len(labels) // self.shard_size
        if wanted > there:
            raise StudyError(
                f"partition: shards with {num_clients} clients x {self.shards_per_client} shards of "
                f"{self.shard_size} must have {wanted} shards, got {there} from {len(labels)} examples"
            )
        by_label = np.argsort(labels, kind="stable")
        later = _kept(self.unbalance, self.shard_size, "shard_size")
        parts = []
        for drawn in rng.permutation(there)[:wanted].reshape(num_clients, -1):
            starts = drawn * self.shard_size
            sizes = [self.shard_size] + [later] * (self.shards_per_client - 1)
            pieces = [by_label[start : start + size] for start, size in zip(starts, sizes, strict=True)]
            parts.append(np.sort(np.concatenate(pieces)))
        return parts


@dataclass(frozen=True)
class Classes:
    """Give each client exactly `classes_per_client` labels and all clients equally many examples.

    A client's main label has m examples, each other int(unbalance * m); m is the largest that every class can serve,
    and what is over is left out. Labels are dealt so that their numbers of holders differ by at most one; with fewer
    slots than classes some classes have no holder.
    """

    classes_per_client: int
    unbalance: float = 1.0
    by_key: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_count("partition.classes_per_client", self.classes_per_client)
        check_share("partition.unbalance", self.unbalance)

    def __call__(
        self, labels: np.ndarray, keys: np.ndarray | None, num_clients: int, rng: np.random.Generator
    ) -> list[np.ndarray]:
        one_label_each("classes", labels)
        classes, sizes = np.unique(labels, return_counts=True)
        if self.classes_per_client > len(classes):
            raise wrong(
                "partition.classes_per_client",
                f"at most {len(classes)}, the classes of the train set",
                self.classes_per_client,
            )
        held, mains = self._deal(len(classes), num_clients, rng)
        main, minor = self._quota(sizes, held, mains, num_clients)
        parts: list[list[np.ndarray]] = [[] for _ in range(num_clients)]
        for c, label in enumerate(classes):
            pool = rng.permutation(np.flatnonzero(labels == label))
            for client in np.flatnonzero(held[:, c]):
                quota = main if mains[client] == c else minor
                parts[client].append(pool[:quota])
                pool = pool[quota:]
        return [np.sort(np.concatenate(part)) for part in parts]

    def _deal(self, num_classes: int, num_clients: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return who holds what (num_clients, num_classes) bool and each client's main class (num_clients,)."""
        held = np.zeros((num_clients, num_classes), bool)
        mains = np.zeros(num_clients, np.int64)
        uses, main_uses = np.zeros(num_classes, np.int64), np.zeros(num_classes, np.int64)
        for client in range(num_clients):
            # Least used first, ties at random: every class is dealt before any is dealt once more.
            picks = np.lexsort((rng.random(num_classes), uses))[: self.classes_per_client]
            held[client, picks] = True
            uses[picks] += 1
            mains[client] = picks[np.argmin(main_uses[picks])]
            main_uses[mains[client]] += 1
        return held, mains

    def _quota(self, sizes: np.ndarray, held: np.ndarray, mains: np.ndarray, num_clients: int) -> tuple[int, int]:
        """Return the examples of a main and of another label: the largest that every class can serve."""
        as_main = np.bincount(mains, minlength=len(sizes))
        as_minor = held.sum(0) - as_main
        for main in range(int(sizes.max()), 0, -1):
            minor = int(self.unbalance * main)
            if minor >= 1 and (as_main * main + as_minor * minor <= sizes).all():
                return main, minor
        raise StudyError(
            f"partition: classes with {num_clients} clients, {self.classes_per_client} classes each and unbalance "
            f"{self.unbalance} must leave an example for every label of a client, got {int(sizes.sum())} in all"
        )


def one_label_each(name: str, labels: np.ndarray) -> None:
    """Raise StudyError where examples have no one class each that a partition could follow."""
    if labels.dtype.kind == "f":
        raise StudyError(f"partition: {name} must have classes as targets, got real numbers; iid, quantity or natural")
    if labels.ndim != 1:
        raise StudyError(f"partition: {name} must have one label for each example, got one for each position")


def _kept(share: float, size: int, name: str) -> int:
    kept = int(share * size)
    if kept < 1:
        raise wrong("partition.unbalance", f"large enough to keep an example of {name} {size}", share)
    return kept
