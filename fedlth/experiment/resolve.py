"""From a study's text to its method and finder, with the method's own defaults written into the study."""

from __future__ import annotations

from dataclasses import replace

from fedlth.errors import StudyError
from fedlth.experiment import effects
from fedlth.methods.method import Recipe, check_frozen
from fedlth.methods.table import METHODS
from fedlth.models.initial import refuse
from fedlth.personalization.arms import ARMS
from fedlth.study.parts import make
from fedlth.study.schema import Study
from fedlth.tickets.dead import DEADS
from fedlth.tickets.finder import Finder
from fedlth.tickets.gate import GATES, STOPS
from fedlth.tickets.granularity import GRANULARITIES
from fedlth.tickets.rewind import REWINDS, ToInit
from fedlth.tickets.schedule import SCHEDULES
from fedlth.tickets.scope import SCOPES
from fedlth.tickets.score import SCORES
from fedlth.training.task import World
from fedlth.wire.codec import CODECS

KEPT_FIRST = ("ticket", "own_tuned", "own", "dense", "local")  # tuned before untuned, personal before dense


def recipe_of(study: Study) -> Recipe:
    """Return the study's method; raise StudyError naming the place."""
    recipe = make(METHODS, study.method, "method")
    name = study.method["name"]
    if not isinstance(recipe, Recipe):
        raise StudyError(f"method: {name} must return a fedlth.methods.method.Recipe, got {type(recipe).__name__}")
    check_frozen(recipe)
    for field, names in (("visit", ("__call__", "sends", "own", "tune")), ("aggregate", ("init", "add", "result"))):
        lacks = [n for n in names if not hasattr(getattr(recipe, field), n)]
        if lacks:
            raise StudyError(f"method: {name}: its {field} must have {lacks[0]}, got {getattr(recipe, field)!r}")
    for field, known in (("space", ("weights", "scores")), ("down", ("broadcast", "slice"))):
        got = getattr(recipe, field)
        if got not in known:
            raise StudyError(f"method: {name}: its {field} must be {' or '.join(known)}, got {got!r}")
    return recipe


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


def arms_of(study: Study) -> tuple[str, ...]:
    """Return the names of the arms that step 2 evaluates."""
    return study.personalise.arms or recipe_of(study).arms


def main_density(study: Study) -> float:
    """Return the density of the ticket that is kept."""
    return study.finder.main if study.finder.main is not None else study.finder.densities[-1]


def kept_arm(study: Study) -> str | None:
    """Name the arm whose model is saved for each client; None where nothing is personal."""
    return next((arm for arm in KEPT_FIRST if arm in arms_of(study)), None)


def product_arm(study: Study) -> str | None:
    """Name the arm that is what a client ends with: the kept one, refined where the study refines."""
    return "refined" if study.refine.rounds else kept_arm(study)


def resolve(study: Study) -> tuple[Study, list[str]]:
    """Return the study with the method's defaults written in, and a note for each option without effect.

    Asks what was given and what is a default, so it is for a study as the user wrote it, never for a resolved one.
    Raises StudyError naming the place.
    """
    recipe = recipe_of(study)
    arms = arms_of(study)
    unknown = [a for a in arms if a not in ARMS]
    if unknown:
        raise StudyError(f"personalise.arms: must be among {', '.join(ARMS)}, got {unknown[0]!r}")
    effects.check_arms(study, recipe, arms)
    notes = effects.notes(study, recipe, arms, product_arm(study))
    update: dict[str, object] = {}
    if recipe.rewind and "rewind" not in study.finder.model_fields_set:
        update["finder"] = study.finder.model_copy(update={"rewind": {"name": recipe.rewind}})
    if not recipe.federated:
        update["federate"] = study.federate.model_copy(update={"rounds": 0})
    study = study.model_copy(update=update)
    finder = finder_of(study)
    weights = recipe.federated and recipe.space == "weights"
    if study.refine.rounds and ("ticket" not in arms or not weights):
        raise StudyError(
            "refine.rounds: must be 0 for a method without the arm `ticket` and federated rounds of weights"
        )
    if CODECS[study.wire].feedback and not (recipe.federated and recipe.visit.sends == "values"):
        raise StudyError(f"wire: must not be {study.wire} for a method that sends no values up, as {recipe.name}")
    if study.refine.rounds and (finder.dead.holds or not getattr(finder.rewind, "trains", True)):
        raise StudyError(
            "refine.rounds: must be 0 where dead weights are not zero or tickets are frozen: refinement trains "
            f"survivors among zeros, got {finder.dead} and {finder.rewind}"
        )
    if study.tickets == "compact" and finder.dead.holds:
        raise StudyError(f"tickets: must be dense where dead weights are not zero, as with {finder.dead}")
    if "ticket_0" in arms:
        replace(finder, rewind=ToInit())  # says so where the finder's other parts forbid it
    _check_counts(study)
    _check_anchor(study, recipe, finder)
    p = study.personalise
    if recipe.space == "scores" and "own_tuned" in arms and (p.lr is not None or p.schedule != "constant"):
        notes.append(
            f"personalise.lr and .schedule: have no effect on own_tuned, whose scores have {recipe.name}'s own rate"
        )
    if recipe.name == "sub_fedavg" and study.train.epochs < 2:
        notes.append("train.epochs: with 1, sub_fedavg's two masks are the same epoch's, and nothing is pruned")
    return study, notes


def checked(world: World) -> list[str]:
    """Return notes on what only the built data and model can say; raise StudyError where the study cannot be run.

    Another initialisation of a model that brings its weights would be those weights again: a rewind to it is
    refused, and the arm `random` does without.
    """
    study, notes = world.study, world.probe()
    arms = set(arms_of(study))
    if finder_of(study).rewind.anchor == "reinit" and arms & {"ticket", "one_shot", "random"}:
        refuse(world.brought, "finder.rewind")
    if "random" in arms and world.brought:
        notes.append(f"arm random: starts from {' and '.join(random_starts(world))} alone; {world.brought}")
    return notes


def random_starts(world: World) -> tuple[str, ...]:
    """Return the names of the weights that the arm `random` starts from."""
    return ("theta_g", "theta_0") if world.brought else ("theta_g", "theta_0", "reinit")


def _check_anchor(study: Study, recipe: Recipe, finder: Finder) -> None:
    """Refuse weights to go back to that no client could have."""
    anchor = finder.rewind.anchor
    if anchor is None or (isinstance(anchor, str) and anchor in ("theta_0", "theta_g", "reinit")):
        return
    name, at, number = anchor.partition("@") if isinstance(anchor, str) else ("", "", "")
    if name != "theta_g" or not at or not number.isdecimal():
        raise StudyError(
            f"finder.rewind: there are no weights called {anchor!r} for {type(finder.rewind).__name__} to go back to; "
            "known: theta_0, theta_g, theta_g@ROUND, reinit"
        )
    rounds, place = study.federate.rounds, "federate.rounds"
    if study.tune.lr and study.tune.rounds < rounds:
        rounds, place = study.tune.rounds, "tune.rounds"
    if int(number) > rounds:
        raise StudyError(f"finder.rewind.round: must be at most {place} = {rounds}, got {anchor}")
    if recipe.space != "weights":
        raise StudyError(f"finder.rewind.round: must be -1, method {recipe.name} shares no weights, got {anchor}")


def _check_counts(study: Study) -> None:
    """Refuse rounds that ask for more clients than take part (the split's own count), and a rate to try twice."""
    if len(set(study.tune.lr)) < len(study.tune.lr):
        raise StudyError(f"tune.lr: each must stand once, got {list(study.tune.lr)}")
    if study.tune.lr and product_arm(study) is None and "global" not in arms_of(study):
        raise StudyError(f"personalise.arms: must hold global or one of {', '.join(KEPT_FIRST)}, which tune.lr scores")
    count, unseen = study.clients.count, study.clients.unseen
    held_out = min(max(1, round(unseen * count)), count - 1) if unseen else 0
    for place, section in (("federate", study.federate), ("refine", study.refine)):
        if section.rounds and section.clients_per_round > count - held_out:
            raise StudyError(
                f"{place}.clients_per_round: must be at most the {count - held_out} clients that take part, "
                f"got {section.clients_per_round}"
            )
