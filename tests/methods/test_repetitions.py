"""What a visit does several times draws its batches anew each time; what is compared draws the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedlth.methods.client_update import THETA_G
from fedlth.storage.client_state import ClientState
from fedlth.training import evaluation, train
from fedlth.training.flat_model import FlatModel
from fedlth.training.local_client import LocalClient
from fedlth.training.request import TrainingRequest
from fedlth.wire.payload import Content
from tests import tiny


def orders(name: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[list[bytes], list[bytes], LocalClient]:
    """Return the order of every training of a first visit and the examples of every gradient, as bytes."""
    experiment = tiny.experiment(tiny.study(method={"name": name, **tiny.METHODS[name], **options}))
    phase, task = experiment.federated_phases[0], experiment.task
    local, theta = LocalClient(task, 0, 1, phase.name, rounds=phase.rounds), experiment.initial()
    trained, scored = list[bytes](), list[bytes]()
    real, slope = train.train, evaluation.gradient

    def training(model: FlatModel, request: TrainingRequest) -> Any:
        trained.append(np.concatenate([part for parts in request.batches for part in parts]).tobytes())
        return real(model, request)

    def gradient(model: FlatModel, at: Any, batch: Any) -> Any:
        scored.append(batch.tensor.numpy().tobytes())
        return slope(model, at, batch)

    monkeypatch.setattr(train, "train", training)
    monkeypatch.setattr(evaluation, "gradient", gradient)
    phase.update(local, {THETA_G: Content(task.shared_mask(local.full), theta.floats, theta.ints)}, ClientState())
    return trained, scored, local


@pytest.mark.parametrize(
    ("name", "options", "gradients"), [("flash", {"stage1": 4}, 4), ("prunefl", {"initial": 4}, 12)]
)
def test_each_repetition_draws_its_own_batches(
    name: str, options: dict[str, int], gradients: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, scored, local = orders(name, monkeypatch, **options)
    assert len(trained) == len(set(trained)) == 4 and len(scored) == len(set(scored)) == gradients
    assert len(local.log) == 8 and len(local.work) == 8, "and all of it is counted"


def test_ditto_and_fedrep_train_twice_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, options in (("ditto", {}), ("fedrep", {"head_epochs": 1})):
        trained, _, _ = orders(name, monkeypatch, **options)
        assert len(trained) == 2 and trained[0] == trained[1]
