"""From the train and personalise sections of a study to the recipes of its two steps."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

from fedlth.data.dataset import Dataset
from fedlth.data.examples import Examples
from fedlth.errors import StudyError
from fedlth.study import schema, sections
from fedlth.study.parts import imported, make, options_of
from fedlth.training.budget import Budget
from fedlth.training.loss import CrossEntropy, Loss, MeanSquaredError, OfBatch, examined, plain
from fedlth.training.pull import NO_PULL
from fedlth.training.recipe import PARTS, TrainingRecipe

ANY_CLASSES = 2**31  # before the data are known, no token is out of range
HAS = {
    "optimizer": "memory(like)", "schedule": "__call__(step, steps)", "loss": "__call__(outputs, y)",
    "pull": "__call__(grad, weights, anchor)", "augment": "__call__(x, generator)",
}  # fmt: skip


def budget_of(section: sections.Train | sections.Personalise) -> Budget:
    return Budget(epochs=section.epochs or 0, steps=section.steps or 0)


def recipe_of(train: sections.Train, num_classes: int, targets: str, where: str = "train") -> TrainingRecipe:
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
    study: schema.Study, num_classes: int = ANY_CLASSES, targets: str = "classes"
) -> tuple[TrainingRecipe, TrainingRecipe]:
    """Return the recipes of step 1 (in its first round) and of step 2; what the targets are decides the usual loss."""
    second = personal(study)
    for key in ("momentum", "weight_decay"):  # of another optimizer's own, 0 would change nothing
        if getattr(study.personalise, key) is not None and (name := second.optimizer.get("name")) != "sgd":
            raise StudyError(f"personalise.{key}: is an option of sgd; give {name} its own under personalise.optimizer")
    schema.check_optimizer(second, "personalise")
    own = any(getattr(study.personalise, key, None) is not None for key in HAS)
    return recipe_of(study.train, num_classes, targets), recipe_of(
        second, num_classes, targets, "personalise" if own else "train"
    )


def loss_of(spec: Mapping[str, Any] | None, num_classes: int, targets: str = "classes", where: str = "train") -> Loss:
    """Build a loss; your own may be a plain function of (outputs, y). None: the usual one for such targets."""
    if spec is None:
        return MeanSquaredError() if targets == "numbers" else CrossEntropy()
    name = str(spec.get("name"))
    factory = imported(name, f"{where}.loss") if ":" in name else PARTS["loss"].get(name)
    if inspect.isfunction(factory) and len(_required(factory)) == 2:
        return OfBatch(factory)
    takes = factory is not None and callable(factory) and "num_classes" in options_of(factory)
    found: Loss = part("loss", {"num_classes": num_classes, **spec} if takes else spec, where)
    return found


def shown_by(study: schema.Study, dataset: Dataset) -> Callable[[Examples], Examples]:
    """Return what makes of examples that which the study's network is given of them: tokens hidden, say."""
    return partial(_shown, study.train.loss, dataset.num_classes, dataset.targets)


def _shown(spec: Mapping[str, Any] | None, num_classes: int, targets: str, examples: Examples) -> Examples:
    return examined(plain(loss_of(spec, num_classes, targets)), examples)


def part(kind: str, spec: Mapping[str, Any], where: str) -> Any:
    """Build one part; it must be a frozen value, since recipes are compared."""
    place = f"{where}.{kind}"
    found = make(PARTS[kind], spec, place, has=HAS[kind])
    try:
        hash(found)
    except TypeError as error:
        raise StudyError(f"{place}: {spec.get('name')} must be a frozen value that can be hashed: {error}") from error
    return found


@cache
def _required(function: Any) -> tuple[str, ...]:
    parameters = inspect.signature(function).parameters.values()
    return tuple(
        p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    )
