"""FedPer, FedRep, FedBN: what stays, what crosses, and that what crosses really moves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from fedlth import forecast
from fedlth.errors import StudyError
from fedlth.experiment.resolve import resolve
from fedlth.federation.fleet import Clock
from fedlth.methods.client_update import THETA_G, passes_of
from fedlth.methods.fedselect import crossing
from fedlth.methods.private_layers import HeadThenBody
from fedlth.models.layout import HEAD, Params, layout_of
from fedlth.models.registry import MODELS
from fedlth.storage.client_state import ClientState
from fedlth.training.local_client import LocalClient
from fedlth.wire import payload
from fedlth.wire.payload import Content
from tests import tiny
from tests.methods.plain import batches_of, flat, load, mean, network, ran, sgd, state_of, theta_of

NORMED: dict[str, Any] = {"name": "tests.tiny:Small", "options": {}}


class HeadFirst(nn.Module):
    """Names that sort the other way round than the layers lie: ten before two, a head called `a`."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.z = nn.Linear(64, 8)
        self.norm = nn.BatchNorm1d(8)
        self.a = nn.Linear(8, num_classes)

    def forward(self, x: Any) -> Any:
        return self.a(self.norm(self.z(x.flatten(1))).relu())


@pytest.mark.parametrize(
    ("module", "head"),
    [
        (MODELS["lenet5"](num_classes=10, input_shape=(1, 28, 28)), None),
        (MODELS["resnet9"](num_classes=10, input_shape=(3, 32, 32)), None),
        (MODELS["mlp"](num_classes=4, input_shape=(1, 8, 8), hidden=[5] * 6), {"13.weight", "13.bias"}),
        (HeadFirst(), {"a.weight", "a.bias"}),
        (tiny.Small(), {"head.weight", "head.bias"}),
    ],
    ids=["lenet5", "resnet9", "deep", "named", "small"],
)
def test_the_head_is_found_whatever_it_is_called(module: nn.Module, head: set[str] | None) -> None:
    layout = layout_of(module, [n for n, p in module.named_parameters() if p.dim() > 1][:1])
    found = {e.name for e in layout.matching([HEAD])}
    last = [m for m in module.modules() if isinstance(m, nn.Linear)][-1]
    wanted = {n for n, p in module.named_parameters() if p is last.weight or p is last.bias}
    assert found == wanted and (head is None or found == head)
    assert {e.name for e in layout.matching([HEAD, "*bias"])} == found | {
        n for n, _ in module.named_parameters() if n.endswith("bias")
    }


def test_a_network_of_one_layer_has_nothing_left_to_share() -> None:
    with pytest.raises(StudyError, match="model.personal: must leave something to share, got .'@head'."):
        resolve(tiny.of_method("fedper", model={"options": {"hidden": []}}))


def test_fedper_with_everything_shared_is_fedavg_to_the_bit(tmp_path: Path) -> None:
    for name, method, personal in (("a", "fedavg", None), ("b", "fedper", ()), ("c", "fedper", None)):
        model = {"model": {"personal": personal}} if personal is not None else {}
        made = tiny.study(method={"name": method}, personalise={"arms": ["global"]}, **model)
        tiny.run(made, tmp_path / name)
    thetas = [tiny.digests(tmp_path / name)["theta_g"] for name in "abc"]
    assert thetas[0] == thetas[1] != thetas[2]


@pytest.mark.parametrize("name", ["fedper", "fedrep", "fedbn"])
def test_the_body_really_crosses_and_really_changes(name: str, tmp_path: Path) -> None:
    """What users report of others' code: a FedPer that exchanged nothing while its test passed."""
    downs: dict[tuple[int, int], Params] = {}
    ups: dict[tuple[int, int], Params] = {}

    class Watching(tiny.Lists):
        def run(self, jobs: Any) -> Any:
            answers = super().run(jobs)
            for job, answer in zip(jobs, answers, strict=True):
                if job.phase == "federate":
                    for box, found in ((job.inbox, downs), (answer.outbox, ups)):
                        got = payload.decode(box[0].payload, "values", experiment.layout)
                        assert got.floats is not None and got.ints is not None
                        found[job.round, job.client] = Params(got.floats, got.ints)
            return answers

    made = tiny.of_method(name, wire="raw", model=NORMED, federate={"rounds": 3, "clients_per_round": 3})
    experiment = tiny.experiment(made)
    tiny.run(made, tmp_path / "r", engine=Watching())
    names = {e.name for e in experiment.layout.floats if e.role == "param"}
    stays = {"norm.weight", "norm.bias"} if name == "fedbn" else {"head.weight", "head.bias"}
    assert names == {"conv.weight", "conv.bias", "norm.weight", "norm.bias", "head.weight", "head.bias"} - stays
    for round in (1, 2, 3):
        rounds = [c for r, c in ups if r == round]
        for client in rounds:
            before, after = downs[round, client], ups[round, client]
            for e in experiment.layout.floats:
                if e.role == "param":
                    assert (before.floats[e.slice] != after.floats[e.slice]).any(), f"{e.name} was trained"
        if round < 3:  # and what came up is what goes down next
            sizes = [LocalClient(experiment.task, c, round, "federate").num_train for c in rounds]
            joined = mean([ups[round, c].floats for c in rounds], sizes)
            for client in (c for r, c in downs if r == round + 1):
                np.testing.assert_allclose(downs[round + 1, client].floats, joined, rtol=1e-6, atol=1e-7)


def test_fedrep_against_its_arithmetic(tmp_path: Path) -> None:
    """Head epochs on the received body, then body epochs under the new head; three rounds, all clients."""
    experiment, folder = ran({"name": "fedrep", "head_epochs": 2}, tmp_path / "r", personalise={"arms": ["own"]})
    task, theta_0 = experiment.task, experiment.task.theta_0
    is_head = lambda name: name.startswith("3.")  # noqa: E731
    heads = np.zeros(theta_0.floats.size, bool)
    for e in task.layout.floats:
        heads[e.slice] = is_head(e.name)
    sizes = [LocalClient(task, c, 1, "federate").num_train for c in range(3)]
    body, own = theta_0.floats, [theta_0.floats] * 3
    for round in (1, 2, 3):
        for client in range(3):
            start = replace(theta_0, floats=np.where(heads, own[client], body))
            net = sgd(load(network(), start, task), batches_of(task, client, round, 2), 0.1, names=is_head)
            net = sgd(net, batches_of(task, client, round, 1), 0.1, names=lambda name: not is_head(name))
            own[client] = flat(net, task)
        body = mean(own, sizes)
    shared = task.merge(theta_of(folder), theta_0).floats
    np.testing.assert_allclose(shared[~heads], body[~heads], atol=1e-5)
    for client in range(3):
        kept = tiny.kept_by(task, state_of(folder, client)).floats
        np.testing.assert_allclose(kept[heads], own[client][heads], atol=1e-5)


def test_neither_pass_of_fedrep_moves_what_is_the_others() -> None:
    task = tiny.open_task(resolve(tiny.of_method("fedrep", model=NORMED))[0].text)
    local, passes = LocalClient(task, 0, 1, "federate"), list[tuple[Params, Params]]()
    real = LocalClient.train

    def spy(self: LocalClient, start: Params, **more: Any) -> Any:
        done = real(self, start, **more)
        passes.append((start, done.params))
        return done

    inbox = {THETA_G: Content(task.shared_mask(local.full), (sent := task.shared_part(task.theta_0)).floats, sent.ints)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalClient, "train", spy)
        HeadThenBody(2)(local, inbox, ClientState())
        HeadThenBody(2).tune(local, inbox, ClientState(), local.personal_recipe)
    entries = {e.name: e.slice for e in task.layout.floats}
    (before, headed), (between, ended), (start, tuned) = passes
    for name, at in entries.items():
        if name.startswith("head."):
            assert (headed.floats[at] != before.floats[at]).any() and (tuned.floats[at] != start.floats[at]).any()
            np.testing.assert_array_equal(ended.floats[at], between.floats[at])
        else:
            np.testing.assert_array_equal(between.floats[at], before.floats[at])
            assert (ended.floats[at] != between.floats[at]).any()
    assert np.array_equal(tuned.floats[entries["conv.weight"]], start.floats[entries["conv.weight"]])
    epochs = [cost.epochs for cost in local.log]
    assert epochs == [2, 1, 1], "all are counted"


def test_the_forecast_counts_the_heads_epochs() -> None:
    def rounds(name: str, **options: Any) -> tuple[float, float]:
        return forecast.own_epochs(tiny.experiment(tiny.study(method={"name": name, **options})))

    plain, two, five = rounds("fedper"), rounds("fedrep", head_epochs=2), rounds("fedrep", head_epochs=5)
    assert two == (3 * plain[0], plain[1]) and five == (6 * plain[0], plain[1])


def test_a_pass_of_a_part_costs_what_that_part_takes() -> None:
    """By hand: 64 x 12 and 12 x 4 weights, two FLOPs each a forward; 48 examples, 16 a batch."""
    body, head = 2 * 64 * 12, 2 * 12 * 4
    experiment = tiny.experiment(tiny.of_method("fedrep"))
    task = experiment.task
    local = LocalClient(task, 0, 1, "federate")
    crosses, half = crossing(task, local.full), local.full.copy()
    half[: 32 * 12] = False  # half of the body
    for active in (local.full, half):
        for trainable in (~crosses, crosses):
            local.train(task.theta_0, recipe=local.recipe, active=active, trainable=trainable)
    scattered = np.arange(task.layout.num_params) % 2 == 0  # a part of each tensor, as FedSelect's passes have
    local.train(task.theta_0, recipe=local.recipe, active=local.full, trainable=scattered)
    headed, bodied = 48 * (body + 3 * head), 48 * (3 * body + 2 * head)
    thinner = [48 * (body / 2 + 3 * head), 48 * (3 * body / 2 + 2 * head)]
    assert [cost.flops for cost in local.log] == [headed, bodied, headed, bodied, 3 * 48 * (body + head)]
    assert [cost.alive_flops for cost in local.log[:4]] == pytest.approx([headed, bodied, *thinner])
    update = experiment.federated_phases[0].update  # two epochs of the head and one of the body
    assert Clock(experiment, experiment.federated_phases[0], 1).usual_flops(0) == pytest.approx(2 * headed + bodied)
    whole = 3 * (body + head)
    assert passes_of(update, task, 0, flops=True) == pytest.approx((2 * headed + bodied) / 48 / whole)
    assert passes_of(update, task, 0, tunes=True, flops=True) == pytest.approx(headed / 48 / whole)
    shared = tiny.experiment(tiny.of_method("fedrep", model={"personal": []})).task
    assert [passes_of(update, shared, 0, tunes=tunes, flops=True) for tunes in (False, True)] == [1, 1]


def test_the_forecast_is_what_the_passes_cost(tmp_path: Path) -> None:
    """Every client trains as long as the others, so that the sums are equal, but for step 2 and its metrics."""
    made = tiny.of_method("fedrep", personalise={"arms": ["own"]}, federate={"rounds": 1, "clients_per_round": 3})
    tiny.run(made, tmp_path / "r")
    work = [w for row in tiny.rows(tmp_path / "r", "times") for w in row.get("work", []) if "flops" in w]
    assert len(work) == 6
    assert forecast.foreseen(made).flops == pytest.approx(sum(w["flops"] for w in work), rel=0.02)


def test_fedbn_keeps_the_norms_and_refuses_a_network_without() -> None:
    experiment, _ = resolve(tiny.of_method("fedbn"))
    assert {e.name for e in experiment.layout.entries} == {"conv.weight", "conv.bias", "head.weight", "head.bias"}
    assert experiment.study.model.buffers == "local_all"
    with pytest.raises(StudyError, match="method: fedbn needs a model with norms, mlp has none"):
        resolve(tiny.study(method={"name": "fedbn"}))


def test_local_statistics_are_each_clients_own(tmp_path: Path) -> None:
    """What users report: `local_all` norms that were averaged all the same, or fell back to theta_0's."""
    experiment, folder = ran({"name": "fedbn"}, tmp_path / "r", model=NORMED, personalise={"arms": ["own"]})
    task, kept = experiment.task, []
    for client in range(3):
        kept.append(tiny.kept_by(task, state_of(folder, client)))
    entries = {e.name: e.slice for e in task.layout.floats}
    for name in ("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"):
        own = [params.floats[entries[name]] for params in kept]
        assert (own[0] != own[1]).any() and (own[0] != task.theta_0.floats[entries[name]]).any()
    steps = [sum(LocalClient(task, c, r, "federate").steps_an_epoch for r in (1, 2, 3)) for c in range(3)]
    assert [int(params.ints[0]) for params in kept] == steps, "they have seen all of their own batches, no others"
    local = LocalClient(task, 0, 0, "personalise")
    theta = theta_of(folder)
    inbox = {THETA_G: Content(np.ones(task.exchange.num_prunable, bool), theta.floats, theta.ints)}
    held: Any = experiment.method.own
    own_model = held.own(local, inbox, state_of(folder, 0)).params
    np.testing.assert_array_equal(
        own_model.floats[entries["norm.running_var"]], kept[0].floats[entries["norm.running_var"]]
    )
    shared = task.merge(theta, task.theta_0).floats[entries["conv.weight"]]
    np.testing.assert_array_equal(own_model.floats[entries["conv.weight"]], shared)


def test_fedbn_that_shares_all_is_fedavg_to_the_bit(tmp_path: Path) -> None:
    for name, method, buffers in (("a", "fedavg", "aggregate"), ("b", "fedbn", "aggregate")):
        ran({"name": method}, tmp_path / name, model={**NORMED, "buffers": buffers})
    assert tiny.digests(tmp_path / "a")["theta_g"] == tiny.digests(tmp_path / "b")["theta_g"]
