"""What a training recipe asks of the model, the data and the device, and whether a user's parts work: before a run."""

from __future__ import annotations

from dataclasses import replace

from fedlth.data.examples import shapes
from fedlth.data.factory import told
from fedlth.data.tensors import inputs
from fedlth.errors import StudyError
from fedlth.experiment.experiment import Experiment
from fedlth.models.call import call
from fedlth.models.initial import torch_stream
from fedlth.rng import stream
from fedlth.study.sections import Personalise, Train
from fedlth.training import dropout
from fedlth.training.budget import Budget
from fedlth.training.loss import Loss, examined
from fedlth.training.recipe import TrainingRecipe
from fedlth.training.request import drawn_request
from fedlth.training.study_recipe import recipes, round_factor
from fedlth.training.task import Task
from fedlth.training.trial_step import try_schedule, try_step


def check(task: Task) -> None:
    """Refuse what the model, the data or the device cannot do of a training recipe."""
    study, module = task.study, task.model.module()
    first, second = recipes(study, task.dataset.num_classes, task.dataset.targets)
    sections: tuple[tuple[str, Train | Personalise, TrainingRecipe], ...] = (
        ("train", study.train, first), ("personalise", study.personalise, second),
    )  # fmt: skip
    for place, section, recipe in sections:
        if section.dropout is not None and not dropout.places(module):
            raise StudyError(
                f"{place}.dropout: needs a model with a dropout module, {study.model.name} has none, got "
                f"{section.dropout}"
            )
        if section.precision == "bf16" and not task.device.startswith("cuda"):
            raise StudyError(f"{place}.precision: bf16 needs a GPU, the device is {task.device}")
        if section.augment or (place == "train" and hasattr(recipe.loss, "posed")):
            few = inputs(task.dataset, task.few[:2], train=True)
            request = drawn_request(
                task.theta_0, few, replace(recipe, budget=Budget(epochs=1)), order=stream(0, "probe"), torch_seed=0
            )
            try:
                request.shown(0, few)
            except Exception as error:  # the user's parts may raise anything
                what = "augment" if section.augment else "loss"
                raise StudyError(f"{place}.{what}: fails on a batch {shapes(few.x)}: {told(error)}") from error
    if study.personalise.loss is not None:
        _check_own_loss(task, second.loss)


def _check_own_loss(task: Task, loss: Loss) -> None:
    """Refuse a loss of step 2 that cannot judge such outputs and targets; that of step 1 the probe tries."""
    few = inputs(task.dataset, task.few, train=True).batch(slice(None))
    try:
        few = examined(loss, few)
        with torch_stream(0):
            outputs = call(task.model.module(), few.x)
        found = loss(outputs, few.y)
    except Exception as error:  # the user's code may raise anything
        what = f"a batch {shapes(few.x)} with targets {tuple(few.y.shape)} {few.y.dtype}"
        raise StudyError(f"personalise.loss: fails on {what}: {told(error)}") from error
    if found.numel() != 1 or not found.requires_grad:
        raise StudyError(f"personalise.loss: must return one number with a gradient, got {tuple(found.shape)}")


def try_own(task: Task) -> None:
    """Take a step on a few examples with each part that is the user's own; raise StudyError where one fails."""
    study = task.study
    first, second = recipes(study, task.dataset.num_classes, task.dataset.targets)
    few = inputs(task.dataset, task.few, train=True).batch(slice(None)).to(task.device)
    size = max((len(task.splits.clients[client].train) for client in task.clients), default=1)
    for place, recipe in (("train", first), ("personalise", second)):
        if place == "train" or (second.optimizer, second.pull) != (first.optimizer, first.pull):
            try_step(task.flat_model, task.theta_0, few, recipe, place)
        try_schedule(recipe.schedule, recipe.budget.total(size, recipe.batch_size), f"{place}.schedule")


def check_rounds(experiment: Experiment) -> None:
    """Refuse a schedule over the rounds that gives a round no rate: some methods divide by it."""
    train = experiment.study.train
    if train.round_schedule is None:
        return
    for phase in experiment.phases:
        for round in range(1, phase.rounds + 1) if phase.join is not None else ():
            place = f"round {round} of {phase.rounds} of {phase.name}"
            try:
                factor = float(round_factor(train, round, phase.rounds))
            except Exception as error:  # the user's code may raise anything
                raise StudyError(f"train.round_schedule: fails at {place}: {told(error)}") from error
            if not 0 < factor < float("inf"):
                raise StudyError(f"train.round_schedule: must give finite numbers above 0, got {factor} at {place}")
