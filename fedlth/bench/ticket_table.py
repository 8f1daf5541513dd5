"""What personal masks and their controls reach at every density that was evaluated: the numbers of the pictures."""

from __future__ import annotations

import numpy as np

from fedlth.bench.board import Board, Entry
from fedlth.bench.contrasts import masked, over_seeds
from fedlth.bench.controls import DENSE, GLOBAL
from fedlth.bench.mask_picture import PAIRS, control_at, less, sparse
from fedlth.bench.tables import OWN, difference_unit, plain
from fedlth.report.choice import Choice, baseline_of, rows_of
from fedlth.report.measure import Shown
from fedlth.report.statistics import summarise_arm
from fedlth.report.tables import Table

OF_OWN = ("own_random", "own_global_mask", "frozen_random")  # controls of masks that clients make in the rounds


def tickets_table(board: Board) -> Table:
    """Return one row a partition, method, density and arm, every number plain: a personal mask, below it its controls.

    Intervals are 95 % and not corrected for their number: of a mean over seeds (over clients below three), and of the
    mask less its control, paired by seed and client. A control with the very same mask has no difference.
    """
    shown, rows = board.shown, list[dict[str, object]]()
    if shown is None:
        return Table("", (), ())
    for partition, held in board.entries.items():
        for label, entry in held.items():
            for personal, _ in PAIRS if entry.makes_masks else ():
                for one, density in sparse(entry, personal):
                    place: dict[str, object] = {"partition": partition, "method": label, "at_density_share": density}
                    rows.append(place | _reached(shown, entry, one, one, OWN))
                    rows += [place | _reached(shown, entry, one, *other) for other in _controls(entry, one)]
    header = tuple(dict.fromkeys(key for row in rows for key in row))
    return Table("", header, tuple(tuple(plain(row.get(key)) for key in header) for row in rows))


def _controls(entry: Entry, one: Choice) -> list[tuple[Choice, str]]:
    found = []
    for arm, kind in entry.kinds.items():
        other = control_at(entry, arm, one.target_density)
        if kind.startswith(DENSE):
            other = baseline_of(entry.group, arm)
        elif (arm in OF_OWN) != one.arm.startswith("own"):
            continue
        if other is not None and other != one:
            found.append((other, kind))
    return found


def _reached(shown: Shown, entry: Entry, own: Choice, choice: Choice, what: str) -> dict[str, object]:
    """Return what one arm reached, and what the personal mask `own` is more than it."""
    group = masked(entry.group, own.arm)
    summary, runs = summarise_arm(group, choice), [rows_of(facts, choice) for facts in group]
    seeds = over_seeds(float(np.mean([shown.of(row) for row in rows.values()])) for rows in runs if rows)
    interval = summary.interval if np.isnan(seeds.low) else seeds
    same = what == GLOBAL and entry.one_mask
    found = None if choice == own or same else less(entry, own, choice)
    unit, points = "percent" if shown.measure.percent else shown.slug, difference_unit(shown).replace(" ", "_")
    return {
        "row": what,
        "arm": choice.arm,
        "metric": shown.measure.name,
        "seeds": summary.num_seeds,
        "clients": summary.num_clients // max(1, summary.num_seeds),
        "diverged_clients": summary.diverged,
        "density_share": float(summary.density),
        f"mean_{unit}": shown.factor * summary.mean,
        f"mean_low_{unit}": shown.factor * interval.low,
        f"mean_high_{unit}": shown.factor * interval.high,
        f"own_less_control_{points}": None if found is None else shown.factor * found.mean,
        f"own_less_control_low_{points}": None if found is None else shown.factor * found.interval.low,
        f"own_less_control_high_{points}": None if found is None else shown.factor * found.interval.high,
    }
