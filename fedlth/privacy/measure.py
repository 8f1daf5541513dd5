"""What is measured of one client: a shadow's masks, or a victim's masks, tickets and losses. The work of an audit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import torch

from fedlth.data.examples import Examples
from fedlth.experiment.saved_ticket import kept_ticket
from fedlth.methods.defence import Defence
from fedlth.models.layout import Params
from fedlth.personalization.step2 import Step2
from fedlth.privacy.coarse import coarse
from fedlth.privacy.defended import common_mask, defences, flipped
from fedlth.privacy.shadows import present, shadow_task
from fedlth.privacy.subject import Subject, subject_of
from fedlth.rng import stream
from fedlth.storage.audit_records import COARSE, COMMON, NONE, PRIVATE
from fedlth.training.evaluation import EVALUATION_BATCH
from fedlth.training.flat_model import FlatModel
from fedlth.training.loss import CrossEntropy
from fedlth.training.metrics import METRICS
from fedlth.training.task import Task

Arrays = dict[str, np.ndarray]
PRESENT, AGAIN = "present", "second search"


@lru_cache(maxsize=1)
def shadows_of(run: str, count: int) -> Task:
    """Return the task of a run's shadow clients; kept, so that forked workers have it from their parent."""
    subject = subject_of(run)
    return shadow_task(subject.task, subject.header.seed, count)


def measured(run: str, num_shadows: int, kind: str, number: int) -> Arrays:
    """Return what a client's file holds; a pure function of the run, the kind and the number."""
    subject = subject_of(run)
    if kind == "shadow":
        return _shadow(subject, shadows_of(run, num_shadows), number)
    return _victim(subject, number)


def _shadow(subject: Subject, task: Task, number: int) -> Arrays:
    """Find a shadow's masks: from the shared weights, coarse ones, and from weights of its own."""
    found = {PRESENT: present(task, number)}
    step = subject.step(task, number, "audit/shadow")
    masks = {
        NONE: subject.mask(step),
        COARSE: subject.mask(step, coarse(subject.finder, task.layout)),
        PRIVATE: _private_mask(subject, task, number, "audit/shadow"),
    }
    return found | _packed(masks)


def _victim(subject: Subject, client: int) -> Arrays:
    """Find a victim's masks again, train under each defended one, and judge what the ticket says of its examples."""
    task, seed, layout = subject.task, subject.header.seed, subject.task.layout
    step = subject.step(task, client, "personalise")
    own = subject.mask(step) if subject.defence is not None else subject.states[client].masks["ticket"]
    masks: dict[str, np.ndarray | None] = {
        NONE: own,
        AGAIN: subject.mask(subject.step(task, client, "audit/again")),
        COARSE: subject.mask(step, coarse(subject.finder, layout)),
    }
    found = {PRESENT: present(task, client), **_losses(subject, step, client)}
    table: Mapping[str, Defence] = defences(subject)
    under = {NONE: own, COMMON: common_mask(subject), COARSE: masks[COARSE]}
    if own is not None:
        under |= {name: flipped(one, name, own, seed, "victim", client) for name, one in table.items()}
    for name, mask in under.items():
        if mask is not None:
            found[f"price {name}"] = _price(subject, step, mask)
    private = _private(subject, task, client, "audit/victim")
    if private is not None:
        masks[PRIVATE] = subject.mask(private)
        if (mask := masks[PRIVATE]) is not None:
            found[f"price {PRIVATE}"] = _price(subject, private, mask)
    return found | _packed(masks)


def _packed(masks: Mapping[str, np.ndarray | None]) -> Arrays:
    return {f"mask {name}": np.packbits(mask) for name, mask in masks.items() if mask is not None}


def _private(subject: Subject, task: Task, client: int, stage: str) -> Step2 | None:
    """Return a client's step 2 from a draw of its own in place of all shared weights; None where none can be drawn."""
    if task.model.brought:
        return None
    theta = task.model.fresh(f"{stage}/private", client=client)
    return subject.step(task, client, f"{stage}/private", theta=theta)


def _private_mask(subject: Subject, task: Task, client: int, stage: str) -> np.ndarray | None:
    step = _private(subject, task, client, stage)
    return None if step is None else subject.mask(step)


def _price(subject: Subject, step: Step2, mask: np.ndarray) -> np.ndarray:
    """Return density, and test accuracy (NaN where the training diverged), (2,) float64."""
    result, local = subject.under(step, mask), step.local
    accuracy = math.nan
    if not result.diverged:
        part = local.task.part(local.client, "test")
        accuracy = local.evaluate(result.params, part, (METRICS["accuracy"],)).metrics["accuracy"]
    return np.array([np.count_nonzero(mask) / mask.size, accuracy])


def _losses(subject: Subject, step: Step2, client: int) -> Arrays:
    """Return each example's loss under the kept ticket, its dense twin and the global model: members and others."""
    task = subject.task
    member, other = matched(task, client, subject.header.seed)
    parts = {"member": task.part(client, "train").batch(torch.from_numpy(member))}
    parts["other"] = task.part(client, "test").batch(torch.from_numpy(other))
    if not len(member):
        return {}
    models: dict[str, Params] = {"global": step.theta_g, "ticket": kept_ticket(task, subject.states[client])[0]}
    twin = subject.dense_twin(step)
    if not twin.diverged:
        models["dense twin"] = twin.params
    return {
        f"loss {name} {side}": losses(task.flat_model, params, part)
        for name, params in models.items()
        for side, part in parts.items()
    }


def matched(task: Task, client: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return positions in a client's training part and in its test part: as many of each class, at random."""
    split, rng = task.splits.clients[client], stream(seed, "audit/members", client=client)
    y_test = task.dataset.y_train if task.splits.own_test else task.dataset.y_test
    own, others = task.dataset.y_train[split.train], y_test[split.test]
    found: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for label in range(task.dataset.num_classes):
        here, there = np.flatnonzero(own == label), np.flatnonzero(others == label)
        count = min(len(here), len(there))
        for side, pool in zip(found, (here, there), strict=True):
            side.append(np.sort(rng.permutation(pool)[:count]))
    member, other = (np.concatenate(side) for side in found)
    return member, other


def losses(model: FlatModel, params: Params, data: Examples) -> np.ndarray:
    """Return the cross-entropy of each example, (n,) float32, in evaluation mode."""
    loss, found = CrossEntropy(), []
    with model.lock, torch.inference_mode():
        model.load(params)
        model.module.eval()
        data = model.forward.images(data)
        for at in range(0, len(data), EVALUATION_BATCH):
            part = data.batch(slice(at, at + EVALUATION_BATCH))
            found.append(loss.examples(model.forward.evaluate(part.x), part.y).cpu().numpy())
    return np.concatenate(found)
