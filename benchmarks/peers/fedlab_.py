"""FedLab 1.3.0, standalone: SGDSerialClientTrainer and SyncServerHandler, one client at a time."""

# ruff: noqa: E402
from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import common

NAMED = common.torchvision_without_operators()

from fedlab.contrib.algorithm.basic_client import SGDSerialClientTrainer
from fedlab.contrib.algorithm.basic_server import SyncServerHandler
from fedlab.core.standalone import StandalonePipeline
from torch.utils.data import DataLoader, TensorDataset

logging.disable(logging.CRITICAL)
work = common.read_work(alone=True)
x, y, owned = common.data(work)
turn = common.Turn(work)


class Data:
    def get_dataloader(self, client: int, batch_size: int) -> Any:
        return DataLoader(TensorDataset(x[owned[client]], y[owned[client]]), batch_size=batch_size, shuffle=True)


class Pipeline(StandalonePipeline):
    def evaluate(self) -> None:
        turn.end(lambda: server.model)


def sampled() -> list[int]:
    turn.begin()
    return common.clients(server.round, work)


server = SyncServerHandler(common.build(work["model"]), 10_000, work["clients"] / 100)
server.sample_clients = sampled
trainer = SGDSerialClientTrainer(common.build(work["model"]), 100)
trainer.setup_dataset(Data())
trainer.setup_optim(work["epochs"], common.BATCH, common.LR)
Pipeline(server, trainer).main()
