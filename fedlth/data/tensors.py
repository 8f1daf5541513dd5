"""From positions in a data set to the tensors a model is given."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fedlth.data.dataset import Dataset

if TYPE_CHECKING:
    from fedlth.data.examples import Examples


def inputs(dataset: Dataset, indices: np.ndarray, train: bool) -> Examples:
    """Return the examples at `indices` (n,), from the train or the test split.

    x: (n, C, H, W) float32, uint8 images divided by 255 and normalised; float32 as it is; tokens (n, T) int64.
    y: (n,) or (n, T) int64. Both own their memory.
    """
    # Local, since splits and digests must be had without torch.
    import torch

    from fedlth.data.examples import Examples

    x = (dataset.x_train if train else dataset.x_test)[indices]
    y = (dataset.y_train if train else dataset.y_test)[indices]
    if x.dtype == np.uint8:
        x = x.astype(np.float32) / np.float32(255)
        if dataset.mean:
            x -= np.asarray(dataset.mean, np.float32)[:, None, None]
            x /= np.asarray(dataset.std, np.float32)[:, None, None]
    return Examples(torch.from_numpy(x), torch.from_numpy(y))
