"""Simulated time and tiers: what a run takes on its study's fleet, who was late, what each tier moved and got."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedlth.report.canvas import Theme
from fedlth.report.choice import rows_of
from fedlth.report.facts import Facts
from fedlth.report.measure import shown_of
from fedlth.report.results import Results
from fedlth.report.tables import Table
from fedlth.report.traffic import clients_of, flow
from fedlth.report.units import NOTHING, count, percent, scaled, three_digits
from fedlth.storage.records import DROPPED, LATE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALL = "all clients"


def simulated_s(facts: Facts, *, step: int) -> float | None:
    """Return the simulated seconds of a step, None where the study had no fleet.

    Federated rounds come one after another; the waves of a phase are only commits, so that it takes as long as its
    slowest client.
    """
    spent: dict[str, list[float]] = {}
    for row in facts.rounds:
        if row.simulated_s is not None:
            spent.setdefault(row.phase, []).append(row.simulated_s)
    if not spent:
        return None
    phases = [phase for phase in facts.header.phases if phase.step == step]
    return math.fsum(
        math.fsum(spent[phase.name]) if phase.joins else max(spent[phase.name])
        for phase in phases
        if phase.name in spent
    )


def curve(facts: Facts) -> tuple[list[float], list[float]]:
    """Return simulated seconds of the rounds of step 1, and the study's metric on validation data.

    A round's value is that of the model which its clients were sent, so it stands at the round's start.
    """
    joining, at = facts.header.joining(1), 0.0
    seconds, reached, shown = [], [], shown_of([facts])
    for row in facts.rounds:
        if row.phase in joining and row.simulated_s is not None:
            value = shown.of_round(row)
            if value is not None:
                seconds.append(at)
                reached.append(value)
            at += row.simulated_s
    return seconds, reached


def best_reached(facts: Facts) -> float | None:
    """Return the best validation result of any round of step 1, None where the study had no fleet."""
    reached = curve(facts)[1]
    return shown_of([facts]).best(reached) if reached else None


def time_to(facts: Facts, target: float) -> float | None:
    """Return the simulated seconds after which a round first was as good on validation data, None where none was."""
    shown = shown_of([facts])
    return next((s for s, value in zip(*curve(facts), strict=True) if shown.reaches(value, target)), None)


def duration(seconds: float | None) -> str:
    """Return simulated seconds as people read them: in hours from one hour on."""
    if seconds is None:
        return NOTHING
    if seconds >= 3600:
        return f"{seconds / 3600:,.2f} h"
    return f"{three_digits(seconds) if seconds >= 1 else f'{seconds:.3g}'} s"


def fleet_text(results: Results) -> str:
    """Return what the run takes on its fleet, in a sentence; "" without a fleet."""
    steps = [[found for f in results.group if (found := simulated_s(f, step=step)) is not None] for step in (1, 2)]
    if not any(steps):
        return ""
    one, two = (float(np.mean(found)) if found else 0.0 for found in steps)
    return f"On the study's fleet step 1 takes {duration(one)} of simulated time, and step 2 {duration(two)}."


def tiers_table(results: Results) -> Table:
    """Return one row a tier of clients: bytes, simulated time, who was late or dropped out, and what they got.

    No rows where a run has neither tiers nor a fleet. Visits, late and dropped are of federated rounds.
    """
    header = (
        "tier", "clients", "visits", "up", "down", "simulated a visit", "late %", "dropped %", "density",
        f"mean {results.shown.column}",
    )  # fmt: skip
    known = [f for f in results.group if f.header.client_tiers or simulated_s(f, step=1) is not None]
    names = dict.fromkeys(name for facts in known for name in facts.header.client_tiers)
    rows = [_tier_row(results, known, name) for name in ([*names, ALL] if known else [])]
    return Table("The fleet, by tier of clients", header, tuple(rows))


def _tier_row(results: Results, group: Sequence[Facts], name: str) -> tuple[str, ...]:
    clients, visits, late, dropped, up, down = (0.0,) * 6
    seconds: list[float] = []
    densities: list[float] = []
    values: list[float] = []
    shown = results.shown
    for facts in group:
        tiers = facts.header.client_tiers
        held = {c for c in range(facts.header.num_clients) if name == ALL or tiers[c] == name}
        joining = facts.header.joining()
        moved = flow((row for row in facts.ledger if held.intersection(clients_of(row))), held)
        sampled = [row for row in facts.rounds if row.phase in joining]
        kinds = [failed.kind for row in sampled for failed in row.failed if failed.client in held]
        clients, up, down = clients + len(held), up + moved.up_bytes, down + moved.down_bytes
        visits += sum(client in held for row in sampled for client in row.clients)
        late, dropped = late + kinds.count(LATE), dropped + kinds.count(DROPPED)
        times = (row for row in facts.times if row.client in held and row.phase in joining)
        seconds += [row.simulated_s for row in times if row.simulated_s is not None]
        kept = [row for client, row in rows_of(facts, results.main).items() if client in held] if results.main else []
        densities += [row.density for row in kept if not row.diverged]
        values += [shown.of(row) for row in kept] if results.one_metric else []  # of other metrics there is no mean
    seeds = len(group)
    return (
        name, count(clients / seeds), count(visits / seeds), scaled(up / seeds, "B"), scaled(down / seeds, "B"),
        duration(float(np.mean(seconds)) if seconds else None), percent(late / visits if visits else None),
        percent(dropped / visits if visits else None), f"{np.mean(densities):.3g}" if densities else NOTHING,
        shown.text(float(np.mean(values)) if values else None),
    )  # fmt: skip


@dataclass(frozen=True)
class AtTime:
    """The study's metric on validation data in the rounds of step 1 against simulated time, a line a seed."""

    results: Results

    def __call__(self, figure: Figure, theme: Theme) -> None:
        """Draw on an empty figure."""
        axes = figure.add_subplot()
        lines = [curve(facts) for facts in self.results.group]
        longest = max((seconds[-1] for seconds, _ in lines if seconds), default=0.0)
        unit, scale = ("h", 3600.0) if longest >= 3600 else ("s", 1.0)
        for seconds, reached in lines:
            x, y = np.array(seconds) / scale, self.results.shown.factor * np.array(reached)
            axes.plot(x, y, ".-", color=theme.colour("global"), linewidth=1.2, markersize=5)
        axes.set_xlim(0, longest / scale * 1.02 or 1.0)
        axes.set_xlabel(f"simulated time ({unit})")
        axes.set_ylabel(f"validation {self.results.shown.axis}")
