"""The transfer matrix of a finished run: every mask trained on every client's data, one job a cell.

Rows are the dense twin, each client's ticket, tickets of other runs, and theta_0's own mask; columns are the clients.
Chen et al., The Lottery Ticket Hypothesis for Pre-trained BERT Networks, NeurIPS 2020, arXiv 2007.12223.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from fedlth.errors import StudyError
from fedlth.experiment.experiment import Experiment
from fedlth.experiment.other_ticket import OtherTicket
from fedlth.federation.downloads import broadcast
from fedlth.federation.jobs import Engine, Job, Message, Reply
from fedlth.kernel import kernel
from fedlth.methods.client_update import THETA_G
from fedlth.methods.mask_outliers import jaccard_distance
from fedlth.personalization.kept import target_of
from fedlth.personalization.transfer import MASK, in_common
from fedlth.storage.client_state import ClientState
from fedlth.storage.header import Header
from fedlth.storage.records import MetricRow
from fedlth.storage.run_folder import RunFolder
from fedlth.storage.transfer_cells import DENSE, THETA_0, TRANSFER, Cell, append, recovered
from fedlth.storage.typed_record import read
from fedlth.training.study_recipe import budget_of, personal
from fedlth.wire import mask as bitmap
from fedlth.wire import metrics, payload
from fedlth.wire.payload import Content

log = logging.getLogger(__name__)

KNOWN_STARTS = ("theta_0", "theta_g@0", "reinit")  # rewind targets that clients draw themselves


def cells(
    folder: RunFolder, engine: Engine, others: Mapping[str, OtherTicket], clients: Sequence[int] = ()
) -> tuple[Cell, ...]:
    """Return the matrix of a finished run, row by row; cells that were trained before are read, the others trained.

    `others` are tickets of other runs by name, `clients` the columns (none: all that have a ticket). A cell whose
    client fails is left out, and the next call tries it again. Raises StudyError where the run has no such matrix.
    """
    with folder.locked(".transfer.lock"):
        matrix = Matrix(folder, others, clients)
        known, wanted = recovered(folder.root), matrix.wanted
        each = {one.key: one for one in reversed(wanted)}  # equal masks are trained once
        left = [one for one in wanted if one is each[one.key] and one.key not in known]
        log.info(
            f"transfer matrix of {folder.root}: {len(matrix.targets)} clients x {len(matrix.masks)} masks; "
            f"{len(each) - len(left)} of {len(each)} cells done"
        )
        for cell in _trained(matrix, engine, left, len(each)) if left else ():
            append(folder.root, cell)
            known[cell.key] = cell
    named = ((known[one.key], one.mask) for one in wanted if one.key in known)
    return tuple(replace(cell, mask=name, source=matrix.sources.get(name)) for cell, name in named)


@dataclass(frozen=True)
class Wanted:
    """A cell that is asked for; `key` names all that decides its numbers."""

    mask: str
    target: int
    key: str


def _trained(matrix: Matrix, engine: Engine, left: Sequence[Wanted], total: int) -> Iterator[Cell]:
    """Yield the cells that are left, and say after each how many are done and how long the rest takes."""
    if matrix.experiment.study.compute == "sparse":
        kernel.warm()
    began, steps = time.perf_counter(), [matrix.steps(one.target) for one in left]
    done, spent = total - len(left), 0
    with closing(engine.map(matrix.jobs(left))) as answers:
        for one, cost, (_, answer) in zip(left, steps, answers, strict=True):
            spent += cost
            if isinstance(answer, Reply):
                cell, done = matrix.cell(one, answer), done + 1
                yield cell
                came = matrix.told(cell)
            else:
                came = f"failed: {answer.reason}"
            rest = (time.perf_counter() - began) / spent * (sum(steps) - spent)
            about = f"; about {f'{rest / 60:.0f} min' if rest >= 90 else f'{rest:.0f} s'} left" if rest else ""
            log.info(f"[{done}/{total}] {one.mask} on client {one.target}: {came}{about}")


def ticket_name(client: int) -> str:
    """Return the name of the row of a client's ticket."""
    return f"ticket of client {client}"


class Matrix:
    """What a run's cells are made of. `masks` are the rows, in order: of each the mask for every target."""

    def __init__(self, folder: RunFolder, others: Mapping[str, OtherTicket], clients: Sequence[int]) -> None:
        # One by one: in a cohort bits depend on who trains side by side, which a stop would change.
        self.experiment = Experiment.of(folder.study().model_copy(update={"cohort": 1}))
        self.folder, self.progress = folder, folder.progress()
        self.header = _checked(folder, self.experiment)
        self.states = ticket_states(folder, self.header)
        self.targets = tuple(sorted(set(clients))) or tuple(self.states)
        missing = [client for client in self.targets if client not in self.states]
        if missing or not self.targets:
            known, asked = ", ".join(map(str, self.states)) or "none", missing[0] if missing else "any"
            raise StudyError(f"{folder.root}: expected a ticket of client {asked}, there are those of {known}")
        self.sources = {ticket_name(client): client for client in self.targets}
        self.layout = in_common(self.experiment.task)
        if not self.layout.num_prunable:
            raise StudyError(
                f"{folder.root}: must have prunable tensors that all clients have in common, got none: "
                f"model.personal {list(folder.study().model.personal or ())} keeps them all with their clients"
            )
        self.own = {c: self._shared(c, self.states[c].masks["ticket"]) for c in self.targets}
        if any(mask.all() for mask in self.own.values()):
            raise StudyError(f"{folder.root}: expected sparse tickets, got dense ones")
        self.masks = self._masks(others)

    def _shared(self, client: int, mask: np.ndarray) -> np.ndarray:
        """Return what another client can be handed of a mask over the client's whole model."""
        task = self.experiment.task_of(client)
        return in_common(task).mask_of(mask, task.layout)

    def _masks(self, others: Mapping[str, OtherTicket]) -> dict[str, dict[int, np.ndarray]]:
        task, finder = self.experiment.task, self.experiment.finder
        found = {DENSE: dict.fromkeys(self.targets, np.ones(self.layout.num_prunable, bool))}
        for name, client in self.sources.items():
            found[name] = dict.fromkeys(self.targets, self.own[client])
        for name, ticket in others.items():
            if name in found or name == THETA_0:
                raise StudyError(f"--mask: must be a name that no row has, got {name}")
            found[name] = dict.fromkeys(self.targets, ticket.mask(name, self.layout))
            if note := ticket.start_differs(self.layout, self.layout.part_of(task.theta_0, task.layout)):
                log.info(f"note: mask {name}: {note}")
        known: dict[tuple[str, float], np.ndarray] = {}
        for client in self.targets:
            own, density = self.experiment.task_of(client), target_of(self.experiment.keep, self.states[client])
            size = own.layout.num_prunable
            if (own.name, density) not in known:
                score = np.abs(own.theta_0.floats[:size])
                mask = finder.pick(score, np.ones(size, bool), own.layout, density)
                known[own.name, density] = self._shared(client, mask)
            found.setdefault(THETA_0, {})[client] = known[own.name, density]
        return found

    @cached_property
    def wanted(self) -> tuple[Wanted, ...]:
        """Every cell, row by row."""
        return tuple(Wanted(name, t, self._key(mask, t)) for name, row in self.masks.items() for t, mask in row.items())

    def _key(self, mask: np.ndarray, target: int) -> str:
        names = [bitmap.digest(mask), bitmap.digest(self.own[target])]
        told = json.dumps([self.experiment.text, self.progress.theta, target, *names])
        return hashlib.blake2b(told.encode(), digest_size=16).hexdigest()

    def steps(self, target: int) -> int:
        """Return how many steps a training takes on one client's data."""
        train = personal(self.experiment.study)
        return budget_of(train).total(len(self.experiment.task.splits.clients[target].train), train.batch_size)

    @cached_property
    def _start(self) -> tuple[Message, ...]:
        """What trainings begin with, as far as clients do not draw it themselves."""
        experiment, folder, anchor = self.experiment, self.folder, self.experiment.finder.rewind.anchor
        if anchor in KNOWN_STARTS:
            return ()
        layout, codec = experiment.layout, experiment.codec
        state = folder.load_state(self.progress.theta) if self.progress.theta else experiment.start()
        sent = [broadcast("values", THETA_G, state.theta, layout, codec, state.mask)]
        if anchor not in (None, "theta_g"):
            sent.append(broadcast("values", anchor, folder.load_params(anchor), layout, codec, state.mask))
        return tuple(sent)

    def jobs(self, left: Sequence[Wanted]) -> Iterator[Job]:
        """Yield the job of each cell: the client's state, what its training begins with, and the mask."""
        experiment, mask, data = self.experiment, np.zeros(0, bool), b""
        for one in left:
            if self.masks[one.mask][one.target] is not mask:  # a row has one mask, or few
                mask = self.masks[one.mask][one.target]
                data = payload.encode("mask", self.layout, Content(mask, None, None), codec=experiment.codec)
            yield Job(
                study=experiment.text, phase=TRANSFER, round=1, client=one.target, version=TRANSFER,
                data=experiment.task.splits.name, state=self.states[one.target].to_bytes(),
                inbox=(*self._start, Message("mask", MASK, data, broadcast=True)),
            )  # fmt: skip

    def cell(self, one: Wanted, reply: Reply) -> Cell:
        """Return a cell from its client's answer."""
        (record,) = metrics.decode(reply.outbox[0].payload)["rows"]
        row = read(MetricRow, record, strict=True)
        return Cell(
            mask=one.mask, source=self.sources.get(one.mask), target=one.target, key=one.key,
            jaccard=1 - jaccard_distance(self.masks[one.mask][one.target], self.own[one.target]), density=row.density,
            start=row.start, ticket=row.ticket, num_test=row.num_test, test_accuracy=row.test_accuracy,
            test_loss=row.test_loss, test_metrics=row.test_metrics, diverged=row.diverged,
        )  # fmt: skip

    def told(self, cell: Cell) -> str:
        """Return a cell's result for a line of progress."""
        measure = self.header.judges(cell.target)
        name, value = measure.name.rpartition(":")[2], cell.value(measure.name)
        return f"{name} {100 * value:.1f} %" if measure.percent else f"{name} {value:.4g}"


def _checked(folder: RunFolder, experiment: Experiment) -> Header:
    """Return a run's header; raise StudyError where it has not ended, or its tickets cannot be transferred so."""
    header, task, finder = folder.header(), experiment.task, experiment.finder
    if header is None or not header.finished:
        raise StudyError(f"{folder.root}: must have ended; to go on with it: fedlth resume {folder.root}")
    if (header.data_digest, header.partition_digest) != (task.dataset.digest(), task.splits.digest):
        raise StudyError(f"{folder.root}: must have the data that it was run with, got other data")
    if experiment.kept_arm != "ticket" or experiment.method.space.kind != "values":
        raise StudyError(f"{folder.root}: must be a run with the arm ticket, got method {header.method} without")
    if experiment.study.privacy.dp is not None:
        raise StudyError(f"{folder.root}: must be a run without privacy.dp: its epsilon is that of the run alone")
    if finder.dead.holds or not getattr(finder.rewind, "trains", True):
        raise StudyError(
            f"{folder.root}: must have tickets that train among zeros, got {finder.dead} and {finder.rewind}"
        )
    if experiment.method.topology is not None and finder.rewind.anchor != "theta_0":
        raise StudyError(
            f"{folder.root}: must rewind to theta_0, as without a server all clients have no other weights in common, "
            f"got {finder.rewind}"
        )
    if experiment.study.refine.rounds and finder.rewind.anchor not in KNOWN_STARTS:
        raise StudyError(
            f"{folder.root}: must rewind to weights that refine.rounds did not move (init, reinit), as the global "
            f"model that its tickets began with is not kept, got {finder.rewind}"
        )
    return header


def ticket_states(folder: RunFolder, header: Header) -> dict[int, ClientState]:
    """Return the states of the clients that have a ticket; hostile ones are left out, as of a report."""
    store, versions = folder.devices if header.engine == "flower" else folder.clients, folder.progress().versions
    found = {}
    for client in range(header.num_clients):
        version = versions.get(str(client), "")
        if version and client not in header.hostile and store.has(client, version):
            state = ClientState.from_bytes(store.get(client, version) or b"")
            if "ticket" in state.masks:
                found[client] = state
    return found
