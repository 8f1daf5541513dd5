"""Plain torch and numpy beside the package: the arithmetic of papers written out, on the same weights and batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from fedlth import rng
from fedlth.models.layout import Params, read
from fedlth.models.registry import MODELS
from fedlth.storage.client_state import ClientState
from fedlth.storage.run_folder import RunFolder
from fedlth.training.batches import batches
from fedlth.training.local_client import LocalClient
from tests import tiny

# SGD without momentum at one rate, all clients in all rounds, in the backend that golden runs pin.
PLAIN: dict[str, Any] = {
    "train": {"lr": 0.1, "momentum": 0.0, "batch_size": 16, "epochs": 1},
    "clients": {"count": 3, "unseen": 0.0},
    "federate": {"rounds": 3, "clients_per_round": 3},
    "partition": {"name": "dirichlet", "alpha": 1.0},
    "personalise": {"arms": ["global"]},
    "compute": "reference",
}
Grads = list[torch.Tensor]


def ran(method: dict[str, Any], out: Path, **sections: Any) -> tuple[Any, RunFolder]:
    """Run a study of a method on `PLAIN`; return its experiment and folder."""
    merged = {
        key: {**PLAIN.get(key, {}), **value} if isinstance(value, dict) else value for key, value in sections.items()
    }
    made = tiny.study(method=method, **{**PLAIN, **merged})
    folder = tiny.run(made, out)
    assert not [f for row in tiny.rows(out, "rounds") for f in row["failed"]]
    return tiny.experiment(folder.study()), folder


def theta_of(folder: RunFolder, name: str = "") -> Params:
    return folder.load_params(name or folder.progress().theta)


def state_of(folder: RunFolder, client: int) -> ClientState:
    """Return a client's committed state: step 2 leaves what the method keeps."""
    version = folder.progress().versions[str(client)]
    return ClientState.from_bytes(folder.clients.get(client, version))


def network() -> nn.Module:
    """Return the tiny study's network, built anew."""
    return MODELS["mlp"](num_classes=tiny.NUM_CLASSES, input_shape=(1, tiny.SIDE, tiny.SIDE), hidden=[12])


def load(module: nn.Module, params: Params, task: Any) -> nn.Module:
    named = dict(module.named_parameters())
    for e in task.layout.floats:
        named[e.name].data.copy_(torch.from_numpy(params.floats[e.slice].reshape(e.shape)))
    return module


def flat(module: nn.Module, task: Any) -> np.ndarray:
    return read(module, task.layout).floats


def batches_of(task: Any, client: int, round: int, epochs: int) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """Yield a client's batches of a round: from the stream that every training of that round draws from."""
    local = LocalClient(task, client, round, "federate")
    order = rng.stream(task.study.seed, "federate/order", round, client)
    for _ in range(epochs):
        for part in batches(local.num_train, task.study.train.batch_size, order):
            yield local.train_part.tensor[torch.from_numpy(part)], local.train_part.y[torch.from_numpy(part)]


def sgd(
    module: nn.Module,
    data: Iterable[tuple[torch.Tensor, torch.Tensor]],
    lr: float,
    *,
    names: Callable[[str], bool] = lambda name: True,
    more: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
) -> nn.Module:
    """Descend the loss over the batches; only the parameters that `names` accepts move, by gradient plus `more`."""
    for x, y in data:
        module.zero_grad()
        F.cross_entropy(module(x), y).backward()
        with torch.no_grad():
            for name, p in module.named_parameters():
                if names(name):
                    assert p.grad is not None
                    p.add_(p.grad if more is None else p.grad + more(name, p), alpha=-lr)
    return module


def mean(found: list[np.ndarray], sizes: list[int]) -> np.ndarray:
    total = sum(f.astype(np.float64) * n for f, n in zip(found, sizes, strict=True))
    return np.asarray(total / sum(sizes)).astype(np.float32)
