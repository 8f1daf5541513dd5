"""Data in LEAF's JSON files: users, num_samples, user_data with x and y (Caldas et al., 2018, arXiv 1812.01097)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedlth.data.dataset import Dataset
from fedlth.errors import StudyError


def leaf(root: str | None, shape: Sequence[int] | None = None) -> Dataset:
    """Return what a LEAF folder holds, users as keys: its train/ and test/, or all_data/, which has no test split.

    shape: of one example, such as [1, 28, 28]; by default as the files have it. x must be numbers, y whole numbers.
    """
    if root is None:
        raise StudyError("data.root: must name a folder of LEAF, with train/ and test/ or all_data/, got none")
    folder = Path(root).expanduser()
    split = (folder / "train").is_dir() and (folder / "test").is_dir()
    train = _read(folder / ("train" if split else "all_data"), shape)
    test = _read(folder / "test", shape) if split else tuple(array[:0] for array in train)
    return Dataset(
        name="leaf",
        x_train=train[0],
        y_train=train[1],
        x_test=test[0],
        y_test=test[1],
        num_classes=int(max(train[1].max(), test[1].max(initial=0))) + 1,
        key_train=train[2],
        key_test=test[2],
    )


def _read(folder: Path, shape: Sequence[int] | None) -> tuple[np.ndarray, ...]:
    """Return (x, y, key) of all users of all files, files by name and users in the order of their file."""
    files = sorted(folder.glob("*.json"))
    if not files:
        raise StudyError(f"{folder}: must hold LEAF's JSON files, got none")
    x: list[Any] = []
    y: list[Any] = []
    key: list[str] = []
    for file in files:
        try:
            content = json.loads(file.read_bytes())
            for user in content["users"]:
                own = content["user_data"][user]
                if len(own["x"]) != len(own["y"]):
                    raise StudyError(f"{file}: user {user}: must have as many x as y")
                x += own["x"]
                y += own["y"]
                key += [str(user)] * len(own["y"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise StudyError(f"{file}: must hold users and user_data with x and y, got another: {error!r}") from error
    try:
        values, labels = np.array(x), np.array(y)
        if values.dtype.kind not in "if" or labels.dtype.kind != "i" or labels.ndim != 1 or not labels.size:
            raise ValueError("text, or nested values")
        values = values.astype(np.float32)
        values = values.reshape(len(labels), *shape) if shape is not None else values
    except (ValueError, TypeError) as error:
        raise StudyError(f"{folder}: x must be numbers of one shape and y whole numbers, got {error}") from error
    return values, labels.astype(np.int64), np.array(key)
