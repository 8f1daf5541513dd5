"""Flower's simulation (Ray backend), FedAvg: clients of two CPUs, one each."""

# ruff: noqa: E402
from __future__ import annotations

import builtins
import os
import sys
from pathlib import Path
from typing import Any

HERE = str(Path(__file__).parent)
sys.path.insert(0, HERE)
os.environ |= {"OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0", "PYTHONPATH": HERE}

import common
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch.nn import functional

WORK = common.read_work()
client, server = ClientApp(), ServerApp()


@client.train()
def train(message: Any, context: Any, WORK: Any = WORK) -> Any:
    import common  # this function is pickled into the actors

    held = builtins.__dict__.setdefault("_held", {})
    if not held:
        torch.set_num_threads(1)
        held["data"], held["model"] = common.data(WORK), common.build(WORK["model"])
    x, y, owned = held["data"]
    part = torch.from_numpy(owned[int(context.node_config["partition-id"])])
    model = held["model"]
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    before = len(common.STEPS)
    optimiser = torch.optim.SGD(model.parameters(), lr=common.LR)
    for _ in range(WORK["epochs"]):
        for chosen in part[torch.randperm(len(part))].split(common.BATCH):
            optimiser.zero_grad()
            functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimiser.step()
    told = MetricRecord({"num-examples": len(part), "steps": len(common.STEPS) - before})
    content = {"arrays": ArrayRecord(model.state_dict()), "metrics": told}
    return Message(content=RecordDict(content), reply_to=message)


class Timed(FedAvg):
    turn = common.Turn(WORK)

    def configure_train(self, *args: Any, **more: Any) -> Any:
        self.turn.begin()
        return super().configure_train(*args, **more)

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        replies = list(replies)
        arrays, metrics = super().aggregate_train(server_round, replies)
        self.turn.end(lambda: filled(arrays), sum(reply.content["metrics"]["steps"] for reply in replies))
        return arrays, metrics


def filled(arrays: Any) -> torch.nn.Module:
    model = common.build(WORK["model"])
    model.load_state_dict(arrays.to_torch_state_dict())
    return model


@server.main()
def main(grid: Any, context: Any) -> None:
    k = WORK["clients"]
    strategy = Timed(fraction_train=k / 100, fraction_evaluate=0.0, min_train_nodes=k, min_available_nodes=100)
    strategy.start(grid=grid, initial_arrays=ArrayRecord(common.build(WORK["model"]).state_dict()), num_rounds=10_000)


resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": 2}}
run_simulation(server, client, num_supernodes=100, backend_config=resources)
