"""A user's own model and data: BatchNorm, embedding, LSTM, tied weights and a frozen part in one network."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

VOCABULARY, LENGTH, CLASSES = 12, 6, 3


class Reader(nn.Module):
    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.norm = nn.BatchNorm1d(width)
        self.decoder = nn.Linear(width, VOCABULARY, bias=False)
        self.decoder.weight = self.embed.weight  # tied
        self.frozen = nn.Linear(VOCABULARY, 8).requires_grad_(False)
        self.head = nn.Linear(8, num_classes)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states, _ = self.lstm(self.embed(x))
        return self.head(torch.relu(self.frozen(self.decoder(self.drop(self.norm(states[:, -1]))))))


def reader(num_classes: int, width: int = 8) -> nn.Module:
    return Reader(num_classes, width)


def sentences(seed: int = 0) -> dict[str, Any]:
    """Return token sequences (N, T) whose class is a function of their first token."""
    rng = np.random.default_rng(seed)
    x, x_test = rng.integers(0, VOCABULARY, (180, LENGTH)), rng.integers(0, VOCABULARY, (90, LENGTH))
    return {
        "x_train": x, "y_train": x[:, 0] % CLASSES, "x_test": x_test, "y_test": x_test[:, 0] % CLASSES,
        "num_classes": CLASSES,
    }  # fmt: skip


class Mixed(nn.Module):
    """One of each kind of tensor, for images of 8 x 8: see the names; `shift` is dice that no state dict holds."""

    def __init__(self, num_classes: int, trains: bool = False) -> None:
        super().__init__()
        self.features = nn.Linear(64, 16).requires_grad_(trains)
        self.norm = nn.BatchNorm1d(16)
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("causal_mask", torch.arange(16) % 3 > 0)
        self.register_buffer("seen", torch.tensor(0, dtype=torch.int32))
        self.register_buffer("shift", torch.randn(16), persistent=False)
        self.head = nn.Linear(16, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen.add_(1)
        x = self.norm(self.features(x.flatten(1))) + self.shift
        return self.head(torch.relu(x) * self.gain * self.causal_mask)


def frozen_as_constant(num_classes: int) -> nn.Module:
    """Return Mixed with its frozen part as plain buffers that no state dict holds: nothing of it can cross."""
    made = Mixed(num_classes)
    held = [(name, p.detach()) for name, p in made.features.named_parameters()]
    for name, value in held:
        delattr(made.features, name)
        made.features.register_buffer(name, value, persistent=False)
    return made


def pretrained(num_classes: int, trained: bool = True, hidden: int = 12) -> nn.Module:
    """Return a network that brings its first layer's weights; its head is drawn, as for a new task."""
    made = nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))
    if trained:
        rng = np.random.default_rng(5)
        with torch.no_grad():
            made[1].weight.copy_(torch.from_numpy(rng.normal(0, 0.1, (hidden, 64))))
    return made


class MaskedMean(nn.Module):
    """Two inputs by name: token ids, and a mask that says which are there."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 6)
        self.head = nn.Linear(6, num_classes)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        weights = mask[..., None]
        return self.head((self.embed(ids) * weights).sum(1) / weights.sum(1).clamp(min=1))
