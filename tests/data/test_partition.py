"""Laws that every partition keeps, and the special ones of each."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlth.data.label_partition import Classes, Shards
from fedlth.data.leaf import Leaf
from fedlth.data.partition import PARTITIONS, Dirichlet, Iid, NaturalKey, Own, Partition, QuantitySkew
from fedlth.data.partition_file import FromFile
from fedlth.data.parts import Parts
from fedlth.data.pfllib import Pfllib
from fedlth.errors import StudyError
from fedlth.rng import stream

CLIENTS = 12
FILE = Path(__file__).with_name("twelve_clients.json")
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 60))
KEYS = np.random.default_rng(1).integers(0, 15, LABELS.size)

LAWS: list[tuple[str, Partition, bool]] = [
    ("iid", Iid(), True),
    ("dirichlet", Dirichlet(0.3, 5), True),
    ("shards", Shards(20, 2, 0.5), False),
    ("classes", Classes(3), False),
    ("quantity", QuantitySkew(0.5, 5), True),
    ("natural", NaturalKey(), False),
    ("file", FromFile(str(FILE)), False),
    ("pfllib", Pfllib(alpha=0.5), True),
    ("leaf", Leaf(1, 2, fraction=0.75), False),
    ("own", Own(), False),
]
DRAWS_NOTHING = ("natural", "file", "pfllib", "leaf", "own")  # or by a seed of its own


def parts_of(part: Partition, seed: int = 0, clients: int = CLIENTS) -> list[np.ndarray]:
    given = part(LABELS, KEYS, clients, stream(seed, "partition"))
    return [np.sort(np.concatenate([one.train, one.test])) if isinstance(one, Parts) and one.test is not None
            else one.train if isinstance(one, Parts) else one for one in given]  # fmt: skip


def test_every_partition_has_a_law() -> None:
    assert {name for name, _, _ in LAWS} == set(PARTITIONS)
    assert all(type(part) is PARTITIONS[name] for name, part, _ in LAWS)


@pytest.mark.parametrize(("name", "part", "covers"), LAWS, ids=[name for name, _, _ in LAWS])
def test_law_disjoint_sorted_and_complete(name: str, part: Partition, covers: bool) -> None:
    owned = parts_of(part)
    everything = np.concatenate(owned)
    assert len(owned) == CLIENTS
    assert all(indices.dtype == np.int64 and (np.diff(indices) > 0).all() and indices.size for indices in owned)
    assert np.unique(everything).size == everything.size
    assert everything.min() >= 0 and everything.max() < LABELS.size
    assert not covers or everything.size == LABELS.size


@pytest.mark.parametrize(("name", "part", "covers"), LAWS, ids=[name for name, _, _ in LAWS])
def test_law_the_seed_decides(name: str, part: Partition, covers: bool) -> None:
    def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
        return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))

    assert same(parts_of(part), parts_of(part))
    assert same(parts_of(part), parts_of(part, seed=1)) == (name in DRAWS_NOTHING)


@pytest.mark.parametrize(("name", "part", "covers"), LAWS, ids=[name for name, _, _ in LAWS])
def test_law_parts_are_values(name: str, part: Partition, covers: bool) -> None:
    again = pickle.loads(pickle.dumps(part))
    assert again == part and hash(again) == hash(part)


def test_iid_is_even() -> None:
    sizes = [len(indices) for indices in parts_of(Iid(), clients=7)]
    assert max(sizes) - min(sizes) <= 1


def test_dirichlet_follows_alpha_and_minimum() -> None:
    def share_of_largest_class(alpha: float) -> float:
        owned = parts_of(Dirichlet(alpha, 8))
        assert min(len(indices) for indices in owned) >= 8
        return float(np.mean([np.bincount(LABELS[i]).max() / len(i) for i in owned]))

    assert share_of_largest_class(0.05) > 0.5 > 0.2 > share_of_largest_class(1000.0)


def test_dirichlet_leaves_an_absent_class_alone() -> None:
    labels = np.repeat([0, 2, 5], 20)
    owned = Dirichlet(1.0, 1)(labels, None, 4, stream(0, "partition"))
    assert np.concatenate(owned).size == 60


def test_dirichlet_survives_tiny_alpha() -> None:
    owned = Dirichlet(1e-6, 1)(LABELS, None, 2, stream(0, "partition"))
    assert sum(map(len, owned)) == LABELS.size


@pytest.mark.parametrize("alpha", [1e100, 1e306, 1e307, 1.7e308, 10**308])
def test_alpha_beyond_what_numpy_draws_is_the_limit_of_equal_shares(alpha: float) -> None:
    """Row 45: the sum of twenty draws at 1e307 overflows; it gave each class to one owner and told to raise alpha."""
    sizes = {len(indices) for indices in parts_of(QuantitySkew(alpha, 1), clients=20)}
    assert sizes == {30}
    for indices in parts_of(Dirichlet(alpha, 1), clients=20):
        assert np.bincount(LABELS[indices]).tolist() == [3] * 10


def test_a_minimum_that_no_draw_could_leave_is_not_a_matter_of_alpha() -> None:
    """Row 45's brother: raising alpha was the advice where no alpha could help."""
    with pytest.raises(StudyError, match=r"at least 100 of 600 examples, which are 1200; lower the clients"):
        parts_of(Dirichlet(1.0, 100))


@pytest.mark.parametrize("part", [Dirichlet(0.01, 25), Dirichlet(1.0, 100), QuantitySkew(0.01, 25)])
def test_infeasible_skew_names_what_to_change(part: Partition) -> None:
    alpha = part.alpha  # type: ignore[attr-defined]
    with pytest.raises(StudyError, match=rf"alpha {alpha} with 20 clients must leave each at least \d+ of 600"):
        parts_of(part, clients=20)


def test_quantity_skews_sizes_not_labels() -> None:
    sizes = [len(indices) for indices in parts_of(QuantitySkew(0.3, 2))]
    assert max(sizes) > 4 * min(sizes)


def test_shards_are_lotteryfl() -> None:
    for indices in parts_of(Shards(shard_size=20, shards_per_client=2, unbalance=0.25)):
        assert len(indices) == 25
        assert set(np.bincount(LABELS[indices])) <= {0, 5, 20, 25}
    assert all(len(indices) == 40 for indices in parts_of(Shards(20, 2)))


@pytest.mark.parametrize("per_client", [1, 3, 10])
@pytest.mark.parametrize("unbalance", [1.0, 0.5])
def test_classes_gives_exactly_n_and_balance(per_client: int, unbalance: float) -> None:
    owned = parts_of(Classes(per_client, unbalance))
    counts = np.array([np.bincount(LABELS[indices], minlength=10) for indices in owned])
    assert ((counts > 0).sum(1) == per_client).all()
    assert np.unique(counts.sum(1)).size == 1
    holders = (counts > 0).sum(0)
    assert holders.max() - holders.min() <= 1
    main = counts.max()
    assert set(counts[counts > 0]) <= {main, int(unbalance * main)}


def test_classes_uses_everything_when_it_divides() -> None:
    assert sum(map(len, parts_of(Classes(5), clients=20))) == LABELS.size


def test_natural_takes_the_largest_keys_in_order() -> None:
    keys = np.array(["b"] * 5 + ["a"] * 3 + ["d"] * 4 + ["c"] * 3)
    owned = NaturalKey()(np.zeros(15, np.int64), keys, 3, stream(0, "partition"))
    assert [set(keys[indices]) for indices in owned] == [{"a"}, {"b"}, {"d"}]


def test_clients_that_share_a_key_divide_its_examples() -> None:
    keys = np.array(["b"] * 5 + ["a"] * 3 + ["d"] * 4 + ["c"] * 3)
    owned = NaturalKey(clients_per_key=2)(np.zeros(15, np.int64), keys, 4, stream(0, "partition"))
    assert ["".join(set(keys[indices])) for indices in owned] == ["b", "b", "d", "d"]
    assert [len(indices) for indices in owned] == [3, 2, 2, 2] and len(np.unique(np.concatenate(owned))) == 9
    with pytest.raises(StudyError, match="partition.clients_per_key: must divide the 5 clients, got 2"):
        NaturalKey(clients_per_key=2)(np.zeros(15, np.int64), keys, 5, stream(0, "partition"))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Shards(50, 2), "must have 24 shards, got 12 from 600"),
        (Shards(2, 2, 0.1), "unbalance must be large enough"),
        (Classes(11), "classes_per_client must be at most 10"),
        (Classes(10, 0.01), "must leave an example for every label"),
        (NaturalKey(1000), "got 0 of 15"),
    ],
)
def test_infeasible_parts_say_why(part: Partition, message: str) -> None:
    with pytest.raises(StudyError, match=message):
        parts_of(part)


@pytest.mark.parametrize("part", [Dirichlet(1.0), Shards(10), Classes(2)])
def test_label_partitions_refuse_labels_per_position(part: Partition) -> None:
    with pytest.raises(StudyError, match="one label for each example"):
        part(np.zeros((6, 4), np.int64), None, 2, stream(0, "partition"))


def test_natural_without_keys() -> None:
    with pytest.raises(StudyError, match="natural keys"):
        NaturalKey()(LABELS, None, 2, stream(0, "partition"))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Dirichlet, {"alpha": 0}),
        (Dirichlet, {"alpha": "much"}),
        (Dirichlet, {"alpha": float("nan")}),
        (Dirichlet, {"alpha": 10**400}),  # an int that no float holds
        (Shards, {"shard_size": 10, "unbalance": 10**400}),
        (Dirichlet, {"alpha": 1.0, "min_samples": 0}),
        (QuantitySkew, {"alpha": -1.0}),
        (Shards, {"shard_size": 0}),
        (Shards, {"shard_size": 10, "unbalance": 1.5}),
        (Classes, {"classes_per_client": 2.5}),
        (Classes, {"classes_per_client": 2, "unbalance": 0.0}),
        (NaturalKey, {"min_samples": True}),
        (NaturalKey, {"clients_per_key": 0}),
    ],
)
def test_impossible_settings_name_the_setting(kind: type, options: dict[str, Any]) -> None:
    with pytest.raises(StudyError, match=rf"partition.{list(options)[-1]} must be"):
        kind(**options)
