"""Step 2 treats its arms alike: equal settings, costs as spent, divergence one arm's outcome, few models at once."""

from __future__ import annotations

import gc
import json
import math
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlth import forecast
from fedlth.errors import StudyError
from fedlth.experiment.resolve import read
from fedlth.federation.client_step import client_step
from fedlth.federation.jobs import Job
from fedlth.methods.client_update import THETA_G
from fedlth.personalization import personalise
from fedlth.personalization.arms import ARMS
from fedlth.personalization.personalise import row_of
from fedlth.personalization.step2 import Result, Step2
from fedlth.report.build import read_results
from fedlth.report.headline import honest_notes
from fedlth.report.tables import summary_table
from fedlth.rng import stream
from fedlth.storage.client_state import ClientState
from fedlth.storage.records import MetricRow
from fedlth.tickets.gate import Look, Proposal
from fedlth.tickets.search import Walked
from fedlth.training import train
from fedlth.training.batches import batches, steps_an_epoch
from fedlth.training.flat_model import FlatModel
from fedlth.training.local_client import LocalClient
from fedlth.training.metrics import Scores
from fedlth.training.optimizer import Sgd
from fedlth.training.recipe import TrainingRecipe
from fedlth.training.request import TrainingRequest
from fedlth.wire.payload import Content
from tests import tiny
from tests.test_methods import given, results, step2_of


def personal(made: Any, client: int = 0) -> Step2:
    """Return a step 2 whose client holds a mask of half of the weights, and so has something personal."""
    step = step2_of(made, client)
    mask = np.random.default_rng(0).random(step.local.full.size) < 0.5
    kept = {"private": step.theta_g.floats, "private_ints": step.theta_g.ints}
    received = Content(mask, step.theta_g.masked(mask).floats, step.theta_g.ints)
    return given(step, received, visits=1, masks={"shared": mask}, vectors=kept)


def plans(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[float]]]:
    """Return a list that every training adds its stage and its learning rates to."""
    seen: list[tuple[str, list[float]]] = []
    original = LocalClient.train

    def spy(self: LocalClient, start: Any, *, recipe: TrainingRecipe, **more: Any) -> Any:
        steps = recipe.budget.epochs * self.steps_an_epoch
        seen.append((self.stage, [recipe.rate(k, steps) for k in range(recipe.first_step, recipe.end(steps))]))
        return original(self, start, recipe=recipe, **more)

    monkeypatch.setattr(LocalClient, "train", spy)
    return seen


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 33, 48])
@pytest.mark.parametrize("batch", [1, 2, 16])
def test_steps_of_an_epoch(size: int, batch: int) -> None:
    assert steps_an_epoch(size, batch) == len(batches(size, batch, stream(0, "any")))


@pytest.mark.parametrize("name", ["lotteryfl", "sub_fedavg", "fedselect"])
def test_a_methods_own_model_is_tuned_by_the_settings_of_every_arm(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 2: own_tuned took train.lr and a constant rate whatever personalise said."""
    made = tiny.of_method(name, personalise={"epochs": 2, "lr": 1e-6, "schedule": "cosine"})
    step, seen = personal(made), plans(monkeypatch)
    results(step, "dense")
    (twin,) = (rates for _, rates in seen)
    seen.clear()
    (own,), (tuned,) = results(step, "own"), results(step, "own_tuned")
    np.testing.assert_allclose(tuned.params.floats, own.params.floats, atol=1e-4)
    trained = [rates for _, rates in seen]
    if name == "fedselect":  # a personal and a shared pass, each an epoch of the same schedule
        assert trained[0] + trained[2] == trained[1] + trained[3] == twin
    else:
        assert trained == [twin]


def test_a_refined_ticket_is_tuned_by_the_settings_of_every_arm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 2: `refined` took train.lr and a constant rate."""
    seen = plans(monkeypatch)
    tiny.run(
        tiny.study(
            refine={"rounds": 1, "clients_per_round": 2},
            personalise={"arms": ["ticket"], "epochs": 2, "lr": 1e-3, "schedule": "cosine"},
        ),
        tmp_path / "r",
    )
    rates = [rates for stage, rates in seen if stage == "refined"]
    assert len(rates) == 4 and all(r[0] == 1e-3 and r[-1] == pytest.approx(1e-5) for r in rates)
    spent = [r for r in tiny.rows(tmp_path / "r", "metrics") if r["arm"] == "refined"]
    assert all(r["epochs"] == 2 and r["train_flops"] > r["train_flops_effective"] > 0 for r in spent)


def test_a_rate_that_scores_do_not_use_is_noted() -> None:
    """Row 2: FedPM's scores learn at method.score_lr."""
    _, notes = read(tiny.of_method("fedpm", personalise={"lr": 0.01}))
    assert any(note.startswith("personalise.lr and .schedule: have no effect on own_tuned") for note in notes)
    assert not any("personalise" in note for note in read(tiny.of_method("fedpm"))[1])


def test_fedselect_reports_both_of_its_passes() -> None:
    """Row 3: two passes an epoch were reported as one, with the dense twin's FLOPs."""
    step = personal(tiny.of_method("fedselect", personalise={"epochs": 2}))
    (dense,), (tuned,) = results(step, "dense"), results(step, "own_tuned")
    assert (dense.epochs, tuned.epochs) == (2, 4)
    assert tuned.flops[0] == pytest.approx(2 * dense.flops[0]) and tuned.cpu_s[0] > 0
    (early,) = results(step2_of(tiny.of_method("fedselect", personalise={"epochs": 2})), "own_tuned")
    assert early.epochs == 2, "nothing is personal yet"


def test_learned_masks_and_parts_of_trainings_are_counted() -> None:
    """Row 3: a score's training counts, here as a method's own and as a search's."""
    made = tiny.of_method("fedpm", personalise={"epochs": 2})
    scores = tiny.experiment(made).initial()
    step = given(step2_of(made), Content(np.ones(scores.floats.size, bool), scores.floats, scores.ints))
    (tuned,) = results(step, "own_tuned")
    assert (
        tuned.epochs == 2
        and tuned.flops == step.local.flops(step.local.full, 2 * step.local.num_train)
        and tuned.cpu_s[0] > 0
    )
    finder = {"score": "edge_popup", "schedule": {"name": "rescore", "steps": 1}, "rewind": "frozen"}
    step = step2_of(tiny.study(finder={**finder, "densities": [0.5]}))
    (ticket,), (total,) = results(step, "ticket"), results(step, "dense_total")
    assert (ticket.epochs, ticket.search_epochs) == (0, 3) and math.isfinite(ticket.cpu_s[0])
    assert total.epochs == 3, "as many as the search took"
    step = step2_of(tiny.study(finder={"rewind": {"name": "step", "step": 2}, "densities": [0.5]}))
    (ticket,) = results(step, "ticket")
    assert ticket.epochs == 1 / 3 and ticket.search_epochs == 1


EVERY_ARM = ["global", "local", "dense", "dense_total", "ticket", "ticket_0", "one_shot", "global_mask", "random"]


@pytest.mark.parametrize(
    "made",
    [
        *(tiny.of_method(name, federate={"rounds": 4, "clients_per_round": 2}) for name in tiny.KINDS),
        tiny.of_method("fedselect", personalise={"epochs": 2}, train={"epochs": 2}, federate={"rounds": 5}),
        tiny.study(method={"name": "fedselect", "every": 2}, federate={"rounds": 4, "clients_per_round": 2}),
        tiny.study(method={"name": "fedselect", "limit": 1e-9}, federate={"rounds": 3}),
        tiny.study(personalise={"arms": EVERY_ARM, "epochs": 2}, refine={"rounds": 2, "clients_per_round": 2}),
        tiny.study(personalise={"arms": ["random", "one_shot"]}),
        tiny.study(
            finder={"score": "edge_popup", "schedule": {"name": "rescore", "steps": 1}, "rewind": "frozen"},
            personalise={"arms": ["local", "ticket"]},
        ),
    ],
    ids=lambda made: f"{made.method['name']}-{len(made.model_dump_json())}",
)
def test_the_forecast_knows_every_epoch_that_is_trained(tmp_path: Path, made: Any) -> None:
    """Row 3: FedSelect was forecast as fedavg_ft; what arms share, once; a search for the random control alone."""
    tiny.run(made, tmp_path / "r")
    experiment = read(made)[0]
    trained: dict[str, float] = {}
    for row in tiny.rows(tmp_path / "r", "times"):
        epochs = sum(one["epochs"] for one in row.get("work", ()) if "density" in one)
        trained[row["phase"]] = trained.get(row["phase"], 0) + epochs
    rounds, own = forecast.own_epochs(experiment)
    assert rounds == trained.get("federate", 0) + trained.get("refine", 0)
    told = own + made.clients.count * forecast.step2_epochs(experiment)
    # The random control of a client that was never sampled, and so has no mask, is the dense twin.
    shared = told - trained["personalise"] - trained.get("refined", 0)
    assert shared == (made.method["name"] in ("lotteryfl", "sub_fedavg"))


def test_the_random_control_tells_its_own_seconds_and_epochs() -> None:
    """Row 8: its cpu_s were the ticket's."""
    step = step2_of(tiny.study(personalise={"epochs": 2}))
    results(step, "ticket")
    for result in ARMS["random"](step):
        last = [one["cpu_s"] for one in step.local.work if "density" in one][-3:]
        assert result.cpu_s[0] == pytest.approx(sum(last)) and result.cpu_s[1] in last
        assert (result.epochs, result.search_epochs) == (2, 4)
        assert result.flops[1] == pytest.approx(step.local.flops(result.mask, 6 * step.local.num_train)[1])


@pytest.mark.parametrize("name", ["lotteryfl", "sub_fedavg", "fedpm"])
def test_the_controls_of_a_methods_mask_are_of_its_own_granularity(name: str) -> None:
    """Row 9: a mask of single weights was shuffled in the rows of the study's finder, and most of it came alive."""
    step = personal(tiny.of_method(name, finder={"granularity": "row"}))
    mask = step.inbox[THETA_G].mask
    if name == "fedpm":
        scores = np.where(mask, 1, -1).astype(np.float32)
        step = given(step, Content(np.ones(scores.size, bool), scores, np.zeros(0, np.int64)))
    (control,) = results(step, "frozen_random" if name == "fedpm" else "own_random")
    for e in step.local.task.layout.prunable:
        assert control.mask[e.slice].sum() == mask[e.slice].sum()


def breaks(monkeypatch: pytest.MonkeyPatch, where: Any) -> None:
    """Let the trainings of step 2 diverge whose density `where` picks."""
    original = train.train

    def broken(model: FlatModel, request: TrainingRequest) -> Any:
        if request.active is not None and where(float(request.active.mean())):
            raise FloatingPointError("training diverged: loss nan")
        return original(model, request)

    monkeypatch.setattr(train, "train", broken)


def test_an_arm_that_diverges_costs_the_client_that_arm_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 10: the client lost all its arms, and every mean was over the survivors."""
    arms = ["global", "dense", "ticket", "global_mask", "random"]
    breaks(monkeypatch, lambda density: density < 0.3)
    told: list[str] = []
    tiny.run(tiny.study(personalise={"arms": arms}), tmp_path / "r", tell=told.append)
    rows = tiny.rows(tmp_path / "r", "metrics")
    assert len(rows) == 4 * (2 + 3 * 2), "every client has every arm at every density"
    lost = {(r["arm"], r["target_density"]) for r in rows if r.get("diverged")}
    assert lost == {(arm, 0.2) for arm in ("ticket", "global_mask", "random")}
    for row in rows:
        if row.get("diverged"):
            assert row["test_accuracy"] == row["val_accuracy"] == 1 / 4 and row["test_loss"] == math.log(4)
            assert row["density"] == pytest.approx(0.2, abs=0.01) and row["train_flops"] > 0
    assert tiny.digests(tmp_path / "r")["tickets"] == {}, "the kept arm has no model to save"
    found = [d for r in tiny.rows(tmp_path / "r", "rounds") for d in r["diverged"]]
    assert len(found) == 12 and found[0] == {"client": 0, "arm": "ticket", "target_density": 0.2}
    assert any("ticket diverged for 2  random" in line or "ticket diverged for 2  global" in line for line in told)
    notes = honest_notes(read_results(tmp_path / "r"))
    assert sum("the training of 4 of 4 clients diverged; each counts as a uniform guess" in note for note in notes) == 3
    table = summary_table(read_results(tmp_path / "r"))
    column = {(row[0], row[1]): row[table.header.index("diverged")] for row in table.rows}
    assert column["personal ticket", "0.2"] == "4" and column["personal ticket", "0.5"] == "0"


def test_without_a_dense_training_the_random_control_still_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 10: a search whose first training diverges has no mask to shuffle; the other arms go on."""
    breaks(monkeypatch, lambda density: density == 1)
    step = step2_of(tiny.study(personalise={"epochs": 1}))
    every = {arm: results(step, arm) for arm in ("dense", "ticket", "one_shot", "random", "global_mask")}
    assert all(r.diverged for arm in ("dense", "ticket", "one_shot") for r in every[arm])
    size = step.local.full.size
    for arm in ("random", "global_mask"):
        assert [int(r.mask.sum()) for r in every[arm]] == [round(d * size) for d in (0.5, 0.2)]
        assert not any(r.diverged for r in every[arm])
    assert len([one for one in step.local.work if one.get("density") == 1]) == 1, "nor is it tried twice"


@pytest.mark.parametrize("name", ["lotteryfl", "fedselect", "fedavg_ft", "two_step"])
def test_a_run_whose_every_training_of_step_2_diverges_ends_and_says_so(tmp_path: Path, name: str) -> None:
    """Row 10: for real, by a learning rate."""
    made = tiny.of_method(name, personalise={"lr": 1e30, "epochs": 2}, refine={"rounds": 0})
    tiny.run(made, tmp_path / "r")
    rows = tiny.rows(tmp_path / "r", "metrics")
    assert {r["client"] for r in rows} == {0, 1, 2, 3}
    assert {r["arm"] for r in rows if not r.get("diverged")} <= {"global", "own"}
    assert {"dense", "local"} <= {r["arm"] for r in rows if r.get("diverged")}


def test_a_client_goes_on_to_refinement_when_its_ticket_diverged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 10: refinement needs the mask alone; a refined ticket that is fine is saved, one that is not is not."""
    made = tiny.study(
        refine={"rounds": 1, "clients_per_round": 2}, personalise={"arms": ["dense", "ticket"]},
        finder={"densities": [0.2]},
    )  # fmt: skip
    original, lost = train.train, [1]

    def broken(model: FlatModel, request: TrainingRequest) -> Any:
        if request.active is not None and not request.active.all() and lost:
            lost.pop()
            raise FloatingPointError("training diverged: loss nan")
        return original(model, request)

    monkeypatch.setattr(train, "train", broken)
    tiny.run(made, tmp_path / "r")
    rows = {(r["client"], r["arm"]): r for r in tiny.rows(tmp_path / "r", "metrics")}
    assert rows[0, "ticket"]["diverged"] and "diverged" not in rows[0, "refined"]
    assert sorted(tiny.digests(tmp_path / "r")["tickets"]) == ["0", "1", "2", "3"]


def test_weights_or_losses_that_are_no_numbers_are_a_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 10: the last step may break a model whose losses were finite; then its row cannot be sent as it is."""
    step = step2_of(tiny.study())
    local = step.local
    one = replace(
        local.recipe, batch_size=10**6, lr=3e38, optimizer=Sgd(weight_decay=1e3)
    )  # a single step, whose loss is finite
    with pytest.raises(FloatingPointError, match=r"training diverged: loss \d"):
        local.train(step.theta_g, recipe=one)
    assert local.log[-1].steps > 0, "what it cost is counted"
    huge = replace(step.theta_g, floats=np.full_like(step.theta_g.floats, 1e30))
    row = row_of(local, Result(arm="dense", params=huge, mask=local.full))
    assert row.diverged and row.val_loss == row.test_loss == math.log(4)


def test_what_is_kept_does_not_depend_on_test_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 10's brother: a test loss that is no number took the client's ticket file, and in a trial its rate."""
    made = tiny.study(personalise={"arms": ["ticket"]})
    tiny.run(made, tmp_path / "whole")
    original = LocalClient.evaluate

    def infinite(self: LocalClient, params: Any, data: Any, metrics: Any = None) -> Scores:
        found = original(self, params, data, metrics)
        return found if data is self.val_part else replace(found, loss=math.inf)

    monkeypatch.setattr(LocalClient, "evaluate", infinite)
    tiny.run(made, tmp_path / "r")
    assert tiny.digests(tmp_path / "r")["tickets"] == tiny.digests(tmp_path / "whole")["tickets"] != {}
    rows, whole = tiny.rows(tmp_path / "r", "metrics"), tiny.rows(tmp_path / "whole", "metrics")
    guess = {"test_accuracy": 1 / 4, "test_loss": math.log(4)}
    assert rows == [row | guess for row in whole], "the row is a guess on test data alone"


def test_a_client_whose_round_diverges_fails_that_visit_with_the_reason() -> None:
    """Row 10: in a federated round it is the visit's failure."""
    from fedlth.engines.inprocess import attempt

    science = tiny.experiment(tiny.of_method("fedavg", train={"lr": 1e30, "epochs": 2})).text
    failure = attempt(client_step, Job(study=science, phase="federate", round=1, client=0, inbox=()))
    assert "training diverged" in failure.reason  # type: ignore[union-attr]


def kept_models(monkeypatch: pytest.MonkeyPatch, **sections: Any) -> int:
    """Return the most trainings that are held at once while a client's arms go by."""
    made, refs = tiny.study(**{"personalise": {"arms": EVERY_ARM}, **sections}), list[Any]()
    step, original = step2_of(made), Step2._walked

    def noted(self: Step2, *asked: Any) -> Walked:
        walked = original(self, *asked)
        refs.append(weakref.ref(walked))
        held.append(sum(ref() is not None for ref in refs))
        return walked

    held: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(Step2, "_walked", noted)
        for arm in EVERY_ARM:
            for result in ARMS[arm](step):
                assert result.params is not None
    assert sum(ref() is not None for ref in refs) == len(step.known) == 1, "the dense twin is left"
    return max(held)


def test_step_2_holds_as_many_models_for_nine_densities_as_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 33: every training was kept to the end, and a search's own to the search's."""
    many = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    assert kept_models(monkeypatch, finder={"densities": many}) <= 4
    assert kept_models(monkeypatch, finder={"densities": [0.5], "schedule": {"name": "iterative", "rounds": 9}}) <= 4
    assert kept_models(monkeypatch, finder={"densities": many, "stop": {"name": "val_drop", "drop": 0.99}}) <= 4
    assert kept_models(monkeypatch, finder={"densities": [0.5], "gate": {"name": "warm_up", "trainings": 9}}) <= 4


def test_an_older_look_keeps_what_it_was_asked() -> None:
    """Row 33: a gate that waits, or a stop, held one model a training."""
    asked: list[float] = []
    params = step2_of(tiny.study()).theta_g
    proposal = Proposal(np.ones(3, bool), lambda: True)
    look = Look(1.0, 0, params, lambda p: asked.append(1.0) or 0.5, lambda: proposal)
    assert look.val_accuracy == look.let_go().let_go().val_accuracy == 0.5 and len(asked) == 1
    with pytest.raises(StudyError, match="an older look has only what was asked of it"):
        _ = look.let_go().proposal
    assert look.proposal.tied and look.let_go().proposal.tied and look.let_go().params is None


def test_a_result_is_let_go_once_it_is_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 33: the client kept every result until its last row was written; it keeps its product alone."""
    alive: list[int] = []

    def counting(local: LocalClient, result: Result) -> MetricRow:
        gc.collect()
        alive.append(sum(type(o) is Result for o in gc.get_objects()))
        return row_of(local, result)

    monkeypatch.setattr(personalise, "row_of", counting)
    densities = [0.9, 0.7, 0.5, 0.3, 0.1]
    made = tiny.experiment(tiny.study(finder={"densities": densities, "main": 0.7}, personalise={"arms": EVERY_ARM}))
    gc.collect()
    gc.freeze()  # what other tests have left need not be looked through each time
    try:
        reply = client_step(Job(study=made.text, phase="personalise", round=1, client=0, inbox=()))
    finally:
        gc.unfreeze()
    assert len(alive) == 4 + 5 * 5 and max(alive) <= 4
    ticket = ClientState.from_bytes(reply.state).masks["ticket"]
    assert ticket.sum() == round(0.7 * ticket.size)
    assert json.loads(reply.outbox[0].payload)["rows"][0]["arm"] == "global"


def test_the_memory_forecast_does_not_grow_with_densities() -> None:
    """Row 33: what step 2 holds is the same for one density and for nine, but for the masks of the random control."""
    one, many = (
        tiny.experiment(tiny.study(finder={"densities": d}))
        for d in ([0.5], [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    )
    grown = forecast._memory_mb(many) - forecast._memory_mb(one)
    assert grown == pytest.approx(8 * one.task.layout.num_prunable / 1e6)
    plain = tiny.experiment(tiny.of_method("fedavg"))
    assert forecast._memory_mb(one) > forecast._memory_mb(plain)


def test_a_long_step_2_is_heard_of_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(personalise, "LONG_S", 0.0)
    lines: list[str] = []
    made = tiny.of_method("two_step", finder={"densities": [0.5]}, personalise={"arms": ["dense", "ticket"]})
    tiny.run(made, tmp_path / "r", tell=lines.append)
    told = [line for line in lines if line.startswith("client 0: ")]
    assert told == ["client 0: dense at density 1 is done", "client 0: ticket at density 0.5 is done"]


def test_a_process_with_other_data_refuses_the_job() -> None:
    """A factory that draws anew at each call gave every worker examples of its own, and nobody knew."""
    from fedlth.engines.inprocess import attempt

    made = tiny.experiment(tiny.of_method("fedavg"))
    job = Job(study=made.text, phase="federate", round=1, client=0, inbox=(), data=made.task.splits.name)
    assert not hasattr(attempt(client_step, job), "reason")
    failure = attempt(client_step, replace(job, data="0" * 16))
    assert "data: must be the same in every process of a run" in failure.reason  # type: ignore[union-attr]
