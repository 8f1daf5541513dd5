"""What a client is asked for in a round: everything that the server knows of its answer before it comes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from fedlth.experiment.experiment import Experiment
from fedlth.experiment.mask_defence import defence_in
from fedlth.federation.door import Asked
from fedlth.federation.ranges import ranges_of
from fedlth.methods.client_update import sends_in
from fedlth.methods.method import Phase
from fedlth.personalization.arms import row_name
from fedlth.storage.records import HANDED


@dataclass(frozen=True)
class Asking:
    """A round's questions, all alike but for what is a client's own."""

    experiment: Experiment
    phase: Phase
    round: int

    def of(self, client: int) -> Asked:
        task = self.experiment.task_of(client)
        return replace(
            self._of_all, split=task.splits.clients[client], unseen=client in task.splits.unseen,
            layers=frozenset(e.name for e in task.layout.prunable), tier=task.capacity(client), judged=task.judged,
            named=self.experiment.layout.num_prunable == task.layout.num_prunable and not self._defended,
        )  # fmt: skip

    @cached_property
    def _defended(self) -> bool:
        """Say whether clients change their masks before they send them: no row then names what comes."""
        return defence_in(self.experiment, self.phase) is not None

    @cached_property
    def _of_all(self) -> Asked:
        experiment, phase = self.experiment, self.phase
        sends = sends_in(phase.update, self.round)
        arms: tuple[str, ...] = ()
        if phase.in_waves:
            alone = {"refined": ("refined",), HANDED: (HANDED,)}  # phases of one arm
            arms = alone.get(phase.name) or tuple(map(row_name, experiment.arms))
        if phase.evaluates:
            arms = experiment.curve_arms
        return Asked(
            split=experiment.task.splits.clients[0], unseen=False, own_mask=phase.own_mask,
            sends={name: (kind, experiment.message_layout(phase, name, kind)) for name, kind in sends},
            ranges=ranges_of(experiment, phase, self.round), arms=frozenset(arms),
            targets=frozenset((1.0, *experiment.study.finder.densities)),
            keep=None if phase.name == HANDED else experiment.keep, curve=phase.evaluates,
            noisy=experiment.study.privacy.dp is not None and not phase.evaluates,
        )  # fmt: skip
