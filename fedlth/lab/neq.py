"""Neurons at equilibrium: those whose outputs have settled are not updated. A mask on updates, not on weights.

Bragagnolo, Tartaglione, Grangetto. To update or not to update? Neurons at equilibrium in deep models. NeurIPS 2022,
arXiv 2207.09455. In a federated round a frozen neuron is a row that need not be uploaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from fedlth.data.examples import Examples
from fedlth.errors import wrong
from fedlth.models.call import call
from fedlth.models.layout import Layout, Params
from fedlth.models.seed import seed_torch
from fedlth.training.flat_model import FlatModel
from fedlth.training.recipe import TrainingRecipe

# A transposed convolution's weight has its inputs first: a unit is no row there, and none of it rests.
UNITS_FIRST = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Outputs = dict[str, np.ndarray]  # module name -> (units, numbers) float64


@dataclass(frozen=True, eq=False)
class Equilibrium:
    """What is remembered between epochs: outputs, their similarity to the epoch before, its velocity. A value."""

    outputs: Outputs = field(default_factory=dict)
    similarity: Outputs = field(default_factory=dict)
    velocity: Outputs = field(default_factory=dict)


@dataclass(frozen=True)
class UpdateGate:
    """Freeze a unit for the next epoch while |v| < epsilon, v = (change of similarity) - mu x (v before)."""

    mu: float = 0.5
    epsilon: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 <= self.mu < 1:
            raise wrong("neq.mu", "in [0, 1)", self.mu)
        if not 0 < self.epsilon < np.inf:
            raise wrong("neq.epsilon", "above 0", self.epsilon)

    def __call__(self, before: Equilibrium, outputs: Outputs, /) -> tuple[Equilibrium, dict[str, np.ndarray]]:
        """Return what to remember, and which units (units,) bool are frozen next, none before three looks.

        A pure function: asking twice gives the same answer (the released code's velocity changes when it is logged).
        """
        similarity = {n: _cosine(before.outputs[n], y) for n, y in outputs.items() if n in before.outputs}
        velocity, frozen = {}, {}
        for name, y in outputs.items():
            frozen[name] = np.zeros(len(y), bool)
            if name in before.similarity:
                change = similarity[name] - before.similarity[name]
                velocity[name] = change - self.mu * before.velocity.get(name, np.zeros(len(y)))
                frozen[name] = np.abs(velocity[name]) < self.epsilon
        return Equilibrium(outputs, similarity, velocity), frozen


def _cosine(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the cosine of each unit's outputs then and now; 1 where both are zero, 0 where one is."""
    norms = np.linalg.norm(one, axis=1), np.linalg.norm(other, axis=1)
    product = norms[0] * norms[1]
    both = (norms[0] == 0) & (norms[1] == 0)
    return np.where(both, 1.0, (one * other).sum(axis=1) / np.where(product == 0, 1.0, product))


def unit_outputs(model: FlatModel, params: Params, x: Tensor) -> Outputs:
    """Return the outputs of every linear and convolutional unit on held-out examples x, before any activation."""
    seen: dict[str, Tensor] = {}

    def look(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(module: nn.Module, args: object, out: Tensor) -> None:
            units = out.dim() - 1 if isinstance(module, nn.Linear) else 1
            seen[name] = out.movedim(units, 0).flatten(1).to(torch.float64, copy=True)  # relu may work in place

        return hook

    counted = ((n, m) for n, m in model.module.named_modules() if isinstance(m, (nn.Linear, *UNITS_FIRST)))
    hooks = [module.register_forward_hook(look(name)) for name, module in counted]
    model.load(params)
    model.module.eval()
    try:
        with torch.no_grad():
            call(model.module, x)
    finally:
        for handle in hooks:
            handle.remove()
    return {n: y.cpu().numpy() for n, y in seen.items()}


def moving(layout: Layout, frozen: dict[str, np.ndarray]) -> np.ndarray:
    """Return (num_params,) bool: the parameters that may move, a frozen unit's row and bias left out."""
    moves = layout.trainable.copy()
    for e in layout.floats:
        stay = frozen.get(e.name.rpartition(".")[0])
        if e.trainable and stay is not None and e.shape and e.shape[0] == len(stay):
            moves[e.slice] = np.repeat(~stay, e.size // e.shape[0])
    return moves


@dataclass(frozen=True, eq=False)
class Epoch:
    """One epoch: which parameters could move in it, (num_params,) bool, and where it ended."""

    moves: np.ndarray
    params: Params

    @property
    def frozen(self) -> float:
        """Return the share of parameters that were frozen: the share of an upload that is saved."""
        return float(1 - self.moves.mean())


def train(
    model: FlatModel,
    start: Params,
    *,
    data: Examples,
    held_out: Tensor,
    recipe: TrainingRecipe,
    gate: UpdateGate,
    order: np.random.Generator,
    torch_seed: int,
) -> tuple[Epoch, ...]:
    """Train as the recipe says, an epoch at a time, freezing what is at equilibrium; return every epoch."""
    x, y = data.tensor, data.y
    layout = model.layout
    memory = recipe.optimizer.memory(model.grad)
    state, frozen = gate(Equilibrium(), unit_outputs(model, start, held_out))
    parts = recipe.budget(len(y), recipe.batch_size, order)
    steps, step, now, epochs = sum(map(len, parts)), 0, start, []
    seed_torch(torch_seed)
    for epoch in parts:
        moves = moving(layout, frozen)
        alive = model.arranged(moves.astype(np.float32))
        model.load(now)
        model.module.train()
        weights = model.flat[: layout.num_params]
        for part in epoch:
            index = torch.from_numpy(part)
            model.grad.zero_()
            loss = recipe.loss(call(model.module, x[index]), y[index])
            loss.backward()  # type: ignore[no-untyped-call]
            with torch.no_grad():
                direction = recipe.optimizer(model.grad, weights, memory, step + 1, alive)
                # Once more: what a neuron gathered earlier must not move it either.
                weights.add_(direction * alive, alpha=-recipe.rate(step, steps))
            step += 1
        now = model.save()
        epochs.append(Epoch(moves, now))
        state, frozen = gate(state, unit_outputs(model, now, held_out))
    return tuple(epochs)
