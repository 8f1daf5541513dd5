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
