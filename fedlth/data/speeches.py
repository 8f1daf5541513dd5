"""Speeches of a play's roles: next-character prediction, one role a natural key (as LEAF's Shakespeare has it)."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from fedlth.data.dataset import Dataset
from fedlth.data.limits import check_count, check_share
from fedlth.errors import StudyError

FILES = ("roles.jsonl.gz", "roles.jsonl")
VALIDATION = 0.2  # as clients.validation has it


def shakespeare(
    root: str | None,
    length: int = 80,
    stride: int = 10,
    min_characters: int = 2000,
    test_share: float = 0.2,
    validation_share: float | None = None,
) -> Dataset:
    """Return windows of `length` characters (N, length) with the next one (N,) as label; the key is "play: role".

    root holds roles.jsonl or roles.jsonl.gz: an object {"play", "role", "lines"} a line. A window begins every
    `stride` characters of a role's lines, joined by line breaks; roles with fewer than `min_characters` are left out.
    The last `test_share` of a role's characters are for test, the last `validation_share` of the others for
    validation; no window has some of two parts. validation_share: None is .2 where windows overlap; where they do not,
    clients draw validation windows as usual. The alphabet is that of the whole file, sorted.
    """
    for name, value in (("length", length), ("stride", stride), ("min_characters", min_characters)):
        check_count(f"data.options.{name}", value, 1)
    check_share("data.options.test_share", test_share)
    overlapping = stride <= length
    if validation_share is not None:
        check_share("data.options.validation_share", validation_share)
    elif overlapping:
        validation_share = VALIDATION
    told = [] if validation_share is None else [str(validation_share)]
    roles = _read(root)
    alphabet = sorted({sign for text in roles.values() for sign in text})
    place = {sign: number for number, sign in enumerate(alphabet)}
    parts: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    keys: dict[str, list[str]] = {"train": [], "test": []}
    held: list[bool] = []
    for role, text in roles.items():
        if len(text) >= min_characters:
            tokens = np.array([place[sign] for sign in text], np.int64)
            cut = len(tokens) - round(test_share * len(tokens))
            apart = cut - round((validation_share or 0) * cut)
            for part, own in (("train", tokens[:apart]), ("validation", tokens[apart:cut]), ("test", tokens[cut:])):
                windows = _windows(own, length + 1, stride)
                side = "test" if part == "test" else "train"
                parts[side].append(windows)
                keys[side] += [role] * len(windows)
                if side == "train":
                    held += [part == "validation"] * len(windows)
    train, test = (np.concatenate(parts[part] or [np.zeros((0, length + 1), np.int64)]) for part in ("train", "test"))
    if not len(train) or not len(test):
        raise StudyError(
            f"{root}: must hold a role of at least {min_characters} characters, long enough for windows of {length} in "
            f"training and test, got {len(roles)} roles"
        )
    return Dataset(
        name="/".join(["shakespeare", *map(str, (length, stride, min_characters, test_share)), *told]),
        x_train=np.ascontiguousarray(train[:, :-1]),
        y_train=np.ascontiguousarray(train[:, -1]),
        x_test=np.ascontiguousarray(test[:, :-1]),
        y_test=np.ascontiguousarray(test[:, -1]),
        num_classes=len(alphabet),
        key_train=np.array(keys["train"]),
        key_test=np.array(keys["test"]),
        val_train=np.array(held) if validation_share is not None else None,
        overlapping=overlapping,
    )


def _windows(tokens: np.ndarray, size: int, stride: int) -> np.ndarray:
    """Return every `stride`-th window (windows, size)."""
    if len(tokens) < size:
        return np.zeros((0, size), np.int64)
    windows: np.ndarray = np.lib.stride_tricks.sliding_window_view(tokens, size)[::stride]
    return windows


def _read(root: str | None) -> dict[str, str]:
    """Return each role's text, in the order of the file."""
    if root is None:
        raise StudyError(f"data.root: must name a folder with {' or '.join(FILES)}, got none")
    folder = Path(root).expanduser()
    file = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if file is None:
        raise StudyError(f"{folder}: must hold {' or '.join(FILES)}, got neither")
    try:
        data = file.read_bytes()
        text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode("utf-8")
        rows: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines() if line]
        found: dict[str, str] = {}
        for row in rows:
            role = f"{row['play']}: {row['role']}"
            if role in found:
                raise ValueError(f"the role {role!r} is there twice")
            found[role] = "\n".join(row["lines"])
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        raise StudyError(f"{file}: must hold a play, a role and its lines on every line, got {error!r}") from error
    return found
