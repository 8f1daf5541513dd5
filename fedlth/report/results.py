"""Everything a report shows, worked out once from the facts; tables, figures and pages only lay it out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedlth.report.arms import Choice, main_choice
from fedlth.report.bytes import Traffic, traffic
from fedlth.report.facts import Facts
from fedlth.report.overlap import Overlap, overlap
from fedlth.report.statistics import ArmSummary, rows_of, summarise


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


def inference_flops_effective(results: Results, choice: Choice) -> float | None:
    """Return the forward FLOPs an example that alive weights need, mean over clients and seeds; None if unknown.

    Layer by layer: dense FLOPs times the layer's density in each row. Layers that cannot be pruned count in full.
    """
    found = []
    for facts in results.group:
        dense = facts.header.flops_forward_per_example
        cost = {layer.name: layer.flops_per_example for layer in facts.layers if layer.prunable}
        for row in rows_of(facts, choice).values():
            if row.diverged:  # there is no such network
                continue
            if not dense or not cost.keys() <= row.layer_density.keys():
                return None
            found.append(dense - sum(flops * (1 - row.layer_density[name]) for name, flops in cost.items()))
    return float(np.mean(found)) if found else None
