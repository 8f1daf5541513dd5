"""What the Ray tests send into workers: a user's factory and model that misbehave for one client, and a clock."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedlth.engines.worker import Born, Parcel
from fedlth.federation.jobs import Reply

FAULTS = ("raise", "exit", "segfault", "hang", "stop", "memory", "killed", "held")
SENTINEL = 1000.0
EACH = 24


def data(*, fault: str = "", clients: int = 4) -> dict[str, Any]:
    """Return EACH examples a client, x (N, 8) float32; the first column of clients 2, 3 and on asks for `fault`."""
    rng = np.random.default_rng(0)
    key = np.repeat(np.arange(clients), EACH)
    x = rng.normal(size=(key.size, 8)).astype(np.float32)
    y = (x[:, 1] > 0).astype(np.int64) + (x[:, 2] > 0)
    test = x.copy()
    for client, one in enumerate(fault.split(), 2):
        x[key == client, 0] = SENTINEL + FAULTS.index(one)
    return {
        "x_train": x, "y_train": y, "x_test": test, "y_test": y, "num_classes": 3, "key_train": key, "key_test": key
    }  # fmt: skip


class Net(nn.Module):
    """A small network that does what a sentinel in its input says."""

    def __init__(self, *, num_classes: int, input_shape: tuple[int, ...], marker: str = "", once: str = "") -> None:
        super().__init__()
        self.marker, self.once = marker, once
        self.inner = nn.Sequential(nn.Linear(input_shape[0], 16), nn.ReLU(), nn.Linear(16, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        code = int(x[0, 0].item() - SENTINEL)
        if 0 <= code < len(FAULTS) and not self.met(FAULTS[code]):
            misbehave(FAULTS[code], self.marker)
        logits: Tensor = self.inner(x)
        return logits

    def met(self, fault: str) -> bool:
        """Say whether a worker has ended by this fault already, where `once` begins files' names for it to say so."""
        if not self.once or fault == "raise":
            return False
        file = Path(f"{self.once}-{fault}")
        ended = file.exists()
        file.touch()
        return ended


def misbehave(fault: str, marker: str) -> None:
    """Do one of FAULTS; `marker` is a file to leave first ("" for none); once it is there nobody is killed or held."""
    if fault in ("killed", "held") and Path(marker).exists():
        return
    if fault == "killed":
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "held":  # until somebody ends its machine; the parent of a Ray worker is its node's raylet
        whole = Path(f"{marker}.part")
        whole.write_text(str(os.getppid()))
        whole.rename(marker)
        time.sleep(3600)
    if marker:
        Path(marker).touch()
    if fault == "raise":
        raise RuntimeError("planted")
    if fault == "exit":
        os._exit(3)
    if fault == "segfault":
        ctypes.string_at(0)
    if fault == "hang":
        time.sleep(3600)
    if fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault == "memory":
        torch.zeros(4 * 2**30, dtype=torch.uint8).add_(1)


class Clocked:
    """A worker whose step only takes time, and answers when it began (`device`) and how long it took."""

    def start(self, study: str) -> Born:
        return Born(os.getpid(), "host", os.environ["CUDA_VISIBLE_DEVICES"])

    def step(self, parcels: list[Parcel], study: str, *payloads: bytes) -> list[Reply]:
        began = time.monotonic()
        time.sleep(0.2)
        seconds = time.monotonic() - began
        return [Reply(round=1, client=p.job.client, outbox=(), seconds=seconds, device=repr(began)) for p in parcels]
