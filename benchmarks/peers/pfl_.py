"""pfl 0.6.0 (apple/pfl-research): SimulatedBackend, FederatedAveraging."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("PFL_PYTORCH_DEVICE", "cpu")
sys.path.insert(0, str(Path(__file__).parent))
import common
import torch
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

work = common.read_work()
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
    def on_train_begin(self, *, model: Any) -> Any:
        turn.begin()
        return Metrics()

    def after_central_iteration(self, aggregate_metrics: Any, model: Any, *, central_iteration: int) -> Any:
        turn.end()
        turn.begin()
        return False, Metrics()


users = FederatedDataset(lambda u: Dataset([x[owned[u]], y[owned[u]]], user_id=str(u)), lambda: next(order))
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
