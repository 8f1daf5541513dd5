"""Hermes: whole rows leave, only what everyone holds is averaged, and the rest stays with the client."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedlth.errors import StudyError
from fedlth.experiment.resolve import read
from fedlth.methods.aggregate import Contribution, join
from fedlth.methods.client_update import THETA_G, UPDATE
from fedlth.methods.hermes import OverlapMean, PruneRows
from fedlth.models.layout import Entry, Layout, Params
from fedlth.storage.client_state import ClientState
from fedlth.storage.server_state import ServerState
from fedlth.training.local_client import LocalClient
from fedlth.wire.payload import Content
from tests import tiny
from tests.test_methods import final_theta, given, layer_counts, manual_fedavg, results, step2_of

APART = {"name": "hermes", **tiny.METHODS["hermes"], "score": "random"}  # clients that keep different rows
FOUR = Layout((Entry("w", (4,), "param", 0, prunable=True), Entry("b", (1,), "param", 4)))


def sent(mask: list[int], *values: float) -> Content:
    on = np.array(mask, bool)
    return Content(on, np.array(values, np.float32) * np.append(on, True), np.zeros(0, np.int64))


def test_only_what_all_hold_is_averaged_on_four_elements() -> None:
    theta = Params(np.full(5, 9, np.float32), np.zeros(0, np.int64))
    came = [
        Contribution(0, 1, sent([1, 1, 0, 1], 1, 2, 3, 4, 5)),
        Contribution(1, 99, sent([1, 0, 1, 1], 3, 3, 3, 6, 7)),
    ]
    state = join(OverlapMean(), ServerState(theta), came, FOUR)
    np.testing.assert_array_equal(state.theta.floats, [2, 9, 9, 5, 6])
    np.testing.assert_array_equal(state.mask, [True, False, False, True])
    again = join(OverlapMean(), state, [Contribution(2, 1, sent([1, 1, 1, 0], 1, 1, 1, 1, 1))], FOUR)
    np.testing.assert_array_equal(again.mask, [True, False, False, False])
    np.testing.assert_array_equal(again.theta.floats, [1, 9, 9, 5, 1])


@pytest.mark.parametrize("method", [{"density": 1.0}, {"val_accuracy": 1.0}], ids=str)
def test_without_a_prune_it_is_unweighted_fedavg_to_the_bit(tmp_path: Path, method: dict[str, float]) -> None:
    partition = {"name": "dirichlet", "alpha": 1.0}
    made = tiny.study(method={"name": "hermes", **method}, federate={"rounds": 3}, partition=partition)
    tiny.run(made, tmp_path / "r")
    assert final_theta(tmp_path / "r") == manual_fedavg(made, weighted=False).digest()


def test_rows_of_smallest_l1_leave_as_a_whole_and_classes_never() -> None:
    task = tiny.task()
    local = LocalClient(task, 0, 1, "federate")
    params, mask = PruneRows(0.25, 0.3, -1.0)(local, task.theta_0, local.full, None)
    hidden, output = task.layout.prunable
    rows = mask[hidden.slice].reshape(hidden.shape)
    norms = np.abs(task.theta_0.floats[hidden.slice].reshape(hidden.shape)).sum(1)
    assert (rows.all(1) | ~rows.any(1)).all() and rows.any(1).sum() == 9
    assert norms[rows.any(1)].min() >= norms[~rows.any(1)].max()
    assert mask[output.slice].all() and not params.floats[: mask.size][~mask].any()
    for _ in range(9):
        params, mask = PruneRows(0.25, 0.3, -1.0)(local, params, mask, None)
    assert mask[hidden.slice].reshape(hidden.shape).any(1).sum() == round(0.3 * 12)
    drawn = tiny.experiment(tiny.study(method={"name": "hermes", "val_accuracy": -1.0, "score": "random"}))
    other = drawn.method.own.before(local, task.theta_0, local.full, None)[1]  # type: ignore[attr-defined]
    one = PruneRows(0.2, 0.3, -1.0)(local, task.theta_0, local.full, None)[1]
    assert other.sum() == one.sum() and (other != one).any()


def test_the_server_never_sets_an_alive_weight_back() -> None:
    """Found by hand: with slices of the whole model 17 % of alive weights stayed theta_0 for ever."""
    experiment = tiny.experiment(tiny.study(method=APART))
    task, update = experiment.task, experiment.phases[0].update
    size = task.layout.num_prunable
    state, states = ServerState(experiment.initial()), {c: ClientState() for c in range(3)}
    for round in range(1, 6):
        came = []
        for c in (round % 3, (round + 1) % 3):
            mask = np.ones(size, bool) if state.mask is None else state.mask
            inbox = {THETA_G: Content(mask, state.theta.masked(mask).floats, state.theta.ints)}
            local = LocalClient(task, c, round, "federate")
            before = update.own(local, inbox, states[c])  # type: ignore[attr-defined]
            if states[c].visits:  # what is the client's own is what it had; what is everyone's is what came
                alive, mine = before.mask, states[c].vectors["private"][:size]
                np.testing.assert_array_equal(before.params.floats[:size][alive & ~mask], mine[alive & ~mask])
                trained = alive & (mine != task.theta_0.floats[:size])  # behind a dead unit nothing moves
                assert trained.sum() > 0.9 * alive.sum()
                assert (before.params.floats[:size][trained] != task.theta_0.floats[:size][trained]).all()
            np.testing.assert_array_equal(
                before.params.floats[:size][before.mask & mask], state.theta.floats[:size][before.mask & mask]
            )
            done = update(local, inbox, states[c])
            states[c] = done.state
            content = done.contents[UPDATE]
            np.testing.assert_array_equal(content.mask, mask & done.state.masks["active"])
            came.append(Contribution(c, 1, content))
        state = join(OverlapMean(), state, came, experiment.layout)
    assert state.mask is not None
    everyones = state.mask
    assert all((everyones <= s.masks["active"]).all() for s in states.values())
    assert any((s.masks["active"] & ~everyones).any() for s in states.values()), "something is private"


def test_the_download_names_what_everyone_holds(tmp_path: Path) -> None:
    made = tiny.study(method=APART, federate={"rounds": 4, "clients_per_round": 3}, wire="raw")
    tiny.run(made, tmp_path / "r")
    down = [r for r in tiny.rows(tmp_path / "r", "ledger") if r["name"] == THETA_G and r["phase"] == "federate"]
    shares = [{r["density"] for r in down if r["round"] == n} for n in (1, 2, 3, 4)]
    assert all(len(s) == 1 for s in shares) and all(r["broadcast"] for r in down)
    one = [s.pop() for s in shares]
    assert one[0] == 1.0 and one == sorted(one, reverse=True) and one[-1] < 1
    own = [r for r in tiny.rows(tmp_path / "r", "metrics") if r["arm"] == "own" and not r["unseen"]]
    assert all(r["density"] > one[-1] for r in own), "a client has more than what everyone holds"


def test_cut_rows_keep_their_last_values_for_controls_alone() -> None:
    experiment = tiny.experiment(tiny.study(method=APART))
    task, update = experiment.task, experiment.method.own
    size, state, theta = task.layout.num_prunable, ClientState(), experiment.initial()
    mask, last = np.ones(size, bool), np.full(size, np.nan, np.float32)
    for round in (1, 2, 3):
        local, inbox = LocalClient(task, 0, round, "federate"), {THETA_G: Content(mask, theta.floats, theta.ints)}
        whole, held = update.weights(local, inbox, state), update.own(local, inbox, state)  # type: ignore[attr-defined]
        assert held.params.digest() == whole.masked(held.mask).digest()
        cut = ~held.mask
        np.testing.assert_array_equal(whole.floats[:size][cut], last[cut])
        done = update(local, inbox, state)
        state, content = done.state, done.contents[UPDATE]
        new = held.mask & ~state.masks["active"]
        last[new] = whole.floats[:size][new]
        assert new.any() and not content.floats[:size][~state.masks["active"]].any(), "no cut row is sent"
        mask, theta = content.mask, Params(content.floats, content.ints)
    moved = cut & (last != task.theta_0.floats[:size])
    assert last[cut].all() and moved.any(), "some left after a round of training"


def test_controls_begin_with_the_clients_own_weights() -> None:
    step = step2_of(tiny.study(method=APART))
    size = step.local.full.size
    first = step.method(step.local, step.inbox, ClientState())
    content = first.contents[UPDATE]
    step = given(step, content, visits=1, masks=first.state.masks, vectors=first.state.vectors)
    whole, own = (
        step.method.weights(step.local, step.inbox, step.state),
        step.method.own(step.local, step.inbox, step.state),
    )
    (control,), (twin,) = results(step, "own_random"), results(step, "dense")
    assert layer_counts(step, control.mask) == layer_counts(step, own.mask) and (control.mask != own.mask).any()
    assert control.params.digest() == step.train(whole.masked(control.mask), control.mask).digest()
    assert twin.mask.all() and twin.params.digest() == step.train(whole, twin.mask).digest()
    assert control.start == twin.start == "own" and whole.floats[:size][~own.mask].all()
    assert control.epochs == twin.epochs == results(step, "own_tuned")[0].epochs
    with pytest.raises(StudyError, match="must not contain own_global_mask, method hermes shares no whole model"):
        read(tiny.of_method("hermes", personalise={"arms": ["own_global_mask"]}))
