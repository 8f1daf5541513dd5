"""The method that a study names, held against what every method must be."""

from __future__ import annotations

import re
from typing import Any

from fedlth.errors import StudyError
from fedlth.methods.client_update import NEXT_MASK, THETA_G, UPDATE
from fedlth.methods.method import Dense, FederatedMethod, Phase, check_frozen, sending_checks
from fedlth.methods.table import METHODS
from fedlth.storage.records import EVALUATE, HANDED, INTRODUCE
from fedlth.study.parts import make
from fedlth.study.schema import Study

NEXT_MASK_WANTED = f"one that sends {NEXT_MASK} after its first message, the update of a slice under own_mask"
SPACE = ("name", "kind", "trains_weights", "bounds", "layout", "initial", "model", "reply")  # what one must have


def method_of(study: Study) -> FederatedMethod:
    """Return the study's method; raise StudyError naming the place."""
    method = make(METHODS, study.method, "method")
    name = study.method["name"]
    if not isinstance(method, FederatedMethod):
        wanted = "fedlth.methods.method.FederatedMethod"
        raise StudyError(f"method: {name} must return a {wanted}, got {type(method).__name__}")
    if not isinstance(method.phases, tuple) or not all(isinstance(phase, Phase) for phase in method.phases):
        raise StudyError(f"method: {name}: its phases must be a tuple of Phase, got {method.phases!r}")
    check_frozen(method)
    dense, shared = method.first_mask == Dense(), method.start_mask == Dense()
    checks: list[tuple[str, Any, bool, str]] = [
        ("space", method.space, all(hasattr(method.space, part) for part in SPACE), "Weights, Scores or Thresholds"),
        (
            "first_mask", method.first_mask, dense or method.slices or method.topology is not None,
            "Dense where no phase sends slices and clients do not send to one another",
        ),
        ("start_mask", method.start_mask, shared or not method.slices, "Dense where a phase sends slices"),
    ]  # fmt: skip
    between = False
    for phase in method.phases:
        rule = all(hasattr(phase.join, part) for part in ("init", "add", "result"))
        update, place = phase.update, phase.name
        checks += [
            ("phase name", place, bool(re.fullmatch("[a-z_]+", place)), "letters a-z and _"),
            *sending_checks(phase, method.space, between),
            (f"{place}.update", update, callable(update) and hasattr(update, "sends"), "a ClientUpdate"),
            (f"{place}.join", phase.join, rule, "a rule with init, add and result"),
            (f"{place}.update", update, bool(getattr(update, "sends", None)), "one that sends something to join"),
            (f"{place}.update", update, _names_mask_after_update(phase), NEXT_MASK_WANTED),
            (f"{place}.cut", phase.cut, phase.cut is None or phase.down == "slice", "None where it sends no slices"),
            (f"{place}.who", phase.who, callable(phase.who) and not phase.in_waves, "clients, not Waves, step 2's"),
            (f"{place}.also", phase.also, not phase.also or phase.down == "broadcast", "empty where slices go down"),
            (f"{place}.also", phase.also, not any(n.startswith(THETA_G) for n in phase.also), f"no {THETA_G}"),
        ]
        between = phase.topology is not None
    for place, value, fits, wanted in checks:
        if not fits:
            raise StudyError(f"method: {name}: its {place} must be {wanted}, got {value!r}")
    names = [phase.name for phase in method.phases]
    taken = {
        n for n in names if names.count(n) > 1 or n in (EVALUATE, "personalise", INTRODUCE, HANDED, "refine", "refined")
    }
    if taken:
        raise StudyError(f"method: {name}: phase names must be unique and none that every run has, got {min(taken)}")
    return method


def _names_mask_after_update(phase: Phase) -> bool:
    """Say whether a mask of the next download, where any is sent, has an update that it can refer to."""
    names = [name for name, _ in getattr(phase.update, "sends", ())]
    return NEXT_MASK not in names or (names[0] == UPDATE and phase.down == "slice" and phase.own_mask)
