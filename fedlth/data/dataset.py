"""The value that every data source returns: plain arrays, checked once, with a digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from fedlth.data.ragged import IGNORED, Fields, Shape, named
from fedlth.errors import StudyError


@dataclass(frozen=True, eq=False)
class Dataset:
    """Hold the train and test arrays of one data set.

    x: (N, C, H, W) uint8 images, (N, ...) float32, or (N, T) int64 tokens; or name -> such an array, also (N,).
    y: (N,) int64 in [0, num_classes); (N, T) int64 where every position has a class, or -100 for none; or real
    numbers, (N,) or (N, k) float32, whose num_classes is the number of outputs, 1 or k (a factory may leave it out).
    lengths: of each ragged field ("x", "y" or a name of the inputs) the rows' lengths (N,) int64; what is behind them
    is padding, as long in train as in test.
    mean, std: per channel, applied to uint8 images after division by 255; () leaves them in [0, 1].
    key: (N,) natural key of each example (writer, role, domain), int64 or str, or None.
    val_train: (N,) bool, the training examples that are for validation; clients without any draw some of their own.
    overlapping: neighbours among the training examples share values, as windows over one text do; a test part of the
    clients' own examples is then refused. No part of the digest.
    notes: what whoever reads `fedlth check` should know of the data; no part of them.
    """

    name: str
    x_train: Fields
    y_train: np.ndarray
    x_test: Fields
    y_test: np.ndarray
    num_classes: int = 0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    key_train: np.ndarray | None = None
    key_test: np.ndarray | None = None
    lengths_train: Mapping[str, np.ndarray] = field(default_factory=dict)
    lengths_test: Mapping[str, np.ndarray] = field(default_factory=dict)
    val_train: np.ndarray | None = None
    overlapping: bool = False
    notes: tuple[str, ...] = ()

    @property
    def input_shape(self) -> Shape:
        """An example's shape; by name where the inputs are several. A ragged field has that of its longest row."""
        if isinstance(self.x_train, Mapping):
            return {name: tuple(array.shape[1:]) for name, array in self.x_train.items()}
        return tuple(self.x_train.shape[1:])

    @property
    def targets(self) -> str:
        """What y holds: "classes", "positions" (a class each) or "numbers"."""
        if self.y_train.dtype.kind == "f":
            return "numbers"
        return "classes" if self.y_train.ndim == 1 else "positions"

    @property
    def tokens(self) -> bool:
        """Whether any input holds integers."""
        return any(array.dtype.kind == "i" for array in named(self.x_train).values())

    def digest(self) -> str:
        """Return the sha256 hex of every field: equal digests mean equal data, bit by bit."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        state = hashlib.sha256()
        head = [self.name, self.num_classes, list(self.mean), list(self.std)]
        state.update(json.dumps(head).encode())
        for array in self._arrays():
            if array is None:
                state.update(b"none")
            elif array.dtype.kind in "US":
                # The width of a numpy string array is no part of its content.
                state.update(json.dumps(array.tolist()).encode())
            else:
                little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
                state.update(json.dumps([little.dtype.str, list(little.shape)]).encode())
                state.update(little.data)
        if isinstance(self.x_train, Mapping) or self.lengths_train:
            state.update(json.dumps([sorted(self.x_train) if isinstance(self.x_train, Mapping) else None,
                                     sorted(self.lengths_train)]).encode())  # fmt: skip
        if self.val_train is not None:
            state.update(b"val" + self.val_train.tobytes())
        return state.hexdigest()

    def _arrays(self) -> list[np.ndarray | None]:
        """Return every array, fields of a mapping by name."""
        train, test = ([array for _, array in sorted(named(x).items())] for x in (self.x_train, self.x_test))
        lengths = [own[name] for own in (self.lengths_train, self.lengths_test) for name in sorted(own)]
        return [*train, self.y_train, *test, self.y_test, self.key_train, self.key_test, *lengths]


def pooled(dataset: Dataset) -> Dataset:
    """Return the data set with its test examples behind its training examples, and no test split."""
    train, test = named(dataset.x_train), named(dataset.x_test)
    x: Fields = {name: np.concatenate([train[name], test[name]]) for name in train}
    none: Fields = {name: array[:0] for name, array in test.items()}
    keyed = dataset.key_train is not None and dataset.key_test is not None
    behind, no_lengths = dataset.lengths_test, {name: own[:0] for name, own in dataset.lengths_test.items()}
    return replace(
        dataset,
        x_train=x if isinstance(dataset.x_train, Mapping) else x["x"],
        y_train=np.concatenate([dataset.y_train, dataset.y_test]),
        key_train=np.concatenate([dataset.key_train, dataset.key_test]) if keyed else None,
        x_test=none if isinstance(dataset.x_train, Mapping) else none["x"],
        y_test=dataset.y_test[:0],
        key_test=dataset.key_test[:0] if keyed and dataset.key_test is not None else None,
        lengths_train={name: np.concatenate([own, behind[name]]) for name, own in dataset.lengths_train.items()},
        lengths_test=no_lengths,
        val_train=None
        if dataset.val_train is None
        else np.append(dataset.val_train, np.zeros(len(dataset.y_test), bool)),
    )


def checked(dataset: Dataset) -> Dataset:
    """Return `dataset` unchanged; raise StudyError at the first field that breaks its contract."""
    place = f"data set {dataset.name!r}"
    _check_inputs(dataset, place)
    for part in ("train", "test"):
        _check_labels(dataset, part, place)
    for part in ("train", "test"):
        _check_values(dataset, part, place)
        _check_lengths(dataset, part, place)
    held = dataset.val_train
    if held is not None and not (
        isinstance(held, np.ndarray) and held.dtype == bool and held.shape == dataset.y_train.shape[:1]
    ):
        raise StudyError(f"{place}: val_train must be one truth value for each training example, (N,) bool")
    shape = dataset.input_shape
    channels = shape[0] if len(shape) == 3 and not isinstance(shape, dict) else 0
    for scale in ("mean", "std"):
        values = getattr(dataset, scale)
        if values and len(values) != channels:
            raise StudyError(f"{place}: {scale} must have one number for each channel ({channels}), got {values!r}")
    if dataset.mean and not any(x.dtype == np.uint8 for x in named(dataset.x_train).values()):
        raise StudyError(
            f"{place}: mean and std are for uint8 images, got inputs of other types: normalise these first"
        )
    if len(dataset.mean) != len(dataset.std) or any(not s > 0 for s in dataset.std):
        raise StudyError(f"{place}: mean and std must come together and std be above 0, got {dataset.std!r}")
    return dataset


def _check_inputs(dataset: Dataset, place: str) -> None:
    kinds = {isinstance(x, Mapping) for x in (dataset.x_train, dataset.x_test)}
    train, test = named(dataset.x_train), named(dataset.x_test)
    if len(kinds) > 1 or train.keys() != test.keys() or not train:
        raise StudyError(f"{place}: x_train and x_test must have the same fields, got {list(train)} and {list(test)}")
    for name in train:
        label = f"[{name!r}]" if True in kinds else ""
        if not isinstance(name, str) or (True in kinds and (name == "y" or not name.isprintable())):
            raise StudyError(f"{place}: x_train must have names that are text other than 'y', got {name!r}")
        for which, x in ((f"x_train{label}", train[name]), (f"x_test{label}", test[name])):
            # A source without a test split is one for clients.test: own.
            _check_field(x, f"{place}: {which}", least=1 if label else 2, empty=which.startswith("x_test"))
        one, other = train[name], test[name]
        if one.shape[1:] != other.shape[1:] or one.dtype != other.dtype:
            raise StudyError(
                f"{place}: x_train{label} and x_test{label} must agree in shape and dtype after the first dimension, "
                f"got {one.shape} {one.dtype} and {other.shape} {other.dtype}"
            )
    for part, fields in (("train", train), ("test", test)):
        sizes = {name: len(x) for name, x in fields.items()}
        if len(set(sizes.values())) > 1:
            raise StudyError(f"{place}: every field of x_{part} must have as many examples, got {sizes}")


def _check_field(x: np.ndarray, place: str, *, least: int, empty: bool) -> None:
    if not isinstance(x, np.ndarray) or x.ndim < least or not (len(x) or empty):
        got, what = getattr(x, "shape", type(x).__name__), "an array" if empty else "a non-empty array"
        dimensions = f" of at least {least} dimensions" if least > 1 else ""
        raise StudyError(f"{place} must be {what}{dimensions}, got {got}")
    if x.dtype == np.uint8 and x.ndim != 4:
        raise StudyError(f"{place} of uint8 images must be (N, C, H, W), got {x.shape}")
    if x.dtype not in (np.uint8, np.float32, np.int64):
        raise StudyError(f"{place} must be uint8, float32 or int64, got {x.dtype}")
    if x.dtype == np.float32 and not np.isfinite(x).all():
        raise StudyError(f"{place} must be finite, got NaN or infinity")


def _check_labels(dataset: Dataset, part: str, place: str) -> None:
    x, y, key = (getattr(dataset, f"{field}_{part}") for field in ("x", "y", "key"))
    size = len(next(iter(named(x).values())))
    known = isinstance(y, np.ndarray) and y.dtype in (np.int64, np.float32)
    if not known or y.ndim not in (1, 2) or len(y) != size:
        got = f"{y.dtype} {y.shape}" if isinstance(y, np.ndarray) else type(y).__name__
        raise StudyError(
            f"{place}: y_{part} must be int64, (N,) or (N, T), or float32, (N,) or (N, k), with N = {size} as in "
            f"x_{part}, got {got}"
        )
    if key is not None and (not isinstance(key, np.ndarray) or key.shape != (size,) or key.dtype.kind not in "iuU"):
        raise StudyError(f"{place}: key_{part} must be one integer or string for each example, (N,) with N = {size}")


def _check_values(dataset: Dataset, part: str, place: str) -> None:
    y, other, classes = getattr(dataset, f"y_{part}"), dataset.y_test, dataset.num_classes
    if (y.dtype, y.ndim) != (other.dtype, other.ndim) or (y.dtype == np.float32 and y.shape[1:] != other.shape[1:]):
        raise StudyError(
            f"{place}: y_train and y_test must be of one kind, got {y.dtype} {y.shape} and {other.dtype} {other.shape}"
        )
    least = 2
    if y.dtype == np.float32:
        least = 1 if y.ndim == 1 else int(y.shape[1])
        if not np.isfinite(y).all():
            raise StudyError(f"{place}: y_{part} must be finite, got NaN or infinity")
    if isinstance(classes, bool) or not isinstance(classes, int) or classes < max(1, least):
        raise StudyError(f"{place}: num_classes must be an integer of at least {least}, got {classes!r}")
    if y.dtype == np.float32:
        if classes != least:
            raise StudyError(
                f"{place}: num_classes must be {least}, the outputs of real-number targets, as y_{part} holds, got "
                f"{classes}; classes are whole numbers"
            )
        return
    there = y != IGNORED if y.ndim == 2 else np.ones(len(y), bool)
    if y.size and ((y[there] < 0).any() or (y[there] >= classes).any()):
        raise StudyError(
            f"{place}: y_{part} must lie in [0, {classes}){' or be -100' if y.ndim == 2 else ''}, got values from "
            f"{y.min()} to {y.max()}"
        )
    if y.ndim == 2 and not there.any(axis=1).all():
        empty = int(np.flatnonzero(~there.any(axis=1))[0])
        raise StudyError(
            f"{place}: every example of y_{part} must have a position with a class, example {empty} has none"
        )


def _check_lengths(dataset: Dataset, part: str, place: str) -> None:
    fields = named(getattr(dataset, f"x_{part}")) | {"y": getattr(dataset, f"y_{part}")}
    for name, own in getattr(dataset, f"lengths_{part}").items():
        if name not in fields or fields[name].ndim < 2:
            raise StudyError(f"{place}: lengths_{part} must name fields with positions, got {name!r}")
        array = fields[name]
        fits = isinstance(own, np.ndarray) and own.dtype == np.int64 and own.shape == (len(array),)
        if fits and (own < 1).any():
            several = isinstance(dataset.x_train, Mapping) and name != "y"
            rows, empty = f"x_{part}[{name!r}]" if several else f"{name}_{part}", int(np.flatnonzero(own < 1)[0])
            raise StudyError(f"{place}: {rows}: each row must have at least one entry, row {empty} has none")
        if not fits or (own > array.shape[1]).any():
            raise StudyError(
                f"{place}: lengths_{part}[{name!r}] must be one int64 from 1 to {array.shape[1]} for each example"
            )
    if dataset.lengths_train.keys() != dataset.lengths_test.keys():
        raise StudyError(f"{place}: lengths_train and lengths_test must name the same fields")
