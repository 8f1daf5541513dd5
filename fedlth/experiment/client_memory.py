"""Does a client's training fit its tier's memory (clients.capacity.memory_mb)? An estimate, told before a run."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedlth.data.capacity import named
from fedlth.data.examples import tensors
from fedlth.data.tensors import inputs
from fedlth.experiment.experiment import Experiment
from fedlth.models.call import call
from fedlth.models.initial import torch_stream
from fedlth.training.study_recipe import recipes
from fedlth.training.task import Task


def training_mb(task: Task, density: float = 1.0) -> float:
    """Return the MB of a client's training: weights, gradients and the optimizer's memory, and one batch.

    Of prunable weights only what a density keeps is counted: a device that stores zeros needs the dense size.
    A batch is its inputs and what every layer puts out, which stays until the gradient has come back to it.
    """
    train = task.study.train
    kept = task.layout.num_floats - (1 - density) * task.layout.num_prunable
    vectors = 2 + len(
        recipes(task.study, task.dataset.num_classes, task.dataset.targets)[0].optimizer.memory(torch.zeros(1))
    )
    return (4 * vectors * kept + train.batch_size * _example_bytes(task)) / 1e6


def _example_bytes(task: Task) -> int:
    """Return the bytes of one example and of the outputs of the layers that it passes."""
    x = inputs(task.dataset, task.few[:1], train=True).x
    found = [t.numel() * t.element_size() for t in tensors(x)]

    def note(part: nn.Module, given: object, output: object) -> None:
        found.extend(t.numel() * t.element_size() for t in _tensors(output))

    with torch_stream(0), torch.no_grad():
        module = task.model.module().eval()
        for part in module.modules():
            if not any(True for _ in part.children()):
                part.register_forward_hook(note)
        call(module, x)
    return sum(found)


def _tensors(output: object) -> list[Tensor]:
    if isinstance(output, (tuple, list)):
        return [tensor for part in output for tensor in _tensors(part)]
    return [output] if isinstance(output, Tensor) else []


def notes(experiment: Experiment) -> list[str]:
    """Return a note for every tier whose memory does not hold a dense training, and whether its tickets would fit."""
    task, finder = experiment.task, experiment.study.finder
    held = [(name, tier) for name, tier in named(experiment.study.clients.capacity) if tier.memory_mb is not None]
    if not held:
        return []
    smallest, found = min(finder.densities), list[str]()
    # Of tasks with networks of their own, the largest.
    dense, least = (max(training_mb(one, density) for one in task.each) for density in (1.0, smallest))
    for name, tier in held:
        assert tier.memory_mb is not None
        if tier.memory_mb >= dense:
            continue
        clients = [c for c in range(experiment.study.clients.count) if task.capacity(c) == tier]
        ticket = "" if experiment.kept_arm != "ticket" else (
            f"; a ticket at density {smallest:g} takes {least:.3g} MB where zeros are not stored, which "
            f"{'fits' if tier.memory_mb >= least else 'does not fit either'}"
        )  # fmt: skip
        found.append(
            f"clients.capacity: {name}: memory_mb {tier.memory_mb:g} does not hold a dense training, which takes about "
            f"{dense:.3g} MB (weights, gradients, optimizer, one batch); so for clients {_few(clients)}{ticket}"
        )
    return found


def _few(clients: list[int]) -> str:
    return ", ".join(map(str, clients[:10])) + (", ..." if len(clients) > 10 else "")
