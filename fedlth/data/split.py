"""Each client's train, validation and test parts, who is held out as unseen, and the digest of it all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedlth.data.dataset import Dataset
from fedlth.data.factory import told
from fedlth.data.limits import check_count, is_number
from fedlth.data.partition import Partition
from fedlth.data.partition_file import FromFile
from fedlth.data.parts import Parts
from fedlth.data.ragged import IGNORED
from fedlth.errors import StudyError, wrong
from fedlth.rng import stream


@dataclass(frozen=True, eq=False)
class ClientSplit:
    """Hold one client's sorted int64 positions: train and val (disjoint) in x_train, test in x_test.

    With own tests all three are in x_train, and disjoint.
    """

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


@dataclass(frozen=True, eq=False)
class Splits:
    """Hold all clients' parts, the ids held out as unseen, and the sha256 hex that two comparable runs share.

    own_test: test parts are positions in x_train. given: which of "val" and "test" the partition or the data set has
    divided.
    noisy: the ids of clients with wrong labels.
    apart: each client's examples are on its own machine; here are their numbers, or one client's examples.
    """

    clients: tuple[ClientSplit, ...]
    unseen: frozenset[int]
    digest: str
    own_test: bool = False
    given: frozenset[str] = frozenset()
    noisy: tuple[int, ...] = ()
    apart: bool = False

    @property
    def name(self) -> str:
        """What a job calls the data set and its division: equal names mean equal examples; none where they differ."""
        return "" if self.apart else self.digest[:16]


def split_clients(
    dataset: Dataset,
    partition: Partition,
    *,
    num_clients: int,
    validation: float,
    test_samples: int,
    unseen: float,
    seed: int,
    own_test: bool = False,
    test_share: float = 0.2,
) -> Splits:
    """Divide a data set among clients.

    own_test: the test part is a share of the client's own examples, rounded, at least one. Otherwise it is
    `test_samples` images drawn without replacement by the client's label proportions (train and validation together)
    from the data set's own test split (of positions and real numbers: plainly); a class with too few gives what it has,
    and clients may overlap. A partition by key with keys in the test split draws from the client's own key instead.
    validation: share of a client's examples (of what the test part leaves), rounded, at least one and never all; 0:
    none.
    unseen: share of clients held out, rounded, at least one when above zero.
    seed: of the partition, apart from the run's seed.
    What the partition itself divides (Parts), or the data set (val_train), is not drawn. Raises StudyError naming the
    setting, and the client when one would be empty.
    """
    _check(dataset, num_clients, validation, test_samples, unseen, own_test, test_share)
    owned = _owned(dataset, partition, num_clients, own_test, stream(seed, "partition"))
    if dataset.val_train is not None and validation > 0:
        owned = [held_apart(part, dataset.val_train) for part in owned]
    labelled = positions_of_classes(dataset)
    clients = []
    for client, part in enumerate(owned):
        clients.append(
            split_client(
                dataset, labelled, partition, part, client, validation=validation, test_samples=test_samples, seed=seed,
                own_test=own_test, test_share=test_share,
            )
        )  # fmt: skip
    held_out = drawn_unseen(partition, num_clients, unseen, stream(seed, "unseen"))
    given = frozenset(n for n in ("val", "test") if all(getattr(part, n) is not None for part in owned))
    digest = digest_of(clients, held_out, dataset.digest(), own_test)
    return Splits(tuple(clients), held_out, digest, own_test, given)


def split_client(
    dataset: Dataset, labelled: list[np.ndarray], partition: Partition, part: Parts, client: int, *, validation: float,
    test_samples: int, seed: int, own_test: bool, test_share: float,
) -> ClientSplit:  # fmt: skip
    """Return one client's parts of what it owns; what is drawn is the client's alone, whoever else there is."""
    if own_test and dataset.overlapping:
        raise StudyError(
            "clients.test: own would test on windows that share values with those that train; take clients.test: split,"
            " or windows that do not overlap (data.options.stride above length)"
        )
    _check_size(client, part, validation, own_test)
    test, rest = part.test, part.train
    if test is None and own_test:
        most = len(rest) - 1 - (part.val is None and validation > 0)
        rest, test = _drawn(rest, test_share, most, stream(seed, "test", client=client))
    train, val = rest, part.val
    if val is None:
        train, val = _drawn(rest, validation, len(rest) - 1, stream(seed, "validation", client=client))
    if test is None:
        has = part.train if part.val is None else np.concatenate([part.train, part.val])
        test = _test(dataset, labelled, partition, has, test_samples, stream(seed, "test", client=client))
        if len(test) == 0:
            raise StudyError(
                f"clients.test_samples: client {client} must have at least 1 test example of its labels or key, got 0"
            )
    return ClientSplit(*(np.sort(one) for one in (train, val, test)))


def absent_classes(dataset: Dataset) -> list[int]:
    """Return the classes without any training example; a vocabulary may hold words that never come."""
    if dataset.targets != "classes" or dataset.tokens:
        return []
    return np.flatnonzero(np.bincount(dataset.y_train, minlength=dataset.num_classes) == 0).tolist()


def label_counts(dataset: Dataset, split: ClientSplit) -> list[int]:
    """Return a client's train examples (or positions) of each class, (num_classes,); [] for real numbers."""
    if dataset.targets == "numbers":
        return []
    labels = dataset.y_train[split.train].reshape(-1)
    counts = np.bincount(labels[labels != IGNORED], minlength=dataset.num_classes)
    return [int(n) for n in counts]


def _check(
    dataset: Dataset, num_clients: int, validation: float, test_samples: int, unseen: float, own_test: bool,
    test_share: float,
) -> None:  # fmt: skip
    check_count("clients.count", num_clients)
    least = 1 + (validation > 0) + own_test
    if least * num_clients > len(dataset.y_train):
        most = {1: "", 2: "half of ", 3: "a third of "}[least]
        raise wrong("clients.count", f"at most {most}the {len(dataset.y_train)} train examples", num_clients)
    if not is_number(validation) or not 0 <= validation < 1:
        raise wrong("clients.validation", "in [0, 1)", validation)
    check_count("clients.test_samples", test_samples)
    if not is_number(test_share) or not 0 < test_share < 1:
        raise wrong("clients.test_share", "in (0, 1)", test_share)
    if not is_number(unseen) or not 0 <= unseen < 1:
        raise wrong("clients.unseen", "in [0, 1)", unseen)
    if unseen > 0 and num_clients < 2:
        raise wrong("clients.unseen", "0 when there is only one client", unseen)


def _check_size(client: int, part: Parts, validation: float, own_test: bool) -> None:
    """Refuse a client too small for the parts that are drawn from its examples, or with a given part that is empty."""
    drawn = {
        "train": True, "validation": part.val is None and validation > 0, "test": part.test is None and own_test,
    }  # fmt: skip
    names = [name for name, is_drawn in drawn.items() if is_drawn]
    if len(part.train) < len(names):
        wanted = " and ".join(f"1 {name}" for name in names)
        raise StudyError(
            f"partition: client {client} must have at least {wanted} example, got {len(part.train)} in all; "
            "ask for fewer clients or a larger minimum"
        )
    for name, given, needed in (("validation", part.val, validation > 0), ("test", part.test, True)):
        if given is not None and not len(given) and needed:
            raise StudyError(f"partition: client {client} must have at least 1 {name} example, got 0")


def _owned(
    dataset: Dataset, partition: Partition, num_clients: int, own_test: bool, rng: np.random.Generator
) -> list[Parts]:
    """Return each client's positions, checked: a user's partition may return anything."""
    if isinstance(partition, FromFile):
        partition.check(dataset.digest(), own_test)
    try:
        owned = list(partition(dataset.y_train, dataset.key_train, num_clients, rng))
        found = [part if isinstance(part, Parts) else Parts(np.asarray(part)) for part in owned]
    except StudyError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise StudyError(f"partition: {partition!r} raised {told(error)}") from error
    if len(found) != num_clients:
        raise StudyError(f"partition: must return {num_clients} clients, got {len(found)}")
    size = len(dataset.y_train)
    taken = np.zeros(size, bool)
    for client, part in enumerate(found):
        if part.test is not None and part.own_test != own_test:
            raise StudyError(
                f"partition: {partition!r} gives test parts of the clients' {'own' if part.own_test else 'test split'} "
                f"examples: clients.test must be {'own' if part.own_test else 'split'}"
            )
        for name in ("train", "val", "test"):
            positions, inside = getattr(part, name), len(dataset.y_test) if name == "test" and not own_test else size
            if positions is None:
                continue
            if positions.ndim != 1 or (
                positions.size
                and (positions.dtype.kind not in "iu" or positions.min() < 0 or positions.max() >= inside)
            ):
                whole = positions.ndim == 1 and positions.dtype.kind in "iu"
                got = f"{positions.min()} to {positions.max()}" if whole else f"{positions.dtype} {positions.shape}"
                raise StudyError(f"partition: client {client} must get positions in [0, {inside}), got {got}")
            if name == "test" and not own_test:
                if np.unique(positions).size < positions.size:
                    raise StudyError(f"partition: client {client} must have each test example once, got some twice")
                continue
            given, times = np.unique(positions.astype(np.int64), return_counts=True)
            if twice := [*given[taken[given]], *given[times > 1]]:
                raise StudyError(
                    f"partition: clients must not share training examples, got position {twice[0]} twice, "
                    f"the second time for client {client}"
                )
            taken[given] = True
    return [part.as_int64() for part in found]


def _drawn(indices: np.ndarray, share: float, most: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return what is left and what is drawn: a share, rounded, from one (none for share 0) to `most`."""
    count = min(max(1, round(share * len(indices))), most) if share else 0
    order = rng.permutation(indices)
    return np.sort(order[count:]), np.sort(order[:count])


def held_apart(part: Parts, held: np.ndarray) -> Parts:
    """Return a client's parts with the validation examples that the data set sets apart, where it has any of them."""
    mine = held[part.train]
    return (
        part if part.val is not None or not mine.any() else replace(part, train=part.train[~mine], val=part.train[mine])
    )


def drawn_unseen(partition: Partition, num_clients: int, unseen: float, rng: np.random.Generator) -> frozenset[int]:
    wanted = num_unseen(num_clients, unseen)
    given = partition.unseen if isinstance(partition, FromFile) else None
    if given is None:
        return frozenset(int(client) for client in rng.choice(num_clients, wanted, replace=False))
    if len(given) != wanted or any(client >= num_clients for client in given):
        raise StudyError(
            f"clients.unseen: must be the share that gives the {len(given)} unseen clients of {partition}, got {unseen}"
        )
    return frozenset(given)


def positions_of_classes(dataset: Dataset) -> list[np.ndarray]:
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


def num_sampled(wanted: int | float, taking_part: int) -> int:
    """Return how many clients a count is, or a share of those that take part: rounded, at least one."""
    return max(1, round(wanted * taking_part)) if isinstance(wanted, float) else wanted


def digest_of(clients: Sequence[ClientSplit], unseen: frozenset[int], dataset: str, own_test: bool) -> str:
    """Return the sha256 hex of a division of the data set with the digest `dataset`."""
    state = hashlib.sha256()
    state.update(json.dumps([len(clients), sorted(unseen), dataset, *(["own"] if own_test else [])]).encode())
    for split in clients:
        for part in (split.train, split.val, split.test):
            state.update(len(part).to_bytes(8, "little"))
            state.update(part.astype("<i8").tobytes())
    return state.hexdigest()
