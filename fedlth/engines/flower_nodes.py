"""Which SuperNode serves which client. Node ids are random in every run, so the nodes are asked."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from fedlth.errors import StudyError

log = logging.getLogger(__name__)

TOLD_EVERY_S = 10.0


@dataclass
class Roll:
    """The roll of SuperNodes. `ask` returns each node's partition id, or one line about why it gave none.

    `online` and `ask` are the transport; `pause` waits a little, and raises when the run is to stop.
    """

    count: int
    online: Callable[[], Iterable[int]]
    ask: Callable[[Sequence[int]], dict[int, int | str]]
    pause: Callable[[], None]
    wait_s: float
    _partition: dict[int, int] = field(default_factory=dict)
    _ready: bool = False

    def nodes(self) -> dict[int, int]:
        """Return client -> node for every client that has a node now.

        The first call waits until each of `count` clients has one, and raises StudyError when it waited `wait_s`.
        Later ones never wait: a node that has gone costs its own clients, and one that came back under a new id
        (Flower gives an unauthenticated node a new one) takes over.
        """
        if not self._ready:
            self._wait()
            self._register(self._asked(self._new()), first=True)
            self._ready = True
            return {c: n for n, c in self._partition.items()}
        self._register(self._asked(self._new()), first=False)
        here = set(self.online())
        return {c: n for n, c in self._partition.items() if n in here}  # of two, the one that came last

    def _new(self) -> list[int]:
        return sorted(set(self.online()) - self._partition.keys())

    def _wait(self) -> None:
        began = said = time.monotonic()
        while (there := len(set(self.online()))) < self.count:
            now = time.monotonic()
            if now - began > self.wait_s:
                raise StudyError(
                    f"flower: clients.count = {self.count} needs as many SuperNodes, got {there} after "
                    f"{self.wait_s:g} s; in a simulation: flwr run ... --federation-config num-supernodes={self.count}"
                )
            if now - said > TOLD_EVERY_S:
                log.info(f"waiting for SuperNodes: {there} of {self.count}")
                said = now
            self.pause()

    def _asked(self, nodes: Sequence[int]) -> dict[int, int | str]:
        return self.ask(nodes) if nodes else {}

    def _register(self, answers: dict[int, int | str], *, first: bool) -> None:
        problems = [f"node {n}: {a}" for n, a in sorted(answers.items()) if isinstance(a, str)]
        served = [a for a in answers.values() if isinstance(a, int)]
        if first:
            twice = sorted({c for c in served if served.count(c) > 1})
            missing = sorted(set(range(self.count)) - set(served))
            if twice:
                raise StudyError(f"flower: each SuperNode must have its own partition-id, got {twice} more than once")
            if missing:
                why = f"; {problems[0]}" if problems else ""
                raise StudyError(f"flower: SuperNodes must serve partition-id 0 to {self.count - 1}, no {missing}{why}")
        self._partition |= {n: a for n, a in answers.items() if isinstance(a, int)}
