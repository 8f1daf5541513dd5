"""pfl 0.6.0 (apple/pfl-research): SimulatedBackend, FederatedAveraging, two processes of torch.distributed.

As torchrun would start it: each process trains half of a round's users, and gloo adds up what they learnt.
"""

# ruff: noqa: E402
from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

WORKERS = 2
sys.path.insert(0, str(Path(__file__).parent))
import common
import numpy as np
import torch

work = common.read_work()
if "RANK" not in os.environ:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {
        "PFL_PYTORCH_DEVICE": "cpu", "TORCHELASTIC_RUN_ID": "benchmark", "WORLD_SIZE": str(WORKERS),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0",
    }  # fmt: skip
    for rank in range(1, WORKERS):
        other = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, env=os.environ | {"RANK": str(rank)}
        )
        assert other.stdin is not None
        other.stdin.write((json.dumps(work) + "\n").encode())
        other.stdin.flush()
FIRST = os.environ["RANK"] == "0"

from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch.nn import functional

x, y, owned = common.data(work)
turn = common.Turn(work)
order = iter(c for round_ in range(10_000) for c in common.clients(round_, work))


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = common.build(work["model"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def loss(self, x: torch.Tensor, y: torch.Tensor, eval: bool = False) -> torch.Tensor:
        self.train(not eval)
        return functional.cross_entropy(self.net(x), y)

    @torch.no_grad()
    def metrics(self, x: torch.Tensor, y: torch.Tensor, eval: bool = False) -> dict[str, Any]:
        return {"loss": Weighted(functional.cross_entropy(self.net(x), y, reduction="sum").item(), len(y))}


class Turns(TrainingProcessCallback):
    """The first process takes turns with the benchmark; the others wait for it."""

    def on_train_begin(self, *, model: Any) -> Any:
        if FIRST:
            turn.begin()
        torch.distributed.barrier()
        return Metrics()

    def after_central_iteration(self, aggregate_metrics: Any, model: Any, *, central_iteration: int) -> Any:
        steps = torch.tensor(len(common.STEPS))
        torch.distributed.all_reduce(steps)
        common.STEPS.clear()
        if FIRST:
            turn.end(lambda: net, int(steps))
        return False, self.on_train_begin(model=model)


def user(client: int) -> Dataset:
    part = owned[client][np.random.permutation(len(owned[client]))]  # a Dataset hands out its examples in order
    return Dataset([x[part], y[part]], user_id=str(client))


users = FederatedDataset(user, lambda: next(order))
net = Net()
FederatedAveraging().run(
    algorithm_params=NNAlgorithmParams(
        central_num_iterations=10_000, evaluation_frequency=10**6, train_cohort_size=work["clients"], val_cohort_size=0
    ),
    backend=SimulatedBackend(training_data=users, val_data=users),
    model=PyTorchModel(net, torch.optim.SGD, torch.optim.SGD(net.parameters(), lr=1.0)),
    model_train_params=NNTrainHyperParams(
        local_batch_size=common.BATCH, local_num_epochs=work["epochs"], local_learning_rate=common.LR
    ),
    model_eval_params=NNEvalHyperParams(local_batch_size=1000),
    callbacks=[Turns()],
)
