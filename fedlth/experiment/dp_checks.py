"""What `privacy.dp` asks of a study: that nothing but noisy steps looks at training examples.

A client refuses whatever else would look (`LocalClient`); here a study is refused before anything runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from fedlth.data.examples import Examples
from fedlth.data.tensors import inputs
from fedlth.errors import StudyError, require
from fedlth.experiment.experiment import Experiment
from fedlth.models.initial import torch_stream
from fedlth.personalization.newcomer import LabelHistogram
from fedlth.tickets.learned import Bernoulli, Biprop, EdgePopup
from fedlth.tickets.sensitivity import Fisher, GradientWeight, Grasp, Snip
from fedlth.training import dropout
from fedlth.training.dp_sgd import EXTRA, DpSgd, each_gradient, sampled
from fedlth.training.dropout import at_rate
from fedlth.training.flat_model import FlatModel
from fedlth.training.loss import restricts
from fedlth.training.study_recipe import recipes
from fedlth.training.task import Task

LOOKING = (Snip, GradientWeight, Grasp, Fisher, EdgePopup, Biprop, Bernoulli)  # scores that ask for the loss
TOLERANCE = 1e-3  # of an example's gradient against its own, relative to the largest number in it
LABELS = "clients send which classes they have, without noise"
GRADIENTS = "clients send or use gradients without noise"
MASKS = "clients learn masks, without noise"
VIEWS = "the network sees something else than the weights that are trained"
# Of the methods here; one of the user's is refused by its clients, when they look.
METHODS: Mapping[str, str] = {
    "apfl": "two models are mixed in one training",
    "pfedme": "it takes every batch several times in a row, which are no samples of their own",
    "heterofl": LABELS,
    "ticket_lora": "its adapters are pruned by a gradient without noise",
    "sub_fedavg_hybrid": "it runs the network on training examples to see what follows what",
    **dict.fromkeys(("salientgrads", "ssfl", "prunefl", "fedtiny", "feddst", "flash", "fedspa", "dispfl"), GRADIENTS),
    **dict.fromkeys(("fedpm", "fedmask", "deltamask", "spafl", "pfedgate"), MASKS),
    **dict.fromkeys(("fjord", "fiarse", "sparsyfed"), VIEWS),
}


def check_dp(experiment: Experiment) -> list[str]:
    """Return notes on what is noisy and what is not; raise StudyError where a study's epsilon would not hold."""
    study = experiment.study
    if study.privacy.dp is None:
        return []
    require("privacy.dp", "opacus", extra=EXTRA)
    for place, why in _unfit(experiment):
        raise StudyError(f"{place} with privacy.dp: {why}")
    for task in experiment.task.each:
        _check_task(task)
    dp = recipes(study)[0].dp
    assert dp is not None
    _check_delta(experiment, dp)
    return [
        f"privacy.dp: all local training is noisy ({dp.noise_multiplier:g} x {dp.max_grad_norm:g}), on Poisson "
        "batches, in torch; the run's privacy.json will hold each client's epsilon. Not covered: validation and test "
        "examples, whose scores leave the client, and how many examples it has. Seeded noise is no secure randomness"
    ]


def _unfit(experiment: Experiment) -> Iterator[tuple[str, str]]:
    """Yield (place, why) of each part that would look at training examples without noise."""
    study, finder = experiment.study, experiment.finder
    if why := METHODS.get(experiment.method.name):
        yield f"method: must not be {experiment.method.name}", why
    score: Any = finder.score
    while hasattr(score, "of"):
        score = score.of
    if isinstance(score, LOOKING):
        yield f"finder.score: must not be {type(score).__name__}", "it looks at the loss of training examples"
    regrow = getattr(finder.schedule, "regrow", None)
    if regrow is not None and regrow.by == "gradient":
        yield "finder.schedule.by: must be random", "weights come back by a gradient without noise"
    if isinstance(experiment.newcomer, LabelHistogram):
        yield "clients.newcomer: must be another", LABELS
    for place, recipe in zip(("train", "personalise"), recipes(study), strict=True):
        if not hasattr(recipe.loss, "examples") or hasattr(recipe.loss, "posed"):
            yield (
                f"{place}.loss: must be another",
                f"{type(recipe.loss).__name__} does not tell each example's own loss",
            )
        if restricts(recipe.loss):
            yield f"{place}.loss.classes: must be all", "which classes a client has would decide what trains"
        if recipe.precision != "float32":
            yield f"{place}.precision: must be float32", "examples' gradients are taken in it"
        if recipe.group_by_length:
            yield f"{place}.group_by_length: must be false", "batches are random samples"


def _check_delta(experiment: Experiment, dp: DpSgd) -> None:
    sizes = {client: len(split.train) for client, split in enumerate(experiment.task.splits.clients)}
    client = max(sizes, key=lambda one: sizes[one])
    if dp.delta >= 1 / sizes[client]:
        raise StudyError(
            f"privacy.dp.delta: must be below 1 / {sizes[client]} = {1 / sizes[client]:.2g}, the training examples of "
            f"client {client}: else an example may be published whole; got {dp.delta:g}"
        )


def _check_task(task: Task) -> None:
    """Refuse a network whose examples' gradients opacus cannot tell apart, by its own rules and by trial."""
    from opacus.validators import ModuleValidator

    place = f"model: {task.study.model.name} cannot be trained with privacy.dp:"
    model, recipe = task.flat_model, recipes(task.study, task.dataset.num_classes, task.dataset.targets)[0]
    for name, layer in model.module.named_modules():
        refuses = ModuleValidator.VALIDATORS.get(type(layer))
        if refuses is not None and (errors := refuses(layer.train())):
            raise StudyError(f"{place} layer {name or 'itself'}: {' '.join(str(errors[0]).split())}")
    few = inputs(task.dataset, task.few, train=True).batch(slice(None)).to(task.device)
    with model.lock, torch_stream(0), at_rate(model.module, 0.0 if dropout.places(model.module) else None):
        model.load(task.theta_0)
        model.module.train()
        try:
            with sampled(model):
                together = each_gradient(model, recipe.loss, few)[0]
                alone = torch.stack([_alone(model, recipe.loss, few.batch(slice(i, i + 1))) for i in range(len(few))])
        except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError) as error:
            raise StudyError(f"{place} {type(error).__name__}: {' '.join(str(error).split())}") from error
        moved = model.save()
    if not np.array_equal(moved.floats, task.theta_0.floats) or not np.array_equal(moved.ints, task.theta_0.ints):
        raise StudyError(f"{place} its forward pass changes a buffer, without noise")
    off = float((together - alone).abs().max()) / max(1e-12, float(alone.abs().max()))
    if not off <= TOLERANCE:
        raise StudyError(
            f"{place} opacus' gradients of single examples differ from their own by {off:.2g} of the largest"
        )


def _alone(model: FlatModel, loss: Any, one: Examples) -> torch.Tensor:
    """Return torch's own gradient of one example, (P,)."""
    model.grad.zero_()
    each_gradient(model, loss, one)
    return model.grad.clone()
