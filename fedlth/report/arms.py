"""The arms of a study: their order, their names for people, what each one is, and which one speaks for a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedlth.errors import StudyError
from fedlth.report.facts import Facts


@dataclass(frozen=True)
class Arm:
    """One way to give a client a model."""

    name: str
    label: str
    meaning: str


ARMS = (
    Arm("ticket", "personal ticket", "the client's own ticket, found on its data and fine-tuned from theta_g"),
    Arm("refined", "refined ticket", "the ticket after further federated rounds inside the tickets"),
    Arm("own_tuned", "method's own, tuned", "the method's own personal model, fine-tuned at the end"),
    Arm("own", "method's own", "the method's own personal model, as the method leaves it"),
    Arm("ticket_0", "ticket, rewound to theta_0", "the ticket's mask on the initial weights, then fine-tuned"),
    Arm("one_shot", "one-shot ticket", "a ticket pruned in one step, instead of round after round"),
    Arm("global_mask", "global model's own mask", "theta_g pruned by its own magnitudes: not personal, no mask bytes"),
    Arm("random", "random ticket", "a random mask of equal density; its start was chosen on validation data"),
    Arm(
        "own_random",
        "random mask, tuned",
        "the control of the method's own mask: random, with the same number of weights in each layer",
    ),
    Arm("frozen_random", "random mask, frozen", "the control of a learnt mask: random, on the same frozen weights"),
    Arm("dense", "dense twin", "theta_g fine-tuned without pruning, for the ticket's fine-tuning epochs"),
    Arm("dense_total", "dense twin, total epochs", "theta_g fine-tuned without pruning, search epochs included"),
    Arm("local", "local-only model", "trained from theta_0 on the client's own data, never federated"),
    Arm("global", "global model", "theta_g as it came from the federated rounds, not fine-tuned"),
)
_BY_NAME = {arm.name: arm for arm in ARMS}
_ORDER = {arm.name: place for place, arm in enumerate(ARMS)}

# The arm that speaks for a run in a headline or a comparison: its personal ticket first, then what the method
# itself leaves behind, then the dense models.
PREFERENCE = ("ticket", "refined", "own_tuned", "own", "dense", "dense_total", "global", "local")


def arm_of(name: str) -> Arm:
    """Return the arm of that name; an arm that this list does not know stands under its own name."""
    return _BY_NAME.get(name, Arm(name, name.replace("_", " "), "an arm of this method"))


def arm_order(name: str) -> tuple[int, str]:
    """Return the sort key of an arm."""
    return _ORDER.get(name, len(ARMS)), name


@dataclass(frozen=True)
class Choice:
    """One arm at one target density."""

    arm: str
    target_density: float


def same_density(one: float, other: float) -> bool:
    """Say whether two densities are the same but for rounding; densities are never compared with ==."""
    return math.isclose(one, other, rel_tol=1e-6)


def densities(group: Sequence[Facts], arm: str) -> tuple[float, ...]:
    """Return the target densities at which `arm` was evaluated, dense first."""
    return tuple(sorted({r.target_density for f in group for r in f.metrics if r.arm == arm}, reverse=True))


def main_choice(group: Sequence[Facts], *, arm: str | None = None, density: float | None = None) -> Choice:
    """Return the arm and density that speak for a run.

    arm: by default the first of PREFERENCE that was evaluated. density: by default that of the saved tickets, if
    the arm was evaluated there; else the arm's largest. Raises StudyError where the run lacks what was asked for.
    """
    place = str(group[0].path)
    present = sorted({row.arm for facts in group for row in facts.metrics}, key=arm_order)
    if not present:
        raise StudyError(f"{place}: expected evaluated clients, got no row in metrics.jsonl")
    if arm is None:
        arm = next((name for name in PREFERENCE if name in present), present[0])
    if arm not in present:
        raise StudyError(f"{place}: expected an arm of {', '.join(present)}, got {arm!r}")
    known = densities(group, arm)
    if density is not None:
        same = [one for one in known if same_density(one, density)]
        if not same:
            raise StudyError(f"{place}: expected a density of {', '.join(f'{d:g}' for d in known)}, got {density:g}")
        return Choice(arm, same[0])
    saved = [ticket.density for facts in group for ticket in facts.tickets]
    if saved:
        # the file holds the exact density, the row its target: the nearest target, if it is near
        nearest = min(known, key=lambda target: abs(target - saved[0]))
        if abs(nearest - saved[0]) < 0.1 * saved[0]:
            return Choice(arm, nearest)
    return Choice(arm, known[0])
