"""FIARSE: each client trains the weights that are largest now, as many as it can carry; the server cuts them out.

Wu, Wang, Wang, Liu, Su, Gao. FIARSE: Model-Heterogeneous Federated Learning via Importance-Aware Submodel Extraction.
NeurIPS 2024, arXiv 2407.19389.

A client's share is its tier's `density` (clients.capacity). The server knows the weights, so it picks exactly that many
of the largest magnitudes (ties by position), in each round anew, and sends their bits along with their values. While
the client trains, the network sees w = v [|v| >= t], t the smallest magnitude that it was sent; a weight that falls
below t stops. The indicator's derivative is taken to be that of 2|v| / (|v| + t), as in the authors' code, so that the
gradient of a weight that is seen is (1 + 2 t |v| / (|v| + t)^2) times the network's. Holders average without weights.
The authors' masks are over biases too; here over what is prunable (model.prunable), all else is held by everyone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedlth.errors import wrong
from fedlth.methods.client_update import MaskedUpdate
from fedlth.methods.method import FederatedMethod, Phase
from fedlth.methods.options import BY_HOLDERS, OWN
from fedlth.storage.server_state import ServerState
from fedlth.tickets.scope import Global, Layerwise, Scope
from fedlth.training.flat_model import FlatModel
from fedlth.training.local_client import LocalClient
from fedlth.training.recipe import TrainingRecipe
from fedlth.training.task import Task
from fedlth.training.view import Given, Gradient, elementwise

SCOPES: Mapping[str, Scope] = {"global": Global(), "layerwise": Layerwise()}


@dataclass(frozen=True)
class Largest:
    """The weights of largest magnitude, a client's density of them, in the whole model or in each layer."""

    scope: str

    def __call__(self, task: Task, state: ServerState, client: int, /) -> np.ndarray:
        layout = task.exchange
        alive = np.ones(layout.num_prunable, bool)
        size = np.abs(state.theta.floats[: alive.size])
        return SCOPES[self.scope](size, alive, layout, task.capacity(client).density)


@dataclass(frozen=True)
class Important:
    """Weights below a threshold as zero: the least magnitude of those that training starts from, by `scope`.

    A tensor that is whole (personal, or not cut) has no threshold.
    """

    scope: str

    @contextmanager
    def opened(self, model: FlatModel, request: Given, /) -> Iterator[Gradient]:
        least = model.arranged(self.thresholds(model, request))

        def seen(weights: Tensor) -> Tensor:
            return torch.where(weights.abs() >= least, weights, 0.0)

        def slope(weights: Tensor) -> Tensor:
            size = weights.abs()
            more = 2 * least * size / (size + least).square()
            return torch.where(size >= least, 1 + more.nan_to_num(0.0, 0.0, 0.0), 0.0)

        yield elementwise(seen, slope)

    def thresholds(self, model: FlatModel, request: Given) -> np.ndarray:
        """Return (num_params,) float32: below which magnitude a weight is not seen."""
        found, layout = np.zeros(model.layout.num_params, np.float32), model.layout
        if request.active is None:
            return found
        size = np.abs(request.start.floats)
        cut = {e: size[e.slice][request.active[e.slice]] for e in layout.prunable if not request.active[e.slice].all()}
        everywhere = min((float(kept.min()) for kept in cut.values() if kept.size), default=0.0)
        for e, kept in cut.items():
            found[e.slice] = everywhere if self.scope == "global" else kept.min(initial=np.inf)
        return np.where(np.isfinite(found), found, np.float32(0))

    def used(self, alive: np.ndarray, request: Given, /) -> Iterable[tuple[np.ndarray, int]]:
        yield alive, request.num_examples


@dataclass(frozen=True)
class ImportantUpdate(MaskedUpdate):
    """Train what was cut out, by its own importance; send it. A client that carries all of it trains as in FedAvg."""

    scope: str = "global"

    @property
    def shrinking(self) -> None:
        """Nobody knows before a run which weights are the largest."""
        return None

    def recipe(self, local: LocalClient, recipe: TrainingRecipe, /) -> TrainingRecipe:
        return recipe if local.capacity.density == 1 else replace(recipe, view=Important(self.scope))


def fiarse(scope: str = "global") -> FederatedMethod:
    if scope not in SCOPES:
        raise wrong("method.scope", "global or layerwise", scope)
    phase = Phase(
        name="federate", update=ImportantUpdate(scope=scope), join=BY_HOLDERS, down="slice", cut=Largest(scope)
    )
    return FederatedMethod(
        name="fiarse", paper="Wu et al., NeurIPS 2024, arXiv 2407.19389",
        summary="the server cuts out the largest weights for each client, as many as it carries; holders average them",
        phases=(phase,), arms=(*OWN, "own_random"), reads_capacity=True,
    )  # fmt: skip
