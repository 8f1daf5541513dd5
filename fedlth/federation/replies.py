"""One round's jobs and replies: each reply is judged in client order, recorded, kept, and let go."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from fedlth.experiment.experiment import Experiment
from fedlth.federation import ledger_rows
from fedlth.federation.answered import Answered
from fedlth.federation.asking import Asking
from fedlth.federation.door import Accepted, accept
from fedlth.federation.downloads import Downloads
from fedlth.federation.fleet import Clock
from fedlth.federation.jobs import RESYNC, Answers, Failure, Job, Message, Reply
from fedlth.federation.update_norms import Sizes, UpdateNorms
from fedlth.methods.aggregate import Contribution
from fedlth.methods.client_update import UPDATE, sends_in
from fedlth.methods.method import Phase
from fedlth.personalization.personalise import EVALUATION
from fedlth.storage import records
from fedlth.storage.checkpoint import Progress
from fedlth.storage.records import DROPPED, LATE, CurveRow, Failed, LedgerRow, TimeRow, VisitRecord, Work, client_of
from fedlth.storage.run_folder import RunFolder
from fedlth.storage.state_archive import Writer
from fedlth.wire.errors import PayloadError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Arrived:
    """An answer at the door: what was accepted of it, or why it is refused; None where there is no reply.

    `seconds` are those of the study's fleet; `late` says why what was accepted comes too late.
    """

    job: Job
    answer: Reply | Failure
    kind: str
    got: Accepted | PayloadError | None
    sizes: Sizes | None = None
    seconds: float | None = None
    late: str = ""


@dataclass
class Replies:
    """A round's replies and what came of them.

    The round loop draws `jobs`, hands every reply to `judged`, and joins what that yields. States and masks are written
    as they come; they are current only once the round is committed.
    """

    experiment: Experiment
    phase: Phase
    round: int
    folder: RunFolder
    progress: Progress
    downloads: Downloads
    clients: Sequence[int]
    norms: UpdateNorms
    holds_state: bool
    rows: list[LedgerRow] = field(default_factory=list)
    failed: list[Failed] = field(default_factory=list)
    times: list[TimeRow] = field(default_factory=list)
    noisy: list[records.NoisySteps] = field(default_factory=list)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    curve: list[CurveRow] = field(default_factory=list)
    seen: list[float] = field(default_factory=list)
    seen_metric: list[float] = field(default_factory=list)
    visits: list[tuple[int, VisitRecord]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    mirrors: dict[str, str | None] = field(default_factory=dict)
    holds: dict[str, str] = field(default_factory=dict)
    shared: dict[int, np.ndarray] = field(default_factory=dict)
    published: dict[str, str] = field(default_factory=dict)
    publishing: Writer | None = None
    resyncs: int = 0
    came_s: list[float] = field(default_factory=list)
    gone_s: list[float] = field(default_factory=list)
    _tries: dict[int, list[LedgerRow]] = field(default_factory=dict)
    _waiting: list[Arrived] = field(default_factory=list)

    @property
    def version(self) -> str:
        """Name the states that this round makes."""
        return f"{self.phase.name}-{self.round}"

    @cached_property
    def clock(self) -> Clock:
        """The round's simulated time."""
        return Clock(self.experiment, self.phase, self.round)

    @cached_property
    def dropped(self) -> frozenset[int]:
        """Who drops out of the round, known before it begins: their jobs need not be run."""
        return frozenset(client for client in self.clients if self.clock.drops(client))

    @cached_property
    def answered(self) -> Answered | None:
        """The answers that an earlier try of this wave had; None where none are kept.

        In a cohort a client's bits depend on who else trains; on devices the states are not here.
        """
        alone = self.phase.in_waves and self.experiment.study.cohort == 1 and not self.holds_state
        return Answered(self.folder.root / "answered") if alone else None

    @cached_property
    def earlier(self) -> frozenset[int]:
        """Who need not be asked again."""
        if self.answered is None:
            return frozenset()
        return frozenset(c for c in self.clients if self.answered.get(self._job(c, self.downloads.inbox(c))))

    def jobs(self) -> Iterator[Job]:
        asked = (c for c in self.clients if c not in self.dropped and c not in self.earlier)
        return (self._job(c, self.downloads.inbox(c)) for c in asked)

    def all_of(self, answers: Answers) -> Iterator[tuple[Job, Reply | Failure]]:
        """Yield the engine's answers, and those of the clients that dropped out in their places."""
        for client in self.clients:
            if client in self.earlier and self.answered is not None:
                job = self._job(client, self.downloads.inbox(client))
                reply = self.answered.get(job)
                assert reply is not None
                yield job, reply
                continue
            if client not in self.dropped:
                job, answer = next(answers)
                if self.answered is not None and isinstance(answer, Reply) and client not in self._tries:
                    self.answered.put(job, answer)
                yield job, answer
                continue
            alone = self.phase.topology is not None  # without a server nobody sends to who is not there
            why = "before anything was sent (fleet.drop)" if alone else "after its download (fleet.drop)"
            yield (
                self._job(client, () if alone else self.downloads.inbox(client)),
                Failure(round=self.round, client=client, kind=DROPPED, reason=why),
            )
        yield from answers  # to its end: an engine may have something to put away

    def _job(self, client: int, inbox: tuple[Message, ...], *, forget: bool = False) -> Job:
        version = "" if forget else self.progress.versions.get(str(client), "")
        state = None if self.holds_state else self.folder.clients.get(client, version)
        return Job(
            study=self.experiment.text, phase=self.phase.name, round=self.round, client=client, inbox=inbox,
            data=self.experiment.task.splits.name, version=version, state=state, limit_s=self._limit_s,
        )  # fmt: skip

    @property
    def _limit_s(self) -> float | None:
        """Until when an answer counts; the waves of step 2 wait for all, each as long as a job may take."""
        waits = self.phase.in_waves and not self.phase.evaluates
        return None if waits else self.experiment.study.federate.deadline_s

    def again(self, job: Job, reply: Reply) -> Job | None:
        """Return a job that depends on nothing, once, for a client that has lost what its download referred to.

        Notes the rows of the first try, which was sent too.
        """
        knows = self.experiment.known_start is not None  # of what is drawn another machine may have other last bits
        depends = job.version or job.client in self.downloads.masks or knows  # nothing else can have been lost
        if not _asks(job, reply) or not depends or job.client in self._tries:
            return None
        self._tries[job.client] = self._rows_down(job, reply) + self._rows_up(reply, {}, "ok")
        self.resyncs += 1
        forget = not any(reply.outbox[0].payload)
        return self._job(job.client, self.downloads.inbox(job.client, alone=True), forget=forget)

    def judged(self, job: Job, answer: Reply | Failure, states: Writer, masks: Writer) -> Iterator[Contribution]:
        """Check an answer, and yield what may be joined; the first updates of a phase wait for a majority."""
        self._waiting.append(self._opened(job, answer))
        # A first majority must be there before anyone is held against it: two updates wait for a third.
        updates = [one.sizes for one in self._waiting if one.sizes is not None]
        if not updates or self.norms.known(updates):
            yield from self.rest(states, masks)

    def rest(self, states: Writer, masks: Writer) -> Iterator[Contribution]:
        """Yield what still waits, in client order: ledger rows of each answer, and what was accepted."""
        updates = [one.sizes for one in self._waiting if one.sizes is not None]
        while self._waiting:
            one = self._waiting.pop(0)
            job, answer, got = one.job, one.answer, one.got
            self.times.append(replace(self._time_row(answer), simulated_s=one.seconds))
            if one.seconds is not None:
                (self.gone_s if isinstance(answer, Failure) else self.came_s).append(one.seconds)
            self.rows += self._tries.get(job.client, [])
            if isinstance(answer, Failure):
                self.failed.append(Failed(job.client, answer.kind, answer.reason))
                if not answer.sent:
                    continue
            self.rows += self._rows_down(job, answer, one.kind)
            if isinstance(answer, Failure):
                self.rows.append(ledger_rows.failed(self.round, self.phase.name, answer))
                continue
            if isinstance(got, Accepted) and one.sizes is not None:
                try:
                    self.norms.check(one.sizes, updates)
                except PayloadError as error:
                    got = error
            if not isinstance(got, Accepted):
                self.failed.append(Failed(job.client, "refused", str(got)))
                self.rows += self._rows_up(answer, {}, f"refused: {got}")
                continue
            self.noisy += got.noisy  # of one that is late too: whoever receives it has it
            if one.late:
                self.failed.append(Failed(job.client, LATE, one.late))
                self.rows += self._rows_up(answer, got.masks, LATE)
                continue
            self.rows += self._rows_up(answer, got.masks, "ok")
            self._keep(answer, got, states, masks)
            if self.experiment.population.looks_for_outliers(self.phase) and got.mask is not None:
                self.shared[job.client] = got.mask
            if one.sizes is not None:
                self.norms.accept(one.sizes)
                updates.remove(one.sizes)
            if got.contribution:
                yield got.contribution

    def forget(self) -> None:
        """Let nothing of this round become current: no client's state or mask, and nothing that it published.

        What crossed stays in the rows. The states are written, and go with the next commit, since nobody owns them.
        """
        for kept in (self.versions, self.mirrors, self.holds, self.published):
            kept.clear()

    def rows_of_late(self, answers: Sequence[tuple[Job, Reply | Failure]]) -> list[LedgerRow]:
        """Return the rows of answers to closed rounds, under those: they crossed, and nothing of them is looked at."""
        rows: list[LedgerRow] = []
        for job, answer in answers:
            if isinstance(answer, Reply):
                layout_of = self.experiment.layout_of
                rows += ledger_rows.up(job.round, job.phase, answer, {}, LATE, layout_of=layout_of)
            else:
                rows.append(replace(ledger_rows.failed(job.round, job.phase, answer), status=LATE))
        if answers:
            named = ", ".join(f"client {job.client} ({job.phase} {job.round})" for job, _ in answers)
            log.info(f"note: came after their round was closed, counted and not used: {named}")
        return rows

    def _opened(self, job: Job, answer: Reply | Failure) -> Arrived:
        """Decode and check an answer; each is judged alone."""
        kind = "resync" if job.client in self._tries else ""
        if isinstance(answer, Failure):
            took = answer.kind == DROPPED and self.phase.topology is None
            gone = self.clock.of_dropped(job, self.downloads.mask(job.client)) if took else None
            return Arrived(job, answer, kind, None, seconds=gone)
        sent = self._sent.get(job.client, 0) if self.phase.topology is not None else None
        seconds = self.clock.of_reply(job, answer, self._tries.get(job.client, ()), sent_bytes=sent)
        try:
            if (answer.client, answer.round) != (job.client, job.round):
                raise PayloadError(f"client {answer.client} answered for client {job.client}")
            held = self.downloads.held(job.client, job.inbox)
            got = accept(answer, codec=self.experiment.codec, held=held, asked=self._asked.of(job.client))
            late, numbers = self.clock.late(seconds), any(c.floats is not None for c in got.contents.values())
            joins = got.contribution is not None and numbers and not late
            sizes = self.norms.sizes(got.contents, moves_state=self._sends_state) if joins else None
            return Arrived(job, answer, kind, got, sizes, seconds, late)
        except PayloadError as error:
            return Arrived(job, replace(answer, client=job.client), kind, error, seconds=seconds)

    @cached_property
    def _sent(self) -> Mapping[int, int]:
        """The bytes that each client sends to others in this round, where that takes time."""
        if self.clock.fleet is None:
            return {}
        everyone = range(self.experiment.study.clients.count)  # of step 2: which wave a client is in must not matter
        there = everyone if self.phase.in_waves else (c for c in self.clients if c not in self.dropped)
        return self.downloads.published.sent_bytes(self.phase, self.round, there)

    @property
    def _sends_state(self) -> bool:
        """Say whether an update is of what was sent down, so that its distance from it says something."""
        kind = self.experiment.method.space.kind if self.phase in self.experiment.federated_phases else "values"
        return sends_in(self.phase.update, self.round)[:1] == ((UPDATE, kind),) and kind != "scores"

    @cached_property
    def _asked(self) -> Asking:
        return Asking(self.experiment, self.phase, self.round)

    def _keep(self, answer: Reply, got: Accepted, states: Writer, masks: Writer) -> None:
        client = str(answer.client)
        if not self.phase.changes_state:
            self.curve += got.curve
            self.metrics += got.rows
            for row in got.curve:
                if row.arm == "global" and not row.unseen:
                    self._see(row.val_accuracy, row.value("val", self.experiment.task_of(row.client).judged.main.name))
            return
        self.versions[client] = self.version
        if self.phase.down == "broadcast":
            self.holds[client] = self.downloads.name
        if not self.holds_state and answer.state is not None:
            states.add(answer.client, answer.state)
        if got.mask is not None and self.experiment.chooses(self.phase):
            self.mirrors[client] = None  # all, unless something else was the client's first
            if not got.mask.all() or self.experiment.first_mask(answer.client) is not None:
                masks.add(answer.client, self.folder.packed_mask(got.mask))
                self.mirrors[client] = self.version
        if self.publishing is not None:
            self.publishing.add(answer.client, next(m.payload for m in answer.outbox if m.name == UPDATE))
            self.published[client] = self.version
        self.metrics += got.rows
        if got.visit is not None:
            self.visits.append((answer.client, got.visit))
            self._see(got.visit.val_accuracy, got.visit.val_metric)

    def _see(self, accuracy: float | None, metric: float | None) -> None:
        """Note what a client saw on validation data; the study's metric where that is not accuracy."""
        if accuracy is not None:
            self.seen.append(accuracy)
        if metric is not None and math.isfinite(metric) and self.experiment.judged.main.name != "accuracy":
            self.seen_metric.append(metric)

    def _rows_down(self, job: Job, answer: Reply | Failure, kind: str = "") -> list[LedgerRow]:
        first = "install" if str(job.client) not in self.progress.versions else ""
        if self.phase.evaluates:
            kind = EVALUATION
        if self.phase.topology is not None:
            return self._rows_between(job, answer.framed_down_bytes, kind)
        return ledger_rows.down(
            self.round, self.phase.name, job.client, job.inbox, self.downloads.masks.get(job.client),
            answer.framed_down_bytes, layout=self.experiment.layout, everyones=self.downloads.state.mask,
            kind=kind or first,
        )  # fmt: skip

    def _rows_between(self, job: Job, framed: int | None, kind: str) -> list[LedgerRow]:
        """Return the rows of what others sent to a client, and of what only controls need beside it."""
        came = [m for m in job.inbox if client_of(m.name) is not None]
        layout, published = self.experiment.layout, self.downloads.published
        rows = ledger_rows.between(
            self.round, self.phase.name, job.client, came, published.content, framed, layout=layout, kind=kind
        )
        return rows + ledger_rows.down(
            self.round, self.phase.name, job.client, job.inbox[len(came) :], None, None if came else framed,
            layout=layout, everyones=self.downloads.state.mask,
        )  # fmt: skip

    def _rows_up(self, answer: Reply, masks: Mapping[str, np.ndarray], status: str) -> list[LedgerRow]:
        if self.phase.topology is not None and status == "ok":
            # What is published has a row for each client that receives it, once it does.
            told = tuple(m for m in answer.outbox if m.name not in dict(self.phase.update.sends))
            answer = replace(answer, outbox=told)
        return ledger_rows.up(self.round, self.phase.name, answer, masks, status, layout_of=self.experiment.layout_of)

    def _time_row(self, answer: Reply | Failure) -> TimeRow:
        row = TimeRow(round=self.round, phase=self.phase.name, client=answer.client, worker=answer.worker)
        if isinstance(answer, Failure):
            return row
        return replace(row, seconds=answer.seconds, device=answer.device, work=[Work(**one) for one in answer.work])


def _asks(job: Job, answer: Reply) -> bool:
    """Say whether an answer is nothing but the request to send the download again."""
    own = (answer.client, answer.round) == (job.client, job.round)
    return own and [(m.kind, m.name, len(m.payload)) for m in answer.outbox] == [("control", RESYNC, 8)]
