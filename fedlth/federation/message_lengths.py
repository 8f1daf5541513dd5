"""How long each message of a study will be: what a few tried visits and an encoding of it tell."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from fedlth import rng
from fedlth.experiment.experiment import Experiment
from fedlth.federation import downloads
from fedlth.methods.aggregate import Contribution, join
from fedlth.methods.client_update import THETA_G, UPDATE, ClientUpdate
from fedlth.methods.method import Phase
from fedlth.models.layout import Layout, Params
from fedlth.storage.client_state import ClientState
from fedlth.storage.server_state import ServerState
from fedlth.tickets.scope import Layerwise
from fedlth.training.local_client import LocalClient
from fedlth.training.task import Task
from fedlth.wire import payload
from fedlth.wire.codec import CODECS, Codec
from fedlth.wire.payload import Content
from fedlth.wire.reference import Reference

TRIED, TRIAL_S = 4, 2.0  # how many clients try two visits each, and for how long at most
LARGE = 1 << 18  # weights: of a larger model two densities are encoded, and those between lie on a line

Moved = tuple[tuple[Params, Params], ...]  # what a client was sent, and what it sent back


@dataclass(frozen=True, eq=False)
class Lengths:
    """How long each message is. `theta` is a global model as it goes down after the first round."""

    experiment: Experiment
    moved: Moved
    theta: Params
    known: dict[tuple[str, float], float] = field(default_factory=dict)

    @property
    def codec(self) -> Codec:
        return self.experiment.codec

    @property
    def layout(self) -> Layout:
        return self.experiment.layout

    @cached_property
    def model(self) -> int:
        return self.longest if self.undecided else self.broadcast(self.theta)

    @cached_property
    def longest(self) -> int:
        """The most that a global state takes, whatever its numbers: uncoded."""
        kind = self.experiment.method.space.kind
        return len(downloads.broadcast(kind, "", self.theta, self.layout, CODECS["raw"]).payload)

    @cached_property
    def undecided(self) -> bool:
        """Whether the rule leaves what nobody holds as it was drawn: full-length numbers, however long it runs."""
        experiment, state = self.experiment, self.experiment.initial()
        rule, space = experiment.method.phases[-1].join, experiment.method.space
        if rule is None or space.kind == "values" or up_kind(experiment) != "mask":
            return False
        nothing = Content(np.zeros(self.layout.num_prunable, bool), None, None)
        made = join(rule, ServerState(state), (Contribution(0, 1, nothing),), self.layout).theta
        return bool((made.floats == state.floats).all())

    def start(self, theta: Params) -> Reference | None:
        """Return theta_0 where it is what goes down; how near a trained model stays to it only the run tells."""
        known = self.experiment.known_start
        return known if known is not None and np.array_equal(known.floats, theta.floats) else None

    def broadcast(self, theta: Params) -> int:
        kind, codec, start = self.experiment.method.space.kind, self.codec.down, self.start(theta)
        return len(downloads.broadcast(kind, "", theta, self.layout, codec, start=start).payload)

    def message(self, phase: Phase, name: str, kind: str) -> float:
        """Return the most that a message of a phase's update takes which holds everything."""
        if kind == "values":
            return self.update(1.0)
        if kind == "mask":
            return self.bare_mask(0.5)
        return 4.0 * self.experiment.message_layout(phase, name, kind).num_floats + 64

    def beside(self, phase: Phase, name: str, kind: str) -> float:
        """Return the most that a message takes which refers to nothing, beside an update."""
        return self.longest if kind == "values" else self.message(phase, name, kind)

    def kept(self, density: float) -> float:
        """Return the bytes of a slice."""
        return self._line(self._slice, density)

    def update(self, density: float) -> float:
        """Return the bytes of an update whose mask the server knows."""
        return self._line(self._update, density)

    def new_mask(self, before: float, after: float) -> float:
        """Return the most that naming `after` of the `before` takes: its entropy and the counts, or a bitmap."""
        size, share = self.layout.num_prunable, after / before
        bitmap = math.ceil(size / 8)
        if not self.codec.refers or not 0 < share < 1:
            return bitmap
        entropy = -share * math.log2(share) - (1 - share) * math.log2(1 - share)
        return min(bitmap, 1.02 * size * before * entropy / 8 + 8 * (1 + len(self.layout.prunable)))

    def bare_mask(self, density: float) -> float:
        whole = Content(np.ones(self.layout.num_prunable, bool), None, None)
        return len(payload.encode("mask", self.layout, whole)) + self.new_mask(1.0, density)

    def _line(self, measure: Callable[[float], float], density: float) -> float:
        if self.layout.num_prunable <= LARGE:
            return self._once(measure, density)
        low, high = self._once(measure, 0.1), self._once(measure, 1.0)
        return low + (high - low) * (density - 0.1) / 0.9

    def _once(self, measure: Callable[[float], float], density: float) -> float:
        if (measure.__name__, density) not in self.known:
            self.known[measure.__name__, density] = measure(density)
        return self.known[measure.__name__, density]

    def _mask(self, density: float, *, by_size: bool) -> np.ndarray:
        size = self.layout.num_prunable
        score = np.abs(self.theta.floats[:size]) if by_size else rng.stream(0, "forecast mask").random(size)
        return Layerwise()(score, np.ones(size, bool), self.layout, density)

    def _slice(self, density: float) -> float:
        mask = self._mask(density, by_size=True)
        theta, codec = self.theta, self.codec.down
        return len(downloads.slice_for("", theta, self.layout, mask, codec, start=self.start(theta)).payload)

    def _update(self, density: float) -> float:
        if (kind := up_kind(self.experiment)) != "values":
            last = self.experiment.method.phases[-1]
            return self.message(last, last.update.sends[0][0], kind)
        # Of a method with masks of its own this is a bound: weights that are alike in size take fewer bytes than any.
        mask, sizes = self._mask(density, by_size=not self.experiment.method.slices), []
        for old, new in self.moved or ((None, self.theta),):
            held = None if old is None else Content(mask, old.masked(mask).floats, old.ints).reference
            sent = Content(mask, new.masked(mask).floats, new.ints)
            coded = payload.encode("values", self.layout, sent, codec=self.codec, known_mask=mask, reference=held)
            sizes.append(len(coded))
        return float(np.mean(sizes))


def tried(experiment: Experiment, visit_s: float) -> Moved:
    """Try the visits of a few clients, small to large, from theta_0 and from the mean of what they made of it."""
    task, phase = experiment.task, experiment.method.phases[-1]
    update, rounds = phase.update, max(2, phase.rounds or task.study.federate.rounds)
    parts, unseen = task.splits.clients, task.splits.unseen
    clients = sorted((len(part.train), c) for c, part in enumerate(parts) if c not in unseen)
    passes = getattr(update, "passes", None)
    slower = max(passes(task, 0), passes(task, 1)) if passes is not None else 1
    number = min(TRIED, len(clients), int(TRIAL_S / (2 * visit_s * slower)))
    if not number or not task.study.federate.rounds:
        return ()
    chosen = [clients[int((i + 0.5) * len(clients) / number)][1] for i in range(number)]
    found: list[tuple[Params, Params]] = []
    theta = task.shared_part(task.theta_0)
    states = dict.fromkeys(chosen, ClientState())
    for round in (1, 2):
        ends = []
        for client in chosen:
            local = LocalClient(task.of(client), client, round, "forecast", rounds=rounds)
            with suppress(Exception):  # who cannot train, or diverges, is not tried: that is for the run to say
                end, states[local.client] = _visit(update, local, theta, states[local.client])
                ends.append(end)
        if not ends:
            break
        found += [(theta, end) for end in ends]
        theta = Params(np.mean([end.floats for end in ends], axis=0).astype(np.float32), ends[0].ints)
    return tuple(found)


def _visit(update: ClientUpdate, local: LocalClient, theta: Params, state: ClientState) -> tuple[Params, ClientState]:
    """Return what a client makes of `theta`, and its state: by the method's update, or by a plain training.

    The latter where an update needs more than a first round has, or sends a part of the weights only.
    """
    sent = Content(np.ones(local.task.exchange.num_prunable, bool), theta.floats, theta.ints)
    with suppress(Exception):  # the user's code may raise anything
        made = update(local, {THETA_G: sent}, state)
        content = made.contents[UPDATE]
        if content.mask.all() and content.floats is not None and content.ints is not None:
            return Params(content.floats, content.ints), made.state
    trained = local.train(local.task.merge(theta, local.task.theta_0), recipe=local.recipe)
    return local.task.shared_part(trained.params), state


def noise(task: Task, codec: Codec) -> Moved:
    """Return an update that is noise: of all updates of one size it takes the most steps to tell."""
    if not codec.feedback:
        return ()
    theta = task.shared_part(task.theta_0)
    return ((theta, _moved(theta)),)


def _moved(theta: Params) -> Params:
    """Return a model that some training may have made of `theta`: no number is what it was, or zero."""
    noise = rng.stream(0, "forecast").normal(0, 0.1 * float(np.std(theta.floats)) or 1.0, theta.floats.size)
    return Params((theta.floats + noise).astype(np.float32), theta.ints)


def up_kind(experiment: Experiment) -> str:
    """Return the kind of what a visit of the method's last phase sends up first."""
    return experiment.method.phases[-1].update.sends[0][1]


def later(experiment: Experiment, tried: Moved) -> Params:
    """Return a global state as it goes down after the first round."""
    first, study = experiment.initial(), experiment.study
    rule = experiment.method.phases[-1].join
    if study.federate.rounds and rule is not None:
        draw, layout, space = rng.stream(0, "forecast"), experiment.layout, experiment.method.space
        count, kind = experiment.per_round(study.federate), up_kind(experiment)
        made = [one for _ in range(count) if (one := space.reply(first, layout, kind, draw)) is not None]
        if made:
            return join(rule, ServerState(first), (Contribution(0, 1, one) for one in made), layout).theta
    if tried:
        return tried[-1][0]
    # Else theta_0 would stand for every later model: coded as no bytes where both ends have it.
    return _moved(first) if study.federate.rounds and experiment.shares_weights else first
