"""The defence of personal masks that a study names (privacy.mask): what it is, and where it has nothing to defend."""

from __future__ import annotations

from typing import Any

from fedlth.errors import wrong
from fedlth.methods.defence import DEFENCES
from fedlth.methods.method import loose_part
from fedlth.study.parts import make
from fedlth.study.schema import Study


def defence_of(study: Study) -> Any:
    """Return the study's defence of masks, None for none; raise StudyError naming the place."""
    spec = study.privacy.mask
    if spec is None:
        return None
    defence = make(DEFENCES, spec, "privacy.mask", has="__call__(mask, rng)")
    if loose := loose_part(defence, "privacy.mask"):
        raise wrong("privacy.mask", "a frozen dataclass whose fields are immutable", loose)
    return defence
