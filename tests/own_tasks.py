"""Users' data and networks of every kind: several inputs, ragged tokens, positions, real numbers; a user's metric."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

WORDS, CLASSES = 12, 3


def mapping(seed: int = 0, size: int = 240) -> dict[str, Any]:
    """Return two inputs by name, a vector and a kind, and a class that depends on both."""
    rng = np.random.default_rng(seed)

    def part(size: int) -> tuple[dict[str, Any], np.ndarray]:
        kind, dense = rng.integers(0, 4, size), rng.normal(size=(size, 5))
        return {"dense": dense, "kind": kind}, (kind + (dense[:, 0] > 0)) % CLASSES

    (x, y), (x_test, y_test) = part(size), part(size // 2)
    return {"x_train": x, "y_train": y, "x_test": x_test, "y_test": y_test, "num_classes": CLASSES}


class ByName(nn.Module):
    """Called by keyword; returns something with logits."""

    def __init__(self, num_classes: int, input_shape: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        assert input_shape == {"dense": (5,), "kind": ()}
        self.embed, self.head = nn.Embedding(4, 6), nn.Linear(11, num_classes)
        self.norm, self.drop = nn.BatchNorm1d(11), nn.Dropout(0.1)

    def forward(self, dense: Tensor, kind: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        both = torch.cat([dense, self.embed(kind)], 1)
        return SimpleNamespace(logits=self.head(self.drop(torch.relu(self.norm(both)))))


class ByMapping(ByName):
    """Called with the mapping; returns a mapping."""

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:  # type: ignore[override]
        return {"logits": super().forward(**batch).logits}


def sentences(seed: int = 0, size: int = 240, key: bool = False) -> dict[str, Any]:
    """Return ragged tokens and attention masks; the class is that of the first token. 0 is padding."""
    rng = np.random.default_rng(seed)

    def part(size: int) -> tuple[dict[str, Any], np.ndarray]:
        rows = [rng.integers(1, WORDS, rng.integers(2, 9)).tolist() for _ in range(size)]
        masks = [[1] * len(row) for row in rows]
        return {"input_ids": rows, "attention_mask": masks}, np.array([row[0] % CLASSES for row in rows])

    (x, y), (x_test, y_test) = part(size), part(size // 2)
    return {"x_train": x, "y_train": y, "x_test": x_test, "y_test": y_test, "num_classes": CLASSES}


def uneven(by: int) -> dict[str, Any]:
    """Return `sentences` whose sixth attention mask is longer by so much than its tokens."""
    made = sentences()
    made["x_train"]["attention_mask"][5] += [1] * by
    return made


def tokens(seed: int = 0, size: int = 240) -> dict[str, Any]:
    """Return the same sentences as one ragged input."""
    made = sentences(seed, size)
    return {**made, **{f"x_{part}": made[f"x_{part}"]["input_ids"] for part in ("train", "test")}}


def tagged(seed: int = 0, size: int = 240, plain: bool = False) -> dict[str, Any]:
    """Return ragged tokens with a class at each position, none at some: -100. `plain`: neither."""
    made = tokens(seed, size)
    if plain:
        rng = np.random.default_rng(seed)
        for part in ("train", "test"):
            made[f"x_{part}"] = rng.integers(1, WORDS, (len(made[f"x_{part}"]), 6))
            made[f"y_{part}"] = made[f"x_{part}"] % CLASSES
        return made
    for part in ("train", "test"):
        rows = made[f"x_{part}"]
        made[f"y_{part}"] = [[t % CLASSES if i % 3 < 2 else -100 for i, t in enumerate(row)] for row in rows]
    return made


def labelled(kind: str, num_classes: Any = CLASSES) -> dict[str, Any]:
    """Return rows of numbers with targets of a shape that is easily mistaken for another one."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(240, 6)).astype(np.float32)
    several = x[:, :CLASSES] > 0
    y: Any = {
        "a column": x[:, :CLASSES].argmax(1)[:, None], "several": several, "several floats": several.astype(float),
        "classes": x[:, :CLASSES].argmax(1), "ragged floats": [row[: 1 + i % 3] for i, row in enumerate(x)],
    }[kind]  # fmt: skip
    made = {"x_train": x, "y_train": y, "x_test": x[:120], "y_test": y[:120]}
    return made if num_classes is None else {**made, "num_classes": num_classes}


class Recurrent(nn.Module):
    """Embedding, LSTM to the last real token, BatchNorm, dropout; returns a tuple."""

    def __init__(self, num_classes: int, width: int = 8) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(WORDS, width, padding_idx=0), nn.LSTM(width, width, batch_first=True)
        self.norm, self.drop, self.head = nn.BatchNorm1d(width), nn.Dropout(0.1), nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        states, _ = self.lstm(self.embed(x))
        last = states[torch.arange(len(x)), (x > 0).sum(1) - 1]
        return self.head(self.drop(self.norm(last))), "and more"


class Tagger(nn.Module):
    """A class at each position."""

    def __init__(self, num_classes: int, width: int = 8) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, width), nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


class Attentive(nn.Module):
    """A transformer block over input_ids and attention_mask, as Hugging Face models are called."""

    def __init__(self, num_classes: int, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, width)
        self.place = nn.Embedding(16, width)
        self.block = nn.TransformerEncoderLayer(width, 2, 16, dropout=0.1, batch_first=True)
        self.head = nn.Linear(width, num_classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> SimpleNamespace:
        there = attention_mask.bool()
        hidden = self.embed(input_ids) + self.place(torch.arange(input_ids.shape[1]))
        hidden = self.block(hidden, src_key_padding_mask=~there)
        return SimpleNamespace(logits=self.head(hidden[:, 0]))


def numbers(seed: int = 0, size: int = 240, outputs: int = 0) -> dict[str, Any]:
    """Return vectors and real numbers, (N,) or (N, outputs), without num_classes."""
    rng = np.random.default_rng(seed)
    slopes = rng.normal(size=(6, max(1, outputs)))

    def part(size: int) -> tuple[np.ndarray, np.ndarray]:
        x = rng.normal(size=(size, 6))
        y = x @ slopes + 0.1 * rng.normal(size=(size, slopes.shape[1]))
        return x, y if outputs else y[:, 0]

    (x, y), (x_test, y_test) = part(size), part(size // 2)
    keys = np.arange(size) % 4, np.arange(size // 2) % 4
    return {
        "x_train": x, "y_train": y, "x_test": x_test, "y_test": y_test, "key_train": keys[0], "key_test": keys[1],
    }  # fmt: skip


def hits(outputs: Tensor, y: Tensor) -> float:
    """Return how many of a part's examples are right, in all."""
    return float((outputs.argmax(-1) == y).sum())


class WorstError:
    """A user's metric as a class: the largest absolute error, of which less is better."""

    higher_is_better = False

    def __call__(self, outputs: Tensor, y: Tensor) -> Tensor:
        return (outputs - y).abs().max()


def not_finite(outputs: Tensor, y: Tensor) -> float:
    return float("nan")


def wordy(outputs: Tensor, y: Tensor) -> str:
    return "fine"


def rowwise(outputs: Tensor, y: Tensor) -> Tensor:
    return outputs.mean(1)


def needs_many(outputs: Tensor, y: Tensor) -> float:
    if len(y) < 10:
        raise ValueError("too few")
    return float(len(y))


def huber(outputs: Tensor, y: Tensor) -> Tensor:
    return functional.smooth_l1_loss(outputs, y)


class Huber:
    """The same as a class, which does not bring outputs (N, 1) to the shape of targets (N,)."""

    def __call__(self, outputs: Tensor, y: Tensor) -> Tensor:
        return ((outputs - y) ** 2).mean()
