"""How much of the gate one address, and all together, may take: connections, memory, patience."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Limits:
    """What the gate bears; federation.json may have each under `gate`.

    `connections` are those open at once, `connections_per_address` those of one IPv4 address or one IPv6 network of 64
    bits (devices behind one router share it). `held_bytes` are bodies that are there in part or wait to be answered,
    a quarter of them at most of one address. In seconds: the TLS handshake must be over in `handshake_s`, a request's
    head be there in `head_s` after it has begun (the first: after the handshake), and a connection between two requests
    is closed after `idle_s`. A body, and who reads an answer, may stand still for `stall_s` and must keep up
    `bytes_per_s` on average.
    """

    connections: int = 1024
    connections_per_address: int = 128
    held_bytes: int = 256 << 20
    handshake_s: float = 20.0
    head_s: float = 20.0
    # A SuperNode's own client takes up a connection that was idle for up to 5 s. Were it closed about then, a request
    # that a thin link delays would meet the closing, fail, and cross again.
    idle_s: int = 75
    stall_s: float = 30.0
    bytes_per_s: float = 500.0

    @staticmethod
    def of(given: Mapping[str, Any]) -> Limits:
        """Read what federation.json gives; raise ValueError where it is none of these, or not positive."""
        whole = {one.name: one.type == "int" for one in fields(Limits)}
        for name, value in given.items():
            if name not in whole:
                raise ValueError(f"gate.{name} is none of {', '.join(whole)}")
            fits = isinstance(value, int if whole[name] else (int, float)) and not isinstance(value, bool)
            if not fits or not 0 < value < math.inf:
                raise ValueError(
                    f"gate.{name} must be a positive {'whole ' if whole[name] else ''}number, got {value!r}"
                )
        return Limits(**given)

    def held_of_one(self, most_body_bytes: int) -> int:
        """Return how many bytes one address may have held: a quarter of all, and one longest body at least."""
        return max(self.held_bytes // 4, most_body_bytes)


@dataclass
class Pace:
    """Until when a sender must have sent more: it may stand still for `stall_s`, and must keep up an average."""

    limits: Limits
    begun: float
    received: int = 0

    def deadline(self, now: float) -> float:
        kept_up = self.begun + self.limits.stall_s + self.received / self.limits.bytes_per_s
        return min(kept_up, now + self.limits.stall_s)
