"""LotteryFL and Sub-FedAvg against the arithmetic of their released code, in plain torch; its bugs are not ours.

The arithmetic is written here from its description. Its bugs are flags of it: some change nothing in a case like this
one, the others show in a test of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fedlth.experiment.experiment import Experiment
from fedlth.methods.lotteryfl import PruneAndRewind
from fedlth.methods.sub_fedavg import PruneWhenMaskMoves
from fedlth.models.layout import Params
from fedlth.training.local_client import LocalClient
from fedlth.training.request import TrainingResult
from tests import tiny

RATE, TARGET, ROUNDS = 0.25, 0.3, 3  # of 768 and 48 weights, so that a share is a whole number of weights
LOTTERYFL = {"name": "lotteryfl", "rate": RATE, "density": TARGET, "val_accuracy": 0.3}
SUB_FEDAVG = {"name": "sub_fedavg", "rate": RATE, "density": TARGET, "val_accuracy": 0.3, "distance": 1e-4}

Tensors = dict[str, torch.Tensor]


def study(method: dict[str, Any]) -> Any:
    return tiny.study(
        method=method, clients={"count": 3, "unseen": 0}, federate={"rounds": ROUNDS, "clients_per_round": 3},
        train={"epochs": 2, "lr": 0.1, "momentum": 0.5}, partition={"name": "dirichlet", "alpha": 1.0}, wire="raw",
        personalise={"arms": ["own"]},
    )  # fmt: skip


@dataclass
class Released:
    """The released arithmetic. `bugs` are names of what of it we do not follow."""

    experiment: Experiment
    bugs: frozenset[str] = frozenset()
    masks: dict[int, Tensors] = field(default_factory=dict)
    nominal: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        task = self.experiment.task
        self.module = task.model.module()
        self.theta: Tensors = {
            e.name: torch.from_numpy(task.theta_0.floats[e.slice].reshape(e.shape).copy()) for e in task.layout.floats
        }
        self.first = {name: value.clone() for name, value in self.theta.items()}
        ones = {name: torch.ones_like(value) for name, value in self.theta.items() if "weight" in name}
        for client in range(3):
            self.masks[client] = {name: mask.clone() for name, mask in ones.items()}
            self.nominal[client] = 1.0

    def run(self, visit: Any) -> None:
        for round in range(1, ROUNDS + 1):
            models = [visit(self, LocalClient(self.experiment.task, c, round, "federate")) for c in range(3)]
            for name, old in self.theta.items():
                total = torch.stack([model[name].double() for model in models]).sum(0)
                if name not in self.masks[0]:
                    self.theta[name] = (total / 3).float()
                    continue
                count = torch.stack([self.masks[c][name] for c in range(3)]).sum(0)
                mean = total / count.clamp(min=1)
                self.theta[name] = torch.where(count > 0, mean, old.double()).float()

    def received(self, client: int) -> Tensors:
        masks = self.masks[client]
        return {n: (v * masks[n] if n in masks else v).clone() for n, v in self.theta.items()}

    def pruned(self, model: Tensors, masks: Tensors) -> Tensors:
        found = {}
        for name, mask in masks.items():
            size = (model[name].abs() * mask).flatten().numpy()
            alive = mask.flatten().numpy() > 0
            if "percentile" in self.bugs:
                keep = alive & (size >= np.percentile(size[alive], 100 * RATE))
            else:
                keep = np.zeros(alive.size, bool)
                keep[np.argsort(np.where(alive, -size, 1), kind="stable")[: round((1 - RATE) * alive.sum())]] = True
            found[name] = torch.from_numpy(keep.reshape(mask.shape)).float()
        return found

    def remaining(self, client: int) -> float:
        if "nominal rate" in self.bugs:
            return self.nominal[client]
        masks = self.masks[client].values()
        return float(sum(m.sum() for m in masks) / sum(m.numel() for m in masks))

    def accuracy(self, model: Tensors, local: LocalClient) -> float:
        part = local.task.part(local.client, "test" if "test images" in self.bugs else "val")
        self.load(model, copy=True)
        with torch.no_grad():
            return float((self.module(part.x).argmax(1) == part.y).double().mean())

    def load(self, model: Tensors, *, copy: bool) -> None:
        for name, tensor in self.module.named_parameters():
            tensor.data = model[name].clone() if copy else model[name]

    def trained(self, model: Tensors, masks: Tensors, local: LocalClient) -> Iterator[Tensors]:
        """Yield the model after each epoch; without a copy the optimizer steps in the tensors that it was given."""
        self.load(model, copy="aliases" not in self.bugs)
        recipe, data = local.recipe, local.train_part
        optimizer = torch.optim.SGD(self.module.parameters(), recipe.lr, momentum=0.5)
        for batches in recipe.budget(len(data), recipe.batch_size, local.rng("order")):
            for batch in batches:
                part = data.batch(torch.from_numpy(batch))
                optimizer.zero_grad()
                F.cross_entropy(self.module(part.x), part.y).backward()
                for name, tensor in self.module.named_parameters():
                    if name in masks and tensor.grad is not None:
                        live = tensor.detach().abs() >= 1e-6 if "zero is dead" in self.bugs else masks[name]
                        tensor.grad.mul_(live)
                optimizer.step()
            yield {name: tensor.detach().clone() for name, tensor in self.module.named_parameters()}


def lotteryfl_visit(self: Released, local: LocalClient) -> Tensors:
    client, model = local.client, self.received(local.client)
    if self.accuracy(model, local) > LOTTERYFL["val_accuracy"] and self.remaining(client) > TARGET:
        self.masks[client] = self.pruned(model, self.masks[client])
        self.nominal[client] *= 1 - RATE
        model = {n: v * self.masks[client][n] if n in self.masks[client] else v for n, v in self.first.items()}
        if "aliases" not in self.bugs:
            model = {name: value.clone() for name, value in model.items()}
    return list(self.trained(model, self.masks[client], local))[-1]


def sub_fedavg_visit(self: Released, local: LocalClient) -> Tensors:
    client, masks = local.client, self.masks[local.client]
    if "masks begin anew" in self.bugs:
        masks = self.masks[client] = {name: torch.ones_like(mask) for name, mask in masks.items()}
    epochs = list(self.trained(self.received(client), masks, local))
    first, last = self.pruned(epochs[0], masks), self.pruned(epochs[-1], masks)
    if "fifth epoch" in self.bugs and len(epochs) < 5:
        last = masks
    apart = np.mean([float((first[n] != last[n]).double().mean()) for n in masks])
    if apart > SUB_FEDAVG["distance"] and self.remaining(client) > TARGET:
        cut = {n: v * last[n] if n in last else v for n, v in epochs[-1].items()}
        if self.accuracy(cut, local) > SUB_FEDAVG["val_accuracy"]:
            self.masks[client] = last
            return cut
    return epochs[-1]


VISITS = {"lotteryfl": lotteryfl_visit, "sub_fedavg": sub_fedavg_visit}


def released(method: dict[str, Any], *bugs: str) -> tuple[Released, np.ndarray, list[np.ndarray]]:
    """Return what ran, the global model and the clients' masks in our layout."""
    it = Released(tiny.experiment(study(method)), frozenset(bugs))
    it.run(VISITS[method["name"]])
    layout = it.experiment.task.layout
    theta = np.concatenate([it.theta[e.name].numpy().reshape(-1) for e in layout.floats])
    masks = [np.concatenate([it.masks[c][e.name].numpy().reshape(-1) > 0 for e in layout.prunable]) for c in range(3)]
    return it, theta, masks


def ours(method: dict[str, Any], out: Path) -> tuple[np.ndarray, list[np.ndarray]]:
    folder = tiny.run(study(method), out)
    progress, size = folder.progress(), tiny.task_of(out).layout.num_prunable
    masks = [folder.mirror(c, progress.mirrors.get(str(c), ""), size) for c in range(3)]
    assert all(mask is not None for mask in masks)
    return folder.load_params(progress.theta).floats, [mask for mask in masks if mask is not None]


@pytest.mark.parametrize("method", [LOTTERYFL, SUB_FEDAVG], ids=lambda m: m["name"])
def test_three_rounds_are_those_of_the_released_arithmetic(tmp_path: Path, method: dict[str, Any]) -> None:
    theta, masks = ours(method, tmp_path / "r")
    assert all(mask.mean() < 0.8 for mask in masks), "pruned"
    for bugs in ((), ("percentile",), ("nominal rate",), ("zero is dead",)):
        _, theirs, their_masks = released(method, *bugs)
        np.testing.assert_allclose(theirs, theta, atol=1e-5, rtol=0, err_msg=str(bugs))
        for one, other in zip(masks, their_masks, strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_rewind_shares_no_memory_with_theta_0(tmp_path: Path) -> None:
    """Released: biases of the initial model are the model's own, and the optimizer steps in them."""
    theta, _ = ours(LOTTERYFL, tmp_path / "r")
    it, theirs, _ = released(LOTTERYFL, "aliases")
    began = Released(it.experiment).first
    assert any((it.first[n] != began[n]).any() for n in began if "bias" in n), "theirs moves with the first client"
    assert np.abs(theirs - theta).max() > 1e-3
    task = tiny.experiment(study(LOTTERYFL)).task
    before = task.theta_0.digest()
    local = LocalClient(task, 0, 1, "federate")
    for _ in range(2):
        params, mask = PruneAndRewind(RATE, TARGET, -1.0)(local, task.theta_0, local.full, None)
        local.train(params, recipe=local.recipe, active=mask)
    assert task.theta_0.digest() == before and not np.shares_memory(params.floats, task.theta_0.floats)


def test_masks_do_not_begin_anew(tmp_path: Path) -> None:
    _, masks = ours(SUB_FEDAVG, tmp_path / "r")
    _, _, theirs = released(SUB_FEDAVG, "masks begin anew")
    assert all(mask.mean() == pytest.approx(0.75, abs=0.01) for mask in theirs), "one cut deep for ever"
    assert all(mask.mean() < 0.6 for mask in masks)


def test_few_epochs_prune_too(tmp_path: Path) -> None:
    """Released: the second mask is taken after the fifth epoch; with fewer an unchanged one is committed."""
    _, masks = ours(SUB_FEDAVG, tmp_path / "r")
    _, _, theirs = released(SUB_FEDAVG, "fifth epoch")
    assert all(mask.all() for mask in theirs) and not any(mask.all() for mask in masks)
    task = tiny.experiment(study(SUB_FEDAVG)).task
    local = LocalClient(task, 0, 1, "federate")
    trained = TrainingResult(task.theta_0, 0.0, {1: task.theta_0.floats})
    prune = PruneWhenMaskMoves(RATE, TARGET, -1.0, 1e-4)
    assert prune(local, task.theta_0, local.full, trained)[1] is local.full, "the same model twice: nothing moved"


def test_a_live_weight_that_crosses_zero_goes_on() -> None:
    """Released: what is smaller than 1e-6 has no gradient, alive or not."""
    experiment = tiny.experiment(study(LOTTERYFL))
    task = experiment.task
    local = LocalClient(task, 0, 1, "federate")
    e = task.layout.prunable[-1]
    floats = task.theta_0.floats.copy()
    floats[e.offset] = 0
    ours_after = local.train(Params(floats, task.theta_0.ints), recipe=local.recipe, active=local.full).params
    it = Released(experiment, frozenset({"zero is dead"}))
    start = {name: value.clone() for name, value in it.theta.items()}
    start[e.name].view(-1)[0] = 0
    theirs = list(it.trained(start, it.masks[0], local))[-1]
    assert theirs[e.name].view(-1)[0] == 0 and ours_after.floats[e.offset] != 0


def test_ties_and_the_target_are_exact() -> None:
    """Released: a threshold keeps all that are equal to it, and a nominal rate overshoots its target."""
    it = Released(tiny.experiment(study(LOTTERYFL)), frozenset({"percentile"}))
    flat = {name: torch.ones_like(mask) for name, mask in it.masks[0].items()}
    assert all(mask.all() for mask in it.pruned(flat, it.masks[0]).values())
    task = it.experiment.task
    local, equal = LocalClient(task, 0, 1, "federate"), Params(np.ones_like(task.theta_0.floats), task.theta_0.ints)
    _, mask = PruneAndRewind(RATE, TARGET, -1.0)(local, equal, local.full, None)
    assert mask.sum() == round(0.75 * mask.size)
    for _ in range(6):
        _, mask = PruneAndRewind(RATE, TARGET, -1.0)(local, task.theta_0, mask, None)
    assert mask.sum() == round(TARGET * mask.size)
    assert 0.75**5 < TARGET < 0.75**4, "the nominal rate ends at 0.24"


def lotteryfl_cut(local: LocalClient, params: Params, gate: float) -> tuple[Params, np.ndarray]:
    return PruneAndRewind(RATE, TARGET, gate)(local, params, local.full, None)


def sub_fedavg_cut(local: LocalClient, params: Params, gate: float) -> tuple[Params, np.ndarray]:
    """Prune whatever the distance of its masks is: the gate alone decides."""
    trained = TrainingResult(params, 0.0, {1: params.floats})
    return PruneWhenMaskMoves(RATE, TARGET, gate, -1.0)(local, params, local.full, trained)


@pytest.mark.parametrize("cut", [lotteryfl_cut, sub_fedavg_cut], ids=lambda cut: cut.__name__)
def test_the_gate_is_on_validation_data(cut: Any) -> None:
    """Released: on test images. Here the gate stands between what the two say, so that only one of them opens it."""
    experiment = tiny.experiment(study(LOTTERYFL))
    on_val, on_test = Released(experiment), Released(experiment, frozenset({"test images"}))
    task, sides = experiment.task, set()
    local = LocalClient(task, 0, 1, "federate")
    for seed in range(20):
        drawn = np.random.default_rng(seed).normal(size=task.theta_0.floats.size).astype(np.float32)
        params = Params(drawn, task.theta_0.ints)
        judged = params if cut is lotteryfl_cut else cut(local, params, -1.0)[0]  # Sub-FedAvg's: what the cut leaves
        model = {e.name: torch.from_numpy(judged.floats[e.slice].reshape(e.shape)) for e in task.layout.floats}
        val, test = on_val.accuracy(model, local), on_test.accuracy(model, local)
        assert val == pytest.approx(local.val_score(judged))
        if val != test:
            pruned = not cut(local, params, (val + test) / 2)[1].all()
            assert pruned == (val > test)
            sides.add(pruned)
    assert sides == {True, False}, "it was seen open against the test images, and shut"
