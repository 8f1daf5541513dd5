"""SCAFFOLD: its first round is FedAvg, its variates are the paper's, and what the server remembers really goes down."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlth.errors import StudyError
from fedlth.experiment.resolve import resolve
from fedlth.experiment.well_formed import method_of
from fedlth.federation.downloads import Downloads
from fedlth.federation.forecast_bytes import forecast_bytes
from fedlth.federation.jobs import Message
from fedlth.methods import table
from fedlth.methods.aggregate import Contribution, CountMean, FedAvg, join
from fedlth.methods.scaffold import DELTA_C, C, ControlledMean, reach
from fedlth.models.layout import Entry, Layout, Params
from fedlth.storage.server_state import ServerState
from fedlth.training.budget import Budget
from fedlth.training.local_client import LocalClient
from fedlth.training.optimizer import Sgd
from fedlth.wire import payload
from fedlth.wire.payload import Content
from tests import tiny
from tests.methods.plain import batches_of, flat, load, mean, network, ran, sgd, state_of, theta_of

FOUR = Layout((Entry("w", (4,), "param", 0, prunable=True),))
NO_INTS = np.zeros(0, np.int64)
SCAFFOLD = {"name": "scaffold"}


def test_the_first_round_is_fedavg_to_the_bit(tmp_path: Path) -> None:
    """All variates are zero, so that nothing is corrected."""
    more: dict[str, Any] = {"federate": {"rounds": 1}, "train": {"momentum": 0.5, "epochs": 2}}
    ran({"name": "fedavg"}, tmp_path / "a", **more)
    ran(SCAFFOLD, tmp_path / "b", **more)
    assert tiny.digests(tmp_path / "a")["theta_g"] == tiny.digests(tmp_path / "b")["theta_g"]
    ran({"name": "fedavg"}, tmp_path / "c")
    ran(SCAFFOLD, tmp_path / "d")
    assert tiny.digests(tmp_path / "c")["theta_g"] != tiny.digests(tmp_path / "d")["theta_g"]


def test_against_its_arithmetic(tmp_path: Path) -> None:
    """Option II over three rounds: y goes by gradient - c_k + c, c_k+ = c_k - c + (x - y) / (K lr), c by their mean."""
    experiment, folder = ran({**SCAFFOLD, "lr": 0.8}, tmp_path / "r")
    task, lr = experiment.task, 0.1
    x = task.theta_0.floats
    c, own = np.zeros_like(x), [np.zeros_like(x)] * 3
    sizes = [LocalClient(task, k, 1, "federate").num_train for k in range(3)]
    for round in (1, 2, 3):
        ends, changes = [], []
        for client in range(3):
            net = load(network(), replace(task.theta_0, floats=x), task)
            slope = load(network(), replace(task.theta_0, floats=c - own[client]), task)
            add = {name: p.detach() for name, p in slope.named_parameters()}
            data = list(batches_of(task, client, round, 1))
            y = flat(sgd(net, data, lr, more=lambda name, p, add=add: add[name]), task)
            now = own[client] - c + (x - y) / (len(data) * lr)
            ends.append(y)
            changes.append(now - own[client])
            own[client] = now
        x = x + np.float32(0.8) * (mean(ends, sizes) - x)
        c = c + mean(changes, sizes)
    np.testing.assert_allclose(theta_of(folder).floats, x, atol=1e-5)
    np.testing.assert_allclose(tiny.opened(folder).state.memory[C], c, atol=1e-5)
    for client in range(3):
        np.testing.assert_allclose(state_of(folder, client).vectors[C], own[client], atol=1e-4)


def test_the_servers_variate_is_the_mean_of_the_clients(tmp_path: Path) -> None:
    """With everyone in every round, by any momentum and schedule."""
    more = {"train": {"momentum": 0.5, "epochs": 2, "schedule": "linear"}}
    experiment, folder = ran({**SCAFFOLD, "weighted": False}, tmp_path / "r", **more)
    own = [state_of(folder, client).vectors[C] for client in range(3)]
    np.testing.assert_allclose(tiny.opened(folder).state.memory[C], np.mean(own, 0), atol=1e-5)
    assert experiment.rule(experiment.federated_phases[0]) == ControlledMean(1.0, CountMean(), 3)


def test_the_rule_is_told_of_all_that_take_part() -> None:
    """Their examples where the mean weighs by examples, else their number; unseen clients never take part."""
    clients, federate = {"count": 4, "unseen": 0.25}, {"rounds": 1, "clients_per_round": 2}
    for options, join_by, equally in (({}, {}, False), ({"weighted": False}, {}, True), ({}, {"name": "median"}, True)):
        more = {"federate": {**federate, **({"join": join_by} if join_by else {})}, "clients": clients}
        made = tiny.experiment(tiny.study(method={**SCAFFOLD, **options}, **more))
        splits = made.task.splits
        examples = sum(len(split.train) for k, split in enumerate(splits.clients) if k not in splits.unseen)
        rule = made.rule(made.federated_phases[0])
        assert isinstance(rule, ControlledMean) and rule.total == (3 if equally else examples) != 4


def changed(client: int, n: int, w: np.ndarray, change: np.ndarray) -> Contribution:
    two = [Content(np.ones(w.size, bool), v.astype(np.float32), NO_INTS) for v in (w, change)]
    return Contribution(client, n, two[0], {DELTA_C: two[1]})


@pytest.mark.parametrize(("weighted", "total", "x", "c"), [(True, 16, 2.0, 1.75), (False, 8, 1.5, 1.5)])
def test_numbers_on_four_elements(weighted: bool, total: int, x: float, c: float) -> None:
    """Of eight clients with 16 examples two come, with 1 and 3 examples, models 1 and 5, changes 4 and 8; lr is 1/2.

    Weighted: x goes (1 + 3 x 5) / 4 / 2 = 2, c goes (1 x 4 + 3 x 8) / 16 = 1.75. Equally: x goes (1 + 5) / 2 / 2 = 1.5,
    c goes (4 + 8) / 8 = 1.5.
    """
    old = ServerState(Params(np.zeros(4, np.float32), NO_INTS), {C: np.array([1, 0, 0, 0], np.float32)})
    one = np.ones(4)
    rule = ControlledMean(0.5, FedAvg() if weighted else CountMean(), total)
    new = join(rule, old, [changed(0, 1, one, 4 * one), changed(1, 3, 5 * one, 8 * one)], FOUR)
    np.testing.assert_array_equal(new.theta.floats, [x] * 4)
    np.testing.assert_array_equal(new.memory[C], [1 + c, c, c, c])


@pytest.mark.parametrize("weighted", [True, False])
def test_the_servers_variate_stays_the_mean_of_the_clients_when_few_of_unequal_sizes_come(weighted: bool) -> None:
    """Twenty clients of log-normal sizes, four a round, a hundred rounds: c is sum n_k c_k / n up to rounding."""
    draw, size = np.random.default_rng(0), 4
    sizes = np.maximum(10, draw.lognormal(4.5, 1.0, 20)).astype(int)
    weights = sizes / sizes.sum() if weighted else np.full(20, 1 / 20)
    own, state = np.zeros((20, size), np.float32), ServerState(Params(np.zeros(size, np.float32), NO_INTS))
    total = int(sizes.sum()) if weighted else 20
    rule = ControlledMean(1.0, FedAvg() if weighted else CountMean(), total)
    for _ in range(100):
        came = []
        for k in sorted(int(i) for i in draw.choice(20, 4, replace=False)):
            now = draw.normal(k % 5, 1.0, size).astype(np.float32)
            came.append(changed(k, int(sizes[k]), np.zeros(size), now - own[k]))
            own[k] = now
        state = join(rule, state, came, FOUR)
        np.testing.assert_allclose(state.memory[C], weights @ own.astype(np.float64), atol=1e-5)


def test_how_far_a_slope_carries() -> None:
    made = tiny.recipe(batch_size=8, lr=0.1)
    assert reach(made, 30) == pytest.approx(4 * 0.1)
    heavy = replace(made, optimizer=Sgd(momentum=0.5, weight_decay=9.0), budget=Budget(steps=3))
    assert reach(heavy, 30) == pytest.approx(0.1 * (1 + 1.5 + 1.75)), "momentum carries further, decay is a gradient"


def test_only_sgd_has_a_mean_gradient() -> None:
    with pytest.raises(
        StudyError, match="scaffold divides what a client moved by its rate: train.optimizer must be sgd"
    ):
        resolve(tiny.study(method=SCAFFOLD, train={"momentum": 0.0, "optimizer": {"name": "adam"}}))


@pytest.mark.parametrize("name", ["scaffold", "apfl", "pfedme"])
def test_a_cohort_trains_the_same_up_to_rounding(name: str, tmp_path: Path) -> None:
    method = {"name": name, **tiny.METHODS[name]}
    found = [theta_of(ran(method, tmp_path / str(cohort), cohort=cohort)[1]).floats for cohort in (1, 3)]
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-5)


# What the server's rule remembers goes down


def test_what_goes_down_beside_the_model_is_in_ledger_and_forecast(tmp_path: Path) -> None:
    """Absent while the server has none, and then one payload as long as the model, to everyone."""
    made = tiny.of_method("scaffold", wire="raw", federate={"rounds": 3, "clients_per_round": 2})
    folder = tiny.run(made, tmp_path / "r")
    rows = tiny.rows(tmp_path / "r", "ledger")
    beside = [r for r in rows if r["name"] == C]
    assert [r["round"] for r in beside] == [2, 2, 3, 3]
    assert {(r["phase"], r["sender"], r["kind"], r["broadcast"]) for r in beside} == {
        ("federate", "server", "values", True)
    }
    experiment = tiny.experiment(folder.study())
    told = forecast_bytes(experiment, 1.0)
    down = sum(r["payload_bytes"] for r in rows if r["sender"] == "server")
    up = sum(r["payload_bytes"] for r in rows if r["receiver"] == "server")
    assert told.down.size == down and told.up.size == pytest.approx(up, abs=10), "metrics have digits"
    assert told.visit[0] == 2 * beside[0]["payload_bytes"]


def test_what_goes_down_is_what_the_states_mask_keeps() -> None:
    made = tiny.of_method("scaffold", wire="raw")
    experiment = tiny.experiment(made)
    layout, (phase,) = experiment.layout, experiment.federated_phases
    mask = np.arange(layout.num_prunable) % 3 == 0
    memory = {C: np.arange(1, layout.num_floats + 1, dtype=np.float32)}
    state = ServerState(experiment.initial().masked(mask), memory, mask)

    def inbox(of: ServerState) -> tuple[Message, ...]:
        return Downloads(experiment, phase, 1, of, {}, {}, published=None).inbox(0)  # type: ignore[arg-type]

    first, second = inbox(state)
    got = payload.decode(second.payload, "values", layout, known_mask=mask)
    bits = -(-layout.num_prunable // 8)
    assert second.name == C and got.floats is not None
    assert len(second.payload) == len(first.payload) - bits, "the mask's bits came before it"
    np.testing.assert_array_equal(got.floats, Params(memory[C], experiment.initial().ints).masked(mask).floats)
    assert [message.name for message in inbox(replace(state, memory={}))] == [first.name]


def test_only_a_broadcast_has_something_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    scaffold = table.METHODS["scaffold"]()
    sliced = replace(scaffold, phases=(replace(scaffold.phases[0], down="slice", own_mask=True),))
    known = {**table.METHODS, "scaffold": lambda: sliced}
    monkeypatch.setattr("fedlth.experiment.well_formed.METHODS", known)
    with pytest.raises(StudyError, match="its federate.also must be empty where slices go down"):
        method_of(tiny.of_method("scaffold"))


def test_norms_and_private_layers_have_no_variate(tmp_path: Path) -> None:
    """A head that stays has none; running statistics have none; counters count."""
    model = {"name": "tests.tiny:Small", "options": {}, "personal": ["@head"]}
    experiment, folder = ran(SCAFFOLD, tmp_path / "r", model=model)
    size, c = experiment.layout.num_params, tiny.opened(folder).state.memory[C]
    assert c.size == experiment.layout.num_floats < experiment.task.layout.num_floats
    assert not c[size:].any() and np.abs(c[:size]).max() > 0
    assert theta_of(folder).ints.max() > 0
