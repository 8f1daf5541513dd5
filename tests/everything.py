"""One study with all that training and tasks may be: ragged mappings, tasks, a fleet, a curve; for every engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from fedlth.study import schema

WORDS = 40


def reviews() -> dict[str, Any]:
    """Return ragged tokens with a mask, under two keys: one of three kinds for `kinds`, a number for `scores`."""
    rng = np.random.default_rng(2)
    worth = rng.normal(size=(WORDS, 3))

    def part(size: int) -> dict[str, Any]:
        rows = [rng.integers(1, WORDS, rng.integers(3, 12)) for _ in range(size)]
        keys = np.array(["kinds", "scores"])[np.arange(size) % 2]
        told = np.array([worth[row].mean(0) for row in rows])
        x = {"input_ids": rows, "attention_mask": [np.ones(len(row), np.int64) for row in rows]}
        return {"x": x, "y": np.where(keys == "kinds", told.argmax(1), told[:, 0]), "key": keys}

    train, test = part(240), part(120)
    return {f"{field}_{name}": of[field] for name, of in (("train", train), ("test", test)) for field in train}


class Reader(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.embed, self.inner, self.drop = nn.Embedding(WORDS, 16), nn.Linear(16, 16), nn.Dropout(0.5)
        self.head = nn.Linear(16, num_classes)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        there = attention_mask[..., None]
        mean = (self.embed(input_ids) * there).sum(1) / there.sum(1)
        return self.head(self.drop(torch.relu(self.inner(mean))))


STUDY: dict[str, Any] = {
    "method": "two_step",
    "data": "tests.everything:reviews",
    "model": {"name": "tests.everything:Reader", "personal": ["head.*"]},
    "partition": {"name": "natural", "clients_per_key": 3},
    "tasks": {"kinds": {"targets": "classes", "num_classes": 3, "metrics": ["macro_f1"]}, "scores": {"metric": "mae"}},
    "clients": {"count": 6, "test_samples": 20, "capacity": [
        {"name": "small", "clients": [0, 3], "density": 0.3, "speed": 0.1, "up_bytes_s": 2000.0},
    ]},
    "train": {
        "steps": 9, "batch_size": 16, "lr": 0.02, "optimizer": "adamw", "clip_norm": 1.0, "dropout": 0.1,
        "schedule": {"name": "linear", "warmup": 0.3}, "round_decay": 0.9,
        "round_schedule": {"name": "cosine", "warmup": 1},
    },
    "federate": {"rounds": 3, "clients_per_round": 0.67},
    "evaluate": {"every": 2},
    "finder": {"densities": [0.5, 0.3], "main": "auto"},
    "personalise": {"epochs": 1, "clients_per_wave": 3},
    "fleet": {
        "flops_s": 1e6, "down_bytes_s": 1e5, "up_bytes_s": 1e4, "straggle": 0.5, "deadline_s": 4.0, "drop": 0.2,
    },
}  # fmt: skip


def study() -> schema.Study:
    """Return it; some of its clients are late, and some drop out."""
    return schema.build(STUDY)
