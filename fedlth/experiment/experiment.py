"""A study, resolved once: method, finder, arms, phases, and the task they run on. What comes later is handed this."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch

from fedlth import rng
from fedlth.data.split import num_sampled, num_unseen
from fedlth.errors import StudyError
from fedlth.experiment.population import Population
from fedlth.experiment.well_formed import method_of
from fedlth.methods.aggregate import Aggregate, CountMean
from fedlth.methods.client_update import ClientUpdate, MaskedUpdate
from fedlth.methods.method import Dense, Down, Everyone, FederatedMethod, Phase, Sampled, Waves
from fedlth.methods.robust import with_rule
from fedlth.methods.space import SPACES
from fedlth.models.layout import Entry, Layout, Params
from fedlth.personalization.arms import REWOUND
from fedlth.personalization.evaluate import Evaluate
from fedlth.personalization.kept import At, Keep, keep_of
from fedlth.personalization.newcomer import NEWCOMERS, phases_of
from fedlth.personalization.personalise import NEED_NO_GLOBAL, TICKET, Personalise, Refined
from fedlth.storage.client_state import ClientState
from fedlth.storage.records import EVALUATE, MetricRow
from fedlth.storage.server_state import ServerState
from fedlth.study import schema, sections
from fedlth.study.parts import make
from fedlth.study.schema import Study
from fedlth.tickets.dead import DEADS
from fedlth.tickets.finder import Finder
from fedlth.tickets.gate import GATES, STOPS
from fedlth.tickets.granularity import GRANULARITIES
from fedlth.tickets.rewind import REWINDS
from fedlth.tickets.schedule import SCHEDULES
from fedlth.tickets.scope import SCOPES
from fedlth.tickets.score import SCORES
from fedlth.training.metrics import Judged
from fedlth.training.task import Task, open_task
from fedlth.wire.codec import CODECS, DELTA, Codec
from fedlth.wire.payload import Content
from fedlth.wire.reference import Reference

KEPT_FIRST = ("ticket", "own_tuned", "own", "dense", "local")  # tuned before untuned, personal before dense


@dataclass(frozen=True)
class Experiment:
    """What a resolved study means. Cheap to make: data and model are built when `task` is first asked for."""

    study: Study
    method: FederatedMethod
    finder: Finder
    arms: tuple[str, ...]

    @staticmethod
    def of(study: Study) -> Experiment:
        """Return what a resolved study means; raise StudyError naming the place."""
        method = method_of(study)
        return Experiment(study, method, finder_of(study), study.personalise.arms or method.arms)

    @cached_property
    def text(self) -> str:
        """The study's canonical JSON: what a worker is given, and makes the same experiment of."""
        return self.study.science()

    @property
    def task(self) -> Task:
        """The study's own task, asked for each time: after a hung step it is another (forget_tasks).

        Data set, splits and exchanged layout are common to all clients; what a client trains is `task_of` it.
        """
        return open_task(self.text)

    def task_of(self, client: int) -> Task:
        """Return what a client trains: the study's own task, or that of its natural key."""
        return self.task.of(client)

    @property
    def one_metric(self) -> bool:
        """Say whether all clients are judged by the same metric, so that their numbers have a mean."""
        return len({task.judged.main.name for task in self.task.each}) == 1

    @property
    def judged(self) -> Judged:
        """The metrics of what is said of all clients together; of several tasks, the first one's."""
        return self.task.each[0].judged

    @cached_property
    def codec(self) -> Codec:
        return CODECS[self.study.wire]

    @cached_property
    def phases(self) -> tuple[Phase, ...]:
        """The method's phases, evaluation between their rounds, step 2, the rounds inside the tickets.

        The study's counts are filled in.
        """
        study, slices = self.study, self.method.slices
        found = [self._filled(phase) for phase in self.method.phases]
        found = with_rule(found, study.federate.join, self.method.name)
        own = found[-1].update if found else self.method.own  # it may average what neighbours send, by the rule too
        personalise = Personalise(
            own=own, finder=self.finder, arms=self.arms, targets=study.finder.densities,
            main=self.keep, kept=self.kept_arm, space=self.method.space,
            sends=((TICKET, "mask"),) if study.refine.rounds or getattr(self.newcomer, "others", False) else (),
        )  # fmt: skip
        down: Down = "slice" if slices else "broadcast" if found else "nothing"
        cut = self.method.phases[-1].cut if found else None
        topology = self.method.topology
        if topology is not None:
            down = "nothing"
        evaluated = sum(map(self._evaluated, range(1, sum(phase.rounds for phase in found) + 1)))
        update = Evaluate(step2=personalise, arms=self.curve_arms)
        found.append(
            Phase(name=EVALUATE, update=update, who=Everyone(), rounds=evaluated, down=down, evaluates=True,
                  changes_state=False, topology=topology, cut=cut)
        )  # fmt: skip
        found.append(replace(self._wave("personalise", personalise, down), topology=topology, cut=cut))
        if self.newcomer is not None:
            density = self.keep.density if isinstance(self.keep, At) else study.finder.densities[-1]
            found += phases_of(self.newcomer, personalise, density)
        if study.refine.rounds:
            refine = Phase(
                name="refine", update=MaskedUpdate(), join=CountMean(), down="slice", own_mask=True,
                who=Sampled(self.per_round(study.refine)), rounds=study.refine.rounds,
            )  # fmt: skip
            found += with_rule((refine,), study.federate.join, self.method.name)
            found.append(self._wave("refined", Refined(main=self.keep), "slice"))
        return tuple(phase for phase in found if phase.rounds)

    @cached_property
    def newcomer(self) -> Any:
        """How clients that no round has seen get a first ticket (clients.newcomer); None where they get none."""
        spec = self.study.clients.newcomer
        return None if spec is None else make(NEWCOMERS, spec, "clients.newcomer", has="others")

    @cached_property
    def population(self) -> Population:
        """Who may be sampled from which round on, and who of them is hostile."""
        unseen = self.task.splits.unseen
        seen = tuple(c for c in range(self.study.clients.count) if c not in unseen)
        return Population(self.study, seen, self.federated)

    @property
    def curve_arms(self) -> tuple[str, ...]:
        """The models that evaluation between the rounds looks at: the method's own where it has one beside theta_g."""
        return ("global", "own") if "own" in {*self.method.arms, *self.arms} else ("global",)

    def _evaluated(self, trained: int) -> bool:
        """Say whether all clients evaluate after so many rounds of step 1, of all its phases together."""
        every = self.study.evaluate.every
        total = sum(phase.rounds or self.study.federate.rounds for phase in self.method.phases)
        return every > 0 and (trained % every == 0 or trained == total)

    def _wave(self, name: str, update: ClientUpdate, down: Down) -> Phase:
        size = self.study.personalise.clients_per_wave
        rounds = math.ceil(self.study.clients.count / size)
        return Phase(name=name, update=update, who=Waves(size), rounds=rounds, down=down, own_mask=True)

    def _filled(self, phase: Phase) -> Phase:
        federate, who = self.study.federate, phase.who
        if isinstance(who, Sampled) and not who.count:
            who = Sampled(self.per_round(federate))
        return replace(phase, who=who, rounds=phase.rounds or federate.rounds)

    def per_round(self, section: sections.Federate | sections.Refine) -> int:
        """Return how many clients take part in a round of step 1, or in one inside the tickets."""
        return num_sampled(section.clients_per_round, self.taking_part)

    @property
    def taking_part(self) -> int:
        """How many clients the rounds may sample: all but the unseen."""
        clients = self.study.clients
        return clients.count - num_unseen(clients.count, clients.unseen)

    @cached_property
    def federated_phases(self) -> tuple[Phase, ...]:
        """Step 1: the method's own phases."""
        own = {phase.name for phase in self.method.phases}
        return tuple(phase for phase in self.phases if phase.name in own)

    def phase(self, name: str) -> Phase:
        return next(phase for phase in self.phases if phase.name == name)

    @cached_property
    def steps(self) -> tuple[tuple[Phase, int], ...]:
        """Every commit's phase and round, in order; they depend on the study alone.

        An evaluation's round is the number of step 1's rounds before it.
        """
        found: list[tuple[Phase, int]] = []
        evaluation = next((phase for phase in self.phases if phase.evaluates), None)
        trained = 0
        for phase in (phase for phase in self.phases if not phase.evaluates):
            for round in range(1, phase.rounds + 1):
                found.append((phase, round))
                trained += phase in self.federated_phases
                if evaluation and phase in self.federated_phases and self._evaluated(trained):
                    found.append((evaluation, trained))
        return tuple(found)

    def clients(self, phase: Phase, round: int, present: frozenset[int] | None = None) -> list[int]:
        """Return who takes part in a round, sorted; drawn among those `present` where that is said."""
        everyone = range(self.study.clients.count)
        seen = self.population.there(self.of_step_1(phase, round))
        seen = seen if present is None else [client for client in seen if client in present]
        draw = rng.stream(self.study.seed, f"sample {phase.name}", round)
        return phase.who(round, seen=seen, everyone=everyone, rng=draw)

    def of_step_1(self, phase: Phase, round: int) -> float:
        """Return which round of step 1, all its phases together, a phase's round is; none of step 2 is before any."""
        names = [one.name for one in self.federated_phases]
        if phase.name not in names:
            return math.inf
        return sum(one.rounds for one in self.federated_phases[: names.index(phase.name)]) + round

    def senders(self, phase: Phase, round: int, client: int) -> tuple[int, ...]:
        """Return who sends to a client in a round of a phase with a topology, sorted; both ends draw the same.

        An evaluation hears whom step 2 would hear, whatever the round: which wave a client is in must not matter.
        """
        assert phase.topology is not None
        unseen = self.task.splits.unseen
        others = [c for c in range(self.study.clients.count) if c != client and c not in unseen]
        what, number = ("topology", 0) if phase.in_waves else (f"topology {phase.name}", round)
        found = [int(c) for c in phase.topology(client, others, rng.stream(self.study.seed, what, number, client))]
        if len(set(found)) < len(found) or not set(found) <= set(others):
            name = type(phase.topology).__name__
            raise StudyError(f"method.topology: {name} must return each sender once, among the others, got {found}")
        return tuple(sorted(found))

    def unpublished(self, client: int) -> Content:
        """Return what stands for a client that has not published: theta_0 under its first mask, as both ends know."""
        first, start = self.first_mask(client), self.initial()
        if first is None:
            return Content(np.ones(self.layout.num_prunable, bool), start.floats, start.ints)
        return Content(first, start.masked(first).floats, start.ints)

    @property
    def federated(self) -> bool:
        """Say whether anything crosses: a method without phases, and no rounds inside tickets, sends nothing."""
        return bool(self.method.phases)

    @property
    def shares_weights(self) -> bool:
        """Say whether the global state is a model that rounds have trained."""
        return self.federated and self.method.space.kind == "values"

    @cached_property
    def slices(self) -> bool:
        """Say whether any phase sends slices: both ends then keep the mask of what each client shares."""
        return any(phase.down == "slice" for phase in self.phases)

    def chooses(self, phase: Phase) -> bool:
        """Say whether a client's reply decides what it shares from then on: both ends then remember its mask."""
        return self.slices and phase.own_mask and phase.remembers

    @cached_property
    def layout(self) -> Layout:
        """The layout of the global state."""
        return self.method.space.layout(self.task.exchange)

    def layout_of(self, kind: str) -> Layout:
        """Return the layout of a message's kind; a mask is over the state, or the model where that has no weights."""
        if kind == "statistics":  # shares of the classes
            return Layout((Entry("classes", (self.task.dataset.num_classes,), "buffer", 0),))
        if kind == self.method.space.kind or (kind == "mask" and self.layout.num_prunable):
            return self.layout
        space = next((space for space in SPACES if space.kind == kind), SPACES[0])
        return space.layout(self.task.exchange)

    def message_layout(self, phase: Phase, name: str, kind: str) -> Layout:
        """Return the layout of a message that a phase's update sends up."""
        own = getattr(phase.update, "layout", None)
        if kind != "statistics" or own is None:
            return self.layout_of(kind)
        found: Layout = own(name, self.task)
        return found

    def rule(self, phase: Phase) -> Aggregate | None:
        """Return what joins a phase's contributions, given the task where it asks for it."""
        asks = getattr(phase.join, "of_task", None)
        return phase.join if asks is None else asks(self.task)

    def initial(self) -> Params:
        """Return round 0's global state, which both ends draw from the study's seed."""
        return self.method.space.initial(self.task)

    @cached_property
    def known_start(self) -> Reference | None:
        """What a model on its way down may refer to: theta_0, where a study names it (model.theta_0)."""
        known = self.study.model.theta_0 is not None and self.method.space.kind == "values"
        return Reference(self.initial().floats) if known and DELTA in self.codec.down.values else None

    @cached_property
    def start_mask(self) -> np.ndarray | None:
        """Everyone's mask before the first round, (exchange.num_prunable,) bool; None for everything."""
        if self.method.start_mask == Dense():
            return None
        mask = self.task.shared_mask(self.method.start_mask(self.task, 0))
        return None if mask.all() else mask

    def start(self) -> ServerState:
        """Return the server's state before the first round."""
        theta, mask = self.initial(), self.start_mask
        return ServerState(theta if mask is None else theta.masked(mask), mask=mask)

    def first_mask(self, client: int) -> np.ndarray | None:
        """Return what a client shares before it has chosen, (exchange.num_prunable,) bool; None for everything."""
        if self.method.first_mask == Dense():
            return None
        task = self.task_of(client)
        mask = task.shared_mask(self.method.first_mask(task, client))
        return None if mask.all() else mask

    def first_state(self, client: int) -> ClientState:
        """Return what a client holds before its first visit: its first mask, where nobody else keeps all of it."""
        task = self.task_of(client)
        mirrored = task.exchange.num_prunable == task.layout.num_prunable and self.method.topology is None
        if self.method.first_mask == Dense() or mirrored:
            return ClientState()
        return ClientState(masks={"active": self.method.first_mask(task, client)})

    @cached_property
    def rewind_targets(self) -> list[str]:
        """Name the earlier global models that step 2 rewinds to; they are kept and shipped once each."""
        anchor = self.finder.rewind.anchor
        searched = REWOUND & set(self.arms)
        # theta_g@0 is theta_0, which every client draws from the seed.
        return [anchor] if anchor and "@" in anchor and anchor != "theta_g@0" and searched else []

    def needs_whole(self, phase: Phase) -> bool:
        """Say whether controls need the whole global model beside a client's slice; it is counted as evaluation."""
        if phase.evaluates:
            return self.method.space.kind == "values"
        return phase.name == "personalise" and not set(self.arms) <= NEED_NO_GLOBAL

    @cached_property
    def keep(self) -> Keep:
        """The rule that says which ticket is kept (finder.main); without that arm there is nothing to choose among."""
        return keep_of(self.study.finder) if self.kept_arm == "ticket" else At(self.study.finder.densities[-1])

    def is_kept(self, row: MetricRow) -> bool:
        """Say whether a row is at the density that its client keeps."""
        return row.chosen or (isinstance(self.keep, At) and row.target_density == self.keep.density)

    @property
    def kept_arm(self) -> str | None:
        """The arm whose model is saved for each client; None where nothing is personal."""
        return next((arm for arm in KEPT_FIRST if arm in self.arms), None)

    @property
    def product_arm(self) -> str | None:
        """The arm that is what a client ends with: the kept one, refined where the study refines."""
        return "refined" if self.study.refine.rounds else self.kept_arm

    @property
    def random_starts(self) -> tuple[str, ...]:
        """The names of the weights that the arm `random` starts from; without rounds theta_g is theta_0."""
        moved = any(phase.rounds for phase in self.federated_phases)
        brought = any(task.model.brought for task in self.task.each)
        return ("theta_g", *["theta_0"] * moved, *["reinit"] * (not brought))


def open_experiment(text: str) -> Experiment:
    """Return the experiment of a study's canonical JSON; the last two are kept, since every job of a run names one."""
    # Each time, whoever set it in between: bits hold at one thread count, and spinning threads are 5-20 x slower.
    torch.set_num_threads(1)
    return _opened(text)


@lru_cache(maxsize=2)
def _opened(text: str) -> Experiment:
    return Experiment.of(schema.build(json.loads(text)))


def finder_of(study: Study) -> Finder:
    """Return the study's ticket finder; raise StudyError naming the place."""
    f = study.finder
    return Finder(
        score=make(SCORES, f.score, "finder.score"),
        schedule=make(SCHEDULES, f.schedule, "finder.schedule"),
        scope=make(SCOPES, f.scope, "finder.scope"),
        rewind=make(REWINDS, f.rewind, "finder.rewind"),
        granularity=make(GRANULARITIES, f.granularity, "finder.granularity"),
        dead=make(DEADS, f.dead, "finder.dead"),
        gate=make(GATES, f.gate, "finder.gate"),
        stop=make(STOPS, f.stop, "finder.stop"),
    )
