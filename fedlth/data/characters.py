"""A small synthetic text with natural keys: next-character prediction, one Markov chain a role, two dialects."""

from __future__ import annotations

import numpy as np

from fedlth.data.dataset import Dataset
from fedlth.data.limits import check_count
from fedlth.rng import stream

SYMBOLS = 32
DIALECTS = 2


def characters(roles: int = 20, samples: int = 100, length: int = 16) -> Dataset:
    """Return windows of `length` tokens (N, length) of 32 symbols with the next symbol (N,) as label.

    Each role (the key) speaks a chain that is mostly its dialect's, partly its own, `samples` windows for training
    and a quarter as many for test. The text is a fixed draw: the same settings give the same data everywhere.
    """
    for name, value, least in (("roles", roles, 1), ("samples", samples, 4), ("length", length, 1)):
        check_count(f"data.options.{name}", value, least)
    dialects = [_chain(stream(0, "characters/dialect", client=d)) for d in range(DIALECTS)]
    tokens, keys = [], []
    for role in range(roles):
        rng = stream(0, "characters/role", client=role)
        chain = 0.8 * dialects[role % DIALECTS] + 0.2 * _chain(rng)
        tokens.append(_speech(chain, (samples + samples // 4, length + 1), rng))
        keys.append(np.full(samples + samples // 4, role, np.int64))
    spoken, key = np.stack(tokens), np.stack(keys)
    train, test = spoken[:, :samples].reshape(-1, length + 1), spoken[:, samples:].reshape(-1, length + 1)
    return Dataset(
        name=f"characters/{roles}/{samples}/{length}",
        x_train=np.ascontiguousarray(train[:, :-1]),
        y_train=np.ascontiguousarray(train[:, -1]),
        x_test=np.ascontiguousarray(test[:, :-1]),
        y_test=np.ascontiguousarray(test[:, -1]),
        num_classes=SYMBOLS,
        key_train=key[:, :samples].reshape(-1),
        key_test=key[:, samples:].reshape(-1),
    )


def _chain(rng: np.random.Generator) -> np.ndarray:
    """Return transition probabilities (SYMBOLS, SYMBOLS), peaked so that there is something to learn."""
    return rng.dirichlet(np.full(SYMBOLS, 0.08), SYMBOLS)


def _speech(chain: np.ndarray, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Return `shape` = (windows, T) int64 tokens; every window starts anew, so train and test share none."""
    edges = np.cumsum(chain, axis=1)
    # The last edge can round below 1 and a draw above it would name a symbol that does not exist.
    edges[:, -1] = 1.0
    out = np.empty(shape, np.int64)
    out[:, 0] = rng.integers(SYMBOLS, size=shape[0])
    for t in range(1, shape[1]):
        out[:, t] = (rng.random(shape[0])[:, None] >= edges[out[:, t - 1]]).sum(1)
    return out
