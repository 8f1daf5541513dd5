"""Speeches by role: windows that end before the next character, test text that no training window has seen."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from fedlth.data.partition import NaturalKey
from fedlth.data.sources import load
from fedlth.data.split import split_clients
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
    assert data.val_train is not None and data.overlapping
    text = "abcdefghij\nklmno"  # 21 less a quarter, rounded
    for held, own in ((False, text[:13]), (True, text[13:])):  # a fifth of 16, rounded, is for validation: no window
        mine = (data.key_train == "P: A") & (data.val_train == held)
        first = ["".join(alphabet[token] for token in row) for row in data.x_train[mine]]
        assert first == [own[i : i + 3] for i in range(len(own) - 3)]
        assert [alphabet[token] for token in data.y_train[mine]] == list(own[3:])
    assert "".join(alphabet[token] for token in data.x_test[data.key_test == "P: A"][0]) == "pqr"
    strided = load("shakespeare", root=root, options={**OPTIONS, "stride": 5})
    assert strided.val_train is None and not strided.overlapping
    np.testing.assert_array_equal(strided.x_train[:2], data.x_train[data.key_train == "P: A"][::5][:2])


def test_no_character_of_a_validation_window_is_in_a_training_window(tmp_path: Path) -> None:
    """Every character of a role's text is another, so that a shared one is seen; the same with a share of one's own."""
    signs = "".join(chr(1000 + k) for k in range(400))
    root = written(tmp_path, json.dumps({"play": "P", "role": "A", "lines": [signs]}))
    for options, share in (({"stride": 1}, 0.2), ({"stride": 1, "validation_share": 0.4}, 0.4), ({"stride": 9}, None)):
        data = load("shakespeare", root=root, options={"length": 7, "min_characters": 1, **options})
        clients = {"num_clients": 1, "validation": 0.2, "test_samples": 10, "unseen": 0.0, "seed": 0}
        (client,) = split_clients(data, NaturalKey(), **clients).clients  # type: ignore[arg-type]
        seen = [set(data.x_train[part].ravel()) | set(data.y_train[part]) for part in (client.train, client.val)]
        assert not seen[0] & seen[1] and not (seen[0] | seen[1]) & set(data.x_test.ravel())  # type: ignore[union-attr]
        assert len(client.val) == (round((share or 0) * 320) - 7 if share else round(0.2 * len(data.y_train)))
        if share:
            with pytest.raises(StudyError, match="clients.test: own would test on windows that share values"):
                split_clients(data, NaturalKey(), own_test=True, **clients)  # type: ignore[arg-type]


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
