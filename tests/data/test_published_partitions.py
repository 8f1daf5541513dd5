"""The divisions of PFLlib and LEAF: pinned to what their own code gave for the same labels, and by hand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from fedlth.data.leaf import Leaf
from fedlth.data.leaf_json import leaf
from fedlth.data.parts import Parts
from fedlth.data.pfllib import Pfllib
from fedlth.data.sources import load
from fedlth.errors import StudyError
from fedlth.rng import stream
from tests import tiny

LABELS = np.arange(3000) * 7 % 10
USERS = np.repeat(np.arange(20)[::-1], np.arange(20) + 1)  # in the data's order: 19 once, 18 twice, ..., 0 twenty times


def digest(parts: Sequence[Parts]) -> str:
    """Return a short sha256 of all clients' sorted train and test positions."""
    plain = [[p.train.tolist(), p.test.tolist() if p.test is not None else None] for p in parts]
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()[:16]


def deal(part: Any, clients: int, labels: np.ndarray = LABELS) -> list[Parts]:
    made: list[Parts] = part(labels, USERS, clients, stream(0, "partition"))
    return made


# Made by PFLlib d832e76 (separate_data, split_data after np.random.seed) with numpy 2.4.6 and scikit-learn 1.9.1.
PINNED: list[tuple[Pfllib, int, str]] = [
    (Pfllib(), 10, "7a9c4883abe909f6"),
    (Pfllib(alpha=0.5, numpy_seed=3, train_ratio=0.6, batch_size=4), 15, "d540064dc0116432"),
    (Pfllib(kind="pat"), 10, "34dd225a14889621"),
    (Pfllib(kind="pat", class_per_client=3, balance=True), 7, "55c25dceb3e490c0"),
    (Pfllib(kind="pat", class_per_client=10, balance=True), 10, "ec6e5e9af80c3095"),
    (Pfllib(kind="exdir", alpha=100), 10, "21f11afd9af83d8c"),
    (Pfllib(kind="exdir", alpha=1.0, class_per_client=4), 10, "98d6be7138849d43"),
]


@pytest.mark.parametrize(("part", "clients", "theirs"), PINNED)
def test_pfllib_divides_as_its_own_code_does(part: Pfllib, clients: int, theirs: str) -> None:
    assert digest(deal(part, clients)) == theirs


def test_pfllib_uses_every_example_once_and_splits_three_to_one() -> None:
    parts = deal(Pfllib(alpha=0.3), 10)
    assert all(p.test is not None for p in parts)
    everything = np.concatenate([np.concatenate([p.train, p.test]) for p in parts if p.test is not None])
    assert np.array_equal(np.sort(everything), np.arange(3000))
    for p in parts:
        assert p.test is not None and len(p.train) == int(0.75 * (len(p.train) + len(p.test)))


def test_pfllib_pat_deals_classes_in_order() -> None:
    labels = np.repeat([0, 1, 2, 3], 40)
    held = [set(labels[p.train]) for p in deal(Pfllib(kind="pat", balance=True), 4, labels)]
    assert held == [{0, 1}, {0, 1}, {2, 3}, {2, 3}]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Pfllib(kind="shards"), "partition.kind must be dir, pat or exdir"),
        (lambda: Pfllib(alpha=0.0), "partition.alpha must be"),
        (lambda: Pfllib(train_ratio=1.0), "partition.train_ratio must be"),
        (lambda: deal(Pfllib(kind="pat", class_per_client=11), 4), "partition.class_per_client must be at most the 10"),
        (lambda: deal(Pfllib(alpha=0.001), 40), "got at best .* draws; raise alpha|can hold more of class"),
        (lambda: deal(Pfllib(kind="pat"), 40, LABELS[:20]), "must have more examples of class 0"),
        (lambda: deal(Pfllib(), 2, np.zeros((8, 3), np.int64)), "one label for each example"),
        (lambda: Leaf(1, 2, kind="some"), "partition.kind must be niid, iid or all"),
        (lambda: Leaf(1, 2, fraction=0), "partition.fraction must be"),
        (lambda: Leaf(1, 2, train=1), "partition.train must be"),
        (lambda: deal(Leaf(1, 2, kind="all"), 4, LABELS[:210]), "clients.count must be 19, the users"),
        (lambda: Leaf(1, 2)(LABELS, None, 4, stream(0, "x")), "leaf must have a data set with natural keys"),
    ],
)
def test_what_cannot_be_divided_says_why(make: Any, message: str) -> None:
    with pytest.raises(StudyError, match=message):
        make()


def test_a_given_own_test_part_asks_for_own_tests() -> None:
    with pytest.raises(StudyError, match="partition: Pfllib.*: clients.test must be own"):
        _ = tiny.task(partition={"name": "pfllib", "alpha": 5.0})
    task = tiny.task(partition={"name": "pfllib", "alpha": 5.0}, clients={"test": "own"}, data={"pool": True})
    assert sum(len(c.train) + len(c.val) + len(c.test) for c in task.splits.clients) == 360
    assert task.splits.given == {"test"}


# Made by LEAF 09ec454 (sample.py, remove_users.py, split_data.py) from a file with these users.
LEAF_PINNED: list[tuple[Leaf, int, str]] = [
    (Leaf(1549786595, 1549786796, fraction=0.35, min_samples=5), 6, "c39656578308f43a"),
    (Leaf(3, 4, kind="iid", fraction=0.5, users=0.3, train=0.8), 6, "ebc9db266c7df051"),
    (Leaf(0, 0, kind="all", min_samples=3), 18, "76a2af33131ea57e"),
]


@pytest.mark.parametrize(("part", "clients", "theirs"), LEAF_PINNED)
def test_leaf_divides_as_its_own_code_does(part: Leaf, clients: int, theirs: str) -> None:
    assert digest(deal(part, clients, LABELS[:210])) == theirs


def test_leaf_keeps_two_samples_apart_and_drops_a_single_one() -> None:
    parts = deal(Leaf(1, 2, kind="all"), 19, LABELS[:210])
    assert len(parts[0].train) == 1 and parts[0].test is not None and len(parts[0].test) == 1
    sizes = [len(p.train) + len(p.test) for p in parts if p.test is not None]
    assert sizes == list(range(2, 21))  # in the order of the data, the user with one left out
    order = list(range(20))
    Random(5).shuffle(order)
    sampled = deal(Leaf(5, 2, fraction=1.0), 19, LABELS[:210])
    assert [len(p.train) + len(p.test) - 1 for p in sampled if p.test is not None] == [u for u in order if u]


def leaf_folder(root: Path, part: str, users: dict[str, int]) -> None:
    (root / part).mkdir(parents=True)
    content = {
        "users": list(users), "num_samples": list(users.values()),
        "user_data": {u: {"x": [[i, 0.5] for i in range(n)], "y": [i % 3 for i in range(n)]} for u, n in users.items()},
    }  # fmt: skip
    (root / part / "a.json").write_text(json.dumps(content))


def test_leafs_files_are_a_data_set(tmp_path: Path) -> None:
    leaf_folder(tmp_path, "all_data", {"b": 4, "a": 3})
    made = load("leaf", root=str(tmp_path), options={"shape": [1, 2]})
    assert made.x_train.shape == (7, 1, 2) and made.num_classes == 3 and len(made.x_test) == 0
    assert made.key_train is not None and made.key_train.tolist() == ["b"] * 4 + ["a"] * 3
    leaf_folder(tmp_path, "train", {"b": 4})
    leaf_folder(tmp_path, "test", {"b": 2})
    assert [len(x) for x in (leaf(str(tmp_path)).x_train, leaf(str(tmp_path)).x_test)] == [4, 2]
    (tmp_path / "train" / "a.json").write_text('{"users": ["u"], "user_data": {"u": {"x": ["text"], "y": [1]}}}')
    for root, says in ((None, "data.root: must name"), (str(tmp_path), "x must be numbers of one shape")):
        with pytest.raises(StudyError, match=says):
            leaf(root)
    (tmp_path / "train" / "a.json").write_text('{"users": ["u"]}')
    with pytest.raises(StudyError, match="must hold users and user_data"):
        leaf(str(tmp_path))
