"""An audit's facts, averaged over victims: how often attacks are right, how like tickets are, how members stand out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedlth.report.facts import grouped
from fedlth.report.intervals import Interval, interval
from fedlth.storage.audit_records import ALL, HIDDEN, Audit, Guess, Membership

Values = NDArray[np.float64]
FALSE_ALARMS = 0.01  # at which rate of them the share of members that are found is told
YEOM, WATSON = "loss", "loss less the global model's"


@dataclass(frozen=True)
class Score:
    """The mean share of a victim's classes among the attacker's first guesses, and what guessing blindly reaches."""

    defence: str
    attack: str
    mean: float
    interval: Interval
    chance: float
    victims: int


@dataclass(frozen=True)
class Defended:
    """What a defence leaves to an attacker, and its price: means over victims; None where nothing was measured."""

    name: str
    epsilon: float | None
    all_bits: Score | None
    hidden: Score | None
    accuracy: float | None
    density: float | None
    mask_bytes: float | None
    diverged: int


@dataclass(frozen=True)
class Found:
    """How well members stand out: over the examples of all victims, and the mean of each victim's own AUC."""

    model: str
    attack: str
    auc: float
    found_at_low: float
    own_auc: float
    interval: Interval
    examples: int
    others: int


@dataclass(frozen=True)
class Linked:
    """How many victims' masks are most like their own second search, and the mean Jaccard indices."""

    share: float
    interval: Interval
    chance: float
    own: float
    best_other: float
    victims: int


@lru_cache(maxsize=4)
def scores(guesses: tuple[Guess, ...]) -> dict[tuple[str, str], Score]:
    """Return the mean of each attack under each defence, in the order in which they come.

    A victim that was guessed at several times counts once.
    """
    found = {}
    for (defence, attack), group in grouped(((g.defence, g.attack), g) for g in guesses).items():
        own = grouped((one.victim, one.share) for one in group)
        shares = np.array([np.mean(values) for values in own.values()])
        chance = float(np.mean([one.chance for one in group]))
        ends = interval([shares], what=f"audit/{defence}/{attack}")
        found[defence, attack] = Score(defence, attack, float(shares.mean()), ends, chance, len(own))
    return found


def defended(audit: Audit) -> Iterator[Defended]:
    """Yield each defence, with what is left to an attacker and what it costs."""
    found = scores(audit.guesses)
    for name, group in grouped((one.defence, one) for one in audit.prices).items():
        right = [one.test_accuracy for one in group if one.test_accuracy is not None]
        yield Defended(
            name=name, epsilon=group[0].epsilon, all_bits=found.get((name, ALL)), hidden=found.get((name, HIDDEN)),
            accuracy=float(np.mean(right)) if right else None, density=float(np.mean([one.density for one in group])),
            mask_bytes=float(np.mean([one.mask_bytes for one in group])), diverged=len(group) - len(right),
        )  # fmt: skip


def linked(audit: Audit) -> Linked | None:
    """Return how often a mask is recognised by a second search on the same data."""
    if not audit.matches:
        return None
    right = np.array([float(one.own > one.best_other) for one in audit.matches])
    own, other = (float(np.mean([getattr(one, name) for one in audit.matches])) for name in ("own", "best_other"))
    chance = float(np.mean([1 / one.among for one in audit.matches]))
    return Linked(float(right.mean()), interval([right], what="audit/linked"), chance, own, other, len(right))


def membership(audit: Audit) -> Iterator[Found]:
    """Yield each model under the attack by loss, and under the one that the global model calibrates.

    Yeom et al., CSF 2018, arXiv 1709.01604; Watson et al., ICLR 2022, arXiv 2111.08440.
    """
    for model, group in grouped((one.model, one) for one in audit.members).items():
        for attack in (YEOM, WATSON):
            sides = [_signals(one, attack) for one in group]
            inside, outside = (np.concatenate(side) for side in zip(*sides, strict=True))
            own = np.array([auc(*side) for side in sides])
            yield Found(
                model, attack, auc(inside, outside), found_at(inside, outside, FALSE_ALARMS), float(own.mean()),
                interval([own], what=f"audit/{model}/{attack}"), len(inside), len(outside),
            )  # fmt: skip


def _signals(one: Membership, attack: str) -> tuple[Values, Values]:
    """Return how strongly each example looks like a member: the higher, the more."""
    inside, outside = -one.member.astype(np.float64), -one.other.astype(np.float64)
    if attack == WATSON:
        inside, outside = inside + one.member_global, outside + one.other_global
    return inside, outside


def auc(inside: Values, outside: Values) -> float:
    """Return the chance that a member has the higher signal of the two; equal ones count half."""
    ordered = np.sort(outside)
    below, not_above = np.searchsorted(ordered, inside, "left"), np.searchsorted(ordered, inside, "right")
    return float((below + not_above).mean() / (2 * len(outside)))


def found_at(inside: Values, outside: Values, alarms: float) -> float:
    """Return the share of members above a threshold that at most a share `alarms` of the others exceeds."""
    allowed = int(alarms * len(outside))
    threshold = np.sort(outside)[len(outside) - 1 - allowed]
    return float((inside > threshold).mean())
