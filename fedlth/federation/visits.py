"""One step's visits: jobs go out as workers come free, answers are judged one by one, in client order, and let go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fedlth.federation import ledger_rows, server
from fedlth.federation.downlink import Downlink
from fedlth.federation.jobs import RESYNC, Engine, Failure, Job, Message, Reply
from fedlth.federation.update_norms import Distances, UpdateNorms
from fedlth.methods.aggregate import Contribution
from fedlth.methods.method import Recipe
from fedlth.models.layout import Layout
from fedlth.storage.records import Failed, LedgerRow, TimeRow, Work
from fedlth.storage.run_folder import Progress, RunFolder
from fedlth.storage.state_archive import Writer
from fedlth.wire.codec import Codec
from fedlth.wire.errors import PayloadError


@dataclass(frozen=True)
class Stage:
    """What is the same for all of a step's visits. `sends` is the kind of message that is wanted back ("" for none).

    `mirrors` says that the server needs the clients' masks again, for slices or refinement.
    """

    phase: str
    round: int
    science: str
    recipe: Recipe
    layout: Layout
    codec: Codec
    sends: str
    mirrors: bool

    @property
    def version(self) -> str:
        """Name the states that this step makes."""
        return f"{self.phase}-{self.round}"


@dataclass(frozen=True)
class Arrived:
    """An answer at the door: what was accepted of it, or why it is refused; None where there is no reply."""

    job: Job
    answer: Reply | Failure
    kind: str
    got: server.Accepted | PayloadError | None
    distances: Distances | None = None


@dataclass
class Visits:
    """A step's visits and what came of them; `contributions` does the work while an aggregation draws from it."""

    stage: Stage
    folder: RunFolder
    engine: Engine
    progress: Progress
    down: Downlink
    clients: Sequence[int]
    asked: Callable[[int], server.Asked]
    norms: UpdateNorms
    rows: list[LedgerRow] = field(default_factory=list)
    failed: list[Failed] = field(default_factory=list)
    times: list[TimeRow] = field(default_factory=list)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    seen: list[float] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    mirrors: dict[str, str | None] = field(default_factory=dict)
    resyncs: int = 0
    _tries: dict[int, list[LedgerRow]] = field(default_factory=dict)

    def contributions(self) -> Iterator[Contribution]:
        """Visit all clients, judging answers while others are at work; yield what was sent up.

        States and masks are written as they come; they are current only once the step is committed.
        """
        jobs = (self._job(c, self.down.inbox(c)) for c in self.clients)
        with (
            self.folder.clients.writing(self.stage.version) as states,
            self.folder.mirrors.writing(self.stage.version) as masks,
            closing(self.engine.map(jobs, again=self._again)) as answers,
        ):
            waiting: list[Arrived] = []
            for job, answer in answers:
                waiting.append(self._opened(job, answer))
                # A first majority must be there before anyone is held against it: two updates wait for a third.
                updates = [one.distances for one in waiting if one.distances is not None]
                if not updates or self.norms.known(updates):
                    yield from self._judged(waiting, states, masks)
            yield from self._judged(waiting, states, masks)

    def _job(self, client: int, inbox: tuple[Message, ...], *, forget: bool = False) -> Job:
        version = "" if forget else self.progress.versions.get(str(client), "")
        state = None if self.engine.holds_state else self.folder.clients.get(client, version)
        return Job(
            study=self.stage.science, phase=self.stage.phase, round=self.stage.round, client=client, inbox=inbox,
            version=version, state=state,
        )  # fmt: skip

    def _again(self, job: Job, answer: Reply) -> Job | None:
        """Return a job that leans on nothing, once, for a client that has lost what its download referred to.

        Notes the rows of the first try, which was sent too.
        """
        leans = job.version or job.client in self.down.masks  # nothing else can have been lost
        if not _asks(job, answer) or not leans or job.client in self._tries:
            return None
        self._tries[job.client] = self._rows_down(job, answer) + self._rows_up(answer, None, "ok", "")
        self.resyncs += 1
        forget = not any(answer.outbox[0].payload)
        return self._job(job.client, self.down.inbox(job.client, alone=True), forget=forget)

    def _opened(self, job: Job, answer: Reply | Failure) -> Arrived:
        """Decode and check an answer; each stands alone."""
        stage, kind = self.stage, "resync" if job.client in self._tries else ""
        if isinstance(answer, Failure):
            return Arrived(job, answer, kind, None)
        try:
            if (answer.client, answer.round) != (job.client, job.round):
                raise PayloadError(f"client {answer.client} answered for client {job.client}")
            held = self.down.held(job.client, job.inbox if stage.sends else (), mask=stage.phase != "personalise")
            got = server.accept(
                answer, recipe=stage.recipe, layout=stage.layout, sends=stage.sends, codec=stage.codec, held=held,
                asked=self.asked(job.client),
            )  # fmt: skip
            update = got.contribution.content if got.contribution and stage.sends == "values" else None
            return Arrived(job, answer, kind, got, self.norms.distances(update) if update else None)
        except PayloadError as error:
            return Arrived(job, replace(answer, client=job.client), kind, error)

    def _judged(self, waiting: list[Arrived], states: Writer, masks: Writer) -> Iterator[Contribution]:
        """Empty the list, in order: ledger rows of each answer, and what was accepted."""
        updates = [one.distances for one in waiting if one.distances is not None]
        while waiting:
            one = waiting.pop(0)
            job, answer, got = one.job, one.answer, one.got
            self.times.append(_time_row(self.stage, answer))
            self.rows += self._tries.get(job.client, [])
            self.rows += self._rows_down(job, answer, one.kind)
            if isinstance(answer, Failure):
                self.failed.append(Failed(job.client, answer.kind, answer.reason))
                self.rows.append(ledger_rows.failed(self.stage.round, self.stage.phase, answer))
                continue
            if isinstance(got, server.Accepted) and one.distances is not None:
                try:
                    self.norms.check(one.distances, updates)
                except PayloadError as error:
                    got = error
            if not isinstance(got, server.Accepted):
                self.failed.append(Failed(job.client, "refused", str(got)))
                self.rows += self._rows_up(answer, None, f"refused: {got}", self.stage.sends)
                continue
            self.rows += self._rows_up(answer, got.mask, "ok", self.stage.sends)
            self._keep(answer, got, states, masks)
            if one.distances is not None:
                self.norms.accept(one.distances)
                updates.remove(one.distances)
            if got.contribution:
                yield got.contribution

    def _keep(self, answer: Reply, got: server.Accepted, states: Writer, masks: Writer) -> None:
        client, version = str(answer.client), self.stage.version
        self.versions[client] = version
        if not self.engine.holds_state and answer.state is not None:
            states.add(answer.client, answer.state)
        if got.mask is not None and got.mask.all():
            self.mirrors[client] = None
        elif got.mask is not None and self.stage.mirrors:
            masks.add(answer.client, self.folder.packed_mask(got.mask))
            self.mirrors[client] = version
        self.metrics += got.rows
        if got.visit is not None and got.visit.val_accuracy is not None:
            self.seen.append(got.visit.val_accuracy)

    def _rows_down(self, job: Job, answer: Reply | Failure, kind: str = "") -> list[LedgerRow]:
        first = "install" if str(job.client) not in self.progress.versions else ""
        return ledger_rows.down(
            self.stage.round, self.stage.phase, job.client, job.inbox, self.down.masks.get(job.client),
            answer.framed_down_bytes, layout=self.stage.layout, kind=kind or first,
        )  # fmt: skip

    def _rows_up(self, answer: Reply, mask: np.ndarray | None, status: str, sends: str) -> list[LedgerRow]:
        stage = self.stage
        return ledger_rows.up(stage.round, stage.phase, answer, mask, status, sends, layout=stage.layout)


def _asks(job: Job, answer: Reply) -> bool:
    """Say whether an answer is nothing but the request to send the download again."""
    own = (answer.client, answer.round) == (job.client, job.round)
    return own and [(m.kind, m.name, len(m.payload)) for m in answer.outbox] == [("control", RESYNC, 8)]


def _time_row(stage: Stage, answer: Reply | Failure) -> TimeRow:
    row = TimeRow(round=stage.round, phase=stage.phase, client=answer.client, worker=answer.worker)
    if isinstance(answer, Failure):
        return row
    return replace(row, seconds=answer.seconds, device=answer.device, work=[Work(**one) for one in answer.work])
