"""The first training examples of a data set: what two cores can train on with every method and three seeds."""

from __future__ import annotations

from dataclasses import replace

from fedlth.data.dataset import Dataset
from fedlth.data.sources import SOURCES


def first(root: str | None, of: str, train: int) -> Dataset:
    """Return data set `of` with its first `train` training examples, and its whole test split."""
    whole: Dataset = SOURCES[of](root=root)
    if not 0 < train <= len(whole.y_train):
        raise ValueError(f"data.options.train must be in 1..{len(whole.y_train)}, got {train}")
    return replace(whole, x_train=whole.x_train[:train], y_train=whole.y_train[:train])
