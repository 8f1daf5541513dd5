"""What will cross the wire, before a study runs: payloads encoded as they would be, counted as the loop sends them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from fedlth.data.factory import told
from fedlth.errors import StudyError
from fedlth.experiment.experiment import Experiment
from fedlth.experiment.mask_defence import defended_density
from fedlth.federation.forecast_between import between, bounds, published_bytes
from fedlth.federation.message_lengths import Lengths, later, noise, tried, up_kind
from fedlth.methods.client_update import Shrinking, sends_in
from fedlth.methods.method import Dense, Phase
from fedlth.personalization.arms import REWOUND
from fedlth.personalization.evaluate import curve_row
from fedlth.personalization.personalise import NEED_NO_GLOBAL, row_of
from fedlth.personalization.step2 import Result
from fedlth.storage.records import HANDED, INTRODUCE
from fedlth.storage.typed_record import as_record
from fedlth.study.schema import Study
from fedlth.training.local_client import LocalClient
from fedlth.training.metrics import MetricFails
from fedlth.training.task import Task
from fedlth.wire import metrics
from fedlth.wire.codec import DELTA, STEP

EACH_TARGET = REWOUND | {"ticket_0", "global_mask"}  # arms with a row for every density
MARGIN = 0.02  # a model once trained takes more bytes than the one that is encoded here, by so much at most
DENSE = {"global", "local", "dense", "dense_total"}
EVALUATION = "model: an evaluation fails"


@dataclass(frozen=True)
class Bytes:
    """Payload bytes of one direction. `bounds` say why they are at most these; without, they are an estimate.

    `pruned`: where accuracy decides about prunes, the bytes if all of them happen; else None.
    """

    size: float
    bounds: tuple[str, ...] = ()
    pruned: float | None = None

    def __str__(self) -> str:
        pruned = "" if self.pruned is None else f" ({self.pruned / 1e6:,.2f} MB if every prune happens)"
        return f"{'at most' if self.bounds else 'about'} {self.size / 1e6:,.2f} MB{pruned}"


@dataclass(frozen=True)
class Evaluation:
    """What the evaluations between the rounds move, beside all else: so many times all clients."""

    times: int
    clients: int
    down: Bytes
    up: Bytes

    def __str__(self) -> str:
        many = f"{self.times} times all {self.clients} clients"
        return f"beside these, evaluation between rounds, {many}: down {self.down}, up {self.up}"


@dataclass(frozen=True)
class Forecast:
    """Both directions, how many visits were tried to see how long an update is, and evaluation between the rounds.

    `visit` are the bytes (down, up) of one visit with a dense model, and those down of one in step 2.
    """

    down: Bytes
    up: Bytes
    tried: int = 0
    visit: tuple[float, float, float] = (0.0, 0.0, 0.0)
    evaluation: Evaluation | None = None

    def __str__(self) -> str:
        ways = (("down", self.down), ("up", self.up))
        lines = [f"{name} is an upper bound, as with {'; '.join(one.bounds)}" for name, one in ways if one.bounds]
        if self.tried:
            lines.append(f"an update is assumed to be as long as in {self.tried} visits tried here")
        if self.evaluation:
            lines.append(str(self.evaluation))
        return "\n  ".join([f"bytes: down {self.down}, up {self.up}", *lines])


def forecast_bytes(experiment: Experiment, visit_s: float) -> Forecast:
    """Return a run's payload bytes, metrics included. Failures and lost states are not foreseen.

    visit_s: the seconds that a client's visit takes here. Only a training tells how far an update lies from its
    download: under a codec of differences a few visits are tried, unless they would take longer than TRIAL_S.
    """
    task, study, codec, method = experiment.task, experiment.study, experiment.codec, experiment.method
    if not experiment.federated:
        return Forecast(Bytes(0), Bytes(_arms_bytes(experiment)))
    if method.topology is not None:
        return _between(experiment)
    dense = not method.slices
    shrinking: Shrinking | None = getattr(method.own, "shrinking", None) if method.own_masks else Shrinking()
    trial = dense and up_kind(experiment) == "values" and DELTA in codec.values
    found = tried(experiment, visit_s) if trial else ()
    wire = Lengths(experiment, found or noise(task, codec), later(experiment, found))
    down, up = _sums(wire, shrinking or Shrinking(), pruned=True)
    sure = shrinking is not None and shrinking.sure
    most = (down, up) if sure else _sums(wire, shrinking or Shrinking(), pruned=False)
    both = [] if sure else ["no client prunes"]
    if method.first_mask != Dense():
        both.append("clients that begin with the whole model")
    if any(phase.cut for phase in method.phases):
        both.append("slices that hold the whole model")
    if len(method.phases) > 1 or method.masks_all:
        both.append("no mask that all clients share")
    if dense and method.space.kind == "values" and any(phase.own_mask for phase in method.phases):
        both.append("updates and a global model that hold every weight")
    scores = [method.space.bounds[0]] if method.space.bounds[0] and codec.refers else []
    if wire.undecided and codec.refers:
        scores = ["numbers at 4 bytes each: what nobody holds stays as it was drawn"]
    if experiment.known_start is not None and wire.start(wire.theta) is None:
        scores.append("models that have moved coded as if theta_0 told nothing of them")
    evaluation = _evaluation(wire, shrinking, (*both, *scores))
    if study.refine.rounds and _may_stop(study):
        both.append("tickets that stop before their first prune")
    choices = [len(experiment.keep.allowed(task.capacity(c))) for c in range(study.clients.count)]
    if study.refine.rounds and max(choices) > 1:
        both.append("tickets at the largest density that each client may choose")
    beside = ["uncoded numbers beside the model"] if codec.refers else []
    also = beside if any(phase.also for phase in method.phases) else []
    more_up = beside if any(kind == "values" for _, kind in method.phases[-1].update.sends[1:]) else []
    free = ["masks of half the weights"] if any(map(_sends_other_masks, method.phases)) else []
    ups = (*both, *free, *more_up, *_why_less_goes_up(wire, shrinking))
    ends = (down, up) if shrinking is not None and not sure else (None, None)  # of what accuracy may decide
    last = method.phases[-1]
    more = sum(wire.beside(last, name, kind) for name, kind in sends_in(last.update, 1)[1:])
    visit = wire.model + wire.longest * len(last.also), wire.update(1.0) + more + _visit_bytes(task), wire.model
    down_bytes = _most(wire, most[0], (*both, *scores, *also), ends[0])
    return Forecast(down_bytes, _most(wire, most[1], ups, ends[1]), len(found), visit, evaluation)


def _most(wire: Lengths, size: float, bounds: Sequence[str], pruned: float | None = None) -> Bytes:
    """Return an upper bound with its margin, which nothing needs that is sent as it is; no bounds: an estimate."""
    if not bounds or not wire.codec.refers:
        return Bytes(size, tuple(bounds), pruned)
    return Bytes(size * (1 + MARGIN), (*bounds, f"{MARGIN:.0%} more for what training makes harder to code"), pruned)


def _between(experiment: Experiment) -> Forecast:
    """Return the bytes where clients send to one another: what one sends, another receives."""
    wire, most = Lengths(experiment, (), later(experiment, ())), bounds(experiment)
    count, edges = experiment.study.clients.count, between(wire)
    whole = sum(experiment.needs_whole(p) for p in experiment.phases if p.in_waves and not p.evaluates)
    told = sum(len(experiment.clients(*step)) for step in experiment.steps if step[0] in experiment.federated_phases)
    up = edges + told * _visit_bytes(experiment.task) + _arms_bytes(experiment)
    down, visit = edges + whole * count * wire.model, published_bytes(wire)
    evaluated, phase = None, next((p for p in experiment.phases if p.evaluates), None)
    if phase is not None:
        heard, task = between(wire, evaluations=True), experiment.task
        rows = phase.rounds * sum(len(one.clients) * _curve_bytes(experiment, one) for one in task.each)
        evaluated = Evaluation(
            phase.rounds, count, Bytes(heard + phase.rounds * count * wire.model, most), Bytes(heard + rows, most)
        )
    return Forecast(Bytes(down, most), Bytes(up, most), 0, (visit, visit, visit), evaluated)


def _evaluation(wire: Lengths, shrinking: Shrinking | None, bounds: Sequence[str]) -> Evaluation | None:
    """Return the bytes of evaluation between the rounds, None where there is none.

    A client with a mask is sent its slice and the whole model. Where a prune is not sure, the worst is that of the
    first one; where nothing is known of the masks, a slice that holds all.
    """
    experiment = wire.experiment
    count, phase = experiment.study.clients.count, next((p for p in experiment.phases if p.evaluates), None)
    if phase is None:
        return None
    visited: Counter[int] = Counter()
    down = 0.0
    for one, number in experiment.steps:
        if one in experiment.federated_phases[-1:]:
            visited.update(experiment.clients(one, number))
        elif one.evaluates:
            down += count * wire.model
            for visits in visited.values() if phase.down == "slice" else ():
                prunes = shrinking.prunes(visits) if shrinking else 1
                if prunes:
                    known = shrinking is not None and shrinking.sure
                    held = shrinking.densities[prunes if known else 1] if shrinking else 1.0
                    down += wire.kept(held) + (experiment.needs_whole(phase) - 1) * wire.model
            down += _sliced_first(experiment) * experiment.needs_whole(phase) * wire.model
    if phase.down == "slice" and not (shrinking and shrinking.sure):
        bounds = (*bounds, "a prune at the first visit")
    up = phase.rounds * sum(len(task.clients) * _curve_bytes(experiment, task) for task in experiment.task.each)
    return Evaluation(phase.rounds, count, _most(wire, down, bounds), Bytes(up))


def _curve_bytes(experiment: Experiment, task: Task) -> int:
    """Return the bytes of one client's rows of an evaluation."""
    local = LocalClient(task, task.clients[-1], 0, "forecast")
    with trying(EVALUATION, local):
        row = curve_row(local, Result(arm="", params=task.theta_0, mask=local.full))
    return len(metrics.encode({"rows": [{**row, "arm": arm} for arm in experiment.curve_arms]}))


def _why_less_goes_up(wire: Lengths, shrinking: Shrinking | None) -> list[str]:
    codec, study = wire.codec, wire.experiment.study
    if not codec.refers or not study.federate.rounds + study.refine.rounds:
        return []
    if up_kind(wire.experiment) != "values":
        return [wire.experiment.method.space.bounds[1]]
    found = []
    if shrinking is None or len(shrinking.densities) > 1:
        found.append("new masks at their entropy")
    if STEP in codec.values:
        found.append("updates that are noise")
    elif DELTA in codec.values and not wire.moved:
        found.append("updates as long as the download of the same weights")
    return found


def _may_stop(study: Study) -> bool:
    return study.finder.stop != {"name": "target"}


def _sums(wire: Lengths, shrinking: Shrinking, *, pruned: bool) -> tuple[float, float]:
    """Return the bytes down and up, if every prune happens or none does (a mask is then paid for all the same)."""
    experiment, densities = wire.experiment, shrinking.densities
    task, study, method = experiment.task, experiment.study, experiment.method
    count, own = study.clients.count, experiment.federated_phases
    first = len(experiment.clients(own[0], 1)) if own else 0
    unknown = method.slices and len(densities) == 1
    steps, behind = _prunes(experiment, shrinking)
    down = float(first * (wire.broadcast(experiment.initial()) - wire.model))
    up = float(sum(steps.values()) * _visit_bytes(task) + _arms_bytes(experiment))
    for beside in (_earlier(wire), _beside(wire)):
        down, up = down + beside[0], up + beside[1]
    for (before, after), number in steps.items():
        left, stays = (densities[before], densities[after]) if pruned else (1.0, 1.0)
        down += number * (wire.kept(left) if left < 1 else wire.model)
        up += number * wire.update(stays)
        if before < after:
            up += number * wire.new_mask(densities[before], densities[after])
        elif unknown and not pruned:
            up += number * wire.new_mask(1.0, 0.5)
    if any(map(_sends_other_masks, own)):
        up += sum(steps.values()) * wire.new_mask(1.0, 0.5)
    whole = not set(experiment.arms) <= NEED_NO_GLOBAL
    # Beside a slice that holds all, or is counted as if it did.
    down += whole * (count if unknown and not pruned else _sliced_first(experiment)) * wire.model
    sliced = sum(number for prunes, number in behind.items() if prunes)
    down += (count - sliced + count * len(experiment.rewind_targets)) * wire.model
    for prunes, number in behind.items():
        if prunes:
            # Where no prune is sure, the worst is one: a slice, and for the controls the whole model beside it.
            left = densities[prunes if pruned else 1]
            down += number * (wire.kept(left) + whole * wire.model if pruned or whole else wire.model)
    more = _newcomers(wire)
    down, up = down + more[0], up + more[1]
    if study.refine.rounds:
        for density, (clients, visits) in _tickets(experiment).items():
            down += (visits + clients) * wire.kept(density)
            up += clients * wire.bare_mask(min(density, 0.5))
            up += visits * (wire.update(density) + _visit_bytes(task))
    return down, up


def _newcomers(wire: Lengths) -> tuple[float, float]:
    """Return the bytes of what newcomers are handed and say, and of the masks that others have for them."""
    experiment, down, up = wire.experiment, 0.0, 0.0
    newcomer, study, density = experiment.newcomer, experiment.study, experiment.study.finder.densities[-1]
    for phase in experiment.phases:
        count = len(experiment.clients(phase, 1))
        if phase.name == HANDED:
            handed = wire.kept(density) + wire.bare_mask(density) if phase.hand is not None else wire.model
            down += count * handed
            local = LocalClient(experiment.task, experiment.task.clients[-1], 0, "forecast")
            row = as_record(row_of(local, Result(arm=HANDED, params=local.task.theta_0, mask=local.full)))
            up += count * len(metrics.encode({"rows": [{**row, "ticket": "0" * 16}]}))
        if phase.name == INTRODUCE:
            down += count * wire.model if phase.down != "nothing" else 0.0
            told = sum(wire.message(phase, name, kind) for name, kind in phase.update.sends)
            up += count * (_visit_bytes(experiment.task) + told)
    if newcomer is not None and newcomer.others and not study.refine.rounds:
        up += study.clients.count * wire.bare_mask(min(density, 0.5))
    return down, up


def _sends_other_masks(phase: Phase) -> bool:
    """Say whether every update of a phase comes under a mask of its own, which the next download does not have."""
    return phase.down == "slice" and phase.own_mask and not phase.remembers


def _sliced_first(experiment: Experiment) -> int:
    """Count the clients that are sent a slice before they have chosen any: by their first mask, or as it is cut."""
    clients = range(experiment.study.clients.count)
    if any(phase.cut for phase in experiment.method.phases):
        return len(clients)
    return sum(experiment.first_mask(client) is not None for client in clients)


def _tickets(experiment: Experiment) -> Mapping[float, tuple[int, int]]:
    """Count clients, and visits in refinement, by the largest density at which a ticket may be kept."""
    task, keep = experiment.task, experiment.keep
    visits = Counter(
        c for phase, number in experiment.steps if phase.name == "refine" for c in experiment.clients(phase, number)
    )
    found: dict[float, tuple[int, int]] = {}
    for client in range(experiment.study.clients.count):
        density = 1.0 if _may_stop(experiment.study) else keep.allowed(task.capacity(client))[0]
        density = defended_density(experiment, density)
        clients, more = found.get(density, (0, 0))
        found[density] = clients + 1, more + visits[client]
    return found


def _prunes(experiment: Experiment, shrinking: Shrinking) -> tuple[Mapping[tuple[int, int], int], Mapping[int, int]]:
    """Count visits by the prunes before and after them, and clients by the prunes behind them in step 2."""
    visited: Counter[int] = Counter()
    steps: Counter[tuple[int, int]] = Counter()
    for phase, number in experiment.steps:
        if phase in experiment.federated_phases[-1:]:
            for client in experiment.clients(phase, number):
                steps[shrinking.prunes(visited[client]), shrinking.prunes(visited[client] + 1)] += 1
                visited[client] += 1
    return steps, Counter(shrinking.prunes(number) for number in visited.values())


def _earlier(wire: Lengths) -> tuple[float, float]:
    """Return the bytes down and up of a method's phases before its last: whole models down, what they name up."""
    experiment, down, up = wire.experiment, 0.0, 0.0
    for phase, number in experiment.steps:
        if phase in experiment.federated_phases[:-1]:
            count = len(experiment.clients(phase, number))
            told = sum(wire.message(phase, name, kind) for name, kind in sends_in(phase.update, number))
            down += count * wire.model
            up += count * (_visit_bytes(experiment.task) + told)
    return down, up


def _beside(wire: Lengths) -> tuple[float, float]:
    """Return the bytes of what goes down beside the model (`Phase.also`), and up beside the last phase's update.

    A rule remembers something from the first round that joined anything on: its vectors go down from the second.
    """
    experiment, down, up = wire.experiment, 0.0, 0.0
    for phase, number in experiment.steps:
        count = len(experiment.clients(phase, number)) if phase in experiment.federated_phases else 0
        down += count * wire.longest * len(phase.also) * (number > 1)
        if phase in experiment.federated_phases[-1:]:
            up += count * sum(wire.beside(phase, name, kind) for name, kind in sends_in(phase.update, number)[1:])
    return down, up


def _visit_bytes(task: Task) -> int:
    """Return the bytes of what a client says of a visit, the mean over the clients' tasks."""
    told = sum(len(one.clients) * _told_bytes(one) for one in task.each)
    return round(told / sum(len(one.clients) for one in task.each))


def _told_bytes(task: Task) -> int:
    examples, judged = max(len(split.train) for split in task.splits.clients), task.judged
    seen = {"val_accuracy": 0.0} if judged.has_accuracy else {}
    seen |= {} if judged.main.name == "accuracy" else {"val_metric": 0.0}
    if not any(len(split.val) for split in task.splits.clients):
        seen = {}
    return len(metrics.encode({"num_examples": examples, "loss": 0.0, **seen, "density": 1.0}))


@contextmanager
def trying(what: str, local: LocalClient) -> Iterator[None]:
    """Raise StudyError where `what`, which calls the user's code, fails on the examples of a client."""
    try:
        yield
    except Exception as error:
        place = "metric, metrics: fail" if isinstance(error, MetricFails) else what
        raise StudyError(f"{place} on the examples of client {local.client}: {told(error)}") from error


def _arms_bytes(experiment: Experiment) -> int:
    """Return the bytes of all clients' rows of step 2; a row is as long whatever its numbers are."""
    return sum(len(task.clients) * _rows_bytes(experiment, task) for task in experiment.task.each)


def _rows_bytes(experiment: Experiment, task: Task) -> int:
    study, local = experiment.study, LocalClient(task, task.clients[-1], 0, "forecast")
    dense = DENSE if experiment.method.space.kind == "values" else {"local"}
    with trying(EVALUATION, local):
        row = as_record(row_of(local, Result(arm="", params=task.theta_0, mask=local.full, start="theta_g")))
    row["num_train"] = max(len(split.train) for split in task.splits.clients)
    sent = [arm for arm in experiment.arms for _ in (study.finder.densities if arm in EACH_TARGET else (1,))]
    rows = [{**row, "arm": arm, "ticket": "" if arm in dense else "0" * 16} for arm in sent]
    refined = [[{**row, "arm": "refined", "ticket": "0" * 16}]] if study.refine.rounds else []
    for part in (rows, *refined) if experiment.keep.chooses else ():
        place = next(i for i, one in enumerate(part) if one["arm"] in ("ticket", "refined"))
        part[place] = {**part[place], "chosen": True}
    return sum(len(metrics.encode({"rows": part})) for part in (rows, *refined))
