"""Options without effect: one table of which choice makes which option idle, and the arms that no study could mean.

Another choice of the study (method, engine, arms, rounds) makes an option idle: a note, since that is how studies are
compared. What no study could mean is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedlth.errors import StudyError
from fedlth.experiment.experiment import Experiment
from fedlth.methods.client_update import Keep, MaskedUpdate
from fedlth.methods.fedselect import SelectUpdate
from fedlth.methods.gossip import GossipUpdate
from fedlth.methods.method import Dense, FederatedMethod
from fedlth.personalization.arms import OF_TICKETS, REWOUND
from fedlth.study.schema import Study
from fedlth.training.loss import plain
from fedlth.training.study_recipe import recipes

SEARCH = OF_TICKETS | {"ticket", "ticket_0", "one_shot"}
CUT = SEARCH | {"global_mask", "init_mask"}  # arms that hold a mask of the finder's scope
OWN_MASK = frozenset({"own_random", "own_global_mask"})  # controls of a method's own mask
LONG = frozenset({"local", "dense_total"})  # arms that train for as long as the search takes
UNTRAINED = frozenset({"global", "own", "frozen_random"})
# Of a training recipe, what only a training of weights looks at, beside its rate.
SGD = ("momentum", "weight_decay")
STEP_KEYS = (
    *SGD, "optimizer", "schedule", "clip_norm", "pull", "augment", "dropout", "precision", "group_by_length",
)  # fmt: skip
ROUND_KEYS = ("round_decay", "round_schedule")
FINDER: dict[str, frozenset[str]] = {
    "score": SEARCH,
    "schedule": SEARCH - {"one_shot"} | LONG,
    "scope": CUT,
    "rewind": REWOUND,
    "granularity": CUT | OWN_MASK,
    "dead": SEARCH | {"init_mask"},
    "gate": SEARCH,
    "stop": SEARCH,
    "densities": CUT | LONG,
    "main": CUT,
}


def check_arms(study: Study, method: FederatedMethod, arms: Sequence[str]) -> None:
    """Refuse arms that say nothing: none at all, one twice, a control of what the method does not have."""
    if study.personalise.arms == ():
        raise StudyError("personalise.arms: must name at least one arm, got []")
    twice = next((a for a in arms if arms.count(a) > 1), None)
    if twice:
        raise StudyError(f"personalise.arms: each must be given once, got {twice} {arms.count(twice)} times")
    own, name = method.own, method.name
    if "frozen_random" in arms and not hasattr(own, "frozen"):
        raise StudyError(f"personalise.arms: must not contain frozen_random, method {name} has no frozen weights")
    if (found := sorted(OWN_MASK & set(arms))) and (not method.space.trains_weights or not _own_mask(method)):
        raise StudyError(f"personalise.arms: must not contain {found[-1]}, method {name} has no own mask of weights")
    if "own_global_mask" in arms and not method.has_whole:
        raise StudyError(f"personalise.arms: must not contain own_global_mask, method {name} shares no whole model")
    for arm in {"own", "own_tuned", *OWN_MASK} & set(arms):
        if not (hasattr(own, "own") and hasattr(own, "tune")):
            raise StudyError(f"personalise.arms: must not contain {arm}, {type(own).__name__} has no own and tune")


def _own_mask(method: FederatedMethod) -> bool:
    """Say whether clients have masks of their own in the rounds; an update of the user's may make some."""
    own = method.own
    if method.masks_all:
        return True
    if isinstance(own, MaskedUpdate):
        return getattr(own, "private_mask", False) or own.before != Keep() or own.after != Keep() or method.slices
    if isinstance(own, GossipUpdate):
        return own.after != Keep() or method.first_mask != Dense()
    return not isinstance(own, SelectUpdate)


def notes(study: Study, experiment: Experiment) -> list[str]:
    """Return a line for every option that was given in the study as written and changes nothing."""
    method, arms, product = experiment.method, experiment.arms, experiment.product_arm
    made = [*_finder(study, method, set(arms))]
    idle: dict[str, list[str]] = {}
    for place, why in _idle(study, method, set(arms), product):
        if study.given(place):
            idle.setdefault(why, []).append(place)
    for why, places in idle.items():
        made.append(f"{', '.join(places)}: {'has' if len(places) == 1 else 'have'} no effect, {why}")
    made += _idle_columns(study, method)
    if study.attack is not None and study.federate.join is None and _federates(study, method):
        made.append(
            "attack: nothing bears it, since federate.join is not given: the method's own mean counts every client"
        )
    only = ", ".join(a for a in arms if a not in UNTRAINED | {"own_tuned"})
    rates = [p for p in ("train.lr", *(f"train.{key}" for key in STEP_KEYS)) if study.given(p)]
    if not method.space.trains_weights and not study.refine.rounds and only and rates:
        made.append(f"{', '.join(rates)}: only for the arms {only}, method {method.name} learns scores at its own rate")
    if not method.space.trains_weights and plain(loss := recipes(study)[0].loss) != loss:
        keys = ", ".join(f"train.loss.{key}" for key in study.train.loss or {} if key != "name") or "train.loss"
        made.append(f"{keys}: not for method {method.name}, which learns scores by the loss that evaluations report")
    return [*made, *idle_method(experiment)]


def idle_method(experiment: Experiment) -> list[str]:
    """Return the notes that say what keeps a method from doing what it is for; of a bench they are warnings."""
    study, method, found = experiment.study, experiment.method, []
    if method.phases and not _federates(study, method):
        found.append("federate.rounds: is 0, so the global model is theta_0, which no round has trained")
    if study.train.epochs == 1 and 1 in getattr(getattr(method.own, "after", None), "snapshots", ()):
        found.append(f"train.epochs: with 1, {method.name}'s two masks are the same epoch's, and nothing is pruned")
    return found


def _idle_columns(study: Study, method: FederatedMethod) -> Iterator[str]:
    """Yield a note on what tiers say that nothing reads, where something else of them is read."""
    if method.reads_capacity or not _capacity_used(study, method):
        return
    said = {key for tier in study.clients.capacity for key in tier.model_fields_set}
    idle = [key for key in ("density",) if study.finder.main not in ("auto", "capacity")] + ["width"]
    if study.fleet is None:
        idle += ["speed", "down_bytes_s", "up_bytes_s", "latency_s"]
    if found := [key for key in idle if key in said]:
        yield f"clients.capacity: {', '.join(found)} of its tiers: no effect, nothing here reads them"


def _capacity_used(study: Study, method: FederatedMethod) -> bool:
    """Say whether anything reads clients.capacity: the method, the choice of a density, the fleet, a memory's check."""
    chooses, memory = study.finder.main in ("auto", "capacity"), any(t.memory_mb for t in study.clients.capacity)
    return method.reads_capacity or chooses or study.fleet is not None or memory


def _federates(study: Study, method: FederatedMethod) -> bool:
    """Say whether step 1 has a round: a phase's own, or the study's."""
    return any(phase.rounds or study.federate.rounds for phase in method.phases)


def _finder(study: Study, method: FederatedMethod, arms: set[str]) -> Iterator[str]:
    if not study.given("finder"):
        return
    if not arms & (CUT | LONG):
        yield f"finder: has no effect, no arm of method {method.name} searches for a ticket"
        return
    if not arms & CUT:
        yield (
            f"finder: only decides how long {' and '.join(sorted(arms & LONG))} train, no arm of method {method.name} "
            "searches for a ticket"
        )
        return
    for key, used_by in FINDER.items():
        if study.given(f"finder.{key}") and not arms & used_by:
            yield f"finder.{key}: has no effect on the arms {', '.join(sorted(arms))}"


def _idle(study: Study, method: FederatedMethod, arms: set[str], product: str | None) -> Iterator[tuple[str, str]]:
    """Yield (an option, why it changes nothing) as this study stands, given or not."""
    said, refined = f"method {method.name}", study.refine.rounds > 0
    federates = _federates(study, method)
    rounds = federates or refined
    trained = arms - UNTRAINED - (set() if method.space.trains_weights else {"own_tuned"})  # arms that train weights
    weights = rounds and (method.space.trains_weights or refined)
    none = "federate.rounds is 0" if method.phases else f"{said} has no rounds"
    untrained = f"no arm of {said} trains" if not arms - UNTRAINED else f"no arm of {said} trains weights"
    if not federates:
        yield "evaluate", none
    elif not study.evaluate.every:
        yield "evaluate.keep", "evaluate.every is 0"
    if not method.phases:
        yield "federate", none
        yield "wire", f"{said} sends nothing"
        yield "model.buffers", f"{said} sends nothing"
        yield "model.personal", f"{said} sends nothing"
    elif not federates:
        yield from ((f"federate.{key}", none) for key in ("clients_per_round", "roll_back"))
    elif all(phase.rounds for phase in method.phases):
        yield from ((place, f"each phase of {said} has its own rounds") for place in ("federate.rounds", "tune.rounds"))
    if method.topology is not None:
        yield "federate.roll_back", f"clients of {said} are sent no server's model"
    if not rounds:
        yield "attack", none
        yield "clients.joiners", none
    elif not federates:
        yield "clients.joiners", none
    if not study.clients.unseen:
        yield "clients.newcomer", "clients.unseen is 0: there is no newcomer"
    if federates and not any(phase.own_mask for phase in method.phases):
        yield "federate.mask_outliers", f"clients of {said} have no masks of their own"
    if not rounds:
        yield "train.steps" if study.train.steps else "train.epochs", none
        yield from ((f"train.{key}", none) for key in ROUND_KEYS)
        yield "clients.unseen", f"{none}: no client is left out"
    elif not weights:
        yield from ((f"train.{key}", f"{said} learns scores at its own rate") for key in ROUND_KEYS)
    if not weights and not trained:
        yield from ((f"train.{key}", untrained) for key in STEP_KEYS)
    elif not weights:
        yield "train.schedule", "it is that of the rounds, personalise has its own"
        for key in set(STEP_KEYS) - {"schedule"}:
            if getattr(study.personalise, key) is not None:
                yield f"train.{key}", f"every training takes personalise.{key}"
    if not rounds and not arms - UNTRAINED:
        yield "train.batch_size", f"no arm of {said} trains"
    if not weights and (not trained or study.personalise.lr is not None):
        why = "every training takes personalise.lr" if trained else untrained
        yield from (("train.lr", why), ("tune", why))
    if not arms - UNTRAINED and not refined:
        length = "steps" if study.personalise.steps else "epochs"
        yield from ((f"personalise.{key}", f"no arm of {said} trains") for key in (length, "batch_size"))
    if not trained and not refined:
        yield from ((f"personalise.{key}", untrained) for key in ("lr", "loss", *STEP_KEYS))
    if getattr(method.own, "own_pull", False) and arms <= UNTRAINED | {"own_tuned"} and not refined:
        yield "personalise.pull", f"{said} has its own"
    if not refined:
        yield "refine.clients_per_round", "refine.rounds is 0"
    if not study.tune.lr:
        yield "tune.rounds", "tune.lr names no rates to try"
    elif not federates:
        yield "tune.rounds", none
    if study.engine != "ray":
        yield "ray", f"engine is {study.engine}"
    if study.engine != "inprocess":
        yield "workers", f"engine {study.engine} has workers of its own"
    if not _capacity_used(study, method):
        yield "clients.capacity", f"{said} does not ask for it"
    if study.finder.main in ("auto", "capacity"):
        if "ticket" not in arms:
            yield "finder.main", "only the arm ticket has several densities to keep one of"
        elif len(study.finder.densities) == 1:
            yield "finder.main", "finder.densities has one density"
    if study.fleet is not None and not rounds:
        yield from ((f"fleet.{key}", f"{said} has no federated rounds") for key in ("deadline_s", "drop"))
    if product is None:
        yield "tickets", f"no arm of {said} is a client's own model"
    if study.clients.test == "own":
        yield "clients.test_samples", "clients.test is own"
    else:
        yield "clients.test_share", "clients.test is split"
    if study.seeds:
        yield "seed", "seeds are given"
