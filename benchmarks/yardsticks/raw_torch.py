"""Limit A: plain PyTorch FedAvg without a framework, two forked processes of one thread each, shared-memory weights.

A child of benchmarks/rounds.py: reads one JSON object (the work), says "ready", then runs a round a line.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from torch.nn import functional

from fedlth.data.idx import fashion_mnist
from fedlth.models.registry import build

WORKERS = 2


def train(
    model: torch.nn.Module, start: torch.Tensor, x: torch.Tensor, y: torch.Tensor, work: dict[str, Any], seed: Any
) -> tuple[torch.Tensor, int]:
    """Return the flat weights after `epochs` of SGD from `start`, and the steps taken."""
    weights = list(model.parameters())
    torch.nn.utils.vector_to_parameters(start.clone(), weights)
    optimiser = torch.optim.SGD(weights, lr=0.05)
    steps = 0
    order = np.random.default_rng(seed)
    for _ in range(work["epochs"]):
        shuffled = torch.from_numpy(order.permutation(len(y)))
        for at in range(0, len(y), 32):
            part = shuffled[at : at + 32]
            optimiser.zero_grad(set_to_none=True)
            functional.cross_entropy(model(x[part]), y[part]).backward()
            optimiser.step()
            steps += 1
    return torch.cat([w.detach().reshape(-1) for w in weights]), steps


def main() -> None:
    work = json.loads(sys.stdin.readline())
    torch.set_num_threads(1)
    data = fashion_mnist(work["data"])
    images = (torch.tensor(data.x_train, dtype=torch.float32) / 255 - 0.2860) / 0.3530
    labels = torch.from_numpy(data.y_train)
    shards = np.argsort(data.y_train, kind="stable")[: 200 * work["shard"]].reshape(-1, work["shard"])
    shards = shards[np.random.default_rng(0).permutation(len(shards))]
    owned = shards.reshape(100, -1)[:, : work["examples"]]
    torch.manual_seed(0)
    model = build(work["model"], num_classes=10, input_shape=(1, 28, 28), options={})
    theta = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone().share_memory_()
    out = torch.zeros(work["clients"], theta.numel()).share_memory_()
    context = multiprocessing.get_context("fork")
    todo, done = context.SimpleQueue(), context.SimpleQueue()

    def live() -> None:
        torch.set_num_threads(1)
        while (task := todo.get()) is not None:
            place, client, round_ = task
            part = torch.from_numpy(owned[client])
            out[place], steps = train(model, theta, images[part], labels[part], work, (round_, client))
            done.put(steps)

    workers = [context.Process(target=live, daemon=True) for _ in range(WORKERS)]
    for worker in workers:
        worker.start()
    print("ready", flush=True)
    for round_, _ in enumerate(sys.stdin):
        clients = np.random.default_rng(round_).permutation(100)[: work["clients"]]
        began = time.perf_counter()
        for place, client in enumerate(clients):
            todo.put((place, int(client), round_))
        steps = sum(done.get() for _ in clients)
        theta.copy_(out.mean(0))
        print(json.dumps({"wall": time.perf_counter() - began, "steps": steps}), flush=True)
    for _ in workers:
        todo.put(None)


if __name__ == "__main__":
    main()
