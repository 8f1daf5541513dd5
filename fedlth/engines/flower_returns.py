"""Devices that go away in mid-run and come back: whom a round waits for, and how long."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

log = logging.getLogger(__name__)

TOLD_EVERY_S = 30.0


@dataclass
class Returns:
    """Waits for clients whose SuperNode went away, up to `wait_s`; 0 where the study begins rounds without them.

    Once for each absence: who has not come in that time costs no further round any, until it has been there again.
    `nodes` and `pause` are the engine's.
    """

    wait_s: float
    nodes: Callable[[], Mapping[int, int]]
    pause: Callable[[float | None], None]
    _given_up: set[int] = field(default_factory=set)

    def __call__(self, clients: set[int], ends: float | None) -> set[int]:
        """Return those of the clients that are there again, at the latest when the round `ends`."""
        if not clients or not self.wait_s:
            return set()
        began = told = time.monotonic()
        while True:
            there = set(self.nodes())
            self._given_up -= there
            wanted = clients - self._given_up
            away, now = wanted - there, time.monotonic()
            if not away or now - began >= self.wait_s or (ends is not None and now >= ends):
                break
            if now - told >= TOLD_EVERY_S or told == began:
                told = now
                log.info(f"waiting for clients whose SuperNode has gone: {sorted(away)}, {self.wait_s:g} s at most")
            self.pause(ends)
        self._given_up |= away
        if back := wanted - away:
            log.info(f"note: back: clients {sorted(back)}; what they were at work on is sent again")
        return back
