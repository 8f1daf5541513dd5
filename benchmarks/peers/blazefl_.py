"""BlazeFL 3.0.0, FedAvg, two threads of one torch thread each, under the GIL."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import common
import torch
from blazefl.contrib.fedavg import FedAvgBaseServerHandler, FedAvgThreadPoolClientTrainer
from torch.utils.data import DataLoader, TensorDataset

work = common.read_work()
x, y, owned = common.data(work)
turn = common.Turn(work)


class Data:
    def get_dataloader(self, type_: Any, cid: int, batch_size: int, generator: torch.Generator) -> Any:
        own = TensorDataset(x[owned[cid]], y[owned[cid]])
        return DataLoader(own, batch_size=batch_size, shuffle=True, generator=generator)


class Models:
    def select_model(self, model_name: str) -> torch.nn.Module:
        return common.build(model_name)


model, data = work["model"], Data()
server = FedAvgBaseServerHandler(
    Models(), model, data, 10_000, 100, work["clients"] / 100, "cpu", common.BATCH, seed=0
)  # fmt: skip
trainer = FedAvgThreadPoolClientTrainer(
    Models(), model, data, "cpu", 100, work["epochs"], common.BATCH, common.LR, seed=0, num_parallels=2
)
while not server.is_stopped():  # the loop of BlazeFL's quickstart, without its evaluation
    turn.begin()
    clients = common.clients(server.round, work)
    trainer.local_process(server.downlink_package(), clients)
    for package in trainer.uplink_package():
        server.load(package)
    turn.end(lambda: server.model)
