"""SparsyFed: weights are powers of what is trained, so that small ones stay small; the largest few cross.

Guastella, Sani, Iacob, Mora, Bellavista, Lane. SparsyFed: Sparse Adaptive Federated Training. ICLR 2025,
arXiv 2504.05153. The re-parameterisation is Powerpropagation (Schwarz et al., NeurIPS 2021, arXiv 2110.00296).

A client trains v where the network sees w = sign(v) |v|^beta: the gradient of v is beta |v|^(beta - 1) times that of w,
so a weight of zero stays zero. Activations are pruned as they are kept for the backward pass: of each layer's input the
share that the layer's weights have of non-zeros, by magnitude, over the batch (the forward pass is exact). After the
training the client keeps the largest weights of the whole model, exactly the target, and sends them; the server
averages with zeros counted, as in FedAvg, and broadcasts the union of what came, which may hold more than the target.
What crosses and is averaged is w (v is drawn from it at each visit), not v: so every arm sees a plain model, and
theta_0 is a model of the usual size. FLOPs by what is alive do not count what pruned activations save.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fedlth.methods.client_update import VALUES, Inbox, Own, Update, visited
from fedlth.methods.global_mask import UnionMean
from fedlth.methods.method import FederatedMethod, Phase
from fedlth.methods.options import OWN, TRAIN, at_least, check, density_of
from fedlth.models.layout import Layout, Params
from fedlth.models.prunable import CONVOLUTIONS
from fedlth.storage.client_state import ClientState
from fedlth.tickets.scope import Global
from fedlth.training.flat_model import FlatModel
from fedlth.training.local_client import LocalClient
from fedlth.training.recipe import TrainingRecipe
from fedlth.training.view import Given, Gradient, elementwise


@dataclass(frozen=True)
class Power:
    """Prunable weights as sign(v) |v|^beta; with `activations`, what layers keep for the backward pass is pruned."""

    beta: float
    activations: bool

    @contextmanager
    def opened(self, model: FlatModel, request: Given, /) -> Iterator[Gradient]:
        size = model.layout.num_prunable

        def seen(weights: Tensor) -> Tensor:
            out = weights.clone()
            out[:size] = weights[:size].sign() * weights[:size].abs().pow(self.beta)
            return out

        def slope(weights: Tensor) -> Tensor:
            out = torch.ones_like(weights)
            out[:size] = self.beta * weights[:size].abs().pow(self.beta - 1)
            return out

        with pruned_activations(model.module, model.layout) if self.activations else nullcontext():
            yield elementwise(seen, slope)

    def used(self, alive: np.ndarray, request: Given, /) -> Iterable[tuple[np.ndarray, int]]:
        yield alive, request.num_examples

    def root(self, params: Params, size: int) -> Params:
        """Return what is trained for the network to see `params`, whose first `size` are prunable."""
        return _powered(params, size, 1 / self.beta)

    def power(self, params: Params, size: int) -> Params:
        """Return what the network sees of `params`."""
        return _powered(params, size, self.beta)


def _powered(params: Params, size: int, exponent: float) -> Params:
    if exponent == 1:
        return params
    floats, weights = params.floats.copy(), params.floats[:size]
    floats[:size] = np.sign(weights) * np.abs(weights) ** np.float32(exponent)
    return replace(params, floats=floats)


@contextmanager
def pruned_activations(module: nn.Module, layout: Layout) -> Iterator[None]:
    """Let convolutions and linear layers keep for the backward pass only the largest of their input.

    Of each batch as many as the share of the layer's weights that are not zero; only layers with prunable weights.
    """
    names = {name for e in layout.prunable for name in (e.name, *e.aliases)}
    inside: list[saved_tensors_hooks] = []

    def enter(layer: Any, given: tuple[Any, ...]) -> None:
        x, share = given[0], int(torch.count_nonzero(layer.weight)) / layer.weight.numel()

        def pack(saved: Tensor) -> Tensor:
            same = saved.data_ptr() == x.data_ptr() and saved.numel() == x.numel()
            return _largest(saved, share) if same else saved

        hooks = saved_tensors_hooks(pack, lambda saved: saved)
        hooks.__enter__()
        inside.append(hooks)

    def leave(layer: Any, given: tuple[Any, ...], output: Any) -> None:
        inside.pop().__exit__()

    layers = [
        part for name, part in module.named_modules()
        if isinstance(part, (nn.Linear, *CONVOLUTIONS)) and f"{name}.weight".removeprefix(".") in names
    ]  # fmt: skip
    handles = [layer.register_forward_pre_hook(enter) for layer in layers]
    handles += [layer.register_forward_hook(leave, always_call=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _largest(x: Tensor, share: float) -> Tensor:
    """Return x with all but a share of its entries zero, those of largest magnitude kept, at least one."""
    kept = max(1, round(share * x.numel()))
    if kept >= x.numel():
        return x
    flat = x.detach().reshape(-1)
    places = flat.abs().topk(kept).indices
    return torch.zeros_like(flat).index_copy_(0, places, flat[places]).view(x.shape)


@dataclass(frozen=True)
class PowerUpdate:
    """Train through the power, keep the largest weights, send them."""

    beta: float
    density: float
    activations: bool
    sends: tuple[tuple[str, str], ...] = VALUES

    def __call__(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Update:
        held = self.own(local, inbox, state)
        seen = local.visit_scores(held.params)
        made, loss = self._trained(local, held, local.recipe)
        return visited(local, state, made, {"loss": loss, **seen})

    def own(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Own:
        return TRAIN.own(local, inbox, state)

    def tune(self, local: LocalClient, inbox: Inbox, state: ClientState, recipe: TrainingRecipe, /) -> Own:
        return self._trained(local, self.own(local, inbox, state), recipe)[0]

    def recipe(self, local: LocalClient, recipe: TrainingRecipe, /) -> TrainingRecipe:
        plain = self.beta == 1 and (self.density == 1 or not self.activations)
        return recipe if plain else replace(recipe, view=Power(self.beta, self.activations))

    def _trained(self, local: LocalClient, held: Own, recipe: TrainingRecipe) -> tuple[Own, float]:
        layout, power = local.task.layout, Power(self.beta, self.activations)
        size = layout.num_prunable
        # A weight of zero has no gradient under a power; without one nothing else would let pruned weights grow back.
        active = held.mask if self.beta > 1 else None
        trained = local.train(power.root(held.params, size), recipe=self.recipe(local, recipe), active=active)
        params = power.power(trained.params, size)
        mask = Global()(np.abs(params.floats[:size]), local.full, layout, self.density)
        return Own(params.masked(mask), mask), trained.loss


def sparsyfed(density: float = 0.05, beta: float = 1.25, activations: bool = True) -> FederatedMethod:
    check(density=density_of(density), beta=at_least(1, beta))
    phase = Phase(
        name="federate", update=PowerUpdate(beta, density, activations), join=UnionMean(masks=False), own_mask=True
    )
    return FederatedMethod(
        name="sparsyfed", paper="Guastella et al., ICLR 2025, arXiv 2504.05153",
        summary="weights are powers of what is trained; each client sends its largest few, all get their mean",
        phases=(phase,), arms=(*OWN, "own_random"),
    )  # fmt: skip
