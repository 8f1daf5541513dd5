"""Text to classify or to score, of one or several sources (domains), as tokens: what a pre-trained encoder is given."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedlth.data.blocks import LEFT_OUT, TEST, TRAIN, VALIDATION, Blocks
from fedlth.data.dataset import Dataset
from fedlth.data.limits import check_count
from fedlth.data.ragged import padded
from fedlth.data.text_files import SPLITS, Column, Columns, Row, read
from fedlth.data.text_labels import NOWHERE, Labels, real
from fedlth.data.tokens import Tokenizer, encoded, tokenizer_of
from fedlth.errors import StudyError, wrong

CODES = dict(zip(SPLITS, (TRAIN, VALIDATION, TEST), strict=True))
OF_A_KEY = ("text", "pair", "label", "labels", "thresholds", "without")  # what a key may say for itself
VALIDATION_SHARE = 0.1
OVERLAPS = ("keep", "drop", "apart")


def text(
    root: str | None,
    *,
    files: str | Mapping[str, Any],
    tokenizer: Mapping[str, Any],
    max_length: int = 128,
    text: Column = "text",
    pair: Column | None = None,
    label: Column | None = "label",
    key: Column | None = None,
    labels: Sequence[str] | None = None,
    thresholds: Sequence[float] | None = None,
    without: Sequence[str | int] = (),
    test_share: float = 0.2,
    validation_share: float | None = None,
    blocks: int = 1,
    gap: int = 0,
    overlap: str = "keep",
) -> Dataset:
    """Text from TSV, CSV, JSON lines or folders of `datasets`: input_ids and attention_mask, ragged; one key a file.

    root: the folder that files are named from. files: one file; or {train, validation, test}, of which the last two may
    be left out; or a natural key's name -> either of these, with options of its own (text, pair, label, labels,
    thresholds, without). key: the column with the key of an example, in place of that.
    tokenizer: {path | package | hub} of a model, or {words: N}. max_length: tokens of an example, the rest is cut off.
    label null: none, for masked language modelling; num_classes is then the number of tokens.
    test_share, validation_share, blocks, gap: how examples of a key without such a file are cut (Blocks).
    validation_share null: 0.1 where the test part is cut so, else clients draw it (clients.validation).
    overlap: `drop` leaves out training examples whose text (letters and digits alone) is in a validation or test part
    of any key, and validation examples whose text is in a test part. `apart` leaves out besides what several keys train
    on: a text stays with the key that has the fewest training examples, of equals the first by name.
    Raises StudyError naming option, or file and line.
    """
    check_count("data.options.max_length", max_length, 4)
    if overlap not in OVERLAPS:
        raise wrong("data.options.overlap", "keep, drop or apart", overlap)
    own = {"text": text, "pair": pair, "label": label, "labels": labels, "thresholds": thresholds, "without": without}
    sources = [_source(name, spec, own, key) for name, spec in _named(files).items()]
    cut = _Cut(test_share, validation_share, blocks, gap)
    parts = [_placed(source, Path(root or ".").expanduser(), cut) for source in sources]
    y, count, kept = _targets(sources, [rows for rows, _ in parts])
    rows = [row for own_rows, _ in parts for row in own_rows]
    codes = np.where(kept, np.concatenate([part for _, part in parts]), LEFT_OUT)
    keys = np.array([row.key for row in rows]) if len(sources) > 1 or key is not None else None
    codes, notes = _without_overlap([row.text + "\n" + (row.pair or "") for row in rows], codes, keys, overlap)
    for name, part in (("training", TRAIN), ("test", TEST)):
        if not (codes == part).any():
            raise StudyError(f"data: text must have a {name} example, got none")
    training = (t for r, c in zip(rows, codes, strict=True) if c == TRAIN for t in (r.text, r.pair or ""))
    made = tokenizer_of(tokenizer, max_length, training)
    return _dataset(made, rows, codes, y, count or made.size, keys, notes)


@dataclass(frozen=True)
class _Source:
    name: str
    files: Mapping[str, str]
    columns: Columns
    labels: Labels


@dataclass(frozen=True)
class _Cut:
    test: float
    validation: float | None
    blocks: int
    gap: int

    def of(self, given: Mapping[str, Any]) -> Blocks:
        """Return how training examples are cut, where the parts in `given` have examples of their own."""
        test = 0.0 if "test" in given else self.test
        usual = VALIDATION_SHARE if test else 0.0
        validation = usual if self.validation is None else self.validation
        return Blocks(test, 0.0 if "validation" in given else validation, self.blocks, self.gap)


def _named(files: str | Mapping[str, Any]) -> Mapping[str, Any]:
    """Return name -> files of each key, by name: a study's text, from which workers build, knows no other order.

    One alone has no name.
    """
    if isinstance(files, str) or (isinstance(files, Mapping) and files and files.keys() <= {*SPLITS}):
        return {"": files}
    if not isinstance(files, Mapping) or not files:
        raise wrong("data.options.files", "a file, {train, validation, test}, or a natural key's name -> these", files)
    return dict(sorted((str(name), spec) for name, spec in files.items()))


def _source(name: str, spec: Any, usual: Mapping[str, Any], key: Column | None) -> _Source:
    place = f"data.options.files{'.' + name if name else ''}"
    given = {"train": spec} if isinstance(spec, str) else spec
    known = {*SPLITS, *OF_A_KEY}
    if not isinstance(given, Mapping) or "train" not in given or not given.keys() <= known:
        raise wrong(place, f"a file, or train: FILE and any of {', '.join(sorted(known - {'train'}))}", spec)
    files = {split: given[split] for split in SPLITS if split in given}
    if not all(isinstance(file, str) for file in files.values()):
        raise wrong(place, "names of files", files)
    own = {**usual, **{option: given[option] for option in OF_A_KEY if option in given}}
    if {"labels", "thresholds"} & given.keys():  # one takes the other's place
        own |= {option: given.get(option) for option in ("labels", "thresholds")}
    listed = {what: own[what] if own[what] is None else _tuple(f"{place}.{what}", own[what]) for what in OF_A_KEY[3:]}
    columns = Columns(own["text"], own["pair"], own["label"], key)
    return _Source(name, files, columns, Labels(listed["labels"], listed["thresholds"], listed["without"] or ()))


def _tuple(place: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise wrong(place, "a list", value)
    return tuple(value)


def _placed(source: _Source, root: Path, cut: _Cut) -> tuple[list[Row], np.ndarray]:
    """Return a source's rows, and the part that each is in."""
    found: dict[str, list[Row]] = {}
    for split, file in source.files.items():
        whole = read(root / file, source.columns, source.name)
        if len(whole) > 1 and len(source.files) > 1:
            raise StudyError(
                f"{root / file}: must be one split where the parts are files of their own, got {list(whole)}"
            )
        found |= whole if len(source.files) == 1 else {split: whole["train"]}
    rows, codes = [row for own in found.values() for row in own], [np.zeros(0, int)]
    codes += [np.full(len(own), CODES[split]) for split, own in found.items()]
    placed, how = np.concatenate(codes), cut.of(found)
    keys = np.array([row.key for row in found["train"]])
    for key in np.unique(keys) if how.test or how.validation else ():
        mine = np.flatnonzero(keys == key)
        placed[mine] = how(len(mine), str(key) or "the file")
    return rows, placed


def _targets(sources: Sequence[_Source], rows: Sequence[list[Row]]) -> tuple[np.ndarray, int, np.ndarray]:
    """Return the targets of all rows, the number of classes or outputs (0: none are given), and which are kept."""
    blank = [source.columns.label is None for source in sources]
    if any(blank):
        if not all(blank):
            raise StudyError("data.options.label: must be null for every key, or for none")
        count = sum(map(len, rows))
        return np.zeros(count, np.int64), 0, np.ones(count, bool)
    values = [[row.label for row in own] for own in rows]
    kinds = [source.labels.kind(own) for source, own in zip(sources, values, strict=True)]
    if "numbers" in kinds and "names" in kinds:
        raise StudyError("data.options.labels: a key's names and another's real numbers must not be in one data set")
    free = [own for s, own, kind in zip(sources, values, kinds, strict=True) if kind == "names" and not s.labels.labels]
    shared = sorted({str(value) for own in free for value in own})
    found, most = list[np.ndarray](), 1
    for source, own, kind in zip(sources, values, kinds, strict=True):
        if kind == "numbers":
            if source.labels.without:
                raise StudyError("data.options.without: must be left out where labels are real numbers")
            found.append(real(own))
        else:
            classes, count = source.labels.classes(own, source.labels.labels or shared)
            found.append(classes)
            most = max(most, count)
    kept = np.concatenate([own != NOWHERE if own.dtype.kind == "i" else np.ones(len(own), bool) for own in found])
    if "numbers" in kinds:
        return np.concatenate(found).astype(np.float32), 1, kept
    return np.concatenate(found), max(2, most), kept


def _without_overlap(
    texts: Sequence[str], codes: np.ndarray, keys: np.ndarray | None, overlap: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Find texts that stand in two parts, or in the training parts of two keys; leave them out of one, or say so."""
    plain = [re.sub(r"[\W_]+", "", text.lower()) for text in texts]
    less = _less_precious(plain, codes)
    where = f"{int(less.sum()):,} training or validation examples have a text that is in a validation or test part too"
    if overlap == "keep":
        told = (f"data: {where}; data.options.overlap: drop leaves them out",) if less.any() else ()
        return codes, told
    codes = np.where(less, LEFT_OUT, codes)
    notes = [f"data: {where}, and are left out (overlap: {overlap})"] if less.any() else []
    if keys is None:
        if overlap == "apart":
            raise StudyError("data.options.overlap: apart must have several keys (files by name, or key), got one")
        return codes, tuple(notes)
    others = _of_another_key(plain, codes, keys)
    where = f"{int(others.sum()):,} training examples have a text that another key trains on"
    if overlap == "apart":
        codes = np.where(others, LEFT_OUT, codes)
        where += " and keeps, and are left out (overlap: apart)"
    else:
        where += " too; data.options.overlap: apart leaves them out"
    return codes, (*notes, *((f"data: {where}",) if others.any() else ()))


def _less_precious(plain: Sequence[str], codes: np.ndarray) -> np.ndarray:
    """Return which examples have a text that is in a more precious part: validation, or most of all test."""
    best: dict[str, int] = {}
    for text, code in zip(plain, codes, strict=True):
        if code != LEFT_OUT:
            best[text] = max(best.get(text, TRAIN), int(code))
    doubled = np.array([code < best.get(text, TRAIN) for text, code in zip(plain, codes, strict=True)])
    found: np.ndarray = doubled & (codes != LEFT_OUT)
    return found


def _of_another_key(plain: Sequence[str], codes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Return which training examples have a text that stays with another key, which has fewer or is before by name."""
    names, counts = np.unique(keys[codes == TRAIN], return_counts=True)
    rank = {str(name): place for place, name in enumerate(names[np.argsort(counts, kind="stable")])}
    training, owner = np.flatnonzero(codes == TRAIN).tolist(), dict[str, int]()
    for i in training:
        owner[plain[i]] = min(owner.get(plain[i], len(rank)), rank[str(keys[i])])
    others = np.zeros(len(codes), bool)
    others[training] = [rank[str(keys[i])] != owner[plain[i]] for i in training]
    return others


def _dataset(
    tokenizer: Tokenizer, rows: Sequence[Row], codes: np.ndarray, y: np.ndarray, count: int, keys: np.ndarray | None,
    notes: tuple[str, ...],
) -> Dataset:  # fmt: skip
    places = {"train": np.flatnonzero((codes == TRAIN) | (codes == VALIDATION)), "test": np.flatnonzero(codes == TEST)}
    tokens = {
        part: encoded(tokenizer, ((rows[i].text, rows[i].pair) for i in at.tolist())) for part, at in places.items()
    }
    longest = max(len(ids) for part in tokens.values() for ids, _ in part)
    two = any(any(kinds) for part in tokens.values() for _, kinds in part)
    x: dict[str, dict[str, np.ndarray]] = {}
    lengths: dict[str, dict[str, np.ndarray]] = {}
    for part, found in tokens.items():
        ids, sizes = padded([np.array(own, np.int64) for own, _ in found], longest, 0)
        mask = (np.arange(longest) < sizes[:, None]).astype(np.int64)
        x[part] = {"input_ids": ids, "attention_mask": mask}
        if two:
            x[part]["token_type_ids"] = padded([np.array(kinds, np.int64) for _, kinds in found], longest, 0)[0]
        lengths[part] = dict.fromkeys(x[part], sizes)
    train, test, held = places["train"], places["test"], codes[places["train"]] == VALIDATION
    return Dataset(
        name="text", x_train=x["train"], y_train=y[train], x_test=x["test"], y_test=y[test], num_classes=count,
        key_train=None if keys is None else keys[train], key_test=None if keys is None else keys[test],
        lengths_train=lengths["train"], lengths_test=lengths["test"],
        val_train=held if held.any() else None, notes=notes,
    )  # fmt: skip
