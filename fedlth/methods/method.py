"""A federated method as a value: what the client does, what the server sends, how it joins, what it is compared to."""

from __future__ import annotations

import types
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import Enum
from functools import cached_property
from typing import Any, Literal

from fedlth.errors import StudyError
from fedlth.methods.aggregate import Aggregate, CountMean
from fedlth.methods.client_update import MaskedVisit, Visit


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


def check_frozen(recipe: Recipe) -> None:
    """Raise StudyError where a part of a method is no frozen value: what it kept in itself would be lost on resume."""
    for name in ("visit", "aggregate"):
        loose = _loose(getattr(recipe, name), name)
        if loose:
            raise StudyError(
                f"method: {recipe.name} must be made of frozen dataclasses whose fields are immutable, got {loose}; "
                "what a rule remembers belongs into the memory of the server's state, what a client does into its state"
            )


def _loose(value: Any, place: str) -> str:
    """Name the first part of a value that can change, "" where there is none."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, Enum, type, types.FunctionType)):
        return ""
    if isinstance(value, (tuple, frozenset)):
        return next((found for i, v in enumerate(value) if (found := _loose(v, f"{place}[{i}]"))), "")
    kind: Any = type(value)
    if not is_dataclass(value) or not kind.__dataclass_params__.frozen:
        return f"{place}: {kind.__name__}"
    names = [f.name for f in fields(value)]
    kept = [n for n in getattr(value, "__dict__", ()) if not isinstance(getattr(kind, n, None), cached_property)]
    extra = next((n for n in kept if n not in names), None)
    if extra is not None:
        return f"{place}.{extra}, which is no field"
    return next((found for n in names if (found := _loose(getattr(value, n), f"{place}.{n}"))), "")
