"""FedPM, FedMask, DeltaMask: against FedPM's arithmetic in plain torch, against the entropy, and their options."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from fedlth import rng
from fedlth.experiment.resolve import read
from fedlth.federation.client_step import client_step
from fedlth.federation.door import Held
from fedlth.federation.downloads import Downloads, broadcast
from fedlth.federation.jobs import Job
from fedlth.federation.published import Published
from fedlth.methods.aggregate import Contribution, MaskMean, join
from fedlth.methods.client_update import THETA_G
from fedlth.methods.deltamask import Drawn, divergence
from fedlth.methods.fedmask import OverlapMean, strongest
from fedlth.methods.space import Frozen, chances, frozen_weights
from fedlth.models.layout import Params
from fedlth.storage.client_state import ClientState
from fedlth.storage.run_folder import RunFolder
from fedlth.storage.server_state import ServerState
from fedlth.tickets.evidence import Lesson
from fedlth.tickets.granularity import Row
from fedlth.training.budget import Budget
from fedlth.training.local_client import LocalClient
from fedlth.wire import payload
from fedlth.wire.errors import PayloadError
from fedlth.wire.payload import Content
from tests import tiny
from tests.test_personal import started

NONE = np.zeros(0, np.int64)
LARGE: dict[str, Any] = {"model": {"name": "mlp", "options": {"hidden": [300]}}, "wire": "lossless"}


def entropy(share: float) -> float:
    return 0.0 if share in (0, 1) else -share * np.log2(share) - (1 - share) * np.log2(1 - share)


# FedPM against its own arithmetic


def plain_torch_fedpm(made: Any, rounds: int) -> list[np.ndarray]:
    """Return the scores after each round by the public description: logits, sigmoid, Bernoulli, Beta(1, 1), logit."""
    experiment = tiny.experiment(made)
    (phase,), task = experiment.federated_phases, experiment.task
    (first, last), hidden = task.layout.prunable, 12
    c = {e.name: np.sqrt(2 / e.shape[1]) for e in (first, last)}
    frozen, biases = frozen_weights(task), {e.name: task.theta_0.floats[e.slice] for e in task.layout.floats}
    weights = torch.from_numpy(frozen.floats[: task.layout.num_prunable].copy())
    for e in (first, last):
        assert set(weights[e.slice].abs().tolist()) == {np.float32(c[e.name])}, "a signed constant a layer"
    s, found = experiment.initial().floats.copy(), []
    for r in range(1, rounds + 1):
        alpha, beta = np.ones(s.size), np.ones(s.size)  # the prior begins anew every round
        for client in experiment.clients(phase, r):
            local = LocalClient(task, client, r, "federate")
            x, y = local.train_part.tensor, local.train_part.y
            scores = torch.from_numpy(s.copy()).requires_grad_()
            epochs = Budget(epochs=made.train.epochs)(len(y), made.train.batch_size, local.rng("order"))
            torch.manual_seed(local.torch_seed("masks"))
            for part in (p for epoch in epochs for p in epoch):
                theta = torch.sigmoid(scores)
                sampled = torch.bernoulli(theta.detach())
                w = weights * (sampled + (theta - theta.detach()))
                h = functional.relu(
                    x[part].flatten(1) @ w[first.slice].view(hidden, -1).T
                    + torch.from_numpy(biases[first.name.replace("weight", "bias")])
                )
                out = h @ w[last.slice].view(-1, hidden).T + torch.from_numpy(
                    biases[last.name.replace("weight", "bias")]
                )
                (grad,) = torch.autograd.grad(functional.cross_entropy(out, y[part]), scores)
                scores = (scores.detach() - made.method["score_lr"] * grad).requires_grad_()
            theta = torch.sigmoid(scores.detach().double()).numpy()
            mask = local.rng("upload mask").random(s.size) < theta
            alpha, beta = alpha + mask, beta + ~mask
        theta = np.clip((alpha - 1) / (alpha + beta - 2), 0.01, 0.99)
        s = np.log(theta / (1 - theta)).astype(np.float32)
        found.append(s)
    return found


def test_fedpm_agrees_with_the_public_arithmetic_over_three_rounds(tmp_path: Path) -> None:
    made = tiny.of_method(
        "fedpm", federate={"rounds": 3, "clients_per_round": 3}, train={"epochs": 2}, compute="reference"
    )
    for after, wanted in enumerate(plain_torch_fedpm(made, 3), 1):
        started(made, tmp_path / str(after), after=after)
        folder = RunFolder(tmp_path / str(after))
        got = folder.load_state(folder.progress().theta).theta.floats
        assert len(np.unique(got)) > 2
        np.testing.assert_allclose(got, wanted, atol=1e-5, err_msg=f"round {after}")


def test_what_was_wrong_in_the_released_fedpm_is_not_here(tmp_path: Path) -> None:
    """Its clamp adds .01 to the count of ones for each zero, its test draws a mask, and it runs a round too many."""
    made = tiny.of_method("fedpm", federate={"rounds": 3, "clients_per_round": 2}, wire="raw", evaluate={"every": 1})
    folder = tiny.run(made, tmp_path / "r")
    rows = tiny.rows(folder.root, "ledger")
    assert {r["round"] for r in rows if r["phase"] == "federate"} == {1, 2, 3}
    experiment = tiny.experiment(made)
    size, sent = experiment.layout.num_prunable, broadcast("scores", THETA_G, experiment.initial(), experiment.layout)
    reply = client_step(Job(study=experiment.text, phase="federate", round=1, client=2, inbox=(sent,), state=None))
    mask = payload.decode(reply.outbox[0].payload, "mask", experiment.layout).mask
    ups = [r for r in rows if r["kind"] == "mask"]
    assert all(r["density"] * size == pytest.approx(round(r["density"] * size), abs=1e-9) for r in ups)
    told = next(r["density"] for r in ups if r["sender"] == "client:2")
    assert told == np.count_nonzero(mask) / size, "ones are counted, not their clamped chances"
    content = Content(np.ones(size, bool), experiment.initial().floats, NONE)
    local = LocalClient(experiment.task, 0, 0, "personalise")
    own: Any = experiment.method.own
    first, again = (own.own(local, {THETA_G: content}, ClientState()) for _ in range(2))
    other = own.own(replace(local, round=5), {THETA_G: content}, ClientState())
    assert first.params.digest() == again.params.digest() == other.params.digest(), "no dice in an evaluation"
    np.testing.assert_array_equal(first.mask, content.floats > 0)  # type: ignore[operator]


# Bits per weight


def replied(name: str, **options: Any) -> tuple[Any, Any, np.ndarray, Content]:
    """Let one client answer round 1; return experiment, reply, the mask both ends draw, and what came down."""
    made = tiny.study(method={"name": name, **tiny.METHODS[name], **options}, **LARGE)
    experiment = tiny.experiment(made)
    theta = experiment.initial()
    sent = broadcast("scores", THETA_G, theta, experiment.layout, experiment.codec)
    reply = client_step(Job(study=experiment.text, phase="federate", round=1, client=1, inbox=(sent,), state=None))
    dice = rng.stream(made.seed, "federate/known mask", 1, 1).random(theta.floats.size)
    return (
        experiment,
        reply,
        dice < chances(theta.floats),
        Content(np.ones(theta.floats.size, bool), theta.floats, NONE),
    )


@pytest.mark.parametrize("top", [1.0, 0.5])
def test_deltamask_sends_its_flips_at_their_entropy(top: float) -> None:
    experiment, reply, known, down = replied("deltamask", top=top)
    data = reply.outbox[0].payload
    got = payload.decode(
        data, "mask", experiment.layout, codec=experiment.codec, known_mask=known, reference=down.reference
    ).mask
    flips = np.count_nonzero(got != known) / known.size
    assert 0 < flips < 0.2
    bits = 8 * (len(data) - 30) / known.size
    assert bits <= 1.05 * entropy(flips) + 0.02, "what is known of each score makes it less, the coder little more"
    every, _, _, _ = replied("deltamask", top=1.0), 0, 0, 0
    assert top == 1.0 or len(data) < len(every[1].outbox[0].payload)


def test_deltamask_sends_what_moved_most_and_top_says_how_much_of_it() -> None:
    experiment, reply, known, down = replied("deltamask", top=1.0)
    local = LocalClient(experiment.task, 1, 1, "federate")
    own: Any = experiment.method.own
    scores, _ = own._train(local, down.floats, local.recipe)
    dice = rng.stream(experiment.study.seed, "federate/known mask", 1, 1).random(scores.size)
    whole = own.drawn(local, {THETA_G: down}, scores)
    np.testing.assert_array_equal(whole, dice < chances(scores), "all differences: a sample of the client's own mask")
    half = replace(own, top=0.5).drawn(local, {THETA_G: down}, scores)
    all_of, some = np.flatnonzero(whole != known), np.flatnonzero(half != known)
    assert set(some) < set(all_of) and len(some) == round(0.5 * len(all_of))
    moved = divergence(chances(scores), chances(down.floats))
    assert moved[some].min() >= moved[np.setdiff1d(all_of, some)].max()


def test_divergence_on_four_chances() -> None:
    got = divergence(np.array([0.5, 0.9, 1.0, 0.0]), np.array([0.5, 0.5, 0.5, 1.0]))
    np.testing.assert_allclose(got[:3], [0, 0.9 * np.log(1.8) + 0.1 * np.log(0.2), np.log(2)], atol=1e-9)
    assert 20 < got[3] < np.inf


def test_an_upload_against_another_rounds_dice_is_refused_by_name(tmp_path: Path) -> None:
    experiment, reply, known, down = replied("deltamask")
    (phase,) = experiment.federated_phases
    state = ServerState(Params(down.floats, NONE))

    def held_in(round: int, client: int) -> Held:
        downloads = Downloads(experiment, phase, round, state, {}, {}, Published(experiment, RunFolder(tmp_path), {}))
        return downloads.held(client, downloads.inbox(client))

    held = held_in(1, 1)
    assert held.mask is not None
    np.testing.assert_array_equal(held.mask, known)
    for round, client in ((2, 1), (1, 2)):
        wrong = held_in(round, client).mask
        assert wrong is not None and (wrong != known).any()
        with pytest.raises(PayloadError, match="does not hold"):
            payload.decode(
                reply.outbox[0].payload, "mask", experiment.layout, codec=experiment.codec, known_mask=wrong,
                reference=down.reference,
            )  # fmt: skip


@pytest.mark.parametrize("wire", ["raw", "bf16"])
def test_both_ends_draw_the_same_under_any_wire(tmp_path: Path, wire: str) -> None:
    made = tiny.of_method("deltamask", wire=wire, federate={"rounds": 3, "clients_per_round": 2})
    tiny.run(made, tmp_path / "r")
    assert not [f for r in tiny.rows(tmp_path / "r", "rounds") for f in r["failed"]]
    ups = [r for r in tiny.rows(tmp_path / "r", "ledger") if r["kind"] == "mask"]
    assert len(ups) == 6 and {r["status"] for r in ups} == {"ok"}


def test_bits_per_weight_in_the_ledger_both_ways(tmp_path: Path) -> None:
    """Up at most the entropy of a mask, DeltaMask's far below it; down the scores, which the papers do not count."""
    up: dict[str, float] = {}
    for name in ("fedpm", "deltamask", "fedmask"):
        tiny.run(tiny.of_method(name, **LARGE, federate={"rounds": 2, "clients_per_round": 3}), tmp_path / name)
        rows = [r for r in tiny.rows(tmp_path / name, "ledger") if r["phase"] == "federate"]
        size = 64 * 300 + 300 * 4
        masks = [r for r in rows if r["kind"] == "mask"]
        for r in masks:
            assert 8 * (r["payload_bytes"] - 40) / size <= 1.02 * entropy(r["density"])
        up[name] = sum(r["payload_bytes"] for r in masks) / len(masks) * 8 / size
        downs = [r for r in rows if r["receiver"] != "server"]
        first = [8 * r["payload_bytes"] / size for r in downs if r["round"] == 1]
        later = [8 * r["payload_bytes"] / size for r in downs if r["round"] == 2]
        assert all(24 < bits < 33 for bits in first), "real numbers, a float each"
        # Of three masks a mean has four values: two bits a weight at most.
        assert all(bits < 2.2 or name == "fedmask" for bits in later)
    assert up["deltamask"] < 0.5 * up["fedpm"] and up["fedpm"] < 1


# FedMask


def fedmask_layout() -> Any:
    return tiny.experiment(tiny.of_method("fedmask")).layout


def test_overlap_mean_is_the_plain_mean_where_all_hold_all() -> None:
    layout = fedmask_layout()
    draw = np.random.default_rng(0)
    masks = [draw.random(layout.num_prunable) < 0.4 for _ in range(3)]
    for e in layout.prunable:
        for m in masks:
            m[e.slice].reshape(e.shape)[:, 0] = True  # every row is held
    state = ServerState(Params(np.full(layout.num_prunable, 7, np.float32), NONE))
    came = [Contribution(i, 5 + i, Content(m, None, None)) for i, m in enumerate(masks)]
    plain, overlap = (join(rule, state, came, layout).theta.floats for rule in (MaskMean(), OverlapMean()))
    assert plain.tobytes() == overlap.tobytes()


def test_overlap_mean_on_four_bits() -> None:
    """Two rows of two: both hold the first, one the second; then nobody does."""
    from fedlth.models.layout import Entry, Layout

    layout = Layout((Entry("w", (2, 2), "param", 0, prunable=True),))
    state = ServerState(Params(np.array([7, 7, 7, 7], np.float32), NONE))

    def joined(*masks: list[int]) -> np.ndarray:
        came = [Contribution(i, 1, Content(np.array(m, bool), None, None)) for i, m in enumerate(masks)]
        return join(OverlapMean(), state, came, layout).theta.floats

    high = np.log(0.99 / 0.01)
    np.testing.assert_allclose(joined([1, 0, 1, 0], [1, 1, 0, 0]), [high, 0, high, -high], atol=1e-5)
    np.testing.assert_allclose(joined([1, 0, 0, 0], [1, 1, 0, 0]), [high, 0, 7, 7], atol=1e-5)


def fedmask_states(tmp_path: Path, **options: Any) -> tuple[Any, dict[int, ClientState]]:
    made = tiny.study(
        method={"name": "fedmask", **tiny.METHODS["fedmask"], **options}, clients={"count": 3, "unseen": 0.0},
        federate={"rounds": 3, "clients_per_round": 3}, partition={"name": "dirichlet", "alpha": 0.3},
    )  # fmt: skip
    started(made, tmp_path, after=3)
    folder = RunFolder(tmp_path)
    versions = folder.progress().versions
    return tiny.experiment(made), {c: ClientState.from_bytes(folder.clients.get(c, versions[str(c)])) for c in range(3)}


def test_rows_are_personal_chosen_once_and_the_output_layer_keeps_its_own(tmp_path: Path) -> None:
    experiment, states = fedmask_states(tmp_path / "r")
    layout = experiment.layout
    first, last = layout.prunable
    held = {c: s.masks["held"] for c, s in states.items()}
    for mask in held.values():
        rows = mask[first.slice].reshape(first.shape)
        assert (rows.all(1) | ~rows.any(1)).all() and rows.any(1).sum() == 6 and mask[last.slice].all()
    assert any((held[0] != held[c]).any() for c in (1, 2)), "of other data, other rows"
    tiny.opened(RunFolder(tmp_path / "r")).run()
    for row in tiny.rows(tmp_path / "r", "metrics"):
        if row["arm"] == "own_tuned":
            assert row["layer_density"][first.name] <= 0.5


def test_every_option_of_fedmask_says_what_it_does(tmp_path: Path) -> None:
    _, all_held = fedmask_states(tmp_path / "a", density=1.0)
    assert all(s.masks["held"].all() for s in all_held.values())
    experiment, single = fedmask_states(tmp_path / "b", granularity="element")
    first, _ = experiment.layout.prunable
    rows = single[0].masks["held"][first.slice].reshape(first.shape)
    assert rows.sum() == rows.size // 2 and not (rows.all(1) | ~rows.any(1)).all()
    task = experiment.task
    assert Frozen("theta_0")(task) is task.theta_0
    assert Frozen("auto")(task).digest() == Frozen("signed")(task).digest() == frozen_weights(task).digest()
    for bad in ({"granularity": "block"}, {"weights": "brought"}, {"density": 0.0}):
        with pytest.raises(Exception, match=f"method.{next(iter(bad))}"):
            read(tiny.study(method={"name": "fedmask", **bad}))


def test_a_mask_cut_at_zero_has_no_dice() -> None:
    experiment = tiny.experiment(tiny.of_method("fedmask"))
    local = LocalClient(experiment.task, 0, 1, "federate")
    lesson = Lesson(rule="threshold", alive=local.full, density=1.0, epochs=1, lr=5.0)
    scores, frozen = experiment.initial().floats, frozen_weights(experiment.task)
    found = local.learn(frozen, scores, lesson)[0]
    torch.manual_seed(99)
    from fedlth.training import supermask

    again = supermask.learn(
        experiment.task.flat_model, frozen, scores, data=local.train_part, lesson=lesson,
        batch_size=local.recipe.batch_size, order=local.rng("order"), torch_seed=99,
    )[0]  # fmt: skip
    np.testing.assert_array_equal(found, again)
    assert (found != scores).any()


def test_strongest_keeps_the_rows_of_highest_mean() -> None:
    layout = fedmask_layout()
    first, last = layout.prunable
    scores = np.zeros(layout.num_prunable, np.float32)
    scores[first.slice] = np.repeat(np.arange(12), 64)
    kept = strongest(scores, layout, Row(), 0.25)
    assert kept[first.slice].reshape(12, 64).all(1).tolist() == [False] * 9 + [True] * 3 and kept[last.slice].all()


def test_drawn_is_a_pure_function_of_the_stream() -> None:
    scores = np.array([-20, 0, 20], np.float32)
    draws = np.stack([Drawn()(np.random.default_rng(i), None, scores) for i in range(64)])  # type: ignore[arg-type]
    assert draws.mean(0)[0] == 0 and draws.mean(0)[2] == 1 and 0.2 < draws.mean(0)[1] < 0.8
    assert Drawn()(np.random.default_rng(0), None, None) is None
