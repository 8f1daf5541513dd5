"""Which rows are meant: one arm at one density, the one that speaks for a run, and the rows of either."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedlth.errors import StudyError
from fedlth.report.facts import Facts
from fedlth.report.known_arms import arm_order, is_users
from fedlth.storage.records import MetricRow

OWN = ("own_tuned", "own")
OF_ROUNDS = (*OWN, "own_random", "own_global_mask", "frozen_random")  # arms of masks that clients make in the rounds
# The arm that speaks for a run in a headline or a comparison: its personal ticket first, then what the method
# itself leaves behind (an arm of a user's, too), then the dense models.
PREFERENCE, DENSE = ("ticket", "refined", "own_tuned", "own"), ("dense", "dense_total", "global", "local")


@dataclass(frozen=True)
class Choice:
    """One arm at one target density; `chosen`: at the one that each client chose, of which this is then the mean."""

    arm: str
    target_density: float
    chosen: bool = False


def same_density(one: float, other: float) -> bool:
    """Say whether two densities are the same but for rounding; densities are never compared with ==."""
    return math.isclose(one, other, rel_tol=1e-6)


def densities(group: Sequence[Facts], arm: str) -> tuple[float, ...]:
    """Return the target densities at which `arm` was evaluated, dense first."""
    return tuple(sorted({r.target_density for f in group for r in f.metrics if r.arm == arm}, reverse=True))


def chosen_choices(group: Sequence[Facts]) -> tuple[Choice, ...]:
    """Return the arms that can be held against each other at every client's own density; none where all have one.

    Each client then counts with the density that it chose for its ticket, whatever the arm.
    """
    kept = [density for facts in group for density in facts.chosen.values()]
    if not kept:
        return ()
    mean = kept[0] if len(set(kept)) == 1 else sum(kept) / len(kept)
    arms = dict.fromkeys(row.arm for facts in group for row in facts.metrics if row.target_density < 1 or row.chosen)
    found = [Choice(arm, mean, chosen=True) for arm in arms]
    return tuple(one for one in found if all(rows_of(f, one).keys() == f.chosen.keys() for f in group))


def main_choice(group: Sequence[Facts], *, arm: str | None = None, density: float | None = None) -> Choice:
    """Return the arm and density that speak for a run.

    arm: by default the first of PREFERENCE, a user's own and DENSE that was evaluated. density: by default each
    client's own, where clients chose; else that of the saved tickets, if the arm was evaluated there; else the arm's
    largest. Raises StudyError where the run lacks what was asked for.
    """
    place = str(group[0].path)
    present = sorted({row.arm for facts in group for row in facts.metrics}, key=arm_order)
    if not present:
        raise StudyError(f"{place}: expected evaluated clients, got no row in metrics.jsonl")
    if arm is None:
        wanted = (*PREFERENCE, *filter(is_users, present), *DENSE)
        arm = next((name for name in wanted if name in present), present[0])
    if arm not in present:
        raise StudyError(f"{place}: expected an arm of {', '.join(present)}, got {arm!r}")
    known = densities(group, arm)
    own = next((one for one in chosen_choices(group) if one.arm == arm), None)
    if own is not None and density is None:
        return own
    if density is not None:
        same = [one for one in known if same_density(one, density)]
        if not same:
            raise StudyError(f"{place}: expected a density of {', '.join(f'{d:g}' for d in known)}, got {density:g}")
        return Choice(arm, same[0])
    saved = next((ticket.density for facts in group for ticket in facts.tickets), group[0].main_density)
    if saved is not None:
        # the file holds the exact density, the row its target: the nearest target, if it is near
        nearest = min(known, key=lambda target: abs(target - saved))
        if abs(nearest - saved) < 0.1 * saved:
            return Choice(arm, nearest)
    return Choice(arm, known[0])


def baseline_of(group: Sequence[Facts], arm: str) -> Choice | None:
    """Return the baseline arm at its largest density, or None where it was not evaluated."""
    known = densities(group, arm)
    return Choice(arm, known[0]) if known else None


def with_mask(rows: Sequence[MetricRow], arm: str) -> list[MetricRow]:
    """Return the rows of clients that can have a mask of their own.

    Who makes one in the rounds has none where no round has seen it: an unseen client would count as dense.
    """
    return [row for row in rows if not row.unseen] or list(rows) if arm in OF_ROUNDS else list(rows)


def rows_of(facts: Facts, choice: Choice) -> dict[int, MetricRow]:
    """Return the rows of one arm and density in one run, by client, in client order."""
    rows = (row for row in facts.metrics if row.arm == choice.arm)
    if choice.chosen:
        found = {r.client: r for r in rows if r.chosen or r.target_density == facts.chosen.get(r.client)}
    else:
        found = {row.client: row for row in rows if row.target_density == choice.target_density}
    return dict(sorted(found.items()))
