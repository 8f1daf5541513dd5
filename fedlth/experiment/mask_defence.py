"""The defence of personal masks that a study names (privacy.mask): which messages it changes, and where it has none."""

from __future__ import annotations

from typing import Any

from fedlth.errors import StudyError, wrong
from fedlth.experiment.experiment import Experiment
from fedlth.methods.defence import DEFENCES
from fedlth.methods.method import Phase, loose_part
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


def defence_in(experiment: Experiment, phase: Phase) -> Any:
    """Return what a phase's clients do to their masks before they send them; None where the masks go as they are."""
    if experiment.study.privacy.mask is None or not _sends_bare(experiment, phase):
        return None
    return defence_of(experiment.study)


def _sends_bare(experiment: Experiment, phase: Phase) -> bool:
    """Say whether personal masks come on their own: a ticket's on its way into refinement, a newcomer's signature."""
    names = {one.name for one in experiment.federated_phases}
    return phase.name not in names and any(kind == "mask" for _, kind in phase.update.sends)


def told(defence: Any) -> str:
    """Return a defence as people read it, with the epsilon of a bit where it has one; "" for none."""
    if defence is None:
        return ""
    epsilon = getattr(defence, "epsilon", None)
    return f"{defence!r}" + ("" if epsilon is None else f", epsilon {epsilon:.2f} for one bit alone")


def defended_density(experiment: Experiment, density: float) -> float:
    """Return how much of a mask of this density is kept once it is defended; all where the defence does not say."""
    defence = defence_of(experiment.study)
    if defence is None:
        return density
    after = getattr(defence, "density", None)
    return 1.0 if after is None else float(after(density))


def check_defence(experiment: Experiment) -> list[str]:
    """Return a note on what the defence of a study is worth; raise StudyError where it would defend nothing, or half.

    A mask that comes with values is refused: a weight that was flipped in has no trained value, and its zero would
    tell the flip.
    """
    defence, name = defence_of(experiment.study), experiment.method.name
    if defence is None:
        return []
    place = "privacy.mask: must be left out"
    for phase in experiment.federated_phases:
        kinds = {kind for _, kind in phase.update.sends}
        if phase.own_mask or "mask" in kinds:
            raise StudyError(
                f"{place} for method {name}: the masks of its rounds go up with what was trained under them, which "
                "tells the flips; defended are masks that come on their own, those of tickets (refine.rounds)"
            )
    if not any(_sends_bare(experiment, phase) for phase in experiment.phases):
        raise StudyError(
            f"{place}: no personal mask leaves its client in this study; tickets' masks do with refine.rounds, or with "
            "a clients.newcomer that is handed those of others"
        )
    if tiers := [tier for tier in experiment.study.clients.capacity if tier.density < 1]:
        raise StudyError(
            f"{place} where clients carry less than all, here a density of {tiers[0].density:g}: a mask that is "
            "defended may keep more than its client can carry"
        )
    return [
        f"privacy.mask: {told(defence)}; a mask has many bits that depend on each other, so together they are no small "
        "epsilon. The audit (fedlth audit) measures what is left"
    ]
