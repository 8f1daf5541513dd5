"""From a study's text to its method and finder, with the method's own defaults written into the study."""

from __future__ import annotations

from dataclasses import replace

from fedlth.config import Study
from fedlth.errors import StudyError
from fedlth.methods.arms import ARMS
from fedlth.methods.recipe import Recipe
from fedlth.methods.recipes import METHODS
from fedlth.parts import make
from fedlth.tickets.dead import DEADS
from fedlth.tickets.finder import Finder
from fedlth.tickets.gate import GATES, STOPS
from fedlth.tickets.granularity import GRANULARITIES
from fedlth.tickets.rewind import REWINDS, ToInit
from fedlth.tickets.schedule import SCHEDULES
from fedlth.tickets.scope import SCOPES
from fedlth.tickets.score import SCORES
from fedlth.wire.codec import CODECS

SEARCHING = {"local", "ticket", "ticket_0", "one_shot", "global_mask", "random", "dense_total"}
KEPT_FIRST = ("ticket", "own_tuned", "dense", "local")


def recipe_of(study: Study) -> Recipe:
    """Return the study's method; raise StudyError naming the place."""
    recipe: Recipe = make(METHODS, study.method, "method")
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


def resolve(study: Study) -> tuple[Study, list[str]]:
    """Return the study with the method's defaults written in, and a note for each section without effect."""
    recipe, notes = recipe_of(study), []
    update: dict[str, object] = {}
    if recipe.rewind and "rewind" not in study.finder.model_fields_set:
        update["finder"] = study.finder.model_copy(update={"rewind": {"name": recipe.rewind}})
    if not recipe.federated:
        update["federate"] = study.federate.model_copy(update={"rounds": 0})
        if study.given("federate"):
            notes.append(f"federate: has no effect, method {recipe.name} has no rounds")
    study = study.model_copy(update=update)
    arms = arms_of(study)
    unknown = [a for a in arms if a not in ARMS]
    if unknown:
        raise StudyError(f"personalise.arms: must be among {', '.join(ARMS)}, got {unknown[0]!r}")
    finder = finder_of(study)
    if study.given("finder") and not SEARCHING & set(arms):
        notes.append(f"finder: has no effect, no arm of method {recipe.name} searches for a ticket")
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
    anchor = finder.rewind.anchor
    if anchor and "@" in anchor and int(anchor.partition("@")[2]) > study.federate.rounds:
        raise StudyError(
            f"finder.rewind.round: must be at most federate.rounds = {study.federate.rounds}, got {anchor}"
        )
    if anchor and "@" in anchor and recipe.space != "weights":
        raise StudyError(f"finder.rewind.round: must be -1, method {recipe.name} shares no weights, got {anchor}")
    p = study.personalise
    if recipe.space == "scores" and "own_tuned" in arms and (p.lr is not None or p.schedule != "constant"):
        notes.append(
            f"personalise.lr and .schedule: have no effect on own_tuned, whose scores have {recipe.name}'s own rate"
        )
    if recipe.name == "sub_fedavg" and study.train.epochs < 2:
        notes.append("train.epochs: with 1, sub_fedavg's two masks are the same epoch's, and nothing is pruned")
    return study, notes


def _check_counts(study: Study) -> None:
    """Refuse rounds that ask for more clients than take part; the unseen are counted as the split counts them."""
    count, unseen = study.clients.count, study.clients.unseen
    held_out = min(max(1, round(unseen * count)), count - 1) if unseen else 0
    for place, section in (("federate", study.federate), ("refine", study.refine)):
        if section.rounds and section.clients_per_round > count - held_out:
            raise StudyError(
                f"{place}.clients_per_round: must be at most the {count - held_out} clients that take part, "
                f"got {section.clients_per_round}"
            )
