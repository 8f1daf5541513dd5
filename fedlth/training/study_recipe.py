"""From the train and personalise sections of a study to the recipes of its two steps."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from fedlth.data.dataset import Dataset
from fedlth.data.examples import Examples
from fedlth.errors import StudyError
from fedlth.study import schema, sections
from fedlth.study.parts import imported, make, options_given, options_of
from fedlth.training.budget import Budget
from fedlth.training.dp_sgd import DpSgd
from fedlth.training.loss import CrossEntropy, Loss, MeanSquaredError, OfBatch, examined, plain
from fedlth.training.pull import NO_PULL
from fedlth.training.rate_schedule import RateSchedule
from fedlth.training.recipe import PARTS, TrainingRecipe

ANY_CLASSES = 2**31  # before the data are known, no token of masked_lm is out of range
HAS = {
    "optimizer": "memory(like)", "schedule": "__call__(step, steps)", "loss": "__call__(outputs, y)",
    "pull": "__call__(grad, weights, anchor)", "augment": "__call__(x, generator)",
}  # fmt: skip


def budget_of(section: sections.Train | sections.Personalise) -> Budget:
    return Budget(epochs=section.epochs or 0, steps=section.steps or 0)


def recipe_of(train: sections.Train, num_classes: int | None, targets: str, where: str = "train") -> TrainingRecipe:
    """Build the parts that a train section names; raise StudyError naming the place."""
    optimizer = dict(train.optimizer)
    for key in ("momentum", "weight_decay"):
        if short := getattr(train, key):
            optimizer[key] = short
    return TrainingRecipe(
        budget=budget_of(train), batch_size=train.batch_size, lr=train.lr,
        optimizer=part("optimizer", optimizer, where), schedule=part("schedule", train.schedule, where),
        loss=loss_of(train.loss, num_classes, targets, where), clip_norm=train.clip_norm,
        pull=NO_PULL if train.pull is None else part("pull", train.pull, where),
        augment=tuple(part("augment", one, where) for one in train.augment),
        dropout=train.dropout, precision=train.precision, group_by_length=train.group_by_length,
    )  # fmt: skip


def personal(study: schema.Study) -> sections.Train:
    """Return what a training of step 2 is as a train section: personalise's keys, and train's where it has none."""
    p, keys = study.personalise, sections.Train.model_fields.keys() & sections.Personalise.model_fields.keys()
    given = {key: getattr(p, key) for key in keys if getattr(p, key) is not None}
    if "optimizer" in given:  # with it go the options of the other one
        given = {"momentum": 0.0, "weight_decay": 0.0, **given}
    elif study.train.optimizer.get("name") == "sgd":  # a short form takes the place of train's option, 0 too
        given["optimizer"] = {key: value for key, value in study.train.optimizer.items() if key not in given}
    return study.train.model_copy(update={**given, "epochs": p.epochs, "steps": p.steps})


def recipes(
    study: schema.Study, num_classes: int | None = None, targets: str = "classes"
) -> tuple[TrainingRecipe, TrainingRecipe]:
    """Return the recipes of step 1 (in its first round) and of step 2; what the targets are decides the usual loss.

    num_classes: None before the data are known, for a study's check alone.
    """
    second = personal(study)
    if study.train.round_schedule is not None:
        round_schedule(study.train.round_schedule)  # says what is wrong with it
    for key in ("momentum", "weight_decay"):  # of another optimizer's own, 0 would change nothing
        if getattr(study.personalise, key) is not None and (name := second.optimizer.get("name")) != "sgd":
            raise StudyError(f"personalise.{key}: is an option of sgd; give {name} its own under personalise.optimizer")
    schema.check_optimizer(second, "personalise")
    own = any(getattr(study.personalise, key, None) is not None for key in HAS)
    found = (
        recipe_of(study.train, num_classes, targets),
        recipe_of(second, num_classes, targets, "personalise" if own else "train"),
    )
    dp = study.privacy.dp
    if dp is None:
        return found
    noisy = DpSgd(noise_multiplier=dp.noise_multiplier, max_grad_norm=dp.max_grad_norm, delta=dp.delta)
    return replace(found[0], dp=noisy), replace(found[1], dp=noisy)


def round_factor(train: sections.Train, round: int, rounds: int) -> float:
    """Return what the rate of a round, from 1, of a phase of so many is multiplied by."""
    factor = train.round_decay ** (round - 1)
    if train.round_schedule is not None:
        factor *= float(round_schedule(train.round_schedule)(round - 1, rounds))
    return factor


def round_schedule(spec: Mapping[str, Any]) -> RateSchedule:
    found: RateSchedule = part("schedule", spec, "train", key="round_schedule")
    return found


@dataclass(frozen=True)
class Unbuilt:
    """Stands for a loss of the user's that is built once the data say how many classes there are."""

    name: str

    def __call__(self, outputs: Tensor, y: Tensor) -> Tensor:
        raise TypeError(f"{self.name} needs the number of classes, which is not known yet")


def loss_of(
    spec: Mapping[str, Any] | None, num_classes: int | None, targets: str = "classes", where: str = "train"
) -> Loss:
    """Build a loss; your own may be a plain function of (outputs, y). None: the usual one for such targets.

    A loss with an option num_classes is given it. Of the user's only the options are looked at where it is not known.
    """
    if spec is None:
        return MeanSquaredError() if targets == "numbers" else CrossEntropy()
    name, place = str(spec.get("name")), f"{where}.loss"
    factory: Any = imported(name, place) if ":" in name else PARTS["loss"].get(name)
    known = _known(factory)
    classes = {"num_classes": ANY_CLASSES if num_classes is None else num_classes} if "num_classes" in known else {}
    given = {**classes, **spec}
    function = inspect.isfunction(factory) and _of_batch(known, given)
    if function:
        known = dict(list(known.items())[2:])
    unbuilt = bool(classes) and num_classes is None and ":" in name
    if unbuilt or function:
        options = options_given(known, given, place)
        if unbuilt:
            return Unbuilt(name)
        found: Loss = _hashable(OfBatch(factory, tuple(sorted(options.items()))), given, place)
        return found
    found = part("loss", given, where)
    return found


def _known(factory: Any) -> dict[str, inspect.Parameter]:
    """Return the options of what may be a factory; none where it does not say."""
    try:
        return options_of(factory) if callable(factory) else {}
    except (TypeError, ValueError):
        return {}


def _of_batch(known: Mapping[str, inspect.Parameter], spec: Mapping[str, Any]) -> bool:
    """Say whether the first two parameters of a function are left for outputs and y: else it makes a loss."""
    places = [k for k, p in known.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [k for k in places if known[k].default is inspect.Parameter.empty and k not in spec]
    return len(needed) > 1 and needed[:2] == places[:2]


def shown_by(study: schema.Study, dataset: Dataset) -> Callable[[Examples], Examples]:
    """Return what makes of examples that which the study's network is given of them: tokens hidden, say."""
    return partial(_shown, study.train.loss, dataset.num_classes, dataset.targets)


def _shown(spec: Mapping[str, Any] | None, num_classes: int, targets: str, examples: Examples) -> Examples:
    return examined(plain(loss_of(spec, num_classes, targets)), examples)


def part(kind: str, spec: Mapping[str, Any], where: str, *, key: str = "") -> Any:
    """Build one part, named by `key` of a section where that is not its kind."""
    place = f"{where}.{key or kind}"
    return _hashable(make(PARTS[kind], spec, place, has=HAS[kind]), spec, place)


def _hashable(found: Any, spec: Mapping[str, Any], place: str) -> Any:
    """Return a part, which must be a frozen value, since recipes are compared; raise StudyError where it is none."""
    try:
        hash(found)
    except TypeError as error:
        raise StudyError(f"{place}: {spec.get('name')} must be a frozen value that can be hashed: {error}") from error
    return found
