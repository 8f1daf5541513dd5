"""What a study's data and model refuse, found before anything trains: moves beyond a training, empty masks."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

import numpy as np

from fedlth.data.factory import is_factory, takes, told
from fedlth.data.sources import SOURCES
from fedlth.data.split import absent_classes
from fedlth.errors import StudyError
from fedlth.experiment.effects import CUT, FINDER, LONG
from fedlth.experiment.experiment import Experiment
from fedlth.models.initial import refuse
from fedlth.models.layout import Layout
from fedlth.rng import stream
from fedlth.study.schema import Study
from fedlth.study.sections import Data
from fedlth.tickets.finder import Finder
from fedlth.training.study_recipe import budget_of, personal
from fedlth.training.task import Task


def check(study: Study, experiment: Experiment) -> list[str]:
    """Return notes on options that this data set or model leaves without effect; `study` knows what was given.

    Raises StudyError where a schedule or scope fails, a density keeps no weight, or a move of the mask or a rewind
    lies beyond some client's training, or the arm `reinit` would begin with the weights that a model brings.
    """
    finder, arms, task = experiment.finder, set(experiment.arms), experiment.task
    if "reinit" in arms:
        for one in task.each:
            refuse(one.model.brought, "personalise.arms")
    for layout in (one.layout for one in task.each):
        if arms & (CUT | LONG):
            _check_masks(finder, study.finder.densities, layout, dry=bool(arms & CUT))
        for event in ("before", "after"):  # a method that prunes in its rounds has a target of its own
            target = getattr(getattr(experiment.method.own, event, None), "density", None)
            if isinstance(target, float) and not round(target * layout.num_prunable):
                raise _empty("method.density", target, layout.num_prunable, "prunable weights")
    _check_steps(task, finder, arms)
    return _notes(study, experiment)


def _check_masks(finder: Finder, targets: tuple[float, ...], layout: Layout, *, dry: bool) -> None:
    """Ask the schedule for its chains and the scope for the smallest mask: both may be the user's."""
    place = "schedule"
    try:
        finder.chains(targets)
        if not dry:
            return
        place = "granularity"
        groups = finder.granularity.groups(layout)
        counted = groups.weights or groups.layout
        if not hasattr(finder.scope, "counts") and not round(targets[-1] * counted.num_prunable):
            what = "prunable weights" if counted is layout else "prunable groups"
            raise _empty("finder.densities", targets[-1], counted.num_prunable, what)
        place = "scope"
        size = groups.layout.num_prunable
        kept = finder.kept(stream(0, "dry run").random(size), np.ones(size, bool), groups, targets[-1])
    except (StudyError, MemoryError):
        raise
    except Exception as error:  # the user's code may raise anything
        raise StudyError(f"finder.{place}: {getattr(finder, place)} raised {told(error)}") from error
    if not kept.any():
        raise _empty("finder.densities", targets[-1], size, "prunable groups")


def _empty(place: str, density: float, size: int, what: str) -> StudyError:
    return StudyError(f"{place}: must keep at least one of the {size:,} {what}, got {density:g}, which keeps none")


def _check_steps(task: Task, finder: Finder, arms: set[str]) -> None:
    """Refuse a step to go back to, or a move of the mask, that the client with the fewest steps does not reach."""
    rewind, regrow = getattr(finder.rewind, "steps", 0), getattr(finder.schedule, "regrow", None)
    if not isinstance(rewind, int):
        raise StudyError(f"finder.rewind: {type(finder.rewind).__name__}.steps must be a whole number, got {rewind!r}")
    moves = [regrow.window(i)[1] for i in range(regrow.rounds)] if finder.moves and regrow is not None else []
    last: Sequence[tuple[str, int]] = (
        ("rewind", rewind if arms & (FINDER["rewind"] | LONG) else 0),  # what a search goes back, they train less
        ("schedule", max((m for m in moves if m is not None), default=0) if arms & FINDER["schedule"] - LONG else 0),
    )
    sizes = [len(split.train) for split in task.splits.clients]
    client, train = int(np.argmin(sizes)), personal(task.study)
    steps = budget_of(train).total(sizes[client], train.batch_size)
    length = f"{train.epochs} epochs" if train.epochs else f"{train.steps} steps"
    for part, step in last:
        if step >= steps:
            raise StudyError(
                f"finder.{part}: must stay inside every client's training, got step {step}; client {client} has "
                f"{steps} steps: {sizes[client]} examples in batches of {train.batch_size}, {length}"
            )


def uneven(lengths: Mapping[str, np.ndarray]) -> list[str]:
    """Say where fields of one example, the labels of positions too, are of different lengths: seldom meant."""
    names = sorted(lengths)
    found = []
    for name in names[1:]:
        (rows,) = np.nonzero(lengths[name] != lengths[names[0]])
        if len(rows):
            found.append(
                f"data: {names[0]} and {name} are of different lengths in {len(rows)} of {len(lengths[name])} training "
                f"examples, first in example {rows[0]}: right only if each has a length of its own"
            )
    return found


def _notes(study: Study, experiment: Experiment) -> list[str]:
    task = experiment.task
    notes: list[str] = list(task.dataset.notes)
    if absent := [] if task.splits.apart else absent_classes(task.dataset):
        which = f"class {absent[0]} has" if len(absent) == 1 else f"classes {', '.join(map(str, absent[:10]))}"
        more = "" if len(absent) == 1 else f"{f' and {len(absent) - 10} more' if len(absent) > 10 else ''} have"
        notes.append(f"data: {which}{more} no training example")
    norms = [e for e in task.layout.entries if e.norm]
    if study.given("model.buffers") and experiment.federated:
        local = task.layout.num_floats + task.layout.num_ints - task.exchange.num_floats - task.exchange.num_ints
        if not norms or (study.model.buffers != "aggregate" and not local):
            what = "norm" if not norms else "norm with running statistics"
            notes.append(f"model.buffers: has no effect, {study.model.name} has no {what}")
    if not task.dataset.lengths_train:
        asked = [f"{step}.group_by_length" for step in ("train", "personalise")]
        notes += [f"{key}: has no effect, all examples are of one length" for key in asked if study.given(key)]
    notes += uneven(task.dataset.lengths_train)
    idle = [f"tasks.{name}" for name in study.tasks if name not in task.names]
    if idle:
        notes.append(f"{', '.join(idle)}: {'has' if len(idle) == 1 else 'have'} no effect, no client has such examples")
    places = {"val": ("validation",), "test": ("test_samples", "test_share")}
    for part in sorted(task.splits.given):
        idle = [f"clients.{key}" for key in places[part] if study.given(f"clients.{key}")]
        giver = "the data have" if part == "val" and task.dataset.val_train is not None else "the partition gives"
        notes += [f"{place}: has no effect, {giver} each client's {part} part" for place in idle]
    return [*notes, *_idle_root(study.data)]


def _idle_root(data: Data) -> list[str]:
    """Say where nothing reads the folder that is given."""
    source = SOURCES.get(data.name)
    if data.root is None:
        return []
    if source and "root" not in inspect.signature(source).parameters:
        return [f"data.root: has no effect, {data.name} is not read from a folder"]
    if is_factory(data.name) and data.own is None and not takes(data.name, "root"):  # own: it may be on devices alone
        return [f"data.root: has no effect, {data.name} has no parameter root"]
    return []
