"""FedProx, Ditto, pFedMe: what each is without its term, and against the papers' arithmetic in plain torch."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fedlth import forecast
from fedlth.errors import StudyError
from fedlth.experiment.resolve import resolve
from fedlth.methods.client_update import THETA_G
from fedlth.methods.proximal import DittoUpdate, EnvelopeUpdate
from fedlth.models.layout import Params
from fedlth.storage.client_state import ClientState
from fedlth.training.budget import Budget
from fedlth.training.local_client import LocalClient
from fedlth.wire.payload import Content
from tests import tiny
from tests.methods.plain import batches_of, flat, load, mean, network, ran, sgd, state_of, theta_of


def facts(out: Path) -> tuple[Any, ...]:
    """Return what two methods' runs have in common where their rounds are the same."""
    rounds = [r for r in tiny.rows(out, "ledger") if r["phase"] == "federate"]
    return tiny.digests(out)["theta_g"], str(rounds)


def received(local: LocalClient, params: Params) -> dict[str, Content]:
    return {THETA_G: Content(np.ones(local.full.size, bool), params.floats, params.ints)}


@pytest.mark.parametrize("method", [{"name": "fedprox", "mu": 0.0}, {"name": "ditto"}, {"name": "apfl"}], ids=str)
def test_the_shared_model_is_fedavgs_to_the_bit(method: dict[str, Any], tmp_path: Path) -> None:
    more = {"train": {"momentum": 0.5, "epochs": 2}}
    ran({"name": "fedavg"}, tmp_path / "fedavg", **more)
    ran(method, tmp_path / "other", **more)
    assert facts(tmp_path / "fedavg") == facts(tmp_path / "other")


def test_the_pull_is_to_what_was_received(tmp_path: Path) -> None:
    """mu / 2 |w - w_t|^2 written out; and mu changes the result."""
    experiment, folder = ran({"name": "fedprox", "mu": 0.7}, tmp_path / "r")
    task, theta = experiment.task, experiment.task.theta_0
    sizes = [LocalClient(task, c, 1, "federate").num_train for c in range(3)]
    for round in (1, 2, 3):
        ends = []
        for client in range(3):
            net = load(network(), theta, task)
            anchor = {name: p.detach().clone() for name, p in net.named_parameters()}
            pull = lambda name, p, anchor=anchor: 0.7 * (p - anchor[name])  # noqa: E731
            ends.append(flat(sgd(net, batches_of(task, client, round, 1), 0.1, more=pull), task))
        theta = replace(theta, floats=mean(ends, sizes))
    np.testing.assert_allclose(theta_of(folder).floats, theta.floats, atol=1e-5)
    _, free = ran({"name": "fedavg"}, tmp_path / "free")
    assert np.abs(theta_of(free).floats - theta.floats).max() > 1e-3


def test_without_a_pull_dittos_personal_model_is_local_training_alone(tmp_path: Path) -> None:
    """The same start, the same batches: round after round, without anything of the others."""
    experiment, folder = ran({"name": "ditto", "strength": 0.0}, tmp_path / "r", train={"momentum": 0.5, "epochs": 2})
    task = experiment.task
    for client in range(3):
        alone = task.theta_0
        for round in (1, 2, 3):
            local = LocalClient(task, client, round, "federate")
            alone = local.train(alone, recipe=local.recipe).params
        np.testing.assert_array_equal(state_of(folder, client).vectors["personal"], task.moving_part(alone).floats)


def test_ditto_against_its_arithmetic(tmp_path: Path) -> None:
    """v goes by the gradient at v plus strength (v - w_t), w by FedAvg; three rounds, all clients."""
    strength = 0.4
    experiment, folder = ran({"name": "ditto", "strength": strength}, tmp_path / "r")
    task = experiment.task
    shared, personal = task.theta_0.floats, [task.theta_0.floats] * 3
    sizes = [LocalClient(task, c, 1, "federate").num_train for c in range(3)]
    for round in (1, 2, 3):
        ends = []
        for client in range(3):
            net = load(network(), replace(task.theta_0, floats=shared), task)
            anchor = {name: p.detach().clone() for name, p in net.named_parameters()}
            ends.append(flat(sgd(net, batches_of(task, client, round, 1), 0.1), task))
            own = load(network(), replace(task.theta_0, floats=personal[client]), task)
            pull = lambda name, p, anchor=anchor: strength * (p - anchor[name])  # noqa: E731
            personal[client] = flat(sgd(own, batches_of(task, client, round, 1), 0.1, more=pull), task)
        shared = mean(ends, sizes)
    np.testing.assert_allclose(theta_of(folder).floats, shared, atol=1e-5)
    for client in range(3):
        np.testing.assert_allclose(state_of(folder, client).vectors["personal"], personal[client], atol=1e-5)


def test_dittos_own_model_is_v_and_the_first_one_is_what_came() -> None:
    task = tiny.task()
    local, update = LocalClient(task, 0, 1, "federate"), DittoUpdate(0.5)
    inbox = received(local, task.theta_0)
    np.testing.assert_array_equal(update.own(local, inbox, ClientState()).params.floats, task.theta_0.floats)
    visited = update(local, inbox, ClientState()).state
    other = received(local, replace(task.theta_0, floats=task.theta_0.floats * 2))
    np.testing.assert_array_equal(update.own(local, other, visited).params.floats, visited.vectors["personal"])
    near = update.tune(local, other, visited, local.recipe).params.floats
    far = DittoUpdate(0.0).tune(local, other, visited, local.recipe).params.floats
    away = [float(np.linalg.norm(v - 2 * task.theta_0.floats)) for v in (near, far)]
    assert away[0] < away[1], "more of a pull leaves it nearer to the global model"


def test_a_batch_may_be_taken_several_times_in_a_row() -> None:
    def drawn(budget: Budget) -> list[list[list[int]]]:
        return [[part.tolist() for part in epoch] for epoch in budget(10, 4, np.random.default_rng(0))]

    once, thrice = Budget(epochs=1, steps=1), Budget(epochs=1, steps=1, repeats=3)
    assert drawn(thrice) == [[part for part in epoch for _ in range(3)] for epoch in drawn(once)]
    assert thrice.total(10, 4) == 3 * once.total(10, 4) == 12
    assert thrice.passes(10, 4) == once.passes(10, 4) == 2
    assert (thrice + once).repeats == 3 and thrice.times(2).total(10, 4) == 24


def test_pfedme_against_its_arithmetic() -> None:
    """One visit: K steps on each batch from the last theta, then w goes outer_lr strength (w - theta)."""
    lam, steps, outer = 3.0, 4, 0.05
    task = tiny.task(train={"momentum": 0.0, "epochs": 2}, compute="reference")
    local, update = LocalClient(task, 0, 1, "federate"), EnvelopeUpdate(lam, steps, outer)
    found = update(local, received(local, task.theta_0), ClientState())
    theta = load(network(), task.theta_0, task)
    w = copy.deepcopy(theta)
    for x, y in batches_of(task, 0, 1, 2):
        anchor = {name: p.detach().clone() for name, p in w.named_parameters()}
        pull = lambda name, p, anchor=anchor: lam * (p - anchor[name])  # noqa: E731
        sgd(theta, [(x, y)] * steps, 0.1, more=pull)
        with torch.no_grad():
            for p, t in zip(w.parameters(), theta.parameters(), strict=True):
                p.sub_(outer * lam * (p - t))
    sent = found.contents["update"].floats
    assert sent is not None
    np.testing.assert_allclose(sent, flat(w, task), atol=1e-5)
    np.testing.assert_allclose(found.state.vectors["personal"], flat(theta, task), atol=1e-5)
    assert sum(cost.steps for cost in local.log) == steps * local.recipe.steps(local.num_train), "all are counted"


def test_pfedmes_beta_mixes_the_mean_into_the_old_state(tmp_path: Path) -> None:
    method = {"name": "pfedme", "strength": 2.0, "inner_steps": 2, "outer_lr": 0.1}
    one = {"federate": {"rounds": 1}}
    experiment, whole = ran(method, tmp_path / "whole", **one)
    _, half = ran({**method, "beta": 0.5}, tmp_path / "half", **one)
    old = experiment.task.theta_0.floats
    np.testing.assert_allclose(theta_of(half).floats, old + 0.5 * (theta_of(whole).floats - old), atol=1e-6)


@pytest.mark.parametrize("name", ["pfedme", "ditto", "apfl"])
def test_nothing_personal_is_trained_on_test_examples(name: str, tmp_path: Path) -> None:
    """What users report of pFedMe's code: it personalises on the batches that it is then tested on."""
    method = {"name": name, **tiny.METHODS[name]}
    arms = {"personalise": {"arms": ["own", "own_tuned"]}, "clients": {"test_samples": 20}}
    ran(method, tmp_path / "a", **arms)
    ran(method, tmp_path / "b", **arms, data={"name": "tests.methods.test_proximal:other_tests"})
    before, after = tiny.digests(tmp_path / "a"), tiny.digests(tmp_path / "b")
    assert before == after, "models and tickets are the same, whatever is tested"
    scores = [[r["test_loss"] for r in tiny.rows(tmp_path / n, "metrics")] for n in "ab"]
    assert scores[0] != scores[1], "and the test examples were others"


def other_tests() -> dict[str, Any]:
    found = tiny.images()
    return {**found, "x_test": 255 - found["x_test"]}


def test_apfl_against_its_arithmetic() -> None:
    """w by its own gradient; v by alpha times the gradient at alpha v + (1 - alpha) w, both as they were before."""
    task = tiny.task(train={"momentum": 0.0, "epochs": 2}, compute="reference")
    for adaptive in (False, True):
        local = LocalClient(task, 0, 1, "federate")
        start = replace(task.theta_0, floats=task.theta_0.floats * np.float32(0.5))
        trained, personal, share = local.train_mixed(
            task.theta_0, start, 0.3, recipe=local.recipe, active=local.full, adapts=adaptive
        )
        w, v, alpha = load(network(), task.theta_0, task), load(network(), start, task), 0.3
        for step, (x, y) in enumerate(batches_of(task, 0, 1, 2)):
            seen = network()
            with torch.no_grad():
                for s, a, b in zip(seen.parameters(), v.parameters(), w.parameters(), strict=True):
                    s.copy_(alpha * a + (1 - alpha) * b)
            F.cross_entropy(seen(x), y).backward()
            if adaptive and step == 0:
                triples = zip(seen.parameters(), v.parameters(), w.parameters(), strict=True)
                slope = sum(float((s.grad * (a - b)).sum().detach()) for s, a, b in triples if s.grad is not None)
                alpha = min(1.0, max(0.0, alpha - 0.1 * slope))
            sgd(w, [(x, y)], 0.1)
            with torch.no_grad():
                for s, a in zip(seen.parameters(), v.parameters(), strict=True):
                    assert s.grad is not None
                    a.sub_(0.1 * alpha * s.grad)
        assert share == pytest.approx(alpha, abs=1e-6) and (share != 0.3) == adaptive
        np.testing.assert_allclose(trained.params.floats, flat(w, task), atol=1e-5)
        np.testing.assert_allclose(personal.floats, flat(v, task), atol=1e-5)


def test_apfls_ends_are_the_shared_model_and_one_alone() -> None:
    task = tiny.task(train={"momentum": 0.0}, compute="reference")
    local = LocalClient(task, 0, 1, "federate")
    alone = local.train(task.theta_0, recipe=local.recipe)
    for share in (0.0, 1.0):
        trained, personal, _ = local.train_mixed(
            task.theta_0, task.theta_0, share, recipe=local.recipe, active=local.full, adapts=False
        )
        assert trained.params.digest() == alone.params.digest() and trained.loss == alone.loss
        wanted = task.theta_0 if share == 0 else alone.params
        assert personal.digest() == wanted.digest()


@pytest.mark.parametrize("name", ["fedprox", "ditto", "pfedme", "apfl", "scaffold"])
def test_a_studys_pull_does_not_vanish_behind_the_methods(name: str) -> None:
    with pytest.raises(StudyError, match=f"train.pull: must be left out, method {name} has its own"):
        resolve(tiny.of_method(name, train={"pull": {"name": "proximal", "mu": 1.0}}))


def test_the_forecast_says_what_trains_the_methods_own_objective() -> None:
    pytest.importorskip("numba")
    text = forecast.forecast(tiny.of_method("fedprox", compute="sparse", train={"clip_norm": 1.0}))
    why = "dense trainings run in torch, client by client, because the kernel has no clip_norm"
    assert f"fedprox's own: {why}" in text and f"step 1: {why}" in text
    assert "fedprox's own: dense trainings run in the kernel" in forecast.forecast(
        tiny.of_method("fedprox", compute="sparse")
    )
    assert "'s own" not in forecast.forecast(tiny.of_method("fedavg", compute="sparse"))
    text = forecast.forecast(
        tiny.of_method("fedavg", compute="sparse", train={"pull": {"name": "l1", "strength": 0.1}})
    )
    assert "because the kernel has no pull L1" in text

    def rounds(name: str) -> float:
        return forecast.own_epochs(tiny.experiment(tiny.of_method(name)))[0]

    assert rounds("ditto") == rounds("apfl") == 2 * rounds("fedavg") == rounds("pfedme"), "it has two inner steps"
