"""Which of a client's tickets is kept (finder.main): at one density for all, by validation, or by what it can carry.

A kept ticket remembers its target density in the client's state. Validation data decide, never test data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedlth.errors import StudyError
from fedlth.storage.client_state import ClientState
from fedlth.storage.records import MetricRow
from fedlth.study.sections import Finder, Tier
from fedlth.training.metrics import Judged

TARGET = "ticket_target"  # in a state: the target density of the ticket that the client chose


class Keep(Protocol):
    """A rule that says which of a client's tickets is kept; `chooses`: each client has a density of its own."""

    @property
    def chooses(self) -> bool: ...

    def allowed(self, tier: Tier, /) -> tuple[float, ...]:
        """Return the target densities at which a client of this tier may keep its ticket, in falling order.

        It finds them all: a client that needs but one of several, whatever comes out, is asked for that one.
        """
        ...

    def better(self, row: MetricRow, kept: MetricRow, tier: Tier, judged: Judged, /) -> bool:
        """Say whether a ticket takes the place of one that is kept so far."""
        ...


@dataclass(frozen=True)
class At:
    """The ticket at one density, the same for every client; where there is none, the first."""

    density: float
    chooses: bool = False

    def allowed(self, tier: Tier, /) -> tuple[float, ...]:
        return (self.density,)

    def better(self, row: MetricRow, kept: MetricRow, tier: Tier, judged: Judged, /) -> bool:
        return row.target_density == self.density != kept.target_density


@dataclass(frozen=True)
class Largest:
    """The largest density that the client's tier can carry."""

    densities: tuple[float, ...]
    chooses: bool = True

    def allowed(self, tier: Tier, /) -> tuple[float, ...]:
        return within(self.densities, tier)[:1]

    def better(self, row: MetricRow, kept: MetricRow, tier: Tier, judged: Judged, /) -> bool:
        return row.target_density in self.allowed(tier) and kept.target_density not in self.allowed(tier)


@dataclass(frozen=True)
class Best:
    """The best on validation data of those that the client's tier can carry; at equal scores the lower density.

    A ticket that diverged is kept only where all have.
    """

    densities: tuple[float, ...]
    chooses: bool = True

    def allowed(self, tier: Tier, /) -> tuple[float, ...]:
        return within(self.densities, tier)

    def better(self, row: MetricRow, kept: MetricRow, tier: Tier, judged: Judged, /) -> bool:
        return row.target_density in self.allowed(tier) and self._rank(row, tier, judged) > self._rank(
            kept, tier, judged
        )

    def _rank(self, row: MetricRow, tier: Tier, judged: Judged) -> tuple[bool, bool, float, float]:
        score = judged.score(row.value("val", judged.main.name))
        return row.target_density in self.allowed(tier), not row.diverged, score, -row.target_density


def within(densities: Sequence[float], tier: Tier) -> tuple[float, ...]:
    """Return the densities that a tier can carry."""
    return tuple(density for density in densities if density <= tier.density)


def keep_of(finder: Finder) -> Keep:
    """Return the rule that finder.main names."""
    if finder.main == "auto":
        return Best(finder.densities)
    if finder.main == "capacity":
        return Largest(finder.densities)
    return At(finder.main if finder.main is not None else finder.densities[-1])


def check(keep: Keep, finder: Finder, tiers: Sequence[tuple[str, Tier]]) -> None:
    """Raise StudyError where clients of a tier, given by name, may keep no ticket, or a denser one than they carry."""
    for name, tier in tiers if keep.chooses else ():
        if not keep.allowed(tier):
            raise StudyError(
                f"finder.main: {finder.main} needs one of finder.densities that each tier can carry, got "
                f"{list(finder.densities)} and density {tier.density:g} of {name}"
            )
        if tier.density < 1 and finder.stop != {"name": "target"}:
            raise StudyError(
                f"finder.stop: must be target where finder.main is {finder.main} and a tier carries less than all: a "
                f"search that stops early leaves a denser ticket than {name} can carry, got {finder.stop}"
            )


def remembered(state: ClientState, target: float) -> ClientState:
    """Return the state with the target density of the ticket that the client chose."""
    return state.with_(vectors={TARGET: np.array([target])})


def target_of(keep: Keep, state: ClientState) -> float:
    """Return the target density of the ticket in a state: that of all, or the client's own; 1 where it has none."""
    if isinstance(keep, At):
        return keep.density
    return float(state.vectors[TARGET][0]) if TARGET in state.vectors else 1.0
