"""client_step: one client's pure step, the same on every engine and on a device."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from fedlth.errors import StudyError
from fedlth.experiment.chaos import fault_of
from fedlth.experiment.experiment import Experiment, open_experiment
from fedlth.experiment.mask_defence import defence_in
from fedlth.federation.chaotic import NUMBERS, spoilt
from fedlth.federation.jobs import RESYNC, Job, Message, Reply
from fedlth.federation.noisy_steps import noisy_steps
from fedlth.federation.ranges import ranges_of
from fedlth.federation.uplink import Uplink
from fedlth.methods.attack import Aim, attacked
from fedlth.methods.client_update import NEXT_MASK, THETA_G, UPDATE, Update, sends_in
from fedlth.methods.defence import defended
from fedlth.methods.method import KNOWN, Phase
from fedlth.personalization.personalise import EVALUATION
from fedlth.personalization.transfer import in_common
from fedlth.personalization.transfer import phase_of as transfer_phase
from fedlth.storage.client_state import ClientState
from fedlth.storage.records import party
from fedlth.storage.transfer_cells import TRANSFER
from fedlth.training.local_client import Cost, LocalClient
from fedlth.wire import mask as bitmap
from fedlth.wire import metrics, payload
from fedlth.wire.errors import ReferenceLost
from fedlth.wire.payload import OF_ITSELF, Content

EVERYONES = "everyones"  # the mask that all share, among the masks of a client's state


def client_step(job: Job) -> Reply:
    """Decode, restore, train, encode. Pure but for its caches: equal jobs give equal replies on every engine."""
    began = time.perf_counter()
    experiment = open_experiment(job.study)
    if job.data and job.data != experiment.task.splits.name:
        raise StudyError(
            "data: must be the same in every process of a run, got other examples here than the server has: the "
            "factory gives something else at each call, or the files on this machine are others"
        )
    phase = _phase(experiment, job.phase)
    if job.version and job.state is None:
        return _resync(job, began, bytes(8))
    state = experiment.first_state(job.client) if job.state is None else ClientState.from_bytes(job.state)
    known = state.masks.get("shared", experiment.first_mask(job.client))  # until it has chosen, what it began with
    everyones = state.masks.get(EVERYONES, experiment.start_mask)
    try:
        inbox = _received(job, experiment, phase, known, everyones)
    except ReferenceLost:
        known = everyones if job.inbox[0].broadcast else known
        return _resync(job, began, bytes.fromhex(bitmap.digest(known)) if known is not None else b"\1" * 8)
    # Streams of step 2 are the client's alone: which wave it is in must not matter.
    attack = experiment.population.attack_in(phase, job.client)
    local = LocalClient(
        experiment.task_of(job.client), job.client, 0 if phase.in_waves else job.round, job.phase,
        poison=getattr(attack, "poison", None), rounds=phase.rounds,
    )  # fmt: skip
    update = phase.update(local, inbox, state)
    if attack is not None:
        sends, ranges = sends_in(phase.update, job.round), ranges_of(experiment, phase, job.round)

        def aim(name: str, kind: str) -> Aim:
            may_choose = phase.own_mask or kind != "values"  # what the door holds against the download are values
            layout = experiment.message_layout(phase, name, kind)
            return Aim(kind, layout, inbox[THETA_G], own_mask=may_choose, name=name, range=ranges.get(name))

        update = attacked(attack, local, update, sends, aim)
    defence = None if phase.name == TRANSFER else defence_in(experiment, phase)
    if defence is not None:
        update = defended(defence, local, update, phase.update.sends)
    state, outbox = _encoded(job, experiment, phase, local, inbox[THETA_G], update)
    if (fault := fault_of(experiment.study, job.phase, job.round, job.client)) in NUMBERS:
        outbox = spoilt(fault, outbox, update.contents, partial(experiment.message_layout, phase), experiment.codec)
    cost = Cost()
    if experiment.study.fleet is not None:  # else nobody asks, and it would cost bytes of the transport
        cost = sum(local.log, Cost()) if update.cost is None else update.cost
    return Reply(
        round=job.round,
        client=job.client,
        outbox=outbox,
        state=state.to_bytes() if phase.changes_state else None,
        seconds=time.perf_counter() - began,
        device=experiment.task.device,
        work=tuple(local.work),
        flops=cost.flops,
        alive_flops=cost.alive_flops,
    )


def _phase(experiment: Experiment, name: str) -> Phase:
    """Return a phase of the study by name, or the one that comes after every run."""
    if name == TRANSFER:
        return transfer_phase(experiment.phase("personalise").update)
    return experiment.phase(name)


def _resync(job: Job, began: float, held: bytes) -> Reply:
    """Ask for the same download without references; nothing has changed here."""
    asked = Message("control", RESYNC, held)
    return Reply(round=job.round, client=job.client, outbox=(asked,), seconds=time.perf_counter() - began)


@dataclass
class _Broadcasts:
    """What the last inbox's broadcasts say: each is decoded once a worker, and let go once none of them comes again.

    Callers treat the content as immutable.
    """

    kept: dict[tuple[bytes, str, str, bytes | None], Content]

    def decoded(self, data: bytes, kind: str, text: str, held: bytes | None) -> Content:
        """Return a broadcast's content; `held` are the bits of the mask that it may leave out."""
        key = (data, kind, text, held)
        if key not in self.kept:
            experiment = open_experiment(text)
            layout, codec = experiment.layout, experiment.codec.down
            known = None if held is None else bitmap.unpack(held, layout.num_prunable)
            if kind == "mask":  # nothing but a cell of a transfer matrix brings one, and it refers to nothing
                layout, known = in_common(experiment.task), None
            self.kept[key] = payload.decode(
                data, kind, layout, codec=codec, known_mask=known, reference=experiment.known_start
            )
        return self.kept[key]

    def of(self, inbox: tuple[Message, ...]) -> None:
        """Let go what this inbox does not hold."""
        sent = {message.payload for message in inbox if message.broadcast}
        self.kept = {key: content for key, content in self.kept.items() if key[0] in sent}


_broadcasts = _Broadcasts({})


def _received(
    job: Job, experiment: Experiment, phase: Phase, known: np.ndarray | None, everyones: np.ndarray | None
) -> dict[str, Content]:
    """Return what came, by name; training uses these decoded objects, never the sender's.

    `known` is what the client shares, `everyones` the mask that all share, as the client holds them.
    """
    layout = experiment.layout
    got: dict[str, Content] = {}
    held = None if everyones is None else bitmap.pack(everyones)
    _broadcasts.of(job.inbox)
    for message in job.inbox:
        kind = "values" if message.kind == EVALUATION else message.kind
        if message.broadcast:
            content = _broadcasts.decoded(message.payload, kind, job.study, held)
            held = None if content.mask.all() else bitmap.pack(content.mask)  # what comes after it may refer to it
        else:
            content = payload.decode(
                message.payload, kind, layout, codec=experiment.codec.down, known_mask=known,
                reference=experiment.known_start,
            )  # fmt: skip
        got[EVALUATION if message.kind == EVALUATION else message.name] = content
    for sender in experiment.senders(phase, job.round, job.client) if phase.topology is not None else ():
        if party(sender) not in got:
            got[party(sender)] = experiment.unpublished(sender)
    if THETA_G not in got:
        start = experiment.initial()
        got[THETA_G] = Content(np.ones(layout.num_prunable, bool), start.floats, start.ints)
    return got


def _encoded(
    job: Job, experiment: Experiment, phase: Phase, local: LocalClient, received: Content, update: Update
) -> tuple[ClientState, tuple[Message, ...]]:
    """Return what goes up as messages, and the state after it: with what the client now shares, and what it owes.

    An update refers to the download that the server knows it has sent, the mask after it to the update's; a ticket's
    mask comes on its own, and so does what other clients will read.
    """
    codec, state, sent = experiment.codec, update.state, []
    known = None if phase.in_waves else phase.known(local.rng(KNOWN), received.mask, received.floats)
    plain = Uplink(codec)
    up = Uplink(codec, known, received.reference if job.inbox and codec.refers else None)
    if phase.topology is not None:
        up = plain
    if job.inbox and not job.inbox[0].broadcast and not received.mask.all():
        # A slice is of the client's own mask; one that was sent again brings it back to a client that has lost it.
        state = state.with_(masks={"shared": received.mask})
    if job.inbox and job.inbox[0].broadcast:
        full = received.mask.all()
        state = state.without(EVERYONES) if full else state.with_(masks={EVERYONES: received.mask})
    sends = sends_in(phase.update, job.round)
    if update.contents.keys() != dict(sends).keys():
        raise ValueError(f"{job.phase}: must send {[name for name, _ in sends]}, got {list(update.contents)}")
    for i, (name, kind) in enumerate(sends):  # in this order at both ends: only the first refers to anything
        content, layout = update.contents[name], experiment.message_layout(phase, name, kind)
        refers = i == 0 and kind not in OF_ITSELF
        if refers and name == UPDATE:
            data, state = up.update(kind, layout, content, state)
        elif name == NEXT_MASK:
            data = Uplink(codec, update.contents[UPDATE].mask).encode(kind, layout, content)
        else:
            data = (up if refers else plain).encode(kind, layout, content)
        sent.append(Message(kind, name, data))
        if (i == 0 or name == NEXT_MASK) and experiment.chooses(phase):
            dense = content.mask.all() and experiment.first_mask(job.client) is None
            state = state.without("shared") if dense else state.with_(masks={"shared": content.mask})
    noisy = noisy_steps(local) if experiment.study.privacy.dp is not None and not phase.evaluates else {}
    if phase.in_waves:
        record = Message("metrics", "arms", metrics.encode({"rows": list(update.rows), **noisy}))
        return state, (record, *sent)
    numbers: dict[str, Any] = {"num_examples": local.num_train, **update.metrics, **noisy}
    if noisy:
        numbers.pop("loss", None)  # of the training examples, and without noise
    return state, (*sent, Message("metrics", "visit", metrics.encode(numbers)))
