"""Arrays as a data set holds them: one an example's field, ragged rows padded, a mapping where inputs are several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

IGNORED = -100  # a position without a class
Shape = tuple[int, ...] | dict[str, tuple[int, ...]]  # an example's, by name where inputs are several
Fields = np.ndarray | Mapping[str, np.ndarray]


def named(x: Fields, name: str = "x") -> dict[str, np.ndarray]:
    """Return inputs as name -> array; one array is called `name`."""
    return dict(x) if isinstance(x, Mapping) else {name: x}


def taken(x: Fields, index: Any) -> Fields:
    """Return the examples at `index` of inputs."""
    return {name: array[index] for name, array in x.items()} if isinstance(x, Mapping) else x[index]


def as_rows(value: object) -> np.ndarray | list[np.ndarray]:
    """Return a value as an array, or as a list of arrays where its rows have unequal lengths; raises ValueError."""
    if not (isinstance(value, Sequence) or (isinstance(value, np.ndarray) and value.dtype == object)):
        return plain(np.asarray(value))
    rows = [plain(np.asarray(row)) for row in value]
    if any(row.ndim == 0 or row.dtype == object for row in rows) or len({len(row) for row in rows}) < 2:
        return plain(np.asarray(value if isinstance(value, Sequence) else list(value)))
    if len({row.shape[1:] for row in rows}) > 1:
        raise ValueError(f"ragged rows must agree in all but their length, got {sorted({r.shape[1:] for r in rows})}")
    return rows


def padded(rows: np.ndarray | list[np.ndarray], longest: int, fill: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows as one array (N, longest, ...), filled up at the end, and their lengths (N,) int64."""
    lengths = np.array([len(row) for row in rows], np.int64)
    kind = np.result_type(*rows) if isinstance(rows, list) else rows.dtype
    out = np.full((len(rows), longest, *rows[0].shape[1:]), fill, kind)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = row
    return out, lengths


def plain(array: np.ndarray) -> np.ndarray:
    """Bring doubles to float32, and truth values and small integers to int64; bytes of images stay."""
    if array.dtype.kind == "f":
        return array.astype(np.float32)
    return array.astype(np.int64) if array.dtype.kind in "iub" and array.dtype != np.uint8 else array
