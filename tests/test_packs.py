"""Packs: what is live survives any tidy-up, disk stays near what is live, damage names the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedlth.errors import StudyError
from fedlth.storage.state_archive import Packs


def filled(root: Path, version: str, clients: range) -> Packs:
    packs = Packs(root)
    with packs.writing(version) as writer:
        for client in clients:
            writer.add(client, content(client, version))
    return packs


def content(client: int, version: str) -> bytes:
    return f"{version} {client} ".encode() * (client + 1)


@pytest.mark.parametrize("again", [False, True], ids=["same process", "another"])
def test_what_is_live_survives_and_the_rest_goes(tmp_path: Path, again: bool) -> None:
    filled(tmp_path, "a-1", range(20))
    packs = filled(tmp_path, "a-2", range(20))
    if again:
        packs = Packs(tmp_path)
    before = packs.path("a-1").stat().st_size
    packs.tidy({"a-1": {19, 3}, "a-2": set(range(19))})
    assert packs.path("a-1").stat().st_size < before / 4
    assert packs.get(19, "a-1") == content(19, "a-1") and packs.get(3, "a-1") == content(3, "a-1")
    assert packs.get(7, "a-2") == content(7, "a-2") and packs.get(5, "") is None
    assert not packs.has(4, "a-1")
    packs.tidy({"a-2": {1}})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-2.pack"]
    assert Packs(tmp_path).get(1, "a-2") == content(1, "a-2")


def test_disk_stays_within_twice_of_what_is_live(tmp_path: Path) -> None:
    packs, rng = Packs(tmp_path), np.random.default_rng(0)
    owner: dict[int, str] = {}
    for step in range(60):
        version = f"federate-{step}"
        with packs.writing(version) as writer:
            for client in rng.choice(50, size=10, replace=False).tolist():
                writer.add(client, bytes(1000))
                owner[client] = version
        packs.tidy({v: {c for c, o in owner.items() if o == v} for v in owner.values()})
        used = sum(p.stat().st_size for p in tmp_path.iterdir())
        assert used < 2 * 1000 * len(owner) + 100 * 40
    assert all(packs.get(c, v) == bytes(1000) for c, v in owner.items())


def test_a_write_that_fails_leaves_the_old_pack(tmp_path: Path) -> None:
    packs = filled(tmp_path, "a-1", range(3))
    with pytest.raises(OSError, match="full"), packs.writing("a-1") as writer:
        writer.add(0, b"new")
        raise OSError("full")
    assert packs.get(0, "a-1") == content(0, "a-1")
    assert [p.name for p in tmp_path.iterdir()] == ["a-1.pack"]


@pytest.mark.parametrize("at", [0, 5, -1, -9, -20, -60])
def test_every_flipped_bit_is_seen(tmp_path: Path, at: int) -> None:
    packs = filled(tmp_path, "a-1", range(1))
    data = bytearray(packs.path("a-1").read_bytes())
    data[at % len(data)] ^= 4
    packs.path("a-1").write_bytes(bytes(data))
    with pytest.raises(StudyError, match=r"a-1.pack: damaged"):
        Packs(tmp_path).get(0, "a-1")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    packs = filled(tmp_path, "a-1", range(3))
    for client, version in ((9, "a-1"), (0, "a-2")):
        with pytest.raises(StudyError, match=f"{version}.pack: the committed state of client {client} is missing"):
            packs.get(client, version)
