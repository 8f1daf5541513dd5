"""States and logs on disk: equal content is equal bytes, damage is seen, writes are whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from fedlth.errors import StudyError
from fedlth.storage import json_lines, store
from fedlth.storage.client_state import ClientState
from fedlth.storage.records import LedgerRow

ARRAYS = {"b": np.float32([1, -0.0, 3]), "a": np.uint8([[1, 2]]), "c": np.zeros(0, np.int64)}


def test_equal_content_is_equal_bytes_and_any_reader_can_open_it(tmp_path: Path) -> None:
    one = store.pack(ARRAYS, {"x": 1, "y": [2]})
    assert all(store.pack(dict(reversed(ARRAYS.items())), {"y": [2], "x": 1}) == one for _ in range(20))
    arrays, meta = store.unpack(one)
    assert meta == {"x": 1, "y": [2]} and set(arrays) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype and arrays[name].tobytes() == array.tobytes()
    (tmp_path / "f.safetensors").write_bytes(one)
    with safe_open(tmp_path / "f.safetensors", "numpy") as file:
        assert set(file.keys()) == set(ARRAYS)


def test_metadata_has_one_order() -> None:
    told = {k: k for k in "zyxwvu"}
    assert len({store.safetensors_bytes(ARRAYS, told) for _ in range(20)}) == 1


@given(st.integers(0, 10_000), st.integers(0, 7))
def test_every_flipped_bit_is_seen(at: int, bit: int) -> None:
    data = bytearray(store.pack(ARRAYS, {"x": 1}))
    data[at % len(data)] ^= 1 << bit
    try:
        arrays, meta = store.unpack(bytes(data))
    except ValueError:
        return
    # What is left to flip without harm is a space of the header's padding.
    assert meta == {"x": 1} and all(arrays[n].tobytes() == a.tobytes() for n, a in ARRAYS.items())


@given(st.binary(max_size=64))
def test_noise_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a packed state"):
        store.unpack(data)


def test_versions(tmp_path: Path) -> None:
    states = store.Store(tmp_path)
    states.put(3, "federate-1", store.pack(ARRAYS))
    states.put(3, "federate-2", store.pack({}))
    assert states.get(3, "") is None and states.get(3, "federate-1") == store.pack(ARRAYS)
    states.drop_others(3, "federate-2")
    with pytest.raises(StudyError, match=r"federate-1.safetensors: the committed state of client 3 is missing"):
        states.get(3, "federate-1")
    states.drop_others(9, "none")


def test_client_states() -> None:
    state = ClientState(3, {"active": np.array([True, False] * 5 + [True])}, {"private": np.float32([1, 2])})
    again = ClientState.from_bytes(state.to_bytes())
    assert again.to_bytes() == state.to_bytes() and again.visits == 3
    np.testing.assert_array_equal(again.masks["active"], state.masks["active"])
    assert ClientState.from_bytes(None) == ClientState()
    assert state.with_(masks={"x": np.ones(1, bool)}).masks.keys() == {"active", "x"} and "x" not in state.masks


def test_logs_grow_and_are_cut_back(tmp_path: Path) -> None:
    log = tmp_path / "ledger.jsonl"
    row = LedgerRow(
        round=1, phase="federate", sender="server", receiver="client:1", kind="values", name="x", payload_bytes=7
    )
    length = json_lines.append(log, json_lines.lines([row]))
    assert json_lines.append(log, json_lines.lines([{"b": 1, "a": 2}])) > length
    json_lines.truncate(log, length)
    assert log.read_bytes() == json_lines.lines([row]) and log.stat().st_size == length
    with pytest.raises(StudyError, match="must hold the 9999 bytes that are committed"):
        json_lines.truncate(log, 9999)
    json_lines.truncate(tmp_path / "none", 0)
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_lines.lines([{"x": float("nan")}])


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Whichever file the disk is full at: a run's own test meets it at the first that a commit writes."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    file = tmp_path / "checkpoint.json"
    store.write_atomic(file, b"old")
    monkeypatch.setattr(store.os, call, full)
    with pytest.raises(OSError, match="No space left"):
        store.write_atomic(file, b"a new one, longer")
    assert file.read_bytes() == b"old"
