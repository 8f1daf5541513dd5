"""CIFAR-10 and CIFAR-100 in their standard binary and python layouts (format: cs.toronto.edu/~kriz/cifar.html)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fedlth.data.dataset import Dataset
from fedlth.data.idx import find_folder
from fedlth.data.unpickle import read_pickle
from fedlth.errors import StudyError, wrong

PIXELS = 3 * 32 * 32
TEN_TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))


def cifar10(root: str | None) -> Dataset:
    """Return CIFAR-10 (Krizhevsky, 2009): 50,000 + 10,000 images of 3 x 32 x 32 in 10 classes."""
    folders = ("cifar-10-batches-bin", "cifar-10-batches-py", "cifar10")
    folder = find_folder(root, folders, (f"{TEN_TRAIN[0]}.bin", TEN_TRAIN[0]), "cifar10")
    train = [_batch(folder, stem, (b"labels",)) for stem in TEN_TRAIN]
    x_test, y_test = _batch(folder, "test_batch", (b"labels",))
    return Dataset(
        name="cifar10",
        x_train=np.concatenate([x for x, _ in train]),
        y_train=np.concatenate([y[0] for _, y in train]),
        x_test=x_test,
        y_test=y_test[0],
        num_classes=10,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    )


def cifar100(root: str | None, labels: str = "fine") -> Dataset:
    """Return CIFAR-100 (Krizhevsky, 2009); `labels` fine has 100 classes, coarse 20.

    The natural key of an image is its coarse class, so clients can be 20 semantic domains.
    """
    if labels not in ("fine", "coarse"):
        raise wrong("data.options.labels", "fine or coarse", labels)
    folder = find_folder(root, ("cifar-100-binary", "cifar-100-python", "cifar100"), ("train.bin", "train"), "cifar100")
    keys = (b"coarse_labels", b"fine_labels")
    x_train, y_train = _batch(folder, "train", keys)
    x_test, y_test = _batch(folder, "test", keys)
    column = 1 if labels == "fine" else 0
    return Dataset(
        name="cifar100" if labels == "fine" else "cifar100_coarse",
        x_train=x_train,
        y_train=y_train[column],
        x_test=x_test,
        y_test=y_test[column],
        num_classes=100 if labels == "fine" else 20,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        key_train=y_train[0],
        key_test=y_test[0],
    )


def _batch(folder: Path, stem: str, keys: tuple[bytes, ...]) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Return images (N, 3, 32, 32) uint8 and one label array (N,) int64 for each of `keys`."""
    binary, python = folder / f"{stem}.bin", folder / stem
    if binary.is_file():
        return _read_binary(binary, len(keys))
    if python.is_file():
        return _read_python(python, keys)
    raise StudyError(f"{folder}: the file {stem}.bin or {stem} is missing")


def _read_binary(path: Path, num_labels: int) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Read records of `num_labels` label bytes and 3,072 pixels."""
    flat = np.fromfile(path, np.uint8)
    record = num_labels + PIXELS
    if flat.size == 0 or flat.size % record:
        raise StudyError(f"{path}: must be a whole number of records of {record} bytes, got {flat.size} bytes")
    rows = flat.reshape(-1, record)
    labels = tuple(rows[:, i].astype(np.int64) for i in range(num_labels))
    return np.ascontiguousarray(rows[:, num_labels:]).reshape(-1, 3, 32, 32), labels


def _read_python(path: Path, keys: tuple[bytes, ...]) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Read one batch of the python layout; its keys are bytes, or str when someone re-saved it."""
    content = read_pickle(path)
    if not isinstance(content, Mapping):
        raise StudyError(f"{path}: must hold a dictionary, got {type(content).__name__}")
    fields = {key.encode() if isinstance(key, str) else key: value for key, value in content.items()}
    missing = [key.decode() for key in (b"data", *keys) if key not in fields]
    if missing:
        raise StudyError(f"{path}: the fields {', '.join(missing)} are missing")
    data = fields[b"data"]
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != PIXELS:
        raise StudyError(f"{path}: data must be a uint8 array (N, {PIXELS})")
    try:
        labels = tuple(np.asarray(fields[key], np.int64) for key in keys)
    except (TypeError, ValueError, OverflowError) as error:
        raise StudyError(f"{path}: labels must be a list of integers") from error
    if any(column.shape != (len(data),) for column in labels):
        raise StudyError(f"{path}: there must be one label for each of the {len(data)} images")
    return np.ascontiguousarray(data).reshape(-1, 3, 32, 32), labels
