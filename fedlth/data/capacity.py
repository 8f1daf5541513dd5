"""Which client is of which tier of capacity."""

from __future__ import annotations

from collections.abc import Sequence

from fedlth.errors import StudyError
from fedlth.rng import stream
from fedlth.study.sections import Tier

WHOLE = Tier()


def tiers_of(tiers: Sequence[Tier], count: int, seed: int) -> tuple[Tier, ...]:
    """Return each client's tier: the one that names it, else its share's, drawn once from a named stream.

    Shares are of all clients that no tier names; whoever is left over is a whole device. Raises StudyError.
    """
    found: dict[int, Tier] = {}
    for i, tier in enumerate(tiers):
        if (tier.clients is None) == (tier.share is None):
            raise StudyError(f"clients.capacity.{i}: must give either clients or share, got {tier!r}")
        for client in tier.clients or ():
            if client >= count or client in found:
                raise StudyError(f"clients.capacity.{i}.clients: each of 0..{count - 1} at most once, got {client}")
            found[client] = tier
    shares = [tier for tier in tiers if tier.share is not None]
    total = sum(tier.share or 0.0 for tier in shares)
    if total > 1 + 1e-9:
        raise StudyError(f"clients.capacity: shares must be at most 1 together, got {total:g}")
    rest = [int(c) for c in stream(seed, "capacity").permutation([c for c in range(count) if c not in found])]
    at, reached = 0, 0.0
    for tier in shares:
        reached += tier.share or 0.0
        end = round(reached * len(rest))
        found |= dict.fromkeys(rest[at:end], tier)
        at = end
    return tuple(found.get(client, WHOLE) for client in range(count))


def named(tiers: Sequence[Tier]) -> list[tuple[str, Tier]]:
    """Return tiers with what they are called: their name, else their place in the list; whole devices last.

    Of tiers that are called alike, later ones have a number too.
    """
    found: dict[str, Tier] = {}
    for i, tier in enumerate([*tiers, WHOLE]):
        name = plain = "whole device" if i == len(tiers) else tier.name or f"tier {i}"
        number = 1
        while name in found:
            number += 1
            name = f"{plain} ({number})"
        found[name] = tier
    return list(found.items())


def names_of(tiers: Sequence[Tier], count: int, seed: int) -> list[str]:
    """Return the name of each client's tier, none where there are no tiers."""
    names = {id(tier): name for name, tier in named(tiers)}
    return [names[id(tier)] for tier in tiers_of(tiers, count, seed)] if tiers else []
