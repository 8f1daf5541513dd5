"""A model with weights of its own: what nothing trains, and what it brings, is named and never crosses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from fedlth.engines.inprocess import InProcess
from fedlth.errors import NothingUsable, StudyError
from fedlth.experiment.resolve import resolve
from fedlth.experiment.saved_ticket import load_ticket
from fedlth.federation import session
from fedlth.models.layout import read
from fedlth.storage.client_state import ClientState
from fedlth.study import schema
from fedlth.training.local_client import LocalClient
from fedlth.training.optimizer import AdamW
from fedlth.training.task import forget_tasks
from tests import tiny

WORDS, WIDTH = 64, 32


class Encoder(nn.Module):
    """Embeddings that nothing trains and a layer, both from a file; a head that is drawn."""

    def __init__(self, num_classes: int, path: str) -> None:
        super().__init__()
        self.embed = nn.Linear(WORDS, WIDTH, bias=False)
        self.layer = nn.Linear(WIDTH, WIDTH)
        weights = load_file(path)
        with torch.no_grad():
            self.embed.weight.copy_(weights["embed.weight"])
            self.layer.weight.copy_(weights["layer.weight"])
        self.embed.requires_grad_(False)
        self.head = nn.Linear(WIDTH, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.layer(self.embed(x.flatten(1)))))


def weights(path: Path, seed: int = 0) -> Path:
    """Write "pre-trained" weights."""
    made = torch.Generator().manual_seed(seed)
    shapes = {"embed.weight": (WIDTH, WORDS), "layer.weight": (WIDTH, WIDTH)}
    save_file({name: torch.randn(*shape, generator=made) / 6 for name, shape in shapes.items()}, path)
    return path


def study(path: Path, **sections: Any) -> schema.Study:
    model = {"name": "tests.test_named_weights:Encoder", "options": {"path": str(path)}, **sections.pop("model", {})}
    base: dict[str, Any] = {"finder": {"densities": [0.5]}, "personalise": {"arms": ["ticket"]}, "model": model}
    return tiny.study(**{**base, **sections})


def test_what_nothing_trains_is_in_no_message_state_or_compact_ticket(tmp_path: Path) -> None:
    made = study(weights(tmp_path / "w"), tickets="compact", wire="raw", refine={"rounds": 1, "clients_per_round": 2})
    folder = tiny.run(made, tmp_path / "r")
    task = tiny.task_of(tmp_path / "r")
    assert [e.name for e in task.layout.entries if e not in task.layout.moving.entries][0] == "embed.weight"
    trained = sum(e.size for e in task.layout.floats if e.name != "embed.weight")
    assert json.loads((tmp_path / "r" / "header.json").read_bytes())["num_exchanged"] == trained
    rows = [r for r in tiny.rows(tmp_path / "r", "ledger") if r["kind"] in ("values", "evaluation")]
    assert rows and max(r["payload_bytes"] for r in rows) < 4 * trained + 200 < 4 * task.layout.num_floats
    theta = folder.load_params(folder.progress().theta)
    assert theta.floats.size == trained
    for client, version in folder.progress().versions.items():
        held = ClientState.from_bytes(folder.clients.get(int(client), version))
        assert sum(v.size for v in held.vectors.values()) <= trained
    for file in (tmp_path / "r" / "tickets").iterdir():
        with safe_open(file, "numpy") as opened:
            assert "embed.weight" not in opened.keys() and opened.metadata()["frozen"]  # noqa: SIM118
    loaded = load_ticket(tmp_path / "r", 0).state_dict()
    assert torch.equal(loaded["embed.weight"], load_file(tmp_path / "w")["embed.weight"])


def test_both_forms_of_a_ticket_are_one_model(tmp_path: Path) -> None:
    for form in ("dense", "compact"):
        tiny.run(study(weights(tmp_path / "w"), tickets=form), tmp_path / form)
    one, other = (load_ticket(tmp_path / form, 1).state_dict() for form in ("dense", "compact"))
    assert one.keys() == other.keys() and all(one[k].equal(other[k]) for k in one)
    files = [tmp_path / form / "tickets" / "client-0001.safetensors" for form in ("dense", "compact")]
    assert files[1].stat().st_size < files[0].stat().st_size - 4 * WIDTH * WORDS
    weights(tmp_path / "w", seed=1)
    with pytest.raises(StudyError, match="what nothing trains has other values than in the run"):
        load_ticket(tmp_path / "compact", 1)


def test_the_name_is_of_what_is_not_drawn(tmp_path: Path) -> None:
    path = weights(tmp_path / "w")
    first, second = (resolve(study(path, seed=seed))[0].study.model.theta_0 for seed in (0, 1))
    assert first and first == second, "the head, which a seed draws, is not in it"
    assert resolve(study(weights(tmp_path / "v", seed=1)))[0].study.model.theta_0 != first
    assert resolve(tiny.study())[0].study.model.theta_0 is None
    frozen = resolve(tiny.study(model={"name": "tests.user_model:Mixed", "options": {}}))[0].study.model.theta_0
    assert frozen is not None, "of what nothing trains a draw counts too"
    random = study(path, model={"reinit_options": {"path": str(weights(tmp_path / "u", seed=2))}})
    assert resolve(random)[0].study.model.theta_0 == first


def test_other_weights_are_refused(tmp_path: Path) -> None:
    """By a study that names them, by a resume, and by a device that has other files."""
    path = weights(tmp_path / "w")
    named = resolve(study(path))[0].study
    tiny.run(study(path), tmp_path / "r")
    weights(path, seed=1)
    forget_tasks()
    with pytest.raises(StudyError, match="model.theta_0: the study begins with the weights .* other files, or another"):
        resolve(named)
    with pytest.raises(StudyError, match="model.theta_0"):
        session.resume(tmp_path / "r", InProcess())
    with pytest.raises(StudyError, match="got a model without any"):
        resolve(tiny.study(model={"theta_0": "00"}))


class Elsewhere(tiny.Lists):
    """Devices whose files have changed since the server began."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def run(self, jobs: Any) -> Any:
        weights(self.path, seed=1)
        forget_tasks()
        try:
            return super().run(jobs)
        finally:
            weights(self.path)
            forget_tasks()


def test_a_client_with_other_files_is_refused_and_says_why(tmp_path: Path) -> None:
    path = weights(tmp_path / "w")
    with pytest.raises(NothingUsable, match="model.theta_0: the study begins with the weights"):
        tiny.run(study(path, federate={"rounds": 3}), tmp_path / "r", engine=Elsewhere(path))
    failed = [f for r in tiny.rows(tmp_path / "r", "rounds") for f in r["failed"]]
    assert {f["kind"] for f in failed} == {"raised"}


def test_a_ticket_says_what_its_mask_costs_who_has_the_weights(tmp_path: Path) -> None:
    tiny.run(study(weights(tmp_path / "w")), tmp_path / "r")
    task = tiny.task_of(tmp_path / "r")
    with safe_open(tmp_path / "r" / "tickets" / "client-0000.safetensors", "numpy") as file:
        assert 26 < int(file.metadata()["mask_bytes"]) < task.layout.num_prunable / 8


def test_a_step_leaves_out_what_nothing_trains(tmp_path: Path) -> None:
    """The same numbers as where all tensors are trained and one may not move."""
    task = tiny.task(**study(weights(tmp_path / "w")).model_dump(include={"model", "finder"}, mode="json"))
    layout, model = task.layout, task.flat_model
    frozen = next(e for e in layout.floats if e.name == "embed.weight")
    assert frozen.slice.start == layout.trained.stop == layout.num_params - frozen.size
    seen = list[torch.Tensor]()

    class Watched(AdamW):
        def __call__(self, grad: torch.Tensor, *rest: Any) -> torch.Tensor:
            seen.append(grad)
            return super().__call__(grad, *rest)

    local = LocalClient(task, 0, 0, "t")
    done = [local.train(task.theta_0, recipe=replace(local.recipe, optimizer=one())).params for one in (AdamW, Watched)]
    assert done[0].digest() == done[1].digest() and {g.numel() for g in seen} == {layout.trained.stop}
    assert np.array_equal(done[0].floats[frozen.slice], task.theta_0.floats[frozen.slice])
    module = task.model.module()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=local.recipe.lr)
    for parts in local.recipe.budget(local.num_train, local.recipe.batch_size, local.rng("order")):
        for at in parts:
            optimizer.zero_grad()
            batch = local.train_part.batch(torch.from_numpy(at))
            torch.nn.functional.cross_entropy(module(batch.x), batch.y).backward()
            optimizer.step()
    np.testing.assert_allclose(done[0].floats, read(module, layout).floats, atol=2e-5)
    assert model.grad[frozen.slice].abs().sum() == 0
