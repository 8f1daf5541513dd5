"""Parts of benchmark studies: a client that does nothing, a model that no kernel knows, and resampled images."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from fedlth.data.dataset import Dataset
from fedlth.data.idx import fashion_mnist
from fedlth.methods.aggregate import FedAvg
from fedlth.methods.client_update import THETA_G, UPDATE, Inbox, MaskedUpdate, Update
from fedlth.methods.method import FederatedMethod, Phase
from fedlth.storage.client_state import ClientState
from fedlth.training.local_client import LocalClient


@dataclass(frozen=True)
class Idle(MaskedUpdate):
    """An update without training: decode, keep a count, encode."""

    def __call__(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Update:
        kept = replace(state, visits=state.visits + 1)
        return Update(kept, {UPDATE: inbox[THETA_G]}, {"loss": 0.0, "val_accuracy": 0.0, "density": 1.0})


def idle() -> FederatedMethod:
    """Return FedAvg whose clients send back what they were sent."""
    phase = Phase(name="federate", update=Idle(), join=FedAvg())
    return FederatedMethod(
        name="idle", paper="benchmark", summary="no training", phases=(phase,), arms=("global",)
    )  # fmt: skip


def small(*, num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """Return 25,450 weights: a payload of 100 KB."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, num_classes))


class Normed(nn.Module):
    """A convolutional net with BatchNorm: what a user may bring and no kernel runs."""

    def __init__(self, *, num_classes: int, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(input_shape[0], 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(64 * 16, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.body(x))
        return logits


def resampled(*, root: str | None, examples: int, seed: int = 0) -> Dataset:
    """Return Fashion-MNIST whose train split is `examples` draws with replacement, for many clients."""
    data = fashion_mnist(root)
    drawn = np.random.Generator(np.random.PCG64(seed)).integers(0, len(data.y_train), examples)
    return replace(data, name="fashion_mnist resampled", x_train=data.x_train[drawn], y_train=data.y_train[drawn])
