"""fluke 0.8.1, FedAVG, one client at a time."""

# ruff: noqa: E402
from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import common

NAMED = common.torchvision_without_operators()

from fluke import DDict
from fluke.algorithms.fedavg import FedAVG
from fluke.data import DataSplitter, DummyDataContainer, FastDataLoader

work = common.read_work(alone=True)
x, y, owned = common.data(work)
loaders = [FastDataLoader(x[i], y[i], num_labels=10, batch_size=common.BATCH, shuffle=True) for i in owned]
settings = DDict(
    {
        "client": {
            "batch_size": common.BATCH, "local_epochs": work["epochs"], "loss": "CrossEntropyLoss",
            "optimizer": {"name": "SGD", "lr": common.LR}, "scheduler": {"name": "StepLR", "gamma": 1, "step_size": 1},
        },
        "server": {"weighted": True}, "model": common.build(work["model"]),
    }
)  # fmt: skip
study = FedAVG(100, DataSplitter(DummyDataContainer(loaders, [None] * 100, None, 10)), settings)
turn, server, number = common.Turn(work), study.server, [0]
joined = server.aggregate


def eligible(share: float) -> list[Any]:
    turn.begin()
    number[0] += 1
    return [study.clients[c] for c in common.clients(number[0], work)]


def aggregate(*args: Any, **more: Any) -> None:
    joined(*args, **more)
    turn.end(lambda: server.model)


server.get_eligible_clients, server.aggregate = eligible, aggregate
study.run(n_rounds=10_000, eligible_perc=work["clients"] / 100, finalize=False)
