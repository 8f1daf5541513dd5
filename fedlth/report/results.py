"""Everything a report shows, worked out once from the facts; tables, figures and pages only lay it out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedlth.report.choice import Choice, main_choice, rows_of
from fedlth.report.facts import Facts
from fedlth.report.measure import Shown, shown_of
from fedlth.report.overlap import Overlap, overlap
from fedlth.report.statistics import ArmSummary, summarise
from fedlth.report.traffic import Traffic, traffic
from fedlth.storage.records import Header, MetricRow


@dataclass(frozen=True)
class Results:
    """The results of one run or of several seeds of it. traffics and overlaps stand in the order of `group`.

    main: the arm and density that speak for the run, None where nothing was evaluated.
    """

    group: tuple[Facts, ...]
    main: Choice | None
    summaries: tuple[ArmSummary, ...]
    traffics: tuple[Traffic, ...]
    overlaps: tuple[Overlap, ...]

    @property
    def shown(self) -> Shown:
        """The metric that the study is judged by."""
        return shown_of(self.group)

    def summary(self, choice: Choice | None) -> ArmSummary | None:
        """Return the summary of one arm and density, or None where it was not evaluated."""
        return next((found for found in self.summaries if found.choice == choice), None)

    def best_known(self, arm: str) -> ArmSummary | None:
        """Return the summary of an arm at its largest density: for the dense arms, the only one."""
        return next((found for found in self.summaries if found.choice.arm == arm), None)

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what a reader must know of the runs, each told with its seed where there are several."""
        several = len(self.group) > 1
        return tuple(
            f"seed {facts.header.seed}: {note}" if several else note for facts in self.group for note in facts.notes
        )


def results_of(group: Sequence[Facts]) -> Results:
    """Return the results of a group of runs of one study (one run a seed)."""
    evaluated = any(facts.metrics for facts in group)
    return Results(
        group=tuple(group),
        main=main_choice(group) if evaluated else None,
        summaries=summarise(group),
        traffics=tuple(traffic(facts) for facts in group),
        overlaps=tuple(found for facts in group if (found := overlap(facts)) is not None),
    )


def alive_flops(header: Header, row: MetricRow) -> float | None:
    """Return the forward FLOPs an example that a client's alive weights need; None if unknown.

    Layer by layer: dense FLOPs times the layer's density. Layers that cannot be pruned count in full.
    """
    dense = header.flops_forward_per_example
    cost = {layer.name: layer.flops_per_example for layer in header.layers if layer.prunable}
    if not dense or not cost.keys() <= row.layer_density.keys():
        return None
    return dense - sum(flops * float(1 - row.layer_density[name]) for name, flops in cost.items())


def inference_flops_effective(results: Results, choice: Choice) -> float | None:
    """Return `alive_flops` of a choice, mean over clients and seeds; None if unknown."""
    rows = [(facts.header, row) for facts in results.group for row in rows_of(facts, choice).values()]
    found = [alive_flops(header, row) for header, row in rows if not row.diverged]  # there is no such network
    known = [flops for flops in found if flops is not None]
    return float(np.mean(known)) if known and len(known) == len(found) else None
