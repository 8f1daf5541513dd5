"""Shadow clients: clients that an attacker makes up, of examples that no client of the run has trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedlth.data.dataset import Dataset
from fedlth.data.split import ClientSplit, Splits
from fedlth.rng import stream
from fedlth.training.task import Task


def shadow_task(task: Task, seed: int, count: int) -> Task:
    """Return the task with `count` shadow clients in the place of the run's own.

    Each has the label counts of a random client of the run, its classes under other names, at random. Its examples are
    of the data set's test split: auxiliary data of the same distribution. A class with too few there repeats some.
    """
    dataset, profiles = task.dataset, _profiles(task)
    labelled = [np.flatnonzero(dataset.y_test == label) for label in range(dataset.num_classes)]
    clients = tuple(_drawn(profiles, labelled, stream(seed, "audit/shadow", client=i)) for i in range(count))
    splits = Splits(clients, frozenset(), f"shadows of {task.splits.digest}")
    return replace(task, dataset=_turned(dataset), splits=splits, clients=tuple(range(count)))


def _profiles(task: Task) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return how many training and validation examples of each class every client of the run has."""
    y, most = task.dataset.y_train, task.dataset.num_classes
    return [
        (np.bincount(y[one.train], minlength=most), np.bincount(y[one.val], minlength=most))
        for one in task.splits.clients
    ]


def _drawn(
    profiles: Sequence[tuple[np.ndarray, np.ndarray]], labelled: Sequence[np.ndarray], rng: np.random.Generator
) -> ClientSplit:
    train, val = profiles[int(rng.integers(len(profiles)))]
    there = np.array([len(pool) > 0 for pool in labelled])
    order = rng.permutation(len(labelled))
    order = np.concatenate((order[there[order]], order[~there[order]]))  # classes without test examples come last
    ranked = np.argsort(-(train + val), kind="stable")
    parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for label, like in zip(order, ranked, strict=True):
        wanted, pool = int(train[like] + val[like]), rng.permutation(labelled[label])
        if not wanted or not len(pool):
            continue
        found = np.resize(pool, wanted)  # the pool again and again, where it is too small
        parts[0].append(found[: train[like]])
        parts[1].append(found[train[like] :])
    none = np.zeros(0, np.int64)
    own, held = (np.sort(np.concatenate((none, *part))) for part in parts)
    return ClientSplit(own, held, none)


def _turned(dataset: Dataset) -> Dataset:
    """Return the data set with its test split as what is trained on."""
    return replace(
        dataset, x_train=dataset.x_test, y_train=dataset.y_test, key_train=dataset.key_test,
        lengths_train=dataset.lengths_test, val_train=None,
    )  # fmt: skip


def present(task: Task, client: int) -> np.ndarray:
    """Return (num_classes,) bool: of which classes a client has training examples."""
    found = np.bincount(task.dataset.y_train[task.splits.clients[client].train], minlength=task.dataset.num_classes)
    present: np.ndarray = found > 0
    return present
