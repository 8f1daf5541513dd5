"""From positions in a data set to the tensors a model is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from fedlth.data.dataset import Dataset

if TYPE_CHECKING:
    from fedlth.data.examples import Examples


def inputs(dataset: Dataset, indices: np.ndarray, train: bool) -> Examples:
    """Return the examples at `indices` (n,), from the train or the test split.

    x: (n, C, H, W) float32, uint8 images divided by 255 and normalised; float32 as it is; tokens (n, T) int64; several
    by name. y: (n,) or (n, T) int64, or (n,) or (n, k) float32. They own their memory.
    """
    # Local, since splits and digests must be had without torch.
    import torch

    from fedlth.data.examples import Examples

    x = dataset.x_train if train else dataset.x_test
    y = torch.from_numpy((dataset.y_train if train else dataset.y_test)[indices])
    lengths = dataset.lengths_train if train else dataset.lengths_test
    ragged = {name: torch.from_numpy(own[indices]) for name, own in lengths.items()}
    if isinstance(x, Mapping):
        several = {name: torch.from_numpy(_scaled(array[indices], dataset)) for name, array in x.items()}
        return Examples(several, y, ragged)
    return Examples(torch.from_numpy(_scaled(x[indices], dataset)), y, ragged)


def _scaled(x: np.ndarray, dataset: Dataset) -> np.ndarray:
    """Return images in [0, 1], normalised where the data set says how; all else as it is."""
    if x.dtype != np.uint8:
        return x
    x = x.astype(np.float32) / np.float32(255)
    if dataset.mean:
        x -= np.asarray(dataset.mean, np.float32)[:, None, None]
        x /= np.asarray(dataset.std, np.float32)[:, None, None]
    return x
