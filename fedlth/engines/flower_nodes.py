"""Which SuperNode serves which client. Node ids are random in every run, so the nodes are asked."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from fedlth.engines.flower_keys import anybody
from fedlth.errors import StudyError

log = logging.getLogger(__name__)

TOLD_EVERY_S = 10.0
MOST_NAMED = 10
DEVICES = "start theirs (start.sh on each device), then run again"
ASKED_AGAIN_S, SELDOM_S = 60.0, 3600.0  # doubled each time up to the latter


@dataclass
class Asked:
    """A node that has not said whom it serves: when it was asked (first and last), by which messages, what it said."""

    first: float
    last: float
    ids: list[str]
    said: str = ""

    def is_due(self, now: float) -> bool:
        return now - self.last >= min(SELDOM_S, ASKED_AGAIN_S * 2.0 ** (len(self.ids) - 1))


@dataclass
class Roll:
    """The roll of SuperNodes. Nobody is waited for but at the first call: a late answer registers its node then.

    `ask` sends a node the question and returns the message's id; `heard` returns what has come by such ids, each once:
    a partition id, or one line about why there is none. `online`, too, is the transport's; `pause` waits a little, and
    raises when the run is to stop. `quorum` clients of `count` must be there to begin. `objection` says what is wrong
    with a node that says whom it serves: it then serves nobody. `remedy` is what to do where nodes are missing.
    """

    count: int
    quorum: int
    online: Callable[[], Iterable[int]]
    ask: Callable[[int], str]
    heard: Callable[[Iterable[str]], Mapping[str, int | str]]
    pause: Callable[[], None]
    wait_s: float
    answer_s: float
    objection: Callable[[int, int], str] = anybody
    remedy: str = DEVICES
    _partition: dict[int, int] = field(default_factory=dict)
    _asked: dict[int, Asked] = field(default_factory=dict)
    _ready: bool = False

    def nodes(self) -> dict[int, int]:
        """Return client -> node for every client that has a node now.

        The first call waits up to `wait_s` for all `count` clients, and `answer_s` for nodes that have been asked by
        then; it raises StudyError where fewer than the quorum are there. Later ones never wait: a node that is silent
        or has gone costs its own client, and one that came back under a new id (Flower gives an unauthenticated node a
        new one) takes over once it has answered.
        """
        if self._ready:
            here = self._look()
        else:
            here = self._first()
            self._ready = True
        return {c: n for n, c in self._partition.items() if n in here}  # of two, the one that came last

    def _look(self) -> set[int]:
        """Take what has come, ask who is new or due to be asked again; return the nodes that are online."""
        now, here = time.monotonic(), set(self.online())
        self._asked = {n: asked for n, asked in self._asked.items() if n in here}
        ids = {id: n for n, asked in self._asked.items() for id in asked.ids}
        for id, said in (self.heard(list(ids)) if ids else {}).items():
            node = ids[id]
            if isinstance(said, int) and (wrong := self.objection(node, said)):
                said = wrong
            if isinstance(said, int):
                self._partition.pop(node, None)
                self._partition[node] = said
                self._asked.pop(node, None)
            elif node in self._asked:
                self._asked[node].said = said
        for node in sorted(here - self._partition.keys()):
            asked = self._asked.get(node)
            if asked is None:
                self._asked[node] = Asked(now, now, [self.ask(node)])
            elif asked.is_due(now):
                if len(asked.ids) == 1:
                    log.info(f"note: SuperNode {node} does not say whom it serves ({asked.said or 'no answer'})")
                asked.last = now
                asked.ids.append(self.ask(node))
        return here

    def _first(self) -> set[int]:
        """Wait for the SuperNodes; return those that are online when the run can begin."""
        began = said = time.monotonic()
        while True:
            here, now = self._look(), time.monotonic()
            served = [c for n, c in self._partition.items() if n in here]
            if twice := sorted({c for c in served if served.count(c) > 1}):
                raise StudyError(f"flower: each SuperNode must have its own partition-id, got {twice} more than once")
            missing = sorted(set(range(self.count)) - set(served))
            if not missing:
                return here
            over = now - began > self.wait_s
            if over and len(here) < self.quorum:
                raise self._too_few(len(here), missing)
            # Who has come after the wait is not waited for, or new ones could go on coming.
            waits = any(
                not a.said and a.first - began <= self.wait_s and now - a.first < self.answer_s
                for a in self._asked.values()
            )
            every = self.quorum == self.count and len(here) >= self.count  # else somebody may still come
            if not waits and (over or every):
                self._check(missing)
                return here
            if now - said > TOLD_EVERY_S:
                known = f"{self.count - len(missing)} of {self.count} known"
                log.info(f"waiting for SuperNodes: {len(here)} online, {known}, none yet of clients {few(missing)}")
                said = now
            self.pause()

    def _too_few(self, there: int, missing: list[int]) -> StudyError:
        got = f"got {there} after {self.wait_s:g} s, no SuperNode of clients {few(missing)}{self._why()}; {self.remedy}"
        if self.quorum < self.count:
            wanted = f"federate.quorum: {self.quorum} of {self.count} clients must be there to begin"
            return StudyError(f"flower: {wanted}, {got}")
        return StudyError(f"flower: clients.count = {self.count} needs as many SuperNodes, {got}")

    def _why(self) -> str:
        """Return what the first node said that serves nobody: one client's device is there, and yet missing."""
        problems = [f"node {n}: {asked.said or 'no answer'}" for n, asked in sorted(self._asked.items())]
        return f"; {problems[0]}" if problems else ""

    def _check(self, missing: list[int]) -> None:
        """Say without whom the run begins; raise StudyError where the quorum is not met."""
        why = self._why()
        if self.quorum == self.count:
            raise StudyError(f"flower: SuperNodes must serve partition-id 0 to {self.count - 1}, no {missing}{why}")
        if (there := self.count - len(missing)) < self.quorum:
            wanted = f"federate.quorum: {self.quorum} of {self.count} clients must be there to begin"
            raise StudyError(f"flower: {wanted}, got {there}, no {missing}{why}")
        log.info(f"note: {there} of {self.count} clients are there to begin with, no {missing}{why}")


def few(clients: list[int]) -> str:
    """Return clients as a line names them: the first ten, and how many more."""
    more = f" and {len(clients) - MOST_NAMED} more" if len(clients) > MOST_NAMED else ""
    return f"{clients[:MOST_NAMED]}{more}"
