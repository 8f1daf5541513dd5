"""Each client's train, validation and test parts, who is held out as unseen, and the digest of it all."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np

from fedlth.data.dataset import Dataset
from fedlth.data.factory import told
from fedlth.data.limits import check_count, is_number
from fedlth.data.partition import Partition
from fedlth.data.ragged import IGNORED
from fedlth.errors import StudyError, wrong
from fedlth.rng import stream


@dataclass(frozen=True, eq=False)
class ClientSplit:
    """Hold one client's sorted int64 positions: train and val in x_train (disjoint), test in x_test."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


@dataclass(frozen=True, eq=False)
class Splits:
    """Hold all clients' parts, the ids held out as unseen, and the sha256 hex that two comparable runs share."""

    clients: tuple[ClientSplit, ...]
    unseen: frozenset[int]
    digest: str


def split_clients(
    dataset: Dataset,
    partition: Partition,
    *,
    num_clients: int,
    validation: float,
    test_samples: int,
    unseen: float,
    seed: int,
) -> Splits:
    """Divide a data set among clients.

    validation: share of a client's examples, rounded, at least one and never all.
    test_samples: test images a client, drawn without replacement by the client's label proportions (train and
    validation together) from the data set's own test split (of positions and real numbers: plainly); a class with
    too few gives what it has, and clients may overlap. A partition by key with keys in the test split draws from the
    client's own key instead.
    unseen: share of clients held out, rounded, at least one when above zero.
    seed: of the partition, apart from the run's seed.
    Raises StudyError naming the setting, and the client when one would be empty.
    """
    _check(dataset, num_clients, validation, test_samples, unseen)
    owned = _owned(dataset, partition, num_clients, stream(seed, "partition"))
    labelled = _labelled(dataset)
    clients = []
    for client, indices in enumerate(owned):
        if len(indices) < 2:
            raise StudyError(
                f"partition: client {client} must have at least 1 train and 1 validation example, "
                f"got {len(indices)} in all; ask for fewer clients or a larger minimum"
            )
        train, val = _validation(np.asarray(indices, np.int64), validation, stream(seed, "validation", client=client))
        test = _test(dataset, labelled, partition, indices, test_samples, stream(seed, "test", client=client))
        if len(test) == 0:
            raise StudyError(
                f"clients.test_samples: client {client} must have at least 1 test example of its labels or key, got 0"
            )
        clients.append(ClientSplit(train, val, test))
    drawn = stream(seed, "unseen").choice(num_clients, num_unseen(num_clients, unseen), replace=False)
    held_out = frozenset(int(client) for client in drawn)
    return Splits(tuple(clients), held_out, _digest(clients, held_out, dataset.digest()))


def label_counts(dataset: Dataset, split: ClientSplit) -> list[int]:
    """Return a client's train examples (or positions) of each class, (num_classes,); [] for real numbers."""
    if dataset.targets == "numbers":
        return []
    labels = dataset.y_train[split.train].reshape(-1)
    counts = np.bincount(labels[labels != IGNORED], minlength=dataset.num_classes)
    return [int(n) for n in counts]


def _check(dataset: Dataset, num_clients: int, validation: float, test_samples: int, unseen: float) -> None:
    check_count("clients.count", num_clients)
    if 2 * num_clients > len(dataset.y_train):
        raise wrong("clients.count", f"at most half of the {len(dataset.y_train)} train examples", num_clients)
    if not is_number(validation) or not 0 < validation < 1:
        raise wrong("clients.validation", "in (0, 1)", validation)
    check_count("clients.test_samples", test_samples)
    if not is_number(unseen) or not 0 <= unseen < 1:
        raise wrong("clients.unseen", "in [0, 1)", unseen)
    if dataset.targets == "classes" and not dataset.tokens:  # a vocabulary may hold words that never come
        absent = np.flatnonzero(np.bincount(dataset.y_train, minlength=dataset.num_classes) == 0)
        if absent.size:
            raise StudyError(f"data: class {absent[0]} must have a training example, got none that a client could have")
    if unseen > 0 and num_clients < 2:
        raise wrong("clients.unseen", "0 when there is only one client", unseen)


def _owned(dataset: Dataset, partition: Partition, num_clients: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Return each client's positions in x_train, checked: a user's partition may return anything."""
    try:
        owned = [np.asarray(part) for part in partition(dataset.y_train, dataset.key_train, num_clients, rng)]
    except StudyError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise StudyError(f"partition: {partition!r} raised {told(error)}") from error
    if len(owned) != num_clients:
        raise StudyError(f"partition: must return {num_clients} clients, got {len(owned)}")
    size = len(dataset.y_train)
    taken = np.zeros(size, bool)
    for client, part in enumerate(owned):
        if part.ndim != 1 or (part.size and (part.dtype.kind not in "iu" or part.min() < 0 or part.max() >= size)):
            raise StudyError(
                f"partition: client {client} must get positions in [0, {size}), got {part.dtype} {part.shape}"
            )
        taken[part.astype(np.int64)] = True
    if np.count_nonzero(taken) != sum(map(len, owned)):
        raise StudyError("partition: clients must not share training examples, got some twice")
    return owned


def _validation(indices: np.ndarray, validation: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    count = min(max(1, round(validation * len(indices))), len(indices) - 1)
    order = rng.permutation(indices)
    return np.sort(order[count:]), np.sort(order[:count])


def _labelled(dataset: Dataset) -> list[np.ndarray]:
    """Return the positions in x_test of each class; none where labels are not one an example."""
    if dataset.targets != "classes":
        return []
    order = np.argsort(dataset.y_test, kind="stable")
    return np.split(order, np.cumsum(np.bincount(dataset.y_test, minlength=dataset.num_classes))[:-1])


def _test(
    dataset: Dataset, labelled: list[np.ndarray], partition: Partition, indices: np.ndarray, test_samples: int,
    rng: np.random.Generator,
) -> np.ndarray:  # fmt: skip
    """Return sorted positions in x_test, at most `test_samples`."""
    if getattr(partition, "by_key", False) and dataset.key_train is not None and dataset.key_test is not None:
        own = np.flatnonzero(np.isin(dataset.key_test, np.unique(dataset.key_train[indices])))
        return np.sort(rng.choice(own, min(test_samples, len(own)), replace=False))
    if dataset.targets != "classes":
        everything = len(dataset.y_test)
        return np.sort(rng.choice(everything, min(test_samples, everything), replace=False))
    counts = np.bincount(dataset.y_train[indices], minlength=dataset.num_classes)
    picks = []
    for label, quota in enumerate(_apportion(counts, test_samples)):
        pool = labelled[label] if label < len(labelled) else np.zeros(0, np.int64)
        picks.append(rng.choice(pool, min(int(quota), len(pool)), replace=False))
    return np.sort(np.concatenate(picks))


def _apportion(counts: np.ndarray, total: int) -> np.ndarray:
    """Return integers proportional to `counts` that sum to `total`: largest remainder, ties to the lower class."""
    exact = counts * total
    quota: np.ndarray = exact // counts.sum()
    remainder = exact - quota * counts.sum()
    quota[np.argsort(-remainder, kind="stable")[: total - int(quota.sum())]] += 1
    return quota


def num_unseen(num_clients: int, unseen: float) -> int:
    """Return how many clients a share of them is: rounded, at least one, and one must stay."""
    return min(max(1, round(unseen * num_clients)), num_clients - 1) if unseen else 0


def _digest(clients: list[ClientSplit], unseen: frozenset[int], dataset: str) -> str:
    state = hashlib.sha256()
    state.update(json.dumps([len(clients), sorted(unseen), dataset]).encode())
    for split in clients:
        for part in (split.train, split.val, split.test):
            state.update(len(part).to_bytes(8, "little"))
            state.update(part.astype("<i8").tobytes())
    return state.hexdigest()
