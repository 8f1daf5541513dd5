"""Text from files: formats, labels, blocks, overlap, tokens; what is wrong with them by name."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlth.data.blocks import LEFT_OUT, TEST, TRAIN, VALIDATION, Blocks
from fedlth.data.dataset import Dataset, pooled
from fedlth.data.partition import PARTITIONS
from fedlth.data.sources import load
from fedlth.data.split import split_clients
from fedlth.data.text_labels import Labels
from fedlth.data.tokens import Words, tokenizer_of
from fedlth.errors import StudyError
from tests.text import sentences

TWO = {"text": 0, "label": 1, "tokenizer": {"words": 30}}


def read(folder: Path, **options: Any) -> Dataset:
    return load("text", root=str(folder), options={**TWO, **options})


def shown(data: Dataset, part: str = "train") -> list[list[int]]:
    """Return the tokens of a part without their padding."""
    x, lengths = (getattr(data, f"{what}_{part}") for what in ("x", "lengths"))
    return [row[:n].tolist() for row, n in zip(x["input_ids"], lengths["input_ids"], strict=True)]


ROWS = [('he said "no', 1), ("a, b", 0), ("c d e", 1), ("f", 0), ("g", 1)]


def test_every_format_gives_the_same_data(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("".join(f"{text}\t{label}\r\n" for text, label in ROWS))
    (tmp_path / "b.tsv").write_text("label\ttext\n" + "".join(f"{label}\t{text}\n" for text, label in ROWS))
    quoted = [(text.replace('"', '""'), label) for text, label in ROWS]
    (tmp_path / "c.csv").write_text("\ufefftext,label\n" + "".join(f'"{text}",{label}\n' for text, label in quoted))
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": t, "label": n}) + "\n" for t, n in ROWS))
    found = [read(tmp_path, files="a.tsv")]
    found += [read(tmp_path, files=name, text="text", label="label") for name in ("b.tsv", "c.csv", "d.jsonl")]
    assert len({data.digest() for data in found}) == 1
    data = found[0]
    assert data.num_classes == 2 and data.y_train.tolist() == [1, 0, 1, 0] and data.y_test.tolist() == [1]
    assert data.val_train is not None and data.val_train.tolist() == [False, False, False, True]
    assert isinstance(data.x_train, dict) and set(data.x_train) == {"input_ids", "attention_mask"}
    mask = data.x_train["attention_mask"]
    assert mask.sum(1).tolist() == data.lengths_train["input_ids"].tolist() == [6, 5, 5, 3]


def test_keys_stand_in_the_order_of_their_names(tmp_path: Path) -> None:
    """A run that began with `tweets` before `amazon` could not be resumed: its text, sorted, has them the other way."""
    files = sentences.write(tmp_path, ("tweets", "amazon"))
    one, other = (read(tmp_path, files=dict(order)) for order in (files.items(), sorted(files.items())))
    assert list(files) == ["tweets", "amazon"] and one.digest() == other.digest()


class Folder(dict[str, Any]):
    """What `datasets` gives of a folder with splits."""


def test_folders_of_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"train": [{"text": t, "label": n} for t, n in ROWS], "test": [{"text": "h", "label": 1}], "other": []}
    library = types.ModuleType("datasets")
    library.load_from_disk = lambda path: Folder(parts) if path.endswith("split") else parts["train"]  # type: ignore[attr-defined]
    library.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "datasets", library)
    for name in ("split", "whole"):
        (tmp_path / name).mkdir()
    data = read(tmp_path, files="split", text="text", label="label")
    assert len(data.y_train) == 5 and len(data.y_test) == 1 and data.val_train is None
    assert len(read(tmp_path, files="whole", text="text", label="label").y_test) == 1


@pytest.mark.parametrize(
    ("labels", "values", "classes"),
    [
        (Labels(), ["2", "0", "1"], [2, 0, 1]),
        (Labels(labels=("no", "yes")), ["yes", "no"], [1, 0]),
        (Labels(labels=("1", "0")), [1, "0"], [0, 1]),
        (Labels(thresholds=(-0.5, 0.5)), ["-0.5", "-0.4", "0.5", "0.6", 3], [0, 1, 1, 2, 2]),
        (Labels(thresholds=(-0.5, 0.5), without=(1,)), [-1.0, 0.0, 1.0], [0, -1, 1]),
        (Labels(labels=("no", "so", "yes"), without=("so",)), ["yes", "so", "no"], [1, -1, 0]),
        (Labels(), [True, False], [1, 0]),
    ],
)
def test_classes(labels: Labels, values: list[Any], classes: list[int]) -> None:
    found, count = labels.classes(values, labels.labels or ())
    assert found.tolist() == classes and count == (max(classes) + 1)


def test_kinds_of_labels_by_key(tmp_path: Path) -> None:
    for name, labels in (("a", "0 1 0 1 0"), ("b", "-1.5 2 0.1 3 -2"), ("c", "no yes yes no no")):
        rows = (f"{name}{i}\t{label}\n" for i, label in enumerate(labels.split()))
        (tmp_path / f"{name}.tsv").write_text("".join(rows))
    one = {"train": "b.tsv", "thresholds": [-0.5, 0.5], "without": [1]}
    data = read(tmp_path, files={"a": "a.tsv", "b": one, "c": "c.tsv"}, validation_share=0)
    assert data.key_train is not None and data.num_classes == 2
    assert data.y_train[data.key_train == "b"].tolist() == [0, 1, 1]
    assert data.y_train[data.key_train == "c"].tolist() == [0, 1, 1, 0]
    numbers = read(tmp_path, files={"a": "a.tsv", "b": "b.tsv"})
    assert numbers.targets == "numbers" and numbers.y_train.dtype == np.float32
    with pytest.raises(StudyError, match="a key's names and another's real numbers"):
        read(tmp_path, files={"c": "c.tsv", "b": "b.tsv"})
    none = read(tmp_path, files="c.tsv", label=None)
    assert none.num_classes == 30 and not none.y_train.any()


def test_blocks_and_their_gaps() -> None:
    assert Blocks(0.2, 0.1)(10, "k").tolist() == [TRAIN] * 7 + [VALIDATION] + [TEST] * 2
    twice = Blocks(0.2, 0.2, blocks=2)(10, "k").tolist()
    assert twice == [TRAIN, TRAIN, TRAIN, VALIDATION, TEST] * 2
    for blocks in (1, 2, 3):
        cut = Blocks(0.2, 0.2, blocks=blocks, gap=3)(90, "k")
        there = np.flatnonzero(cut != LEFT_OUT)
        for left, right in zip(there[:-1], there[1:], strict=True):
            assert cut[left] == cut[right] or right - left > 3
        assert (cut == TEST).sum() == 18  # the most precious part loses nothing
    with pytest.raises(StudyError, match="data.options.gap: k must have an example left"):
        Blocks(0.2, 0.1, gap=9)(10, "k")
    with pytest.raises(StudyError, match="data.options.blocks: k must have examples for 5 stretches"):
        Blocks(0.2, 0.1, blocks=5)(10, "k")


def test_clients_take_the_validation_examples_of_the_data(tmp_path: Path) -> None:
    files = sentences.write(tmp_path)
    data = read(tmp_path, files=files)
    held = data.val_train
    assert held is not None and held.sum() == 12
    more = {"test_samples": 5, "unseen": 0.0, "seed": 0}
    splits = split_clients(data, PARTITIONS["natural"](), num_clients=2, validation=0.3, **more)  # type: ignore[arg-type]
    for split in splits.clients:
        assert held[split.val].all() and not held[split.train].any() and len(split.val) == 6
    assert splits.given == {"val"}
    without = split_clients(data, PARTITIONS["natural"](), num_clients=2, validation=0.0, **more)  # type: ignore[arg-type]
    assert sum(len(split.train) for split in without.clients) == len(held)
    whole = pooled(data).val_train
    assert whole is not None and whole.shape == (120,) and whole.sum() == 12


def test_overlap(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("One fine day.\t1\nother\t0\nmore\t1\nmore still\t0\n")
    (tmp_path / "b.tsv").write_text("one fine day\t1\nx\t0\n")
    files = {"train": "a.tsv", "test": "b.tsv"}
    kept, dropped = (read(tmp_path, files=files, overlap=what) for what in ("keep", "drop"))
    assert len(kept.y_train) == 4 and len(dropped.y_train) == 3 and len(dropped.y_test) == 2
    assert kept.notes[0].startswith("data: 1 training or validation examples have a text")
    assert "left out (overlap: drop)" in dropped.notes[0] and kept.val_train is None


def test_a_text_of_two_keys_stays_with_the_smaller_one(tmp_path: Path) -> None:
    (tmp_path / "large.tsv").write_text("one\t1\nTwo!\t0\nthree\t1\nthree\t1\nfour\t0\nfive\t1\n")
    (tmp_path / "small.tsv").write_text("two\t1\nthree\t0\nsix\t1\nsix\t1\n")
    (tmp_path / "test.tsv").write_text("one\t1\nseven\t0\n")
    files = {name: {"train": f"{name}.tsv", "test": "test.tsv"} for name in ("large", "small")}
    dropped, apart = (read(tmp_path, files=files, overlap=what) for what in ("drop", "apart"))
    for data, large in ((dropped, 5), (apart, 2)):  # four and five; a key's own copies stay
        assert data.key_train is not None and data.key_test is not None
        assert ((data.key_train == "large").sum(), (data.key_train == "small").sum()) == (large, 4)
        assert len(data.key_test) == 4
    assert [note.split(" have ")[0] for note in apart.notes] == ["data: 1 training or validation examples",
                                                                 "data: 3 training examples"]  # fmt: skip
    assert "apart leaves them out" in dropped.notes[1] and "left out (overlap: apart)" in apart.notes[1]
    (tmp_path / "small.tsv").write_text("two\t1\nthree\t0\nsix\t1\nnine\t1\nten\t0\n")
    equal = read(tmp_path, files=files, overlap="apart")  # five each, once `one` has gone: the first by name keeps
    assert equal.key_train is not None
    assert ((equal.key_train == "large").sum(), (equal.key_train == "small").sum()) == (5, 3)
    with pytest.raises(StudyError, match="overlap: apart must have several keys"):
        read(tmp_path, files=files["large"], overlap="apart")


def test_words() -> None:
    made = tokenizer_of({"words": 8}, 8, ["b a c", "a b a"])
    assert isinstance(made, Words) and made.words == ("a", "b", "c") and made.size == 8
    assert made("A z!", None) == ([2, 5, 1, 1, 3], [0] * 5)
    assert made("a a a a a", "b b") == ([2, 5, 5, 5, 3, 6, 6, 3], [0] * 5 + [1] * 3)
    assert tokenizer_of({"words": 6}, 8, ["b a"])("b a", None)[0] == [2, 1, 5, 3]


def test_pairs_have_types(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("text,other,label\n" + "a b,c,0\na,b c,1\nb,b,0\n")
    data = read(tmp_path, files="p.csv", text="text", label="label", pair="other")
    assert isinstance(data.x_train, dict)
    kinds = data.x_train["token_type_ids"]
    assert kinds.sum(1).tolist() == [2, 3] and shown(data)[0][0] == 2


def test_a_models_own_tokenizer(tmp_path: Path) -> None:
    library = pytest.importorskip("tokenizers")
    made = library.Tokenizer(library.models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    made.pre_tokenizer = library.pre_tokenizers.Whitespace()
    made.enable_padding(length=9)
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.tsv").write_text("a b\t1\nb a x\t0\nb\t1\na a a a a a\t0\n")
    data = read(tmp_path, files="a.tsv", tokenizer={"path": str(tmp_path)}, max_length=5, validation_share=0)
    assert shown(data) == [[1, 2], [2, 1, 0], [2]] and shown(data, "test") == [[1] * 5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"files": "none.tsv"}, "none.tsv: must be a file of UTF-8 text"),
        ({"files": "a.txt"}, "a.txt: must be a folder of datasets, or end in .tsv, .csv, .jsonl"),
        ({"files": {}}, "data.options.files must be a file"),
        ({"files": {"a": {"test": "a.tsv"}}}, "data.options.files.a must be a file, or train: FILE"),
        (
            {"files": {"a": {"train": "a.tsv", "lable": 1}}},
            "data.options.files.a must be a file, or train: FILE and any of",
        ),
        ({"files": "a.tsv", "label": 2}, r"a.tsv: line 1: must have the column 2 \(data.options.label\), got 0, 1"),
        ({"files": "a.tsv", "text": "text"}, "must all be names of columns, or all places"),
        ({"files": "a.tsv", "tokenizer": {"word": 3}}, "data.options.tokenizer must be {path"),
        (
            {"files": "a.tsv", "tokenizer": {"words": 3}},
            "data.options.tokenizer.words must be an integer of at least 6",
        ),
        ({"files": "a.tsv", "tokenizer": {"path": "nowhere"}}, "data.options.tokenizer.path: must be a folder"),
        ({"files": "a.tsv", "tokenizer": {"package": "no-such"}}, "'no-such' is not installed: pip install no-such"),
        ({"files": "a.tsv", "thresholds": [1, 0]}, "data.options.thresholds: must be numbers in rising order"),
        ({"files": "a.tsv", "labels": ["x", "y"]}, "data.options.labels: must name every label, got '1'"),
        ({"files": "a.tsv", "without": [7]}, "data.options.without: must be classes of the data, got 7 of 2"),
        ({"files": "a.tsv", "test_share": 1.0}, r"data.options.test_share must be in \[0, 1\)"),
        ({"files": "a.tsv", "overlap": "no"}, "data.options.overlap must be keep, drop or apart"),
        ({"files": "b.csv", "text": "text", "label": "label"}, "b.csv: line 3: must have the 2 columns, got 1"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    (tmp_path / "a.tsv").write_text("".join(f"{text}\t{label}\n" for text, label in ROWS))
    (tmp_path / "b.csv").write_text("text,label\na,1\nb\n")
    with pytest.raises(StudyError, match=message):
        read(tmp_path, **options)


def test_the_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "a.tsv").write_text("a\t1\nb\t0\nc\t1\n")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    monkeypatch.setattr("fedlth.errors.find_spec", lambda name: None)
    with pytest.raises(StudyError, match=r"pip install 'fedlth\[text\]' \(tokenizers not installed\)"):
        read(tmp_path, files="a.tsv", tokenizer={"path": str(tmp_path)})
