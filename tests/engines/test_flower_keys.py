"""A device's key says whose it is: a node that says it is another client serves nobody, and is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlth.deploy.certificates import new_device_key
from fedlth.engines.flower_counts import counted
from fedlth.engines.flower_keys import Identity, owners_in
from fedlth.engines.flower_nodes import Roll
from fedlth.errors import StudyError
from tests.engines.test_own_data import Devices, devices, study


def folder_of_keys(folder: Path, count: int = 3) -> list[bytes]:
    """Write a public key for each client; return the keys as Flower has them, by client."""
    folder.mkdir()
    for client in range(count):
        (folder / f"device-{client}.pub").write_bytes(new_device_key()[1])
    owners = owners_in(folder)
    return sorted(owners, key=owners.__getitem__)


def roll_of(said: dict[int, int], keys: dict[int, bytes], owners: dict[bytes, int], quorum: int) -> Roll:
    return Roll(
        count=3, quorum=quorum, online=lambda: list(said), ask=str, heard=lambda ids: {i: said[int(i)] for i in ids},
        pause=lambda: None, wait_s=0.3, answer_s=5.0, objection=Identity(owners, lambda: keys),
    )  # fmt: skip


def test_a_node_serves_the_client_of_its_key_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = folder_of_keys(tmp_path / "keys")
    owners = owners_in(tmp_path / "keys")
    assert owners == {key: client for client, key in enumerate(keys)}
    whose = {10: keys[0], 11: keys[1], 12: keys[2], 13: b"", 14: b"a stranger's"}
    honest = {10: 0, 11: 1, 12: 2}
    assert roll_of(honest, whose, owners, 3).nodes() == {0: 10, 1: 11, 2: 12}
    with caplog.at_level("INFO"):
        found = roll_of({10: 0, 11: 2, 13: 1, 14: 2}, whose, owners, 1).nodes()
    assert found == {0: 10}, "neither another client's key, nor none, nor a stranger's"
    assert "node 11: says that it serves client 2, with the key of client 1" in caplog.text
    with pytest.raises(StudyError, match="no .1, 2.; node 13: says that it serves client 1, with a key that is no dev"):
        roll_of({10: 0, 13: 1, 14: 2}, whose, owners, 3).nodes()


def test_counts_are_taken_of_the_keys_owner(tmp_path: Path) -> None:
    keys = folder_of_keys(tmp_path / "keys")
    folder = devices(tmp_path / "data")
    whose = {100: keys[0], 101: keys[2], 102: keys[1]}
    objection = Identity(owners_in(tmp_path / "keys"), lambda: whose)
    with pytest.raises(StudyError, match="flower: node 101 says that it serves client 1, with the key of client 2"):
        counted(study(folder), Devices(folder, tmp_path), wait_s=1.0, pause=lambda: None, objection=objection)


def test_a_folder_that_holds_no_keys_is_named(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="must hold each device's public key, device-0.pub and so on, got none"):
        owners_in(tmp_path)
    folder_of_keys(tmp_path / "keys")
    (tmp_path / "keys" / "device-2.pub").write_bytes((tmp_path / "keys" / "device-0.pub").read_bytes())
    with pytest.raises(StudyError, match=r"device-2.pub: is the key of client 0 too"):
        owners_in(tmp_path / "keys")
    (tmp_path / "keys" / "device-1.pub").write_text("no key")
    with pytest.raises(StudyError, match=r"device-1.pub: must be a public key in OpenSSH's form"):
        owners_in(tmp_path / "keys")
