"""The value that every data source returns: plain arrays, checked once, with a digest."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from fedlth.errors import StudyError


@dataclass(frozen=True, eq=False)
class Dataset:
    """Hold the train and test arrays of one data set.

    x: (N, C, H, W) uint8 images, (N, ...) float32, or (N, T) int64 tokens.
    y: (N,) int64 in [0, num_classes), or (N, T) int64 where the loss is per position.
    mean, std: per channel, applied to uint8 images after division by 255; () leaves them in [0, 1].
    key: (N,) natural key of each example (writer, role, domain), int64 or str, or None.
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    num_classes: int
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    key_train: np.ndarray | None = None
    key_test: np.ndarray | None = None

    @property
    def input_shape(self) -> tuple[int, ...]:
        return tuple(self.x_train.shape[1:])

    def digest(self) -> str:
        """Return the sha256 hex of every field: equal digests mean equal data, bit by bit."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        state = hashlib.sha256()
        head = [self.name, self.num_classes, list(self.mean), list(self.std)]
        state.update(json.dumps(head).encode())
        for array in (self.x_train, self.y_train, self.x_test, self.y_test, self.key_train, self.key_test):
            if array is None:
                state.update(b"none")
            elif array.dtype.kind in "US":
                # The width of a numpy string array is no part of its content.
                state.update(json.dumps(array.tolist()).encode())
            else:
                little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
                state.update(json.dumps([little.dtype.str, list(little.shape)]).encode())
                state.update(little.data)
        return state.hexdigest()


def pooled(dataset: Dataset) -> Dataset:
    """Return the data set with its test examples behind its training examples, and no test split."""
    joined = {
        field: np.concatenate([getattr(dataset, f"{field}_train"), getattr(dataset, f"{field}_test")])
        for field in ("x", "y", "key")
        if getattr(dataset, f"{field}_train") is not None and getattr(dataset, f"{field}_test") is not None
    }
    return replace(
        dataset,
        x_train=joined["x"],
        y_train=joined["y"],
        key_train=joined.get("key"),
        x_test=dataset.x_test[:0],
        y_test=dataset.y_test[:0],
        key_test=dataset.key_test[:0] if "key" in joined and dataset.key_test is not None else None,
    )


def checked(dataset: Dataset) -> Dataset:
    """Return `dataset` unchanged; raise StudyError at the first field that breaks its contract."""
    place = f"data set {dataset.name!r}"
    if isinstance(dataset.num_classes, bool) or not isinstance(dataset.num_classes, int) or dataset.num_classes < 2:
        raise StudyError(f"{place}: num_classes must be an integer of at least 2, got {dataset.num_classes!r}")
    _check_inputs(dataset, place)
    for part in ("train", "test"):
        _check_labels(dataset, part, place)
    channels = dataset.input_shape[0] if len(dataset.input_shape) == 3 else 0
    for field in ("mean", "std"):
        values = getattr(dataset, field)
        if values and len(values) != channels:
            raise StudyError(f"{place}: {field} must have one number for each channel ({channels}), got {values!r}")
    if len(dataset.mean) != len(dataset.std) or any(not s > 0 for s in dataset.std):
        raise StudyError(f"{place}: mean and std must come together and std be above 0, got {dataset.std!r}")
    return dataset


def _check_inputs(dataset: Dataset, place: str) -> None:
    x_train, x_test = dataset.x_train, dataset.x_test
    for field, x in (("x_train", x_train), ("x_test", x_test)):
        least = field == "x_train"  # a source without a test split is one for clients.test: own
        if not isinstance(x, np.ndarray) or x.ndim < 2 or len(x) < least:
            got, what = getattr(x, "shape", type(x).__name__), "a non-empty" if least else "an"
            raise StudyError(f"{place}: {field} must be {what} array of at least 2 dimensions, got {got}")
        if x.dtype == np.uint8 and x.ndim != 4:
            raise StudyError(f"{place}: {field} of uint8 images must be (N, C, H, W), got {x.shape}")
        if x.dtype not in (np.uint8, np.float32, np.int64):
            raise StudyError(f"{place}: {field} must be uint8, float32 or int64, got {x.dtype}")
        if x.dtype == np.float32 and not np.isfinite(x).all():
            raise StudyError(f"{place}: {field} must be finite, got NaN or infinity")
    if x_train.shape[1:] != x_test.shape[1:] or x_train.dtype != x_test.dtype:
        raise StudyError(
            f"{place}: x_train and x_test must agree in shape and dtype after the first dimension, "
            f"got {x_train.shape} {x_train.dtype} and {x_test.shape} {x_test.dtype}"
        )


def _check_labels(dataset: Dataset, part: str, place: str) -> None:
    x, y, key = (getattr(dataset, f"{field}_{part}") for field in ("x", "y", "key"))
    if not isinstance(y, np.ndarray) or y.dtype != np.int64 or y.ndim not in (1, 2) or len(y) != len(x):
        got = f"{y.dtype} {y.shape}" if isinstance(y, np.ndarray) else type(y).__name__
        raise StudyError(
            f"{place}: y_{part} must be int64, (N,) or (N, T), with N = {len(x)} as in x_{part}, got {got}"
        )
    if y.size and (y.min() < 0 or y.max() >= dataset.num_classes):
        raise StudyError(
            f"{place}: y_{part} must lie in [0, {dataset.num_classes}), got values from {y.min()} to {y.max()}"
        )
    if key is not None and (not isinstance(key, np.ndarray) or key.shape != (len(x),) or key.dtype.kind not in "iuU"):
        raise StudyError(f"{place}: key_{part} must be one integer or string for each example, (N,) with N = {len(x)}")
