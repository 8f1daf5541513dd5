"""The bench with images pooled to a few pixels and a small network: where full Hessians fit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch.nn import functional

from fedlth.data.dataset import Dataset
from fedlth.data.examples import Examples
from fedlth.lab.bench import Bench
from fedlth.lab.study import Model


def pooled(bench: Bench, *, side: int, hidden: int) -> Bench:
    """Return a bench whose images are (1, side, side) and whose network has one hidden layer."""
    small = {
        name: Examples(functional.adaptive_avg_pool2d(part.tensor, side).mean(1, keepdim=True), part.y)
        for name, part in bench.parts.items()
    }
    one = np.zeros((1, 1, side, side), np.float32)
    label = np.zeros(1, np.int64)
    model = Model(name="mlp", options={"hidden": [hidden]}, init=bench.study.model.init)
    return replace(
        bench,
        study=bench.study.model_copy(update={"model": model}),
        dataset=Dataset("pooled", one, label, one, label, bench.dataset.num_classes),
        parts=small,
    )
