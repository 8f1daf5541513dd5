"""Wrong labels: a share of the training and validation labels of some clients, never of a test label."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedlth.data.dataset import Dataset
from fedlth.data.split import Splits, digest_of
from fedlth.errors import StudyError
from fedlth.rng import stream
from fedlth.study.sections import LabelNoise


def with_noise(dataset: Dataset, splits: Splits, noise: LabelNoise, seed: int) -> tuple[Dataset, Splits]:
    """Return the data set with wrong labels, and splits with the digest of both.

    `noise.share` of the clients (rounded, at least one) are drawn; of each one's training and validation examples
    `noise.rate` (rounded, at least one) get another class: any other with equal chance, or the next (pair).
    """
    labels = dataset.y_train
    if labels.ndim != 1 or labels.dtype.kind != "i":
        raise StudyError("clients.label_noise: must be left out where an example has not one class, as in this data")
    count = max(1, round(noise.share * len(splits.clients)))
    noisy = sorted(int(c) for c in stream(seed, "label noise").choice(len(splits.clients), count, replace=False))
    labels, classes = labels.copy(), dataset.num_classes
    for client in noisy:
        rng = stream(seed, "label noise", client=client)
        own = np.sort(np.concatenate([splits.clients[client].train, splits.clients[client].val]))
        wrong = rng.choice(own, max(1, round(noise.rate * len(own))), replace=False)
        step = 1 if noise.kind == "pair" else rng.integers(1, classes, len(wrong))
        labels[wrong] = (labels[wrong] + step) % classes
    made = replace(dataset, y_train=labels)
    digest = digest_of(splits.clients, splits.unseen, made.digest(), splits.own_test)
    return made, replace(splits, digest=digest, noisy=tuple(noisy))
