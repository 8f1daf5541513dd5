"""Laws of the per-client train, validation and test parts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedlth.data.characters import characters
from fedlth.data.dataset import Dataset
from fedlth.data.label_partition import Classes
from fedlth.data.partition import Dirichlet, Iid, NaturalKey, Partition
from fedlth.data.split import Splits, label_counts, split_clients
from fedlth.errors import StudyError


def data(seed: int = 0) -> Dataset:
    rng = np.random.default_rng(seed)
    return Dataset(
        name="numbers",
        x_train=rng.standard_normal((600, 3)).astype(np.float32),
        y_train=rng.permutation(np.repeat(np.arange(10), 60)),
        x_test=rng.standard_normal((200, 3)).astype(np.float32),
        y_test=rng.permutation(np.repeat(np.arange(10), 20)),
        num_classes=10,
    )


def split(dataset: Dataset | None = None, partition: Partition | None = None, **changes: Any) -> Splits:
    settings: dict[str, Any] = {"num_clients": 8, "validation": 0.2, "test_samples": 15, "unseen": 0.25, "seed": 0}
    return split_clients(dataset or data(), partition or Dirichlet(0.3, 10), **settings | changes)


def test_train_and_validation_are_disjoint_and_complete() -> None:
    result = split()
    parts = [part for client in result.clients for part in (client.train, client.val)]
    everything = np.concatenate(parts)
    assert np.array_equal(np.sort(everything), np.arange(600))
    for client in result.clients:
        total = len(client.train) + len(client.val)
        assert len(client.val) == round(0.2 * total) and len(client.train) > 0
        assert all(part.dtype == np.int64 and (np.diff(part) > 0).all() for part in (client.train, client.val))


def test_test_part_follows_the_clients_labels() -> None:
    dataset = data()
    for client in split(dataset, Classes(3), test_samples=30).clients:
        own = dataset.y_train[np.concatenate([client.train, client.val])]
        assert np.bincount(dataset.y_test[client.test], minlength=10).tolist() == [
            10 if label in own else 0 for label in range(10)
        ]
        assert np.unique(client.test).size == client.test.size


def test_largest_remainders_meet_the_number_asked_for() -> None:
    assert all(len(client.test) == 7 for client in split(partition=Iid(), test_samples=7).clients)


def test_a_scarce_class_gives_what_it_has() -> None:
    result = split(partition=Classes(1), test_samples=1000)
    assert all(len(client.test) == 20 for client in result.clients)


def test_unseen_is_a_share_and_never_all() -> None:
    assert len(split(unseen=0.25).unseen) == 2
    assert split(unseen=0.0).unseen == frozenset()
    assert len(split(unseen=0.01).unseen) == 1
    assert len(split(unseen=0.99).unseen) == 7


def test_the_seed_decides_everything() -> None:
    assert split().digest == split().digest
    assert split().digest != split(seed=1).digest


@pytest.mark.parametrize(
    "changes",
    [
        {"num_clients": 9},
        {"validation": 0.3},
        {"test_samples": 14},
        {"unseen": 0.0},
        {"partition": Dirichlet(0.4, 10)},
        {"dataset": replace(data(), x_train=data(1).x_train)},
    ],
)
def test_digest_changes_with_everything(changes: dict[str, Any]) -> None:
    assert split(**changes).digest != split().digest


def test_test_labels_permuted_change_no_train_part() -> None:
    shuffled = replace(data(), y_test=data(5).y_test)
    for before, after in zip(split().clients, split(shuffled).clients, strict=True):
        assert np.array_equal(before.train, after.train) and np.array_equal(before.val, after.val)


def test_natural_keys_test_on_their_own_examples() -> None:
    dataset = characters(roles=6)
    assert dataset.key_train is not None and dataset.key_test is not None
    for role, client in enumerate(split(dataset, NaturalKey(), num_clients=6).clients):
        assert set(dataset.key_train[client.train]) == {role}
        assert set(dataset.key_test[client.test]) == {role}


def test_label_counts_are_of_the_train_part() -> None:
    dataset, result = data(), split()
    for client in result.clients:
        assert sum(label_counts(dataset, client)) == len(client.train)


def test_a_class_that_no_client_can_have_is_refused() -> None:
    with pytest.raises(StudyError, match="data: class 10 must have a training example"):
        split(replace(data(), num_classes=12), Classes(1), num_clients=2)


def test_a_class_that_no_client_drew_works() -> None:
    used = np.concatenate([data().y_test[client.test] for client in split(data(), Classes(1), num_clients=2).clients])
    assert np.unique(used).size == 2


def test_sequence_labels_draw_test_uniformly() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 5, (40, 6))
    dataset = Dataset("sequence", tokens, tokens.copy(), tokens[:20], tokens[:20].copy(), num_classes=5)
    assert all(len(client.test) == 15 for client in split(dataset, Iid(), num_clients=4).clients)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_clients": 0}, "clients.count must be an integer of at least 1, got 0"),
        ({"num_clients": 301}, "clients.count must be at most half of the 600 train examples"),
        ({"validation": 0.0}, "clients.validation must be in"),
        ({"validation": 1}, "clients.validation must be in"),
        ({"test_samples": 0}, "clients.test_samples must be"),
        ({"unseen": 1.0}, "clients.unseen must be in"),
        ({"unseen": 0.5, "num_clients": 1}, "clients.unseen must be 0 when there is only one client"),
    ],
)
def test_impossible_splits_name_the_setting(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        split(**changes)


def test_a_client_with_a_single_example_is_named() -> None:
    dataset = replace(data(), key_train=np.array([0] * 599 + [1]))
    with pytest.raises(StudyError, match="client 1 must have at least 1 train and 1 validation example, got 1"):
        split(dataset, NaturalKey(min_samples=1), num_clients=2)


def test_a_client_without_test_examples_is_named() -> None:
    dataset = data()
    no_nines = dataset.y_test != 9
    dataset = replace(dataset, x_test=dataset.x_test[no_nines], y_test=dataset.y_test[no_nines])
    with pytest.raises(StudyError, match=r"client \d+ must have at least 1 test example"):
        split(dataset, Classes(1), num_clients=10)
