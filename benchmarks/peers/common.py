"""What every peer's script shares: the data, the networks, and taking turns with benchmarks/rounds.py.

Runs in the peer's own environment: nothing of fedlth is imported. A script's first line of input is the work. Client
steps are counted where they happen, in the optimiser. benchmarks/peers/check.py shows that the loss falls.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.optim.optimizer import register_optimizer_step_post_hook

TOLD = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # frameworks print as they like; the benchmark listens to TOLD alone
LR, BATCH = 0.05, 32


STEPS: list[int] = []  # grows by one a client step; a list, since appending is safe among threads


def _count(optimiser: torch.optim.Optimizer, *_: Any) -> None:
    if optimiser.param_groups[0]["lr"] == LR:  # a server's optimiser has another
        STEPS.append(1)


register_optimizer_step_post_hook(_count)


def read_work(*, alone: bool = False) -> dict[str, Any]:
    """Return the work. A framework that trains one client at a time, `alone`, gets what serves it best on two cores.

    That is two torch threads for the LEAF CNN and one for LeNet-5, whose steps two threads make slower.
    """
    found: dict[str, Any] = json.loads(sys.stdin.readline())
    torch.set_num_threads(2 if alone and found["model"] != "lenet5" else 1)
    return found


def data(work: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Return images, labels, and (100, examples) positions: two shards of one label each a client."""
    root = Path(work["data"] or "/usr/share/datasets/fashion-mnist")
    with gzip.open(root / "train-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    with gzip.open(root / "train-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8).astype(np.int64)
    shards = np.argsort(labels, kind="stable").reshape(200, 300)[np.random.default_rng(0).permutation(200)]
    x = (torch.tensor(images, dtype=torch.float32) / 255 - 0.2860) / 0.3530
    return x, torch.from_numpy(labels), shards.reshape(100, 600)[:, : work["examples"]]


def build(model: str) -> nn.Module:
    torch.manual_seed(0)
    if model == "leaf_cnn":
        return nn.Sequential(
            nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(),
            nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, 10),
        )  # fmt: skip
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


def clients(round_: int, work: dict[str, Any]) -> list[int]:
    return [int(c) for c in np.random.default_rng(round_).permutation(100)[: work["clients"]]]


def torchvision_without_operators() -> torch.library.Library:
    """Let torchvision be imported whose operators are for another build of torch (CUDA's beside a CPU torch)."""
    named = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        named.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return named


class Turn:
    """Waits for the benchmark before each round, and tells it what the round took."""

    def __init__(self, work: dict[str, Any]) -> None:
        self.work, self.began, self.ready = work, 0.0, False

    def begin(self) -> None:
        if not self.ready:
            print("ready", file=TOLD, flush=True)
            self.ready = True
        if not sys.stdin.readline():
            os._exit(0)
        STEPS.clear()
        self.began = time.perf_counter()

    def end(self, model: Callable[[], nn.Module], steps: int | None = None) -> None:
        """Tell the seconds and the client steps, by default those of this process; `model` is the global one."""
        told = {"wall": time.perf_counter() - self.began, "steps": len(STEPS) if steps is None else steps}
        if self.work.get("check"):
            told |= quality(model(), self.work)
        print(json.dumps(told), file=TOLD, flush=True)


@torch.no_grad()
def quality(model: nn.Module, work: dict[str, Any]) -> dict[str, float]:
    """Return loss and accuracy over 2,000 images of all classes."""
    x, y, _ = data(work)
    chosen = torch.from_numpy(np.random.default_rng(1).permutation(len(y))[:2000])
    logits = model(x[chosen])
    accuracy = (logits.argmax(1) == y[chosen]).float().mean()
    return {"loss": float(functional.cross_entropy(logits, y[chosen])), "accuracy": float(accuracy)}
