"""Another local objective, as a user writes one: FedProx, a pull to the start (Li et al., 2020, arXiv 1812.06127)."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedlth.methods.aggregate import FedAvg
from fedlth.methods.client_update import MaskedUpdate
from fedlth.methods.method import FederatedMethod, Phase
from fedlth.training.local_client import LocalClient
from fedlth.training.optimizer import Memory, Optimizer
from fedlth.training.recipe import TrainingRecipe


@dataclass(frozen=True, kw_only=True)
class Pulled:
    """`inner` on the gradient of loss + mu/2 ||w - w_start||^2."""

    inner: Optimizer
    mu: float

    def memory(self, like: Tensor, /) -> Memory:
        return torch.zeros_like(like), *self.inner.memory(like)

    def __call__(self, grad: Tensor, weights: Tensor, memory: Memory, step: int, free: Tensor | None, /) -> Tensor:
        start, *rest = memory
        if step == 1:
            start.copy_(weights)
        grad.add_(weights - start, alpha=self.mu)  # a weight that must not move has not moved: no pull
        return self.inner(grad, weights, tuple(rest), step, free)


@dataclass(frozen=True)
class Proximal(MaskedUpdate):
    mu: float = 0.0

    def recipe(self, local: LocalClient, recipe: TrainingRecipe, /) -> TrainingRecipe:
        return replace(recipe, optimizer=Pulled(inner=recipe.optimizer, mu=self.mu))


def method(mu: float = 0.01) -> FederatedMethod:
    return FederatedMethod(
        name="proximal", paper="a test", summary="FedAvg with a pull to what was received",
        phases=(Phase(name="federate", update=Proximal(mu=mu), join=FedAvg()),), arms=("global", "own_tuned"),
    )  # fmt: skip
