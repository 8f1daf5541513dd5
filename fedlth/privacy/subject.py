"""The run that is audited: its clients with tickets, and its own step 2, from the model that tickets grew from."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from fedlth.errors import StudyError
from fedlth.experiment.experiment import Experiment
from fedlth.experiment.mask_defence import defence_of
from fedlth.federation.downloads import broadcast
from fedlth.federation.rounds import STEP_2
from fedlth.federation.transfer import KNOWN_STARTS, ticket_states
from fedlth.kernel import kernel
from fedlth.methods.client_update import THETA_G, Inbox
from fedlth.models.layout import Params
from fedlth.personalization.arms import trained
from fedlth.personalization.kept import At
from fedlth.personalization.personalise import Personalise
from fedlth.personalization.step2 import Result, Step2
from fedlth.storage.client_state import ClientState
from fedlth.storage.header import Header
from fedlth.storage.run_folder import RunFolder
from fedlth.tickets.finder import Finder
from fedlth.tickets.gate import AtTarget
from fedlth.tickets.granularity import Element
from fedlth.tickets.rewind import changed
from fedlth.tickets.search import Walked, find
from fedlth.training.local_client import LocalClient
from fedlth.training.task import Task
from fedlth.wire import payload
from fedlth.wire.payload import Content

VERSION = 1  # of what a client's file holds, and how it is made


@dataclass(frozen=True, eq=False)
class Subject:
    """A finished run whose tickets are masks of one global model. `states` are those of the clients that have one."""

    experiment: Experiment
    header: Header
    states: Mapping[int, ClientState]
    inbox: Inbox
    start: str

    @property
    def task(self) -> Task:
        return self.experiment.task

    @property
    def density(self) -> float:
        """The density of the tickets that clients keep."""
        keep = self.experiment.keep
        assert isinstance(keep, At)
        return keep.density

    @property
    def finder(self) -> Finder:
        return self.experiment.finder

    @cached_property
    def defence(self) -> Any:
        """What the run itself does to masks before they leave a client; None for nothing."""
        return defence_of(self.experiment.study)

    @property
    def applied(self) -> str:
        """The run's own defence in words, "" for none."""
        return "" if self.defence is None else repr(self.defence)

    @cached_property
    def step_2(self) -> Personalise:
        found = self.experiment.phase("personalise").update
        assert isinstance(found, Personalise)
        return found

    @cached_property
    def key(self) -> str:
        """What decides the numbers of a client's file, but for which client it is."""
        told = json.dumps([VERSION, self.experiment.text, self.start, self.task.splits.name])
        return hashlib.blake2b(told.encode(), digest_size=16).hexdigest()

    def step(self, task: Task, client: int, stage: str, *, theta: Params | None = None) -> Step2:
        """Return one client's step 2; `stage` names its random streams, `theta` takes the place of all known weights.

        Stage personalise of a client of the run is what the run itself did.
        """
        found = self.step_2.step2(LocalClient(task, client, 0, stage), self.inbox, ClientState())
        if theta is None:
            return found
        return replace(found, theta_g=theta, alive=found.local.full, anchors=dict.fromkeys(found.anchors, theta))

    def mask(self, step: Step2, finder: Finder | None = None) -> np.ndarray | None:
        """Return the ticket's mask at the kept density; None where the search diverged or stopped above it.

        A ticket's last training does not change its mask, and is left out where nothing looks at it.
        """
        finder, layout, targets = finder or self.finder, step.local.task.layout, self.step_2.targets
        chains, limit = finder.chains(targets), -1
        if not finder.moves and finder.stop == AtTarget():
            if all(len(chain) == 1 for chain in chains):
                limit = layout.num_prunable
            elif isinstance(finder.granularity, Element) and all(one.count(self.density) < 2 for one in chains):
                limit = math.ceil(self.density * layout.num_prunable)
        walk = _Untrained(step, limit)
        search = find(
            finder, start=step.theta_g, start_name="theta_g", targets=targets, layout=layout, anchors=step.anchor,
            train=walk, rng=step.local.rng, network=step.network, val_accuracy=step.local.val_score,
        )  # fmt: skip
        found = next((one for one in search if one.target == self.density), None)
        return None if found is None or found.diverged else found.mask

    def under(self, step: Step2, mask: np.ndarray) -> Result:
        """Train under a mask as a ticket's last training does; a rewind to trained weights begins with theta_g here."""
        rewind, start = self.finder.rewind, self.finder.rewind.anchor or "theta_g"
        begin = changed(rewind, step.anchor(start), mask, step.local.task.layout, step.local.rng("rewind"))
        density = int(np.count_nonzero(mask)) / mask.size
        return trained(step, "audit", start, mask, target=density, begin=begin)

    def dense_twin(self, step: Step2) -> Result:
        """Train the whole model from theta_g for as long as a ticket's last training."""
        return trained(step, "dense", "theta_g", step.local.full)


@dataclass(frozen=True)
class _Untrained:
    """Train what a search asks for, but leave a sparse mask of at most `count` weights as it is: it is the last."""

    step: Step2
    count: int

    def __call__(
        self, start: Params, mask: np.ndarray, /, *, replay_lr: bool, held: bool = False, window: int = 0,
        first_step: int = 0, last_step: int | None = None,
    ) -> Walked:  # fmt: skip
        if not mask.all() and np.count_nonzero(mask) <= self.count:
            return Walked(start)
        return self.step.walk(
            start, mask, replay_lr=replay_lr, held=held, window=window, first_step=first_step, last_step=last_step
        )


@lru_cache(maxsize=1)
def subject_of(run: str) -> Subject:
    """Return the run in this folder as a subject; raise StudyError where its tickets cannot be audited so.

    Kept, so that forked workers have it from their parent.
    """
    folder = RunFolder(Path(run))
    # One by one: in a cohort bits depend on who trains side by side, which a stop would change.
    experiment = Experiment.of(folder.study().model_copy(update={"cohort": 1}))
    header = _checked(folder, experiment)
    if experiment.study.compute == "sparse":
        kernel.warm()
    start = _start(folder, experiment)
    inbox = _inbox(folder, experiment, start)
    return Subject(experiment, header, _states(folder, header), inbox, start)


def _start(folder: RunFolder, experiment: Experiment) -> str:
    """Name the checkpoint of the global model that step 2 began with, "" for the initial one."""
    if folder.has_params(STEP_2):
        return STEP_2
    if experiment.study.refine.rounds:
        raise StudyError(
            f"{folder.root}: must hold the global model that its tickets grew from, got only the one that "
            "refine.rounds have moved: this run was made by an earlier version"
        )
    return folder.progress().theta


def _inbox(folder: RunFolder, experiment: Experiment, start: str) -> dict[str, Content]:
    """Return what step 2 began with, as clients decoded it."""
    state = folder.load_state(start) if start else experiment.start()
    found = {THETA_G: _decoded(experiment, state.theta, state.mask)}
    anchor = experiment.finder.rewind.anchor
    if anchor not in (None, "theta_g", *KNOWN_STARTS):
        found[anchor] = _decoded(experiment, folder.load_params(anchor), state.mask)
    return found


def _decoded(experiment: Experiment, theta: Params, mask: np.ndarray | None) -> Content:
    layout, codec = experiment.layout, experiment.codec.down
    sent = broadcast("values", THETA_G, theta, layout, codec, mask)
    return payload.decode(sent.payload, "values", layout, codec=codec)


def _checked(folder: RunFolder, experiment: Experiment) -> Header:
    """Return a run's header; raise StudyError where it has not ended, or the attacks do not fit it."""
    root, header = folder.root, folder.header()
    if header is None or not header.finished:
        raise StudyError(f"{root}: must have ended; to go on with it: fedlth resume {root}")
    method, study, finder = experiment.method, experiment.study, experiment.finder
    if experiment.kept_arm != "ticket" or method.space.kind != "values" or method.topology is not None:
        raise StudyError(
            f"{root}: must be a run with the arm ticket and a global model of weights, whose search an attacker can "
            f"repeat on data of its own; got method {header.method} with the arms {', '.join(experiment.arms)}"
        )
    task = experiment.task
    if (header.data_digest, header.partition_digest) != (task.dataset.digest(), task.splits.digest):
        raise StudyError(f"{root}: must have the data that it was run with, got other data")
    if study.tasks or task.dataset.targets != "classes":
        raise StudyError(f"{root}: must have one class an example, the same classes for all clients, to guess at")
    if task.exchange is not task.layout.moving or task.layout.moving is not task.layout:
        raise StudyError(f"{root}: must exchange and train the whole model (no model.personal, no frozen tensors)")
    if not len(task.dataset.y_test):
        raise StudyError(f"{root}: must have a test split, from which shadow clients get their examples, got none")
    if not isinstance(experiment.keep, At):
        raise StudyError(f"{root}: must keep tickets of one density, got finder.main: {study.finder.main}")
    if experiment.keep.density == 1:
        raise StudyError(f"{root}: expected sparse tickets, got dense ones")
    if finder.dead.holds or not getattr(finder.rewind, "trains", True):
        raise StudyError(f"{root}: must have tickets that train among zeros, got {finder.dead} and {finder.rewind}")
    return header


def _states(folder: RunFolder, header: Header) -> dict[int, ClientState]:
    """Return the states of the clients that have a ticket; two at least, since one cannot be told from others."""
    found = ticket_states(folder, header)
    if len(found) < 2:
        raise StudyError(f"{folder.root}: must have tickets of two clients at least, got {len(found)}")
    return found
