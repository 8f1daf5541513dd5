"""FjORD: ordered dropout. Each step trains the first channels of every layer, of a width drawn up to the client's own.

Horvath, Laskaridis, Almeida, Leontiadis, Venieris, Lane. FjORD: Fair and Accurate Federated Learning under
heterogeneous targets with Ordered Dropout. NeurIPS 2021, arXiv 2102.13451.

A client's widest sub-model is the largest of `widths` that its tier's `width` (clients.capacity) holds; it is sent that
slice and sends it back. (The Flower port sends the whole model back, and what it received once more among its metrics.)
Momentum runs through the steps of all widths, weights that a step leaves out have no gradient in it, and still decay.
The paper keeps norm statistics for each width; here a client has one set of its own, which mixes them: group norms fit
better. `distil` above 0: each step also trains the widest sub-model, and the drawn one learns from its outputs by that
share (temperature 1), from the labels by the rest. What is said of masks and devices in heterofl.py holds here too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor
from torch.nn import functional

from fedlth.errors import wrong
from fedlth.methods.aggregate import CountMean
from fedlth.methods.client_update import MaskedUpdate
from fedlth.methods.method import FederatedMethod, Phase
from fedlth.methods.options import OWN, check
from fedlth.training.flat_model import FlatModel
from fedlth.training.local_client import LocalClient
from fedlth.training.loss import Loss
from fedlth.training.recipe import TrainingRecipe
from fedlth.training.task import Task
from fedlth.training.view import Ask, Given, Gradient


@dataclass(frozen=True)
class WidestPrefix:
    """The widest sub-model that a client carries, of those of `widths`, sorted."""

    widths: tuple[float, ...]

    def __call__(self, task: Task, client: int, /) -> np.ndarray:
        carried = carried_widths(self.widths, task.capacity(client).width)
        return task.model.channels.prefix(task.layout, carried[-1])


def carried_widths(widths: Sequence[float], width: float) -> tuple[float, ...]:
    """Return the widths up to a tier's own; raise StudyError where there are none."""
    found = tuple(one for one in widths if one <= width + 1e-9)
    if not found:
        raise wrong("clients.capacity: width", f"at least {min(widths):g}, the least of method.widths", width)
    return found


@dataclass(frozen=True)
class Distilled:
    """Of the loss, `1 - share`; the rest is the divergence from what a teacher puts out, logits (N, ..., C)."""

    inner: Loss
    teacher: Tensor
    share: float

    def __call__(self, outputs: Tensor, y: Tensor) -> Tensor:
        ours, theirs = (functional.log_softmax(one.flatten(0, -2), -1) for one in (outputs, self.teacher))
        apart = functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)
        return (1 - self.share) * self.inner(outputs, y) + self.share * apart


@dataclass(frozen=True)
class OrderedDropout:
    """A mask a step: `masks` are packed bits over the prunable weights, narrow to wide, `order` which a step has."""

    masks: tuple[bytes, ...]
    order: tuple[int, ...]
    distil: float = 0.0

    def _kept(self, size: int) -> list[np.ndarray]:
        return [np.unpackbits(np.frombuffer(bits, np.uint8), count=size).astype(bool) for bits in self.masks]

    @contextmanager
    def opened(self, model: FlatModel, request: Given, /) -> Iterator[Gradient]:
        layout, loss = model.layout, request.recipe.loss
        kept = [
            model.arranged(layout.over_params(mask).astype(np.float32)) for mask in self._kept(layout.num_prunable)
        ]  # fmt: skip

        def gradient(weights: Tensor, step: int, ask: Ask, /) -> tuple[Tensor, float]:
            mask, widest = kept[self.order[step]], kept[-1]
            if not self.distil:
                found = ask(weights * mask)
                return found.gradient.mul_(mask), found.loss
            whole = ask(weights * widest)
            found = ask(weights * mask, Distilled(loss, whole.outputs, self.distil))
            return whole.gradient.mul_(widest).add_(found.gradient.mul_(mask)), found.loss

        yield gradient

    def used(self, alive: np.ndarray, request: Given, /) -> Iterable[tuple[np.ndarray, int]]:
        kept, seen = self._kept(alive.size), [0] * len(self.masks)
        parts = [part for epoch in request.batches for part in epoch]
        for step, part in enumerate(parts, request.recipe.first_step):
            seen[self.order[step]] += len(part)
        if self.distil:
            yield alive & kept[-1], request.num_examples
        yield from ((alive & mask, examples) for mask, examples in zip(kept, seen, strict=True))


@dataclass(frozen=True)
class OrderedUpdate(MaskedUpdate):
    """Train the client's widest sub-model, a drawn width a step; send it. With one width there is nothing to draw."""

    widths: tuple[float, ...] = (1.0,)
    distil: float = 0.0

    def recipe(self, local: LocalClient, recipe: TrainingRecipe, /) -> TrainingRecipe:
        carried, task = carried_widths(self.widths, local.capacity.width), local.task
        if len(carried) == 1:
            return recipe
        masks = (np.packbits(task.model.channels.prefix(task.layout, width)).tobytes() for width in carried)
        steps = recipe.budget.total(local.num_train, recipe.batch_size)
        order = local.rng("widths").integers(0, len(carried), steps)
        return replace(recipe, view=OrderedDropout(tuple(masks), tuple(map(int, order)), self.distil))


def fjord(widths: Sequence[float] = (0.2, 0.4, 0.6, 0.8, 1.0), distil: float = 0.0) -> FederatedMethod:
    fit = isinstance(widths, (list, tuple)) and bool(widths) and all(
        isinstance(one, (int, float)) and not isinstance(one, bool) and 0 < one <= 1 for one in widths
    ) and len(set(widths)) == len(widths)  # fmt: skip
    if not fit:
        raise wrong("method.widths", "a list of different numbers in (0, 1]", widths)
    check(distil=(distil, 0 <= distil <= 1, "in [0, 1]"))
    ordered = tuple(sorted(map(float, widths)))
    phase = Phase(
        name="federate", update=OrderedUpdate(widths=ordered, distil=distil), join=CountMean(weighted=True),
        down="slice",
    )  # fmt: skip
    return FederatedMethod(
        name="fjord", paper="Horvath et al., NeurIPS 2021, arXiv 2102.13451",
        summary="each step trains the first channels of every layer, of a width drawn up to what the client carries",
        phases=(phase,), arms=(*OWN, "own_random"), prunable=("*",), buffers="local_statistics",
        first_mask=WidestPrefix(ordered), reads_capacity=True,
    )  # fmt: skip
