"""HeteroFL: a client of less capacity trains the first channels of every layer; who holds a weight averages it.

Diao, Ding, Tarokh. HeteroFL: Computation and Communication Efficient Federated Learning for Heterogeneous Clients.
ICLR 2021, arXiv 2010.01264.

A client's rate is its tier's `width` (clients.capacity). Sub-models are masks over the full-size network here: bytes
are those of the slice, FLOPs "by what is alive" are those of the narrow network, which a device would really build;
memory and time of a simulation are the wide one's. Channels that a group norm treats together come and go together, so
that a width is rounded up to whole groups. "Static" BatchNorm: running statistics are never averaged (model.buffers:
local_statistics); the paper's last query for global ones is left out, so that every client is evaluated with its own
statistics, and an unseen one with none. That only owners of a label upload its row tells the server their labels.

The Scaler is meant for networks with a norm behind each layer, which undoes it. Without norms (LeNet-5) the activations
of a narrow client grow by 1 / width a layer while it trains, and not when it is evaluated: trainings diverge at rates
that FedAvg bears, and narrow sub-models are judged at another scale than they learnt at; `scaler: false` is better.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedlth.methods.client_update import UPDATE, Inbox, MaskedUpdate, Update
from fedlth.methods.method import FederatedMethod, Phase
from fedlth.methods.options import BY_HOLDERS, OWN
from fedlth.models.layout import Params
from fedlth.storage.client_state import ClientState
from fedlth.training.flat_model import FlatModel
from fedlth.training.local_client import LocalClient
from fedlth.training.loss import IGNORED, CrossEntropy
from fedlth.training.recipe import TrainingRecipe
from fedlth.training.task import Task
from fedlth.training.view import Given, Gradient, elementwise
from fedlth.wire.payload import Content


@dataclass(frozen=True)
class WidthPrefix:
    """The sub-model of a client's width: the first channels of every layer, the ceiling of its share."""

    def __call__(self, task: Task, client: int, /) -> np.ndarray:
        return task.model.channels.prefix(task.layout, task.capacity(client).width)


@dataclass(frozen=True)
class Scaled:
    """The tensors `names` as `factor` times what is trained: a Scaler behind each layer, in training alone."""

    names: tuple[str, ...]
    factor: float

    @contextmanager
    def opened(self, model: FlatModel, request: Given, /) -> Iterator[Gradient]:
        values = np.ones(model.layout.num_params, np.float32)
        for e in model.layout.floats:
            if e.name in self.names:
                values[e.slice] = self.factor
        scale = model.arranged(values)
        yield elementwise(lambda weights: weights * scale, lambda weights: scale)

    def used(self, alive: np.ndarray, request: Given, /) -> Iterable[tuple[np.ndarray, int]]:
        yield alive, request.num_examples


@dataclass(frozen=True)
class ZeroFilled:
    """A loss of logits in which those outside a client's own `classes` are zero; they count, and have no gradient."""

    inner: CrossEntropy
    classes: tuple[int, ...]

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        absent = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
        absent[list(self.classes)] = False
        return self.inner(logits.masked_fill(absent, 0.0), y)


@dataclass(frozen=True)
class NarrowUpdate(MaskedUpdate):
    """Train the sub-model, the logits of absent labels zero; send it without the rows of classes that are not there."""

    scaler: bool = True
    masked_loss: bool = True
    own_rows: bool = True

    def __call__(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Update:
        update, task = MaskedUpdate.__call__(self, local, inbox, state), local.task
        content, classes = update.contents[UPDATE], own_classes(local)
        if not self.own_rows or task.dataset.targets != "classes" or len(classes) == task.dataset.num_classes:
            return update
        assert content.floats is not None and content.ints is not None
        mask = content.mask & task.shared_mask(task.model.channels.rows(task.layout, classes))
        sent = Params(content.floats, content.ints).masked(mask)
        return replace(update, contents={UPDATE: Content(mask, sent.floats, sent.ints)})

    def recipe(self, local: LocalClient, recipe: TrainingRecipe, /) -> TrainingRecipe:
        width, classes, loss = local.capacity.width, own_classes(local), recipe.loss
        if self.scaler and width < 1:
            recipe = replace(recipe, view=Scaled(local.task.model.channels.sliced, 1 / width))
        if self.masked_loss and isinstance(loss, CrossEntropy) and len(classes) < local.task.dataset.num_classes:
            recipe = replace(recipe, loss=ZeroFilled(loss, classes))
        return recipe


def own_classes(local: LocalClient) -> tuple[int, ...]:
    """Return the labels of a client's training examples, sorted."""
    return tuple(int(label) for label in np.unique(local.train_part.y.cpu().numpy()) if label != IGNORED)


def heterofl(scaler: bool = True, masked_loss: bool = True, own_rows: bool = True) -> FederatedMethod:
    update = NarrowUpdate(scaler=scaler, masked_loss=masked_loss, own_rows=own_rows)
    phase = Phase(name="federate", update=update, join=BY_HOLDERS, down="slice", own_mask=True, remembers=False)
    return FederatedMethod(
        name="heterofl", paper="Diao et al., ICLR 2021, arXiv 2010.01264",
        summary="clients train the first channels of every layer, as many as they can carry; holders average a weight",
        phases=(phase,), arms=(*OWN, "own_random"), prunable=("*",), buffers="local_statistics",
        first_mask=WidthPrefix(), reads_capacity=True,
    )  # fmt: skip
