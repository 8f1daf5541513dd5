"""Who of the clients is hostile, and who comes later than the first round: drawn once, from named streams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fedlth import rng
from fedlth.errors import wrong
from fedlth.methods.attack import ATTACKS
from fedlth.methods.method import Phase, loose_part
from fedlth.study.parts import is_number, make
from fedlth.study.schema import Study
from fedlth.study.sections import Joiners

SHARE = 0.2  # of hostile clients, where attack.share is not given


@dataclass(frozen=True)
class Population:
    """The clients of a study; `seen` are those that rounds may sample, sorted. `federated`: there are rounds."""

    study: Study
    seen: tuple[int, ...]
    federated: bool

    @cached_property
    def attack(self) -> tuple[Any, float]:
        """The study's attack, None for none, and the share of hostile clients."""
        return attack_of(self.study)

    @cached_property
    def hostile(self) -> frozenset[int]:
        """The clients that attack."""
        return hostile(self.attack[1], self.study.seed, self.seen) if self.federated else frozenset()

    @cached_property
    def arrivals(self) -> Mapping[int, int]:
        """The first round of step 1 of each late joiner."""
        return arrivals(self.study.clients.joiners, self.study.seed, self.seen)

    def there(self, round: float) -> list[int]:
        """Return who may be sampled in a round of step 1, counted over all its phases; infinity for step 2's."""
        return [c for c in self.seen if self.arrivals.get(c, 1) <= round]

    def attack_in(self, phase: Phase, client: int) -> Any:
        """Return what a client does in a phase to what it sends; None where it is honest."""
        if self.attack[0] is None or not _joins(phase) or client not in self.hostile:
            return None
        return self.attack[0]

    def looks_for_outliers(self, phase: Phase) -> bool:
        """Say whether the masks of a round are held against each other: where clients have masks of their own."""
        return self.study.federate.mask_outliers and phase.own_mask and _joins(phase)


def _joins(phase: Phase) -> bool:
    return phase.join is not None and phase.changes_state


def attack_of(study: Study) -> tuple[Any, float]:
    """Return the study's attack, None for none, and the share of hostile clients; raise StudyError."""
    if study.attack is None:
        return None, 0.0
    share = study.attack.get("share", SHARE)
    if not is_number(share) or not 0 < share < 1:
        raise wrong("attack.share", "in (0, 1)", share)
    spec = {key: value for key, value in study.attack.items() if key != "share"}
    attack = make(ATTACKS, spec, "attack", has="__call__(local, content, aim)")
    if loose := loose_part(attack, "attack"):
        raise wrong("attack", "a frozen dataclass whose fields are immutable", loose)
    return attack, float(share)


def hostile(share: float, seed: int, seen: Sequence[int]) -> frozenset[int]:
    """Return the hostile ones among the clients that rounds may sample: a share, rounded, at least one."""
    if not share:
        return frozenset()
    count = min(len(seen), max(1, round(share * len(seen))))
    return frozenset(seen[int(i)] for i in rng.stream(seed, "attack").choice(len(seen), count, replace=False))


def arrivals(joiners: Sequence[Joiners], seed: int, seen: Sequence[int]) -> Mapping[int, int]:
    """Return the first round of step 1 of each late joiner: shares of the clients that rounds may sample, rounded.

    Each entry has one client at least. Raises StudyError where nobody would be there from the first round on.
    """
    order = [seen[int(i)] for i in rng.stream(seed, "joiners").permutation(len(seen))] if joiners else []
    found: dict[int, int] = {}
    for one in joiners:
        at = len(found)
        found |= dict.fromkeys(order[at : at + max(1, round(one.share * len(seen)))], one.round)
    if joiners and len(found) >= len(seen):
        shares = [one.share for one in joiners]
        raise wrong("clients.joiners", "shares that leave a client for the first round", shares)
    return found
