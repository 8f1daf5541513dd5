"""Speeches by role: windows that end before the next character, test text that no training window has seen."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from fedlth.data.sources import load
from fedlth.errors import StudyError

ROLES = [
    {"play": "P", "role": "A", "lines": ["abcdefghij", "klmnopqrst"]},  # 21 characters with the line break
    {"play": "P", "role": "B", "lines": ["zz"]},
    {"play": "Q", "role": "A", "lines": ["abababababababababababab"]},
]
OPTIONS = {"length": 3, "stride": 1, "min_characters": 20, "test_share": 0.25}


def written(folder: Path, text: str) -> str:
    (folder / "roles.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    return str(folder)


def test_windows_labels_keys_and_the_cut(tmp_path: Path) -> None:
    root = written(tmp_path, "\n".join(map(json.dumps, ROLES)))
    data = load("shakespeare", root=root, options=OPTIONS)
    alphabet = "\nabcdefghijklmnopqrstz"
    assert data.num_classes == len(alphabet)  # of the whole file, roles that are left out included
    assert data.key_train is not None and data.key_test is not None
    assert sorted(set(data.key_train)) == sorted(set(data.key_test)) == ["P: A", "Q: A"]
    first = ["".join(alphabet[token] for token in row) for row in data.x_train[data.key_train == "P: A"]]
    after = [alphabet[token] for token in data.y_train[data.key_train == "P: A"]]
    text = "abcdefghij\nklmno"  # 21 less a quarter, rounded
    assert first == [text[i : i + 3] for i in range(len(text) - 3)] and after == list(text[3:])
    assert "".join(alphabet[token] for token in data.x_test[data.key_test == "P: A"][0]) == "pqr"
    strided = load("shakespeare", root=root, options={**OPTIONS, "stride": 5})
    np.testing.assert_array_equal(strided.x_train[:3], data.x_train[data.key_train == "P: A"][::5][:3])


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "must hold a play"), (json.dumps({"play": "P"}), "must hold a play"), (json.dumps(ROLES[1]), "of at least")],
)
def test_a_file_that_is_none_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(StudyError, match=message):
        load("shakespeare", root=written(tmp_path, text), options=OPTIONS)
    with pytest.raises(StudyError, match=r"must name a folder with roles.jsonl.gz or roles.jsonl"):
        load("shakespeare", root=None, options=OPTIONS)
    with pytest.raises(StudyError, match="got neither"):
        load("shakespeare", root="/nowhere", options=OPTIONS)
