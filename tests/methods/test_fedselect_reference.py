"""FedSelect against the arithmetic of its public code (lapisrocks/fedselect, 0949f8a), written here in plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from fedlth.experiment.resolve import resolve
from fedlth.models.layout import Params, read, views
from fedlth.storage.client_state import ClientState
from fedlth.storage.run_folder import RunFolder
from fedlth.training.task import Task
from tests import tiny

RATE, LIMIT, LR, EPOCHS, ROUNDS, CLIENTS = 0.25, 0.5, 0.2, 2, 3, 3
Weights = dict[str, torch.Tensor]


def study() -> Any:
    """Return one small case: everyone takes part, an epoch is one batch, so that its order means nothing."""
    return tiny.study(
        method={"name": "fedselect", "rate": RATE, "limit": LIMIT}, wire="raw", compute="reference",
        clients={"count": CLIENTS, "unseen": 0.0}, federate={"rounds": ROUNDS, "clients_per_round": CLIENTS},
        train={"lr": LR, "momentum": 0.0, "batch_size": 4096, "epochs": EPOCHS}, personalise={"arms": ["own"]},
    )  # fmt: skip


def epoch(weights: Weights, moves: Weights, x: torch.Tensor, y: torch.Tensor) -> Weights:
    """Return the weights after a step of SGD on all examples that moves only what `moves` holds True."""
    leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
    hidden = torch.relu(x.flatten(1) @ leaves["1.weight"].T + leaves["1.bias"])
    loss = cross_entropy(hidden @ leaves["3.weight"].T + leaves["3.bias"], y)
    slopes = torch.autograd.grad(loss, list(leaves.values()))
    return {n: weights[n] - LR * slope * moves[n] for n, slope in zip(leaves, slopes, strict=True)}


def grown(before: torch.Tensor, after: torch.Tensor, personal: torch.Tensor, *, by_index: bool) -> torch.Tensor:
    """Return the personal set with the RATE share of the shared weights that moved most, up to LIMIT of the tensor.

    `by_index`, as released: all from the value at place round((1 - RATE) n) on, in tensors not yet beyond LIMIT.
    """
    moved, shared = (after - before).abs().flatten(), ~personal.flatten()
    n, size = int(shared.sum()), personal.numel()
    if by_index:
        if n < size * (1 - LIMIT):
            return personal
        cut = moved[shared].sort().values[int(np.round((1 - RATE) * n))]
        return (personal.flatten() | (shared & (moved >= cut))).reshape(personal.shape)
    count = min(round(RATE * n), max(0, int(LIMIT * size) - (size - n)))
    order = torch.where(shared, moved, -1.0).argsort(descending=True, stable=True)
    found = personal.flatten().clone()
    found[order[:count]] = True
    return found.reshape(personal.shape)


def reference(
    task: Task, *, stale: bool = False, by_index: bool = False, shared_first: bool = False
) -> tuple[Weights, list[Weights], list[Weights]]:
    """Return theta_g, each client's weights, and what is personal to each, after ROUNDS rounds.

    The released code differs from the paper where a flag says so: `stale` averages under the masks before they grew,
    `shared_first` alternates the other way round, `by_index` takes its threshold from a rounded index.
    """
    start = {n: torch.from_numpy(v.copy()) for n, v in views(task.theta_0, task.layout).items()}
    clients = [dict(start) for _ in range(CLIENTS)]
    personal = [{n: torch.zeros_like(w, dtype=torch.bool) for n, w in start.items()} for _ in range(CLIENTS)]
    theta = start
    for _ in range(ROUNDS):
        total = {n: torch.zeros_like(w, dtype=torch.float64) for n, w in start.items()}
        count = {n: torch.zeros_like(w, dtype=torch.float64) for n, w in start.items()}
        for k in range(CLIENTS):
            examples, before, own = task.part(k, "train"), clients[k], personal[k]
            passes = (own, {n: ~p for n, p in own.items()})
            for _ in range(EPOCHS):
                for moves in reversed(passes) if shared_first else passes:
                    clients[k] = epoch(clients[k], moves, examples.x, examples.y)
            new = {
                n: grown(before[n], clients[k][n], p, by_index=by_index) if n.endswith("weight") else p
                for n, p in own.items()
            }
            sent = own if stale else new
            for n, w in clients[k].items():
                total[n] += torch.where(sent[n], 0.0, w)
                count[n] += ~sent[n]
            personal[k] = new
        theta = {n: torch.where(count[n] > 0, total[n] / count[n].clamp(min=1), theta[n]).float() for n in theta}
        clients = [{n: torch.where(personal[k][n], w, theta[n]) for n, w in clients[k].items()} for k in range(CLIENTS)]
    return theta, clients, personal


def ours(out: Path) -> tuple[Task, Params, list[Params], list[np.ndarray]]:
    folder = RunFolder(out)
    experiment, _ = resolve(study())
    folder.create(experiment.study)
    federation = tiny.opened(folder)
    federation.run(stop_after=ROUNDS)
    models, masks = [], []
    for client in range(CLIENTS):
        version = federation.progress.versions[str(client)]
        state = ClientState.from_bytes(folder.clients.get(client, version))
        shared = state.masks["shared"]
        floats = federation.theta.floats.copy()
        floats[: shared.size][~shared] = state.vectors["private"][: shared.size][~shared]
        models.append(Params(floats, federation.theta.ints))
        masks.append(~shared)
    return experiment.task, federation.theta, models, masks


def flat(weights: Weights, task: Task) -> np.ndarray:
    """Return named tensors as the layout has them."""
    module = task.model.module()
    module.load_state_dict({n: w.clone() for n, w in weights.items()})
    return read(module, task.layout).floats


def test_it_agrees_with_the_public_arithmetic(tmp_path: Path) -> None:
    task, theta, models, masks = ours(tmp_path / "run")
    wanted, clients, personal = reference(task)
    np.testing.assert_allclose(theta.floats, flat(wanted, task), rtol=0, atol=1e-5)
    for k in range(CLIENTS):
        of = flat({n: p.float() for n, p in personal[k].items()}, task)[: masks[k].size] > 0
        np.testing.assert_array_equal(masks[k], of)
        assert 0.3 < masks[k].mean() <= LIMIT
        np.testing.assert_allclose(models[k].floats, flat(clients[k], task), rtol=0, atol=1e-5)


def test_what_the_released_code_does_otherwise_shows(tmp_path: Path) -> None:
    """Each of its differences alone moves the result further than rounding does."""
    task, theta, _, masks = ours(tmp_path / "run")
    for flag in ("stale", "by_index", "shared_first"):
        other, _, personal = reference(task, **{flag: True})
        of = flat({n: p.float() for n, p in personal[0].items()}, task)[: masks[0].size] > 0
        apart = np.abs(theta.floats - flat(other, task)).max()
        assert apart > 1e-4 or (of != masks[0]).any(), flag
