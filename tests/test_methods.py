"""Equivalences between methods (R6), what each one promises, and that every control changes one thing only."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlth.federation.client_step import client_step
from fedlth.federation.downloads import broadcast, slice_for
from fedlth.federation.jobs import Failure, Job, Reply
from fedlth.methods.aggregate import Contribution, CountMean, join
from fedlth.methods.client_update import THETA_G
from fedlth.methods.space import frozen_weights
from fedlth.models.layout import Params
from fedlth.personalization.arms import ARMS
from fedlth.personalization.step2 import Result, Step2
from fedlth.storage.checkpoint import BEFORE, CHECKPOINT, read_commit
from fedlth.storage.client_state import ClientState
from fedlth.storage.run_folder import RunFolder
from fedlth.storage.server_state import ServerState
from fedlth.tickets.finder import Finder
from fedlth.training import budget
from fedlth.training.budget import Budget
from fedlth.training.local_client import LocalClient
from fedlth.training.request import TrainingResult
from fedlth.training.task import Task
from fedlth.wire import payload
from fedlth.wire.payload import Content
from tests import tiny

STILL = {"rounds": 3, "clients_per_round": 2}


def final_theta(out: Path) -> str:
    return str(tiny.digests(out)["theta_g"])


def manual_fedavg(made: Any, *, weighted: bool) -> Params:
    """FedAvg written out: sample, train each from the mean, average in float64, cast once."""
    experiment = tiny.experiment(made)
    (phase,), task = experiment.federated_phases, experiment.task
    theta = task.theta_0
    for r in range(1, made.federate.rounds + 1):
        total, weight = np.zeros(theta.floats.size), 0
        for c in experiment.clients(phase, r):
            local = LocalClient(task, c, r, "federate")
            share = local.num_train if weighted else 1
            total += local.train(theta, recipe=local.recipe).params.floats.astype(np.float64) * share
            weight += share
        theta = Params((total / weight).astype(np.float32), theta.ints)
    return theta


def test_fedavg_is_fedavg(tmp_path: Path) -> None:
    made = tiny.of_method("fedavg", federate=STILL)
    tiny.run(made, tmp_path / "r")
    theta = RunFolder(tmp_path / "r").load_params(RunFolder(tmp_path / "r").progress().theta)
    np.testing.assert_allclose(theta.floats, manual_fedavg(made, weighted=True).floats, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "method",
    [
        {"name": "lotteryfl", "density": 1.0, "val_accuracy": -1.0},
        {"name": "lotteryfl", "val_accuracy": 1.0},
        {"name": "lotteryfl", "rate": 1e-9, "val_accuracy": -1.0},
        {"name": "sub_fedavg", "density": 1.0},
        {"name": "fedselect", "limit": 1e-9},
    ],
    ids=lambda m: f"{m['name']}-{sorted(m)[0]}",
)
def test_r6_without_a_prune_every_mask_method_is_unweighted_fedavg_to_the_bit(
    tmp_path: Path, method: dict[str, Any]
) -> None:
    partition = {"name": "dirichlet", "alpha": 1.0}  # sizes differ, so weighted would show
    made = tiny.study(method=method, federate=STILL, partition=partition)
    tiny.run(made, tmp_path / "r")
    assert final_theta(tmp_path / "r") == manual_fedavg(made, weighted=False).digest()
    assert final_theta(tmp_path / "r") != manual_fedavg(made, weighted=True).digest()


def test_step_1_is_the_same_for_every_method_that_shares_it(tmp_path: Path) -> None:
    thetas, ledgers = set(), set()
    for name in ("fedavg", "fedavg_ft", "two_step"):
        tiny.run(tiny.of_method(name), tmp_path / name)
        thetas.add(final_theta(tmp_path / name))
        rows = [r for r in tiny.rows(tmp_path / name, "ledger") if r["phase"] == "federate"]
        ledgers.add(str(rows))
    assert len(thetas) == len(ledgers) == 1


def visits(made: Any, count: int, client: int = 0, *, theta: Params | None = None) -> list[tuple[Content, ClientState]]:
    """Let one client visit `count` rounds by itself over raw payloads; return what it sent and kept each time."""
    experiment = tiny.experiment(made.model_copy(update={"wire": "raw"}))
    (phase,), layout = experiment.federated_phases, experiment.layout
    assert phase.join is not None
    theta, state, out = theta or experiment.initial(), None, []
    for r in range(1, count + 1):
        known = ClientState.from_bytes(state).masks.get("shared")
        kind = experiment.method.space.kind
        sent = broadcast(kind, THETA_G, theta, layout)
        if phase.down == "slice" and known is not None:
            sent = slice_for(THETA_G, theta, layout, known)
        reply = client_step(
            Job(study=experiment.text, phase=phase.name, round=r, client=client, inbox=(sent,), state=state)
        )
        update = reply.outbox[0]
        got = payload.decode(update.payload, update.kind, layout, known_mask=known)
        theta = join(phase.join, ServerState(theta), [Contribution(client, 1, got)], layout).theta
        state = reply.state
        out.append((got, ClientState.from_bytes(state)))
    return out


@pytest.mark.parametrize("target", [0.1, 0.3, 0.5])
def test_r2_lotteryfl_follows_the_power_law_and_stops_exactly(target: float) -> None:
    made = tiny.study(method={"name": "lotteryfl", "rate": 0.2, "density": target, "val_accuracy": -1.0})
    size = tiny.open_task(made.science()).layout.num_prunable
    densities = [float(content.mask.mean()) for content, _ in visits(made, 13)]
    wanted = [max(target, 0.8**k) for k in range(1, 14)]
    assert densities == pytest.approx(wanted, abs=13 / size)
    assert densities[-1] == round(target * size) / size, "exactly, where the released code overshoots"


@pytest.mark.parametrize("name", ["lotteryfl", "sub_fedavg", "fedselect"])
def test_masks_only_shrink_and_the_personal_set_only_grows(name: str) -> None:
    made = tiny.of_method(name, train={"epochs": 2})
    size = tiny.open_task(made.science()).layout.num_prunable
    shared = np.ones(size, bool)
    for content, state in visits(made, 8):
        assert not (content.mask & ~shared).any()
        assert content.mask.sum() < shared.sum() or content.mask.mean() <= 0.51
        np.testing.assert_array_equal(state.masks["shared"], content.mask)
        shared = content.mask
    floor = {"fedselect": 0.5}.get(name, 0.3)
    assert shared.mean() == pytest.approx(floor, abs=0.01)


def test_lotteryfl_rewinds_to_theta_0_and_keeps_statistics() -> None:
    """Buffers are no weights: a rewind leaves them (found as a bug: they were reset)."""
    from fedlth.methods.lotteryfl import PruneAndRewind

    made = tiny.study(model={"name": "tests.test_methods:normed", "options": {}})
    task = tiny.open_task(made.science())
    local = LocalClient(task, 0, 1, "federate")
    moved = local.train(task.theta_0, recipe=local.recipe).params
    params, mask = PruneAndRewind(0.2, 0.1, -1.0)(local, moved, local.full, None)
    weights = task.layout.num_params
    np.testing.assert_array_equal(params.floats[:weights], task.theta_0.masked(mask).floats[:weights])
    np.testing.assert_array_equal(params.floats[weights:], moved.floats[weights:])
    assert (moved.floats[weights:] != task.theta_0.floats[weights:]).any()


def normed(num_classes: int) -> tiny.Small:
    return tiny.Small(num_classes)


@pytest.mark.parametrize("name", ["lotteryfl", "sub_fedavg"])
def test_gates_look_at_validation_data_only(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tiny.of_method(name, train={"epochs": 2})
    closed = made.model_copy(update={"method": {**made.method, "val_accuracy": 1.0}})
    assert all(content.mask.all() for content, _ in visits(closed, 2)), "no accuracy exceeds 1"
    asked: list[str] = []
    part = Task.part

    def spy(self: Task, client: int, which: str) -> Any:
        asked.append(which)
        return part(self, client, which)

    monkeypatch.setattr(Task, "part", spy)
    visits(made, 2)
    assert set(asked) == {"train", "val"}


def test_sub_fedavg_needs_the_mask_to_move() -> None:
    still = tiny.of_method("sub_fedavg", train={"epochs": 2})
    still = still.model_copy(update={"method": {**still.method, "distance": 1.0}})
    assert all(content.mask.all() for content, _ in visits(still, 2))
    one_epoch = tiny.study(method={**tiny.METHODS["sub_fedavg"], "name": "sub_fedavg", "distance": 0.0})
    assert all(content.mask.all() for content, _ in visits(one_epoch, 2)), "one epoch: the two masks are one"


def test_fedselect_keeps_what_is_personal_and_takes_what_is_shared() -> None:
    made = tiny.of_method("fedselect")
    task = tiny.open_task(made.science())
    (_, _), (_, state) = visits(made, 2)
    shared = state.masks["shared"]
    theirs = Params(np.full(task.layout.num_floats, 7, np.float32), task.theta_0.ints)
    received = Content(shared, theirs.masked(shared).floats, theirs.ints)
    held = own_of(made).own(LocalClient(task, 0, 3, "federate"), {THETA_G: received}, state)
    size = shared.size
    assert (held.params.floats[:size][shared] == 7).all() and (held.params.floats[size:] == 7).all()
    np.testing.assert_array_equal(held.params.floats[:size][~shared], state.vectors["private"][:size][~shared])
    assert held.mask.all(), "every weight stays alive"


def test_fedselect_trains_one_set_at_a_time() -> None:
    made = tiny.of_method("fedselect")
    task = tiny.open_task(made.science())
    local, update = LocalClient(task, 0, 1, "federate"), own_of(made)
    shared = np.random.default_rng(0).random(task.layout.num_prunable) < 0.5
    calls: list[np.ndarray] = []

    class Spy(LocalClient):
        def train(self, start: Params, **more: Any) -> TrainingResult:
            calls.append(more["trainable"])
            return LocalClient.train(self, start, **more)

    update._alternate(Spy(task, 0, 1, "federate"), task.theta_0, shared, replace(local.recipe, budget=Budget(epochs=2)))
    size = shared.size
    assert [np.array_equal(c[:size], ~shared) for c in calls] == [True, False, True, False]
    assert all(np.array_equal(c[:size], shared) and c[size:].all() for c in calls[1::2])
    assert local.recipe.budget.epochs == 1


def test_fedpm_sends_bits_and_learns_probabilities(tmp_path: Path) -> None:
    made = tiny.of_method("fedpm", federate={"rounds": 3, "clients_per_round": 3}, wire="raw")
    folder = tiny.run(made, tmp_path / "r")
    task = tiny.open_task(made.science())
    size = task.layout.num_prunable
    theta = 1 / (1 + np.exp(-folder.load_params(folder.progress().theta).floats.astype(np.float64)))
    assert theta.size == size and (theta >= 0.01 - 1e-6).all() and (theta <= 0.99 + 1e-6).all()
    thirds = np.array([0.01, 1 / 3, 2 / 3, 0.99])
    assert np.abs(theta[:, None] - thirds).min(1).max() < 1e-6, "the mean of three sampled masks"
    rows = [r for r in tiny.rows(tmp_path / "r", "ledger") if r["phase"] == "federate"]
    up = [r["payload_bytes"] for r in rows if r["kind"] == "mask"]
    assert len(up) == 9 and max(up) <= -(-size // 8) + 24 + 2 + 1 + 4
    down = {r["payload_bytes"] for r in rows if r["sender"] == "server"}
    assert {r["kind"] for r in rows if r["sender"] == "server"} == {"install", "scores"} and down == {
        4 * size + 24 + 1 + 2 + 4
    }
    weights = frozen_weights(task)
    for entry in task.layout.prunable:
        constant = np.abs(weights.floats[entry.slice])
        np.testing.assert_allclose(constant, np.sqrt(2 / (entry.size // entry.shape[0])), rtol=1e-6)


# The arms of step 2


def step2_of(made: Any, client: int = 0) -> Step2:
    experiment = tiny.experiment(made)
    task = experiment.task
    local = LocalClient(task, client, 0, "personalise")
    theta_g = Params((task.theta_0.floats * np.float32(1.1)).astype(np.float32), task.theta_0.ints)
    content = Content(local.full, theta_g.floats, theta_g.ints)
    anchors = {"theta_0": task.theta_0, "theta_g": theta_g}
    return Step2(
        local=local, method=experiment.method.own, inbox={THETA_G: content}, state=ClientState(), theta_g=theta_g,
        alive=local.full, anchors=anchors, finder=experiment.finder, targets=made.finder.densities,
    )  # fmt: skip


def given(step: Step2, content: Content, **state: Any) -> Step2:
    """Return the same step 2 after another download, with another client state."""
    return replace(step, inbox={THETA_G: content}, state=ClientState(**state))


def own_of(made: Any) -> Any:
    return tiny.experiment(made).method.own


def results(step: Step2, arm: str) -> list[Result]:
    return list(ARMS[arm](step))


def layer_counts(step: Step2, mask: np.ndarray) -> list[int]:
    return [int(mask[e.slice].sum()) for e in step.local.task.layout.prunable]


STUDY = tiny.study(finder={"densities": [0.5, 0.2, 0.1]})


@pytest.mark.parametrize("arm", ["ticket", "ticket_0", "one_shot", "global_mask", "random", "init_mask", "reinit"])
def test_every_sparse_arm_gives_each_density_exactly(arm: str) -> None:
    step = step2_of(STUDY)
    got = results(step, arm)
    size = step.local.full.size
    assert [r.target for r in got] == [0.5, 0.2, 0.1] and [int(r.mask.sum()) for r in got] == [
        round(t * size) for t in (0.5, 0.2, 0.1)
    ]
    for result in got:
        assert result.arm == arm and not result.params.floats[:size][~result.mask].any()


def test_the_dense_twin_is_the_searchs_first_training_and_is_paid_once(monkeypatch: pytest.MonkeyPatch) -> None:
    step, count = step2_of(STUDY), []
    original = LocalClient.train
    monkeypatch.setattr(LocalClient, "train", lambda self, start, **k: count.append(1) or original(self, start, **k))
    (dense,) = results(step, "dense")
    assert len(count) == 1
    tickets = results(step, "ticket")
    assert len(count) == 1 + len(tickets), "the search began with the twin's training"
    size = step.local.full.size
    first = step.finder.scope(np.abs(dense.params.floats[:size]), step.local.full, step.local.task.layout, 0.5)
    np.testing.assert_array_equal(first, tickets[0].mask)
    twin, ticket = dense.flops[0], tickets[-1].flops[0]
    assert ticket == pytest.approx(4 * twin), "but its cost is told in full"
    assert tickets[-1].flops[1] < ticket and tickets[-1].search_epochs == 3 and tickets[0].search_epochs == 1


def test_dense_total_trains_as_long_as_the_search() -> None:
    step = step2_of(STUDY)
    (total,), (local,) = results(step, "dense_total"), results(step, "local")
    ticket = results(step, "ticket")[-1]
    assert total.epochs == local.epochs == ticket.epochs + ticket.search_epochs == 4
    assert total.flops[0] == pytest.approx(ticket.flops[0]) and total.mask.all() and local.start == "theta_0"


def orders(monkeypatch: pytest.MonkeyPatch) -> list[list[np.ndarray]]:
    seen: list[list[np.ndarray]] = []
    original = budget.batches

    def spy(size: int, batch_size: int, *how: Any) -> list[np.ndarray]:
        seen[-1:] = [[*seen[-1], *(parts := original(size, batch_size, *how))]]
        return parts

    monkeypatch.setattr(budget, "batches", spy)
    return seen


def test_twins_share_data_order(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = orders(monkeypatch)
    firsts = []
    for arm in ("dense", "dense_total", "ticket", "global_mask", "random", "local", "own_tuned"):
        step = step2_of(STUDY)
        seen.append([])
        results(step, arm)
        firsts.append(np.concatenate(seen[-1])[: step.local.num_train])
    for first in firsts:
        np.testing.assert_array_equal(first, firsts[0])


def test_random_has_the_tickets_layer_counts_and_its_own_masks_and_the_best_start() -> None:
    step = step2_of(STUDY)
    tickets, randoms = results(step, "ticket"), results(step, "random")
    for ticket, control in zip(tickets, randoms, strict=True):
        assert layer_counts(step, control.mask) == layer_counts(step, ticket.mask)
        assert (control.mask != ticket.mask).any()
        assert control.start in ("theta_g", "theta_0", "reinit") and control.epochs == ticket.epochs
        starts = [step.theta_g, step.anchor("theta_0")]
        best = max(step.local.val_score(step.train(s, control.mask)) for s in starts)
        assert step.local.val_score(control.params) >= best
    other = results(step2_of(STUDY, client=1), "random")[0]
    assert (other.mask != randoms[0].mask).any(), "each client draws its own"


def test_global_mask_is_theta_gs_own_and_equal_for_all_clients() -> None:
    masks = []
    for client in (0, 1):
        step = step2_of(STUDY, client)
        for result in results(step, "global_mask"):
            size = result.mask.size
            expected = step.finder.scope(
                np.abs(step.theta_g.floats[:size]), step.local.full, step.local.task.layout, result.target
            )
            np.testing.assert_array_equal(result.mask, expected)
            np.testing.assert_array_equal(result.params.floats, step.train(step.theta_g, expected).floats)
        masks.append(result.mask)
    np.testing.assert_array_equal(*masks)


def test_ticket_0_and_one_shot_change_one_part_of_the_finder(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[Finder] = []
    from fedlth.personalization import arms

    original = arms.find

    def spy(finder: Finder, **more: Any) -> Any:
        used.append(finder)
        return original(finder, **more)

    monkeypatch.setattr(arms, "find", spy)
    step = step2_of(STUDY)
    for arm in ("ticket", "ticket_0", "one_shot"):
        results(step, arm)
    ticket, ticket_0, one_shot = used
    assert replace(ticket_0, rewind=ticket.rewind) == ticket != ticket_0
    assert replace(one_shot, schedule=ticket.schedule) == ticket != one_shot
    first = results(step, "one_shot")[0]
    np.testing.assert_array_equal(first.params.floats, results(step, "ticket")[0].params.floats)


def test_ticket_0_starts_from_theta_0() -> None:
    step = step2_of(STUDY)
    for result in results(step, "ticket_0"):
        expected = step.train(step.anchor("theta_0"), result.mask)
        assert result.params.digest() == expected.digest() and result.start == "theta_0"


def test_own_random_and_frozen_random_keep_the_layer_counts() -> None:
    step = step2_of(STUDY)
    mask = np.random.default_rng(0).random(step.local.full.size) < 0.3
    step = given(step, Content(mask, step.theta_g.masked(mask).floats, step.theta_g.ints))
    own, tuned, control = (results(step, a)[0] for a in ("own", "own_tuned", "own_random"))
    np.testing.assert_array_equal(own.mask, mask)
    np.testing.assert_array_equal(tuned.mask, mask)
    assert layer_counts(step, control.mask) == layer_counts(step, mask) and (control.mask != mask).any()
    (control,) = results(step, "own_global_mask")
    size = step.local.full.size
    assert layer_counts(step, control.mask) == layer_counts(step, mask)
    for e in step.local.task.layout.prunable:  # the global model's largest weights, none of them the client's choice
        here, weights = control.mask[e.slice], np.abs(step.theta_g.floats[:size][e.slice])
        assert weights[here].min() >= weights[~here].max()
    assert control.params.digest() == step.train(step.theta_g, control.mask).digest()
    made = tiny.of_method("fedpm")
    task, scores = tiny.experiment(made).task, tiny.experiment(made).initial()
    step = given(step2_of(made), Content(np.ones(scores.floats.size, bool), scores.floats, scores.ints))
    (control,), (tuned,) = results(step, "frozen_random"), results(step, "own_tuned")
    likely = scores.floats > 0
    assert layer_counts(step, control.mask) == layer_counts(step, likely) and (control.mask != likely).any()
    frozen = frozen_weights(task).floats[: likely.size]
    np.testing.assert_array_equal(control.params.floats[: likely.size][control.mask], frozen[control.mask])
    np.testing.assert_array_equal(tuned.params.floats[: likely.size][tuned.mask], frozen[tuned.mask])


def test_an_arm_never_changes_another_arms_result() -> None:
    alone = {arm: [r.params.digest() for r in results(step2_of(STUDY), arm)] for arm in ("dense", "ticket", "random")}
    together = step2_of(STUDY)
    for arm in ("random", "global_mask", "ticket_0", "dense_total", "one_shot", "local", "ticket", "dense"):
        got = [r.params.digest() for r in results(together, arm)]
        assert got == alone.get(arm, got), arm


# What a run does with them


@pytest.mark.parametrize("arm", ["ticket", "one_shot", "random"])
@pytest.mark.parametrize("anchor", [0, 1, 2, -1])
def test_every_rewind_round_reaches_every_searching_arm(tmp_path: Path, arm: str, anchor: int) -> None:
    """Found as bugs: theta_g@0 stopped the run after step 1, and only the arm `ticket` had its anchor shipped."""
    made = tiny.study(
        finder={"rewind": {"name": "global", "round": anchor}}, personalise={"arms": [arm]},
        clients={"count": 2, "unseen": 0.5}, federate={"rounds": 2, "clients_per_round": 1},
    )  # fmt: skip
    tiny.run(made, tmp_path / "r")
    assert not [f for r in tiny.rows(tmp_path / "r", "rounds") for f in r["failed"]]
    rows = tiny.rows(tmp_path / "r", "metrics")
    assert len(rows) == 2 * 2
    names = {r["name"] for r in tiny.rows(tmp_path / "r", "ledger")}
    assert ("theta_g@1" in names) == (anchor == 1) and "theta_g@0" not in names


def test_rewind_to_the_last_round_by_name_is_rewind_to_theta_g(tmp_path: Path) -> None:
    kinds = {"a": {"name": "global"}, "b": {"name": "global", "round": 2}}
    for name, rewind in kinds.items():
        tiny.run(tiny.study(finder={"rewind": rewind}, personalise={"arms": ["ticket"]}), tmp_path / name)
    assert tiny.digests(tmp_path / "a") == tiny.digests(tmp_path / "b")


class Dropping(tiny.Lists):
    """An engine that loses some clients in some steps."""

    def __init__(self, lose: set[tuple[str, int]]) -> None:
        self.lose = lose

    def run(self, jobs: list[Job]) -> list[Reply | Failure]:
        kept = [j for j in jobs if (j.phase, j.client) not in self.lose]
        answers = super().run(kept)
        lost = [Failure(round=j.round, client=j.client, kind="died", reason="gone") for j in jobs if j not in kept]
        by_client = {a.client: a for a in (*answers, *lost)}
        return [by_client[j.client] for j in jobs]


@pytest.mark.parametrize("name", ["two_step", "lotteryfl", "sub_fedavg", "fedselect"])
@pytest.mark.parametrize("lose", [set(), {("personalise", 1)}, {("refine", 2), ("personalise", 0)}])
def test_refinement_with_and_without_failures(tmp_path: Path, name: str, lose: set[tuple[str, int]]) -> None:
    arms = ["global", "dense", "ticket"]
    made = tiny.of_method(
        name, refine={"rounds": 2, "clients_per_round": 3}, personalise={"arms": arms},
        finder={"densities": [1.0, 0.4]},
    )  # fmt: skip
    folder = tiny.run(made, tmp_path / "r", engine=Dropping(lose))
    failed = {(r["phase"], f["client"]) for r in tiny.rows(tmp_path / "r", "rounds") for f in r["failed"]}
    assert failed == lose, "a failure costs only itself"
    refined = [r for r in tiny.rows(tmp_path / "r", "metrics") if r["arm"] == "refined"]
    assert sorted(r["client"] for r in refined) == [0, 1, 2, 3]
    whole = [c for c in range(4) if ("personalise", c) not in lose]
    assert {r["client"] for r in refined if r["density"] < 0.41} == set(whole)
    mirrors = folder.progress().mirrors
    for client in whole:
        version = folder.progress().versions[str(client)]
        state = ClientState.from_bytes(folder.clients.get(client, version))
        mirror = folder.mirror(client, mirrors[str(client)], state.masks["shared"].size)
        np.testing.assert_array_equal(mirror, state.masks["shared"])
    two = [read_commit(folder.root / name) for name in (CHECKPOINT, BEFORE)]
    needed = {version for commit in two for version in commit.versions.values()}
    assert {p.stem for p in folder.clients.root.iterdir()} == needed, "what neither commit needs is gone"


def test_a_ticket_that_is_dense_replaces_an_older_mask(tmp_path: Path) -> None:
    """Found as a bug: the server kept LotteryFL's mask while the client held the full one, and refused it for ever."""
    made = tiny.of_method(
        "lotteryfl", refine={"rounds": 2, "clients_per_round": 3}, personalise={"arms": ["ticket"]},
        finder={"densities": [1.0]},
    )  # fmt: skip
    tiny.run(made, tmp_path / "r")
    assert not [f for r in tiny.rows(tmp_path / "r", "rounds") for f in r["failed"]]


def test_slices_after_a_lost_visit_use_the_committed_mask(tmp_path: Path) -> None:
    class Flaky(Dropping):
        def run(self, jobs: list[Job]) -> list[Reply | Failure]:
            self.lose = {("federate", j.client) for j in jobs[:1] if j.round % 2 == 0}
            return super().run(jobs)

    made = tiny.of_method("lotteryfl", federate={"rounds": 6, "clients_per_round": 2})
    tiny.run(made, tmp_path / "r", engine=Flaky(set()))
    kinds = [f["kind"] for r in tiny.rows(tmp_path / "r", "rounds") for f in r["failed"]]
    assert kinds == ["died"] * 3
    for row in tiny.rows(tmp_path / "r", "ledger"):
        if row["kind"] == "values" and not row["broadcast"] and row["sender"] == "server":
            assert row["density"] < 1 and row["ticket"], "a slice says what it holds"


def test_count_mean_is_what_mask_methods_use() -> None:
    for name in ("lotteryfl", "sub_fedavg", "fedselect"):
        (phase,) = tiny.experiment(tiny.of_method(name)).federated_phases
        assert phase.join == CountMean()


# FedSelect's two passes


def halves(compute: str, **sections: Any) -> tuple[LocalClient, np.ndarray]:
    made = tiny.of_method("fedselect", compute=compute, train={"momentum": 0.5, "weight_decay": 0.01}, **sections)
    local = LocalClient(tiny.open_task(made.science()), 0, 1, "federate")
    return local, np.random.default_rng(0).random(local.full.size) < 0.5


@pytest.mark.parametrize("compute", ["reference", "tuned", "sparse", "cohort"])
def test_what_is_shared_moves_in_the_shared_pass_alone(compute: str) -> None:
    """Row 5: biases and norms that all clients share moved in the personal pass too."""
    from fedlth.methods.fedselect import crossing
    from fedlth.training import cohort, lockstep

    if compute == "sparse":
        pytest.importorskip("numba")
    found = {}
    for way in ("reference", compute):
        local, shared = halves("reference" if way == "cohort" else way)
        start, size = local.task.theta_0, shared.size
        crosses = crossing(local.task, shared)
        assert crosses[size:].all() and np.array_equal(crosses[:size], shared)

        def moved(update: np.ndarray, local: LocalClient = local, way: str = way) -> np.ndarray:
            call = lambda: local.train(local.task.theta_0, recipe=local.recipe, trainable=update).params.floats  # noqa: E731
            return lockstep.side_by_side([call, call], cohort.answer)[1] if way == "cohort" else call()

        for update in (crosses, ~crosses):
            floats = moved(update)
            np.testing.assert_array_equal(floats[: update.size][~update], start.floats[: update.size][~update])
            assert (floats[: update.size][update] != start.floats[: update.size][update]).mean() > 0.5
            found[way, update[0]] = floats
    for first in (True, False):
        np.testing.assert_allclose(found["reference", first], found[compute, first], rtol=1e-4, atol=1e-6)


def test_the_personal_pass_leaves_biases_norms_and_their_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 5: through the update, on a model with BatchNorm; norms that are kept local are personal."""
    for policy in ("aggregate", "local_all"):
        made = tiny.of_method(
            "fedselect", model={"name": "tests.test_methods:normed", "options": {}, "buffers": policy}
        )
        task = tiny.open_task(made.science())
        shared = np.random.default_rng(0).random(task.layout.num_prunable) < 0.5
        steps: list[tuple[np.ndarray, np.ndarray]] = []

        real = LocalClient.train

        def spy(self: LocalClient, start: Params, *, steps: Any = steps, original: Any = real, **more: Any) -> Any:
            done = original(self, start, **more)
            steps.append((start.floats, done.params.floats))
            return done

        with monkeypatch.context() as patch:
            patch.setattr(LocalClient, "train", spy)
            local = LocalClient(task, 0, 1, "federate")
            own_of(made)._alternate(local, task.theta_0, shared, local.recipe)
        (before, personal), (between, after) = steps
        entries = {e.name: e for e in task.layout.floats}
        norm, head, mean = entries["norm.weight"].slice, entries["head.bias"].slice, entries["norm.running_mean"].slice
        np.testing.assert_array_equal(personal[head], before[head])
        assert (after[head] != before[head]).all()
        assert np.array_equal(between[mean], before[mean]) and (after[mean] != before[mean]).all()
        assert np.array_equal(personal[norm], before[norm]) == (policy == "aggregate")
        assert np.array_equal(after[norm], between[norm]) == (policy == "local_all")


def test_a_frozen_part_is_in_neither_pass() -> None:
    """Row 5: what nothing trains is not personal, even where it does not cross."""
    from fedlth.methods.fedselect import crossing

    made = tiny.of_method("fedselect", model={"name": "tests.test_methods:half_frozen", "options": {}})
    task = tiny.open_task(made.science())
    assert crossing(task, np.ones(task.layout.num_prunable, bool)).all()
    assert own_of(made).passes(task, 0) == 1 and own_of(made).passes(task, 1) == 2


def half_frozen(num_classes: int) -> tiny.Small:
    model = tiny.Small(num_classes)
    model.norm.weight.requires_grad_(False)
    return model
