"""Everything a report shows, worked out once from the facts; tables, figures and pages only lay it out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedlth.report.choice import Choice, main_choice, rows_of
from fedlth.report.facts import Facts
from fedlth.report.measure import Shown, others_of, shown_of
from fedlth.report.overlap import Overlap, overlap
from fedlth.report.statistics import ArmSummary, summarise
from fedlth.report.traffic import Traffic, traffic
from fedlth.storage.header import Header, TaskFacts
from fedlth.storage.records import MetricRow


@dataclass(frozen=True)
class TaskResults:
    """What the clients of one task got: `name` as people read it, every arm over them, by what judges them and more."""

    name: str
    shown: Shown
    others: tuple[Shown, ...]
    num_clients: int
    num_classes: int
    summaries: tuple[ArmSummary, ...]

    def summary(self, choice: Choice | None) -> ArmSummary | None:
        """Return the summary of one arm and density, or None where no client of the task was evaluated there."""
        return next((found for found in self.summaries if found.choice == choice), None)


@dataclass(frozen=True)
class Results:
    """The results of one run or of several seeds of it. traffics and overlaps stand in the order of `group`.

    main: the arm and density that speak for the run, None where nothing was evaluated. tasks: where clients have tasks
    of their own. Where these have different metrics there are no `summaries` over all clients, but only by task.
    """

    group: tuple[Facts, ...]
    main: Choice | None
    summaries: tuple[ArmSummary, ...]
    traffics: tuple[Traffic, ...]
    overlaps: tuple[Overlap, ...]
    tasks: tuple[TaskResults, ...] = ()

    @property
    def one_metric(self) -> bool:
        """Say whether all clients are judged by the same, so that they have a mean."""
        return len(self.group[0].header.judged) == 1

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
    alike = len(group[0].header.judged) == 1
    return Results(
        group=tuple(group),
        main=main_choice(group) if evaluated else None,
        summaries=summarise(group) if alike else (),
        traffics=tuple(traffic(facts) for facts in group),
        overlaps=tuple(found for facts in group if (found := overlap(facts)) is not None),
        tasks=tuple(_task_results(group, task) for task in group[0].header.tasks),
    )


def _task_results(group: Sequence[Facts], task: TaskFacts) -> TaskResults:
    theirs, only = set(task.clients), []
    for facts in group:
        header = replace(facts.header, metrics=task.metrics, tasks=[])
        only.append(replace(facts, header=header, metrics=tuple(r for r in facts.metrics if r.client in theirs)))
    name = task.name or "the study's own"
    return TaskResults(name, shown_of(only), others_of(only), len(theirs), task.num_classes, summarise(only))


def dense_flops(header: Header) -> float:
    """Return the dense forward FLOPs an example, mean over clients where their networks differ."""
    if not header.tasks:
        return header.flops_forward_per_example
    costs = [(len(task.clients), task.flops_forward_per_example) for task in header.tasks]
    return sum(count * flops for count, flops in costs) / sum(count for count, _ in costs)


def alive_flops(header: Header, row: MetricRow) -> float | None:
    """Return the forward FLOPs an example that a client's alive weights need; None if unknown.

    Layer by layer: dense FLOPs times the layer's density. Layers that cannot be pruned count in full.
    """
    layers, dense = header.network(row.client)
    cost = {layer.name: layer.flops_per_example for layer in layers if layer.prunable}
    if not dense or not cost.keys() <= row.layer_density.keys():
        return None
    return dense - sum(flops * float(1 - row.layer_density[name]) for name, flops in cost.items())


def inference_flops_effective(results: Results, choice: Choice) -> float | None:
    """Return `alive_flops` of a choice, mean over clients and seeds; None if unknown."""
    rows = [(facts.header, row) for facts in results.group for row in rows_of(facts, choice).values()]
    found = [alive_flops(header, row) for header, row in rows if not row.diverged]  # there is no such network
    known = [flops for flops in found if flops is not None]
    return float(np.mean(known)) if known and len(known) == len(found) else None
