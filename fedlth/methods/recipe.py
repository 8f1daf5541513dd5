"""A federated method as a value: what the client does, what the server sends, how it joins, what it is compared to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from fedlth.methods.aggregate import Aggregate, CountMean
from fedlth.methods.visit import MaskedVisit, Visit


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A method.

    `space` says what the global state is: "weights", or "scores" of frozen weights. `down` is "broadcast" (one
    payload for all) or "slice" (each client gets what its own last committed mask holds). `arms` are evaluated in
    step 2. `federated` False means no rounds: every client stands alone. `rewind` names the finder's rewind where
    the study names none.
    """

    name: str
    paper: str
    summary: str
    visit: Visit
    aggregate: Aggregate
    arms: tuple[str, ...]
    space: Literal["weights", "scores"] = "weights"
    down: Literal["broadcast", "slice"] = "broadcast"
    federated: bool = True
    rewind: str | None = None


def in_phase(recipe: Recipe, phase: str) -> Recipe:
    """Return what a phase runs: refinement trains inside each client's ticket, whatever step 1 was."""
    if phase not in ("refine", "refined"):
        return recipe
    return replace(recipe, visit=MaskedVisit(), aggregate=CountMean(), down="slice")
