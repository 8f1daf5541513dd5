"""The sparsity that each client reaches: the largest at which an arm is the dense twin's equal but for one deviation.

Full accuracy less one standard deviation over seeds, the rule of Table 2 of Chen et al., BERT-Tickets, NeurIPS 2020,
arXiv 2007.12223. One seed has no such deviation: the standard error of an accuracy on the client's test part stands in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fedlth.report.choice import Choice, baseline_of, densities, rows_of
from fedlth.report.facts import Facts
from fedlth.report.known_arms import arm_of, arm_order
from fedlth.report.measure import Shown
from fedlth.report.results import Results
from fedlth.report.tables import Table
from fedlth.report.units import NOTHING
from fedlth.storage.records import MetricRow

NONE, ROUNDING = "none", 1e-9


def sparsity_table(results: Results) -> Table:
    """Return one row a client: its dense twin, one deviation, and each sparse arm's largest sparsity in percent.

    No rows without a dense twin or a sparse arm. A density counts where the arm has it in every seed that the twin has.
    """
    group, several = results.group, len(results.group) > 1
    met = {row.arm for facts in group for row in facts.metrics if row.target_density < 1}
    arms, dense = sorted(met, key=arm_order), baseline_of(group, "dense")
    head = "1 sd over seeds" if several else "1 se of the test part"
    header = ("client", "test examples", "dense twin", head, *(f"{arm_of(arm).label}, %" for arm in arms))
    title = "The largest sparsity at the dense twin's mean less one " + (
        "standard deviation over seeds" if several else "binomial standard error of the test part (there is one seed)"
    )
    if dense is None or not arms:
        return Table(title, header, ())
    twins = [rows_of(facts, dense) for facts in group]
    found = {(arm, d): [rows_of(f, Choice(arm, d)) for f in group] for arm in arms for d in densities(group, arm)}
    tasks = {client: task.name for task in group[0].header.tasks for client in task.clients if task.name}
    rows = []
    for client in sorted(set().union(*twins)):
        shown = Shown(group[0].header.judges(client))
        held = [twin[client] for twin in twins if client in twin]
        mean, deviation = _mean(shown, held), _deviation(shown, held, several)
        bound = None if deviation is None else mean - float(shown.gain(deviation))
        reached = []
        for arm in arms:
            by_density = {d: [at[client] for at in rows if client in at] for (a, d), rows in found.items() if a == arm}
            reached.append(_reached(shown, by_density, len(held), bound))
        name = f"{client} ({tasks[client]})" if client in tasks else str(client)
        told = NOTHING if deviation is None else shown.difference(deviation).lstrip("+")
        rows.append((name, str(held[0].num_test), f"{shown.text(mean)}{shown.unit}", told, *reached))
    return Table(title, header, tuple(rows))


def _mean(shown: Shown, rows: Sequence[MetricRow]) -> float:
    return float(np.mean([shown.of(row) for row in rows]))


def _deviation(shown: Shown, rows: Sequence[MetricRow], several: bool) -> float | None:
    """Return one standard deviation of the dense twin; None where nothing says what it is."""
    if several:
        return float(np.std([shown.of(row) for row in rows], ddof=1)) if len(rows) > 1 else None
    if shown.measure.name != "accuracy" or not rows[0].num_test:
        return None
    share = _mean(shown, rows)
    return math.sqrt(share * (1 - share) / rows[0].num_test)


def _reached(shown: Shown, by_density: dict[float, list[MetricRow]], seeds: int, bound: float | None) -> str:
    """Return the sparsity of the sparsest model that reaches the bound."""
    if bound is None:
        return NOTHING
    for rows in (by_density[density] for density in sorted(by_density)):
        if len(rows) == seeds and float(shown.gain(_mean(shown, rows) - bound)) >= -ROUNDING:
            return f"{100 * (1 - float(np.mean([row.density for row in rows]))):.3g}"
    return NONE


def told(group: Sequence[Facts]) -> str:
    """Return how the table is to be read."""
    deviation = (
        "one standard deviation over seeds"
        if len(group) > 1
        else "one binomial standard error of the client's test part, as one seed says nothing of another"
    )
    return (
        "For each client the largest sparsity (pruned share of the prunable weights) of those tried whose mean test "
        f"result is at least that of the dense twin less {deviation}. Of few densities, and of an arm that happens to "
        "do well at one of them, it says little; “none” is none of those tried."
    )
