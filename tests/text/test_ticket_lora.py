"""A local mask over frozen weights, under shared adapters: what it masks, what crosses, what leaves as a ticket."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedlth.errors import StudyError
from fedlth.experiment.resolve import resolve
from fedlth.experiment.saved_ticket import load_ticket
from fedlth.methods.client_update import THETA_G
from fedlth.methods.global_mask import mean_gradient
from fedlth.methods.ticket_lora import UnderOwnMask
from fedlth.models.call import call
from fedlth.models.transformer import Transformer
from fedlth.storage.client_state import ClientState
from fedlth.study.schema import Study
from fedlth.training.batches import batches
from fedlth.training.evaluation import evaluate
from fedlth.training.local_client import LocalClient
from fedlth.training.task import Task, open_task
from fedlth.wire.payload import Content
from tests import tiny
from tests.text import sentences

transformers = pytest.importorskip("transformers")
LORA = {"lora": {"rank": 2}}
ADAPTED = 16 * 2 + 2 + 2 * 4 * 2 * 16  # values of the head and of the adapters
FROZEN = 2 * (4 * 16 * 16 + 2 * 16 * 32)  # linear weights of the encoder


def study(folder: Path, *, options: dict[str, Any] | None = None, **method: Any) -> Study:
    return sentences.study(
        folder / "data", options={"trains": LORA, **(options or {})}, method={"name": "ticket_lora", **method},
        federate={"rounds": 2, "clients_per_round": 2},
    )  # fmt: skip


def task_of(made: Study) -> Task:
    return open_task(resolve(made)[0].study.science())


def test_adapters_cross_and_masks_do_not(tmp_path: Path) -> None:
    """The bytes are those of FedAvg over adapters, and each client has a mask of exactly the density, its own."""
    made, plain = study(tmp_path, density=0.3), study(tmp_path, density=1.0)
    task = task_of(made)
    assert (task.exchange.num_floats, task.exchange.num_prunable) == (ADAPTED, 0)
    assert (task.layout.num_prunable, task.layout.moving.num_prunable) == (FROZEN, 0)
    ledgers = []
    for name, one in (("masked", made), ("plain", plain)):
        tiny.run(one.model_copy(update={"wire": "raw"}), tmp_path / name)
        rows = tiny.rows(tmp_path / name, "ledger")
        ledgers.append([(r["sender"], r["kind"], r["payload_bytes"]) for r in rows if r["kind"] != "metrics"])
        assert all(r["density"] == 1 and not r["mask_bytes"] for r in rows)
    assert ledgers[0] == ledgers[1]
    own = [row for row in tiny.rows(tmp_path / "masked", "metrics") if row["arm"] == "own_tuned"]
    assert len({row["ticket"] for row in own}) == 2
    wanted = {e.name: round(0.3 * e.size) / e.size for e in task.layout.prunable}
    assert all(row["layer_density"] == pytest.approx(wanted, abs=5e-3) for row in own)


def test_without_a_mask_it_is_fedavg_over_adapters(tmp_path: Path) -> None:
    tiny.run(study(tmp_path, density=1.0), tmp_path / "whole")
    made = study(tmp_path, density=1.0)
    model = made.model.model_copy(update={"prunable": ("@frozen",)})
    fedavg = made.model_copy(update={"method": {"name": "fedavg"}, "model": model})
    tiny.run(fedavg, tmp_path / "fedavg")
    found = [tiny.digests(tmp_path / name) for name in ("whole", "fedavg")]
    assert found[0]["theta_g"] == found[1]["theta_g"]


def test_the_score_is_weight_times_gradient_at_theta_0(tmp_path: Path) -> None:
    """Against autograd on the plain module; a round, or what the server sends, changes no mask; training leaves it."""
    task = task_of(study(tmp_path, density=0.3))
    theta_0, size = task.theta_0, task.layout.num_prunable
    module = task.model.module().eval()
    named = dict(module.named_parameters())
    for e in task.layout.prunable:
        assert not named[e.name].requires_grad
        named[e.name].requires_grad_(True)
    data, drawn = task.part(0, "train"), LocalClient(task, 0, 0, "own mask")
    parts = batches(len(data), 8, drawn.rng("gradients"))
    for part in parts:
        batch = data.batch(torch.from_numpy(part))
        (task.loss(call(module, batch.x), batch.y) / len(parts)).backward()
    wanted = np.concatenate([named[e.name].grad.numpy().reshape(-1) for e in task.layout.prunable])
    np.testing.assert_allclose(mean_gradient(drawn, theta_0, 0), wanted, atol=1e-6)
    assert np.abs(wanted).max() > 1e-4
    assert not any(tensor.requires_grad for tensor in task.flat_model.frozen)
    update = UnderOwnMask(density=0.3)
    masks = []
    for round, shift in ((1, 0.0), (5, 0.1)):
        local, sent = LocalClient(task, 0, round, "federate"), task.shared_part(theta_0)
        inbox = {THETA_G: Content(np.ones(0, bool), sent.floats + np.float32(shift), sent.ints)}
        held = update.own(local, inbox, ClientState())
        masks.append(held.mask)
        done = update(local, inbox, ClientState())
        assert np.array_equal(done.state.masks["active"], held.mask) and not done.state.vectors
        assert local.log[0].steps == local.steps_an_epoch  # the pass that found the mask
        again = LocalClient(task, 0, round + 1, "federate")
        update(again, inbox, done.state)
        assert len(again.log) == 1  # it is found once
        frozen = held.params.floats[:size]
        assert np.array_equal(frozen, np.where(held.mask, theta_0.floats[:size], 0))
    assert np.array_equal(*masks)
    for e in task.layout.prunable:
        score = np.abs(wanted * theta_0.floats[:size])[e.slice]
        kept = masks[0][e.slice]
        assert score[kept].min() >= score[~kept].max() - 1e-6


def test_a_control_keeps_as_many_by_chance(tmp_path: Path) -> None:
    task = task_of(study(tmp_path, density=0.3))
    local, theta_0 = LocalClient(task, 0, 1, "federate"), task.shared_part(task.theta_0)
    inbox = {THETA_G: Content(np.ones(0, bool), theta_0.floats, theta_0.ints)}
    updates = [
        resolve(study(tmp_path, density=0.3, score=score))[0].method.own for score in ("snip", "random", "magnitude")
    ]
    masks = [update.own(local, inbox, ClientState()).mask for update in updates]
    counts = [[int(mask[e.slice].sum()) for e in task.layout.prunable] for mask in masks]
    assert counts[0] == counts[1] == counts[2]
    assert abs((masks[0] & masks[1]).mean() - 0.09) < 0.02 < (masks[0] & masks[2]).mean() - 0.09


@pytest.mark.parametrize("tickets", ["dense", "compact"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_ticket_leaves_with_masked_merged_weights(tmp_path: Path, family: str, tickets: str) -> None:
    made = sentences.study(
        tmp_path / "data", family, options={"trains": LORA, "pooling": "own"},
        method={"name": "ticket_lora", "density": 0.4}, personalise={"arms": ["own_tuned"]}, tickets=tickets,
    )  # fmt: skip
    tiny.run(made, tmp_path / "r")
    module, task = load_ticket(tmp_path / "r", 1), tiny.task_of(tmp_path / "r")
    assert isinstance(module, Transformer)
    named = dict(module.named_parameters())
    density = np.mean(np.concatenate([(named[e.name] != 0).numpy().reshape(-1) for e in task.layout.prunable]))
    assert density == pytest.approx(0.4, abs=0.01)
    test_part = task.part(1, "test")
    with torch.no_grad():
        outputs = call(module, test_part.batch(slice(None)).x)
    (row,) = (r for r in tiny.rows(tmp_path / "r", "metrics") if r["client"] == 1)
    assert float(task.loss(outputs, test_part.y)) == pytest.approx(row["test_loss"], abs=1e-6)
    module.save_pretrained(tmp_path / "out")
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    few = test_part.batch(slice(0, 1)).x
    assert isinstance(few, dict)
    with torch.no_grad():
        assert torch.allclose(plain(**few).logits, call(module, few), atol=1e-5)


def test_a_personal_ticket_under_adapters_is_a_state_of_little_more_than_its_mask(tmp_path: Path) -> None:
    """Any method with `prunable: ["@frozen"]`: step 2 searches among weights that stand still."""
    made = sentences.study(
        tmp_path / "data", model={"name": "hf", "options": {"config": sentences.config("bert"), "trains": LORA},
                                  "prunable": ["@frozen"]},
        personalise={"arms": ["ticket", "global_mask", "random"]},
    )  # fmt: skip
    tiny.run(made, tmp_path / "r")
    rows = {row["arm"]: row for row in tiny.rows(tmp_path / "r", "metrics") if row["client"] == 0}
    assert rows["ticket"]["ticket"] == rows["global_mask"]["ticket"] != rows["random"]["ticket"]
    module, task = load_ticket(tmp_path / "r", 0), tiny.task_of(tmp_path / "r")
    named = dict(module.named_parameters())
    for e in task.layout.prunable:
        assert int((named[e.name] != 0).sum()) == round(0.5 * e.size)


def test_a_model_that_trains_whole_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="model.prunable: @frozen .*ticket_lora.* nothing trains"):
        resolve(study(tmp_path, options={"trains": "all", "frozen": []}))
    wanted = study(tmp_path)
    other = wanted.model_copy(update={"model": wanted.model.model_copy(update={"prunable": ("head.weight",)})})
    with pytest.raises(StudyError, match="model.prunable"):
        resolve(other)


def test_evaluations_see_the_mask(tmp_path: Path) -> None:
    task = task_of(study(tmp_path, density=0.3))
    theta_0, mask = task.theta_0, np.zeros(task.layout.num_prunable, bool)
    data = task.part(0, "test")
    whole, none = (evaluate(task.flat_model, p, data).loss for p in (theta_0, theta_0.masked(mask)))
    assert whole != none
    trained = LocalClient(task, 0, 1, "x").train(theta_0, recipe=LocalClient(task, 0, 1, "x").recipe, active=mask)
    moved = task.layout.moving.part_of(replace(trained.params), task.layout).floats
    assert not trained.params.floats[: mask.size].any()
    assert (moved != task.moving_part(theta_0).floats).any()
