"""Newcomers: what clients that no round has seen make of a ticket that they are handed, against their own and controls.

All rows are over these clients alone; differences are paired by client.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedlth.report.choice import Choice, densities, rows_of
from fedlth.report.known_arms import arm_of
from fedlth.report.results import Results
from fedlth.report.statistics import difference
from fedlth.report.tables import Table
from fedlth.report.units import percent
from fedlth.storage.records import HANDED

BESIDE = ("ticket", "global_mask", "random", "local", "dense", "global")


def newcomers_table(results: Results) -> Table:
    """Return a row for the handed ticket, and one for each arm beside it; none where nothing was handed over."""
    shown, group, rows = results.shown, results.group, []
    header = (
        "arm",
        "density",
        "clients",
        f"mean {shown.column}",
        "handed less this",
        "95 % interval",
        "handed better %",
    )
    known = densities(group, HANDED) if results.one_metric else ()
    for target in known:
        handed = Choice(HANDED, target)
        theirs = [set(rows_of(facts, handed)) for facts in group]
        only = [
            replace(facts, metrics=tuple(row for row in facts.metrics if row.client in clients))
            for facts, clients in zip(group, theirs, strict=True)
        ]
        for arm in (HANDED, *BESIDE):
            at = target if target in densities(only, arm) else 1.0
            choice = Choice(arm, at)
            found = [shown.of(row) for facts in only for row in rows_of(facts, choice).values()]
            if not found:
                continue
            gap = difference(only, handed, choice) if arm != HANDED else None
            told = ("", "", "")
            if gap is not None:
                pairs = [
                    shown.of(rows_of(f, handed)[c]) - shown.of(row)
                    for f in only
                    for c, row in rows_of(f, choice).items()
                    if c in rows_of(f, handed)
                ]
                better = float(np.mean(shown.gain(np.array(pairs)) > 0))
                told = (shown.difference(gap.mean), shown.bounds(gap.interval, signed=True), percent(better, digits=0))
            mean = shown.text(float(np.mean(found)))
            rows.append((arm_of(arm).label, f"{at:.3g}", str(len(found)), mean, *told))
    return Table("Newcomers: the ticket that they were handed, and what else they could use", header, tuple(rows))
