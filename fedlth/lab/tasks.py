"""Clients as tasks on the bench: each with its own slice of the data, and a test part of its own labels."""

from __future__ import annotations

import numpy as np
import torch

from fedlth.data.partition import PARTITIONS
from fedlth.lab.bench import Bench
from fedlth.rng import stream
from fedlth.study.parts import make


def deal(bench: Bench, clients: int, alpha: float, most: int | None) -> list[np.ndarray]:
    """Put the parts of `clients` Dirichlet(alpha) clients on the bench as tasks "client0", ...; return label shares.

    A client trains on at most `most` of its examples. Its validation and test parts are the bench's, drawn by the
    client's label shares, as many as fit without drawing one twice. All seeds of a study have the same clients, so that
    a spread over seeds is that of the training and not of the tasks.
    """

    def draw(what: str, client: int = -1) -> np.random.Generator:
        return stream(bench.study.data.seed, what, client=client)

    whole = bench.parts["train"]
    y = whole.y
    partition = make(PARTITIONS, {"name": "dirichlet", "alpha": alpha}, "partition")
    owned = partition(y.numpy(), None, clients, draw("clients"))
    shares = []
    for client, positions in enumerate(owned):
        chosen = draw("client", client).permutation(positions)[:most]
        share = np.bincount(y[chosen].numpy(), minlength=bench.dataset.num_classes) / len(chosen)
        bench.parts[f"client{client}/train"] = whole.batch(torch.from_numpy(np.sort(chosen)))
        for part in ("validation", "test"):
            picked = _drawn(bench.parts[part].y.numpy(), share, draw(f"client/{part}", client))
            bench.parts[f"client{client}/{part}"] = bench.parts[part].batch(torch.from_numpy(picked))
        shares.append(share)
    return shares


def _drawn(labels: np.ndarray, share: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return positions whose labels have these shares, as many as the scarcest class allows."""
    there = np.bincount(labels, minlength=len(share))
    total = min(there[c] / share[c] for c in range(len(share)) if share[c] > 0)
    picks = [
        rng.choice(np.flatnonzero(labels == c), int(share[c] * total), replace=False)
        for c in range(len(share))
        if share[c] > 0
    ]
    return np.sort(np.concatenate(picks))


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Return the total variation distance of two label distributions, in [0, 1]."""
    return float(np.abs(one - other).sum() / 2)
