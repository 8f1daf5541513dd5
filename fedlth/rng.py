"""Named, independent random streams, so that no draw depends on order, engine or worker count."""

from __future__ import annotations

import hashlib
import os

import numpy as np

SECRET = "FEDLTH_MASK_SECRET"  # a device's own: who knows the study draws all other streams


def entropy(seed: int, what: str, round: int = 0, client: int = -1) -> int:
    """Return 128 bits that name one stream.

    A hash, not `seed + i`: with sums, seed 42 of client 1 equals seed 43 of client 0, and replicates correlate.
    """
    text = f"{seed}/{what}/{round}/{client}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")


def stream(seed: int, what: str, round: int = 0, client: int = -1) -> np.random.Generator:
    """Return the generator of one named stream; equal arguments give equal draws everywhere."""
    return np.random.Generator(np.random.PCG64(entropy(seed, what, round, client)))


def torch_seed(seed: int, what: str, round: int = 0, client: int = -1) -> int:
    """Return a 63-bit seed for torch's process-global generator (dropout, weight init) of one named stream."""
    return entropy(seed, what, round, client) & (2**63 - 1)


def secretly(what: str) -> str:
    """Return the name of a stream that nobody else can draw, where this device has a secret; else the same name."""
    secret = os.environ.get(SECRET, "")
    return f"{what} {secret}" if secret else what
