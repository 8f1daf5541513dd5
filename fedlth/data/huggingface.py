"""Data sets of the Hugging Face hub, or of a folder in its format, through the optional extra `hf`."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from fedlth.data.dataset import Dataset
from fedlth.data.factory import told
from fedlth.errors import StudyError


def huggingface(
    name: str,
    root: str | None,
    *,
    image: str = "image",
    label: str = "label",
    key: str | None = None,
    subset: str | None = None,
    train: str = "train",
    test: str = "test",
    revision: str | None = None,
) -> Dataset:
    """Return `hf:<id>` as images; root is the library's cache folder.

    image, label, key: columns; key is the natural key (writer, domain) if wanted. subset, revision: of the hub.
    train, test: names of the two splits. Images of one split must agree in size and colours.
    """
    try:
        library: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise StudyError(f"data: {name} needs the extra `hf`: pip install 'fedlth[hf]'") from error
    identity = name.removeprefix("hf:")
    if not identity:
        raise StudyError("data: hf: must be followed by the id of a data set, as in hf:ylecun/mnist")
    try:
        splits = library.load_dataset(identity, subset, cache_dir=root, revision=revision)
    except Exception as error:  # the library raises its own, the network's and the file system's errors
        raise StudyError(f"data: {name} cannot be loaded: {told(error)}") from error
    parts = {}
    for split in (train, test):
        if split not in splits:
            raise StudyError(f"data.options: {name} has the splits {', '.join(splits)}, got {split!r}")
        parts[split] = _columns(splits[split], name, image, label, key)
    x_train, y_train, key_train = parts[train]
    x_test, y_test, key_test = parts[test]
    return Dataset(
        name=name,
        x_train=x_train,
        y_train=y_train,
        x_test=x_test,
        y_test=y_test,
        num_classes=_num_classes(splits[train], label, y_train, y_test),
        mean=tuple(float(v) for v in np.mean(x_train, (0, 2, 3)) / 255),
        std=tuple(max(float(v), 1e-6) for v in np.std(x_train, (0, 2, 3)) / 255),
        key_train=key_train,
        key_test=key_test,
    )


def _columns(part: Any, name: str, image: str, label: str, key: str | None) -> tuple[Any, Any, Any]:
    """Return images (N, C, H, W) uint8, labels (N,) int64, and keys (N,) or None."""
    for column in (image, label, *([key] if key else [])):
        if column not in part.column_names:
            raise StudyError(f"data.options: {name} has the columns {', '.join(part.column_names)}, got {column!r}")
    images = [np.asarray(picture) for picture in part[image]]
    shapes = {picture.shape for picture in images}
    if (
        len(shapes) != 1
        or any(picture.dtype != np.uint8 for picture in images)
        or len(next(iter(shapes))) not in (2, 3)
    ):
        raise StudyError(f"data: {name} must have uint8 images of one size, got shapes {sorted(shapes)[:3]}")
    x = np.stack(images)
    x = x[:, None] if x.ndim == 3 else np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    return x, np.asarray(part[label], np.int64), np.asarray(part[key]) if key else None


def _num_classes(part: Any, label: str, y_train: np.ndarray, y_test: np.ndarray) -> int:
    declared = getattr(part.features[label], "num_classes", None)
    return int(declared) if declared else int(max(y_train.max(), y_test.max())) + 1
