"""A data set's contract and its digest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedlth.data.dataset import Dataset, checked
from fedlth.errors import StudyError


def small() -> Dataset:
    rng = np.random.default_rng(0)
    return Dataset(
        name="small",
        x_train=rng.integers(0, 256, (6, 1, 4, 4), np.uint8),
        y_train=np.array([0, 1, 2, 0, 1, 2]),
        x_test=rng.integers(0, 256, (3, 1, 4, 4), np.uint8),
        y_test=np.array([0, 1, 2]),
        num_classes=3,
        mean=(0.5,),
        std=(0.5,),
        key_train=np.array(["a", "b", "c", "a", "b", "c"]),
        key_test=np.array(["a", "b", "c"]),
    )


CHANGES: dict[str, Any] = {
    "name": "other",
    "x_train": small().x_train ^ np.uint8(1),
    "y_train": np.array([0, 1, 2, 0, 2, 1]),
    "x_test": small().x_test ^ np.uint8(1),
    "y_test": np.array([0, 2, 1]),
    "num_classes": 4,
    "mean": (0.4,),
    "std": (0.4,),
    "key_train": np.array(["a", "b", "c", "a", "b", "d"]),
    "key_test": None,
}


@pytest.mark.parametrize("field", CHANGES)
def test_digest_changes_with_every_field(field: str) -> None:
    assert replace(small(), **{field: CHANGES[field]}).digest() != small().digest()


def test_digest_is_of_the_content_not_of_the_memory() -> None:
    data = small()
    strided = np.repeat(data.x_train, 2, axis=0)[::2]
    wide = np.array(data.key_train, dtype="U20")
    assert replace(data, x_train=strided, key_train=wide).digest() == data.digest()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_classes", 1, "num_classes must be an integer of at least 2"),
        ("x_train", np.zeros((0, 1, 4, 4), np.uint8), "x_train must be a non-empty array"),
        ("x_train", np.zeros((6, 4, 4), np.uint8), "must be .N, C, H, W."),
        ("x_train", np.zeros((6, 1, 4, 4), np.float64), "x_train must be uint8, float32 or int64"),
        ("x_train", np.full((6, 1, 4, 4), np.nan, np.float32), "x_train must be finite"),
        ("x_test", np.zeros((3, 1, 5, 5), np.uint8), "must agree in shape"),
        ("y_train", np.array([0, 1, 2, 0, 1, 3]), r"y_train must lie in \[0, 3\)"),
        ("y_train", np.array([0, 1, 2]), "with N = 6"),
        ("y_test", np.array([0.0, 1.0, 2.0]), "y_test must be int64"),
        ("mean", (0.1, 0.2, 0.3), "one number for each channel"),
        ("std", (0.0,), "std be above 0"),
        ("key_test", np.array(["a"]), "key_test must be one integer or string"),
    ],
)
def test_a_broken_field_is_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(StudyError, match=message):
        checked(replace(small(), **{field: value}))


def test_what_is_never_applied_is_refused() -> None:
    """mean and std are for images of uint8: of other inputs they would be dropped without a word."""
    floats = {part: getattr(small(), part).astype(np.float32) for part in ("x_train", "x_test")}
    with pytest.raises(StudyError, match="mean and std are for uint8 images"):
        checked(replace(small(), **floats))
    assert checked(replace(small(), **floats, mean=(), std=()))


def test_a_sound_data_set_passes() -> None:
    data = small()
    assert checked(data) is data
    assert data.input_shape == (1, 4, 4)
