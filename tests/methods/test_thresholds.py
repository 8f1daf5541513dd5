"""SpaFL: thresholds of rows on four weights, what crosses and what stays, and the space that they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedlth.data.examples import Examples
from fedlth.experiment.resolve import read
from fedlth.federation.forecast_bytes import forecast_bytes
from fedlth.methods.aggregate import Contribution, CountMean, join
from fedlth.methods.client_update import THETA_G
from fedlth.methods.space import Scores, Thresholds, Weights, above, follow
from fedlth.methods.spafl import RowThresholds
from fedlth.models.layout import Entry, Layout, Params
from fedlth.storage.client_state import ClientState
from fedlth.storage.run_folder import RunFolder
from fedlth.storage.server_state import ServerState
from fedlth.training.local_client import LocalClient
from fedlth.wire.payload import Content
from tests import tiny
from tests.test_personal import started

NONE = np.zeros(0, np.int64)
FOUR = Layout((Entry("w", (2, 2), "param", 0, prunable=True), Entry("b", (2,), "param", 4)))
WEIGHTS = np.array([1.0, -3.0, 0.5, 0.5, 9.0, 9.0], np.float32)


def tau(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


# Four weights


def test_a_row_is_alive_where_its_mean_size_is_above_its_threshold() -> None:
    assert above(FOUR, WEIGHTS, tau(1.9, 0.5)).tolist() == [True, True, False, False]
    assert above(FOUR, WEIGHTS, tau(2.0, 0.4)).tolist() == [False, False, True, True]


def test_weights_follow_a_change_by_the_sign_of_their_row() -> None:
    got = follow(FOUR, Params(WEIGHTS, NONE), tau(0.2, 0.2)).floats
    np.testing.assert_allclose(got, [1.1, -2.9, 0.4, 0.4, 9, 9], rtol=1e-6)
    assert follow(FOUR, Params(WEIGHTS, NONE), tau(0, 0)).floats.tobytes() == WEIGHTS.tobytes()


def test_the_step_has_the_gradient_of_a_line_for_threshold_and_weights() -> None:
    weights, extra = (torch.tensor(v, requires_grad=True) for v in (WEIGHTS, tau(1.0, 0.6)))
    batch = Examples(torch.zeros(1), torch.zeros(1))
    mask = RowThresholds(0.5).mask(weights, extra, batch, FOUR)
    assert mask.tolist() == [1, 1, 0, 0]
    (mask * torch.tensor([1.0, 2.0, 4.0, 8.0])).sum().backward()  # type: ignore[no-untyped-call]
    assert extra.grad is not None and weights.grad is not None
    np.testing.assert_allclose(extra.grad, [-3, -12])
    np.testing.assert_allclose(weights.grad, [1.5, -1.5, 6, 6, 0, 0])
    penalty = RowThresholds(0.5).penalty(extra)
    assert float(penalty.detach()) == pytest.approx(0.5 * (np.exp(-1.0) + np.exp(-0.6)))


def test_a_layer_of_which_nothing_is_alive_begins_again_at_zero() -> None:
    extra, batch = torch.tensor(tau(5.0, 5.0)), Examples(torch.zeros(1), torch.zeros(1))
    assert RowThresholds(0.0).mask(torch.tensor(WEIGHTS), extra, batch, FOUR).tolist() == [1, 1, 1, 1]
    assert extra.tolist() == [0, 0]


def test_the_server_takes_the_plain_mean() -> None:
    state, empty = ServerState(Params(tau(0, 0), NONE)), np.ones(0, bool)
    came = [Contribution(i, 10 * i + 1, Content(empty, t, NONE)) for i, t in enumerate((tau(1, 0), tau(3, 1)))]
    assert join(CountMean(), state, came, FOUR.rows).theta.floats.tolist() == [2.0, 0.5]


# The space


def test_spaces_say_kind_layout_and_first_value() -> None:
    task = tiny.experiment(tiny.of_method("spafl")).task
    kinds = {space.kind: space.layout(task.exchange) for space in (Weights(), Scores(), Thresholds())}
    assert kinds["values"] is task.exchange
    assert [e.name for e in kinds["scores"].entries] == [e.name for e in kinds["thresholds"].entries]
    assert [e.shape for e in kinds["thresholds"].entries] == [(e.shape[0],) for e in task.exchange.prunable]
    assert kinds["thresholds"].num_prunable == 0 and not Thresholds().initial(task).floats.any()
    experiment = tiny.experiment(tiny.of_method("spafl"))
    assert experiment.layout_of("thresholds") == experiment.layout == kinds["thresholds"]
    assert experiment.layout_of("values") == experiment.layout_of("mask") == task.exchange
    other = tiny.experiment(tiny.of_method("fedavg"))
    assert other.layout_of("thresholds") == kinds["thresholds"] and other.layout is other.task.exchange


def test_what_needs_shared_weights_is_refused() -> None:
    with pytest.raises(Exception, match=r"refine.rounds"):
        read(tiny.of_method("spafl", refine={"rounds": 1, "clients_per_round": 2}, personalise={"arms": ["ticket"]}))
    with pytest.raises(Exception, match="frozen_random"):
        read(tiny.of_method("spafl", personalise={"arms": ["frozen_random"]}))
    with pytest.raises(Exception, match="own_global_mask"):
        read(tiny.of_method("spafl", personalise={"arms": ["own_global_mask"]}))


# A run


def made(**sections: Any) -> Any:
    base = {"federate": {"rounds": 3, "clients_per_round": 2}, "train": {"epochs": 2}}
    return tiny.study(**{"method": {"name": "spafl", **tiny.METHODS["spafl"]}, **base, **sections})


@pytest.mark.parametrize("wire", ["raw", "lossless"])
def test_thresholds_alone_cross_both_ways_and_theta_0_is_free(tmp_path: Path, wire: str) -> None:
    """The paper's figure counts them once; the released code sends the change to everyone too."""
    study = made(wire=wire)
    tiny.run(study, tmp_path / "r")
    rows, count = tiny.rows(tmp_path / "r", "ledger"), 12 + 4
    assert {r["kind"] for r in rows} == {"install", "thresholds", "metrics"}
    federate = [r for r in rows if r["phase"] == "federate" and r["kind"] != "metrics"]
    up = [r for r in federate if r["receiver"] == "server"]
    assert len(up) == 6 and len(federate) == 12, "a download and an upload for each client of a round, no more"
    assert all(r["payload_bytes"] <= 4 * count + 30 and r["density"] == 1 and not r["ticket"] for r in federate)
    if wire == "raw":
        assert {r["payload_bytes"] for r in federate} == {4 * count + 30}
    told = forecast_bytes(tiny.experiment(study), 0.0)
    down = sum(r["payload_bytes"] for r in rows if r["receiver"] != "server" and r["phase"] != "evaluate")
    assert down <= told.down.size <= down + 3 * 60


def test_weights_stay_and_follow_at_the_next_visit(tmp_path: Path) -> None:
    started(made(), tmp_path / "r", after=3)
    folder, experiment = RunFolder(tmp_path / "r"), tiny.experiment(made())
    versions, own, task = folder.progress().versions, experiment.method.own, experiment.task
    now = folder.load_state(folder.progress().theta).theta.floats
    assert now.shape == (16,) and now.any()
    inbox = {THETA_G: Content(np.ones(0, bool), now, NONE)}
    moved = 0
    for client, version in versions.items():
        state = ClientState.from_bytes(folder.clients.get(int(client), version))
        local = LocalClient(task, int(client), 4, "federate")
        assert isinstance(own, type(experiment.method.phases[0].update))
        kept = task.whole(Params(state.vectors["private"], state.vectors["private_ints"]))
        wanted = follow(task.layout, kept, now - state.vectors["thresholds"])
        got: Any = own.weights(local, inbox, state)  # type: ignore[attr-defined]
        assert got.digest() == wanted.digest() != task.theta_0.digest()
        moved += bool((now != state.vectors["thresholds"]).any())
    assert moved, "who trained last has already seen older ones"
    fresh = own.own(LocalClient(task, 1, 4, "federate"), inbox, ClientState())  # type: ignore[attr-defined]
    content = Thresholds().model(task, inbox[THETA_G], task.theta_0)
    assert fresh.params.digest() == content.params.digest(), "a newcomer has what all begin with"


def test_a_larger_coefficient_keeps_fewer_rows_and_the_control_as_many(tmp_path: Path) -> None:
    kept = {}
    for coefficient in (0.0, 0.1):
        study = made(method={"name": "spafl", "coefficient": coefficient})
        tiny.run(study, tmp_path / str(coefficient))
        rows = tiny.rows(tmp_path / str(coefficient), "metrics")
        by_arm = {arm: {r["client"]: r for r in rows if r["arm"] == arm} for arm in ("own_tuned", "own_random")}
        kept[coefficient] = float(np.mean([r["density"] for r in by_arm["own_tuned"].values()]))
        for client, tuned in by_arm["own_tuned"].items():
            control = by_arm["own_random"][client]
            assert control["layer_density"] == tuned["layer_density"]
            assert tuned["train_flops_effective"] <= tuned["train_flops"]
            assert control["search_epochs"] == tuned["epochs"], "its density took a training to find"
    assert kept[0.1] < kept[0.0]


def test_inputs_are_scaled_as_the_data_set_says() -> None:
    """The released code fed raw 0 to 255."""
    x = LocalClient(tiny.experiment(made()).task, 0, 1, "federate").train_part.tensor
    assert float(x.min()) >= -2.001 and float(x.max()) <= 2.001 and float(x.std()) > 0.5


def test_a_training_counts_what_was_alive_over_its_steps() -> None:
    local = LocalClient(tiny.experiment(made()).task, 0, 1, "federate")
    start = Thresholds().initial(local.task).floats
    for coefficient in (0.0, 0.3):
        done = local.train_masking(local.task.theta_0, RowThresholds(coefficient), start, recipe=local.recipe)
        cost, often = local.log[-1], done.often
        sizes = {e.name: float(often[e.slice].mean()) for e in local.task.layout.prunable}
        flops = local.task.model.flops
        wanted = 3 * 2 * local.num_train * sum(flops[name] * share for name, share in sizes.items())
        assert cost.alive_flops == pytest.approx(wanted) and cost.flops >= cost.alive_flops
    assert often.min() < 1, "thresholds that rise put out rows"


def test_an_absurd_update_of_thresholds_is_refused(tmp_path: Path) -> None:
    from dataclasses import replace

    from fedlth.federation.jobs import Failure, Job, Message, Reply
    from fedlth.wire import payload

    layout = tiny.experiment(made()).layout

    class Absurd(tiny.Lists):
        def run(self, jobs: list[Job]) -> list[Reply | Failure]:
            got = super().run(jobs)
            for i, one in enumerate(got):
                if isinstance(one, Reply) and jobs[i].phase == "federate" and one.client == 2:
                    huge = Content(np.ones(0, bool), np.full(16, 1e20, np.float32), NONE)
                    sent = Message("thresholds", "update", payload.encode("thresholds", layout, huge))
                    got[i] = replace(one, outbox=(sent, *one.outbox[1:]))
            return got

    tiny.run(made(wire="raw", federate={"rounds": 2, "clients_per_round": 3}), tmp_path / "r", engine=Absurd())
    failed = [f for r in tiny.rows(tmp_path / "r", "rounds") for f in r["failed"]]
    assert failed and {f["client"] for f in failed} == {2} and "must be within" in failed[0]["reason"]
