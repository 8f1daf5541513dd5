"""Laws of the per-client train, validation and test parts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedlth.data.characters import characters
from fedlth.data.dataset import Dataset, pooled
from fedlth.data.label_noise import with_noise
from fedlth.data.label_partition import Classes
from fedlth.data.partition import Dirichlet, Iid, NaturalKey, Partition
from fedlth.data.pfllib import Pfllib
from fedlth.data.split import Splits, absent_classes, label_counts, num_sampled, split_clients
from fedlth.errors import StudyError
from fedlth.study.sections import LabelNoise


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


def with_holes() -> Dataset:
    """Labels 0 to 9 as 0, 2, 4 ... 18, of 25 classes."""
    made = data()
    return replace(made, y_train=2 * made.y_train, y_test=2 * made.y_test, num_classes=25)


@pytest.mark.parametrize(
    "partition",
    [Iid(), Classes(2), Dirichlet(0.5, min_samples=2), Pfllib("pat", class_per_client=2, batch_size=1)],
    ids=repr,
)
def test_a_class_without_examples_changes_no_division(partition: Partition) -> None:
    own = {"own_test": True} if isinstance(partition, Pfllib) else {}
    plain, holes = (split(one, partition, num_clients=5, **own) for one in (data(), with_holes()))
    for one, other in zip(plain.clients, holes.clients, strict=True):
        assert np.array_equal(one.train, other.train) and np.array_equal(one.test, other.test)
        counts = label_counts(with_holes(), other)
        assert counts[:20:2] == label_counts(data(), one) and len(counts) == 25
    assert absent_classes(with_holes()) == [*range(1, 19, 2), *range(19, 25)] and absent_classes(data()) == []


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
        ({"validation": -0.1}, "clients.validation must be in"),
        ({"test_share": 0.0}, "clients.test_share must be in"),
        ({"num_clients": 201, "own_test": True}, "clients.count must be at most a third of the 600 train examples"),
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


def test_own_tests_are_disjoint_from_train_and_validation_and_all_is_used() -> None:
    result = split(own_test=True, test_share=0.25, validation=0.5)
    parts = [part for c in result.clients for part in (c.train, c.val, c.test)]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(600)) and result.own_test
    assert all((np.diff(part) > 0).all() and part.size for part in parts)
    for client in result.clients:
        total = len(client.train) + len(client.val) + len(client.test)
        assert len(client.test) == round(0.25 * total)
        assert len(client.val) == max(1, round(0.5 * (total - len(client.test))))  # of what remains


def test_own_tests_leave_an_example_for_each_other_part() -> None:
    tiny = replace(data(), key_train=np.repeat(np.arange(200), 3))
    for client in split(tiny, NaturalKey(), num_clients=200, own_test=True, test_share=0.9).clients:
        assert (len(client.train), len(client.val), len(client.test)) == (1, 1, 1)
    with pytest.raises(StudyError, match="client 0 must have at least 1 train and 1 validation and 1 test example"):
        split(replace(tiny, key_train=np.arange(600) // 2), NaturalKey(), num_clients=8, own_test=True)


def test_no_validation_leaves_all_but_the_test_part_to_training() -> None:
    result = split(validation=0, own_test=True)
    assert all(len(client.val) == 0 for client in result.clients)
    assert sum(len(client.train) + len(client.test) for client in result.clients) == 600
    assert all(len(client.val) == 0 and len(client.test) == 15 for client in split(validation=0).clients)


def test_what_a_client_has_does_not_depend_on_where_its_tests_are_from() -> None:
    for before, after in zip(split().clients, split(own_test=True).clients, strict=True):
        own = np.concatenate([after.train, after.val, after.test])
        assert np.array_equal(np.sort(own), np.sort(np.concatenate([before.train, before.val])))


def test_natural_keys_with_own_tests() -> None:
    dataset = characters(roles=6)
    assert dataset.key_train is not None
    for role, client in enumerate(split(dataset, NaturalKey(), num_clients=6, own_test=True).clients):
        assert set(dataset.key_train[client.test]) == {role}


@pytest.mark.parametrize("changes", [{"own_test": False}, {"test_share": 0.3}, {"validation": 0}, {"seed": 1}])
def test_digest_of_own_tests_changes_with_everything(changes: dict[str, Any]) -> None:
    own: dict[str, Any] = {"own_test": True}
    assert split(**own | changes).digest != split(**own).digest == split(**own).digest


def test_pooled_data_has_all_examples_in_order_and_no_test_split() -> None:
    one = replace(data(), key_train=np.arange(600), key_test=np.arange(600, 800))
    both = pooled(one)
    assert np.array_equal(both.y_train, np.concatenate([one.y_train, one.y_test])) and len(both.y_test) == 0
    assert np.array_equal(both.x_train[600:], one.x_test) and both.digest() != one.digest()
    assert both.key_train is not None and np.array_equal(both.key_train, np.arange(800))
    assert pooled(replace(one, key_test=None)).key_train is None
    result = split(both, own_test=True)
    assert sum(len(c.train) + len(c.val) + len(c.test) for c in result.clients) == 800


def test_a_share_of_the_clients_is_rounded_and_at_least_one() -> None:
    assert [num_sampled(n, 20) for n in (1, 5, 1.0, 0.1, 0.12, 0.001)] == [1, 5, 20, 2, 2, 1]


def noisy(**noise: Any) -> tuple[Dataset, Splits, Dataset, Splits]:
    before, parts = data(), split(own_test=True)
    return before, parts, *with_noise(before, parts, LabelNoise(**noise), 0)


@pytest.mark.parametrize("kind", ["uniform", "pair"])
def test_noise_is_of_the_rate_and_never_in_a_test_part(kind: str) -> None:
    before, parts, after, made = noisy(rate=0.3, share=0.5, kind=kind)
    wrong = before.y_train != after.y_train
    assert len(made.noisy) == 4 and made.digest != parts.digest and after.digest() != before.digest()
    for i, client in enumerate(parts.clients):
        own = np.concatenate([client.train, client.val])
        assert not wrong[client.test].any()
        assert wrong[own].sum() == (max(1, round(0.3 * len(own))) if i in made.noisy else 0)
    if kind == "pair":
        assert np.array_equal(after.y_train[wrong], (before.y_train[wrong] + 1) % 10)
    assert after.y_train.min() >= 0 and after.y_train.max() <= 9
    assert np.array_equal(before.y_test, after.y_test)


def test_uniform_noise_reaches_every_other_class() -> None:
    before, _, after, _ = noisy(rate=1.0)
    steps = (after.y_train - before.y_train) % 10
    assert set(steps[steps > 0]) == set(range(1, 10))


def test_noise_is_for_one_class_an_example() -> None:
    tokens = np.zeros((40, 6), np.int64)
    dataset = Dataset("sequence", tokens, tokens, tokens, tokens, num_classes=5)
    with pytest.raises(StudyError, match="clients.label_noise: must be left out where an example has not one class"):
        with_noise(dataset, split(dataset, Iid(), num_clients=4), LabelNoise(rate=0.5), 0)
