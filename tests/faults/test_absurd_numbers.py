"""What is summed or ranked beside the state itself: finite and absurd numbers there cost their sender alone, too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlth.experiment.experiment import open_experiment
from fedlth.experiment.well_formed import method_of
from fedlth.federation.door import _check_metrics
from fedlth.federation.jobs import Job, Message, Reply
from fedlth.federation.ranges import check_range, ranges_of
from fedlth.federation.update_norms import Sizes, UpdateNorms
from fedlth.methods.client_update import UPDATE, sends_in
from fedlth.models.layout import Params
from fedlth.storage.records import CurveRow, MetricRow, VisitRecord, visit_record
from fedlth.storage.typed_record import read
from fedlth.training.metrics import judged
from fedlth.wire import payload
from fedlth.wire.errors import PayloadError
from fedlth.wire.payload import Content
from tests import tiny
from tests.faults.test_absurd_updates import NORMED, lost, poisoned, run, seen, study

NONE = np.zeros(0, np.int64)


def norms(accepted: dict[str, list[float]] | None = None) -> UpdateNorms:
    layout = tiny.small_layout()
    theta = Params(np.ones(layout.num_floats, np.float32), np.zeros(layout.num_ints, np.int64))
    return UpdateNorms(theta, layout, accepted or {})


def numbers(value: float, size: int = 100) -> Content:
    return Content(np.ones(0, bool), np.full(size, value, np.float32), NONE)


@pytest.mark.parametrize("others", [[], [1.0] * 3, [9e30] * 3])
def test_a_score_of_9e29_is_refused_whatever_others_sent(others: list[float]) -> None:
    """Scores, statistics and changes of a control variate were held against nothing: one client's decided the mean."""
    known = norms({"saliency": others})
    with pytest.raises(PayloadError, match=r"saliency: its norm must be within .*, got inf"):
        known.check(known.sizes({"saliency": numbers(9e29)}, moves_state=True))


def test_a_score_is_held_against_those_of_its_name() -> None:
    known = norms({"saliency": [1.0, 2.0, 3.0], "gradients": [1e9] * 3})
    for name, fits, fails in (("saliency", 9e5, 2e6), ("gradients", 1e11, 2e12), ("new", 1e11, 2e12)):
        known.check(known.sizes({name: numbers(fits)}, moves_state=True))
        with pytest.raises(PayloadError, match=f"{name}: its norm must be within"):
            known.check(known.sizes({name: numbers(fails)}, moves_state=True))
    known.accept(known.sizes({"saliency": numbers(1.0)}, moves_state=True))
    assert known.accepted["saliency"] == [1.0, 2.0, 3.0, 10.0] and known.accepted["gradients"] == [1e9] * 3


def test_a_first_majority_is_waited_for_in_every_message() -> None:
    known = norms({"parameters": [1.0] * 3, "buffers": [0.0] * 3})
    update, beside = Sizes({"parameters": 1.0, "buffers": 0.0}), Sizes({"parameters": 1.0, "saliency": 1.0}, {})
    assert known.known([update]) and not known.known([beside, update]) and known.known([beside] * 3)


@pytest.mark.parametrize("group", ["parameters", "buffers"])
@pytest.mark.parametrize("others", [0, 2, 3, 50])
def test_no_majority_is_believed_at_any_size(group: str, others: int) -> None:
    """Where all clients of a first round sent 9e29 their median let them in, and buffers were held against nothing."""
    known = norms({"parameters": [1e30] * others, "buffers": [1e30] * others})
    with pytest.raises(PayloadError, match=f"update: its {group} must be within"):
        known.check(Sizes({group: 1e30}))


def test_the_first_round_of_a_hostile_federation_is_not_joined(tmp_path: Path) -> None:
    made = study(federate={"rounds": 1, "clients_per_round": 3})

    def absurd(floats: np.ndarray, ints: np.ndarray) -> None:
        floats[:] = 9e29

    run(tmp_path / "r", made, lambda job: job.phase == "federate", lambda job, reply: poisoned(job, reply, absurd))
    (row,) = (r for r in tiny.rows(tmp_path / "r", "rounds") if r["phase"] == "federate")
    assert len(row["failed"]) == 3 and row["void"]
    assert all("(whatever others send)" in f["reason"] for f in row["failed"]), row["failed"]


def test_a_variance_below_zero_is_refused_with_its_tensors_name() -> None:
    """It is small, and NaN in the next forward pass of everyone."""
    experiment = tiny.experiment(study(model=NORMED))
    phase, layout = experiment.phases[0], experiment.layout
    floats, start = experiment.initial().floats.copy(), experiment.initial()
    limits = ranges_of(experiment, phase, 1)[UPDATE]
    check_range(UPDATE, Content(np.ones(layout.num_prunable, bool), floats, start.ints), limits, layout)
    floats[np.flatnonzero(layout.variances)[0]] = -1e-3
    with pytest.raises(PayloadError, match=r"update: norm.running_var must be in \[0, inf\], got -0.001"):
        check_range(UPDATE, Content(np.ones(layout.num_prunable, bool), floats, start.ints), limits, layout)


def test_what_a_method_knows_of_its_numbers_is_held(tmp_path: Path) -> None:
    for method, name, low, high in (
        ("salientgrads", "saliency", 0.0, np.inf), ("flash", "densities", 0.0, 1.0),
        ("prunefl", "squared_gradients", 0.0, np.inf),
    ):  # fmt: skip
        experiment = tiny.experiment(tiny.of_method(method))
        found = {n: r for p in experiment.federated_phases for n, r in ranges_of(experiment, p, 2).items()}
        assert found[name][0].min() == low and found[name][1].max() == high, method


@pytest.mark.parametrize("kind", [MetricRow, CurveRow])
@pytest.mark.parametrize("name", ["val_loss", "test_loss"])
def test_a_loss_whose_sum_is_no_number_is_refused(kind: type, name: str) -> None:
    """Two clients' 1.7e308 were each finite, and their mean was not: the round's record could not be written."""
    base: dict[str, Any] = {
        "client": 0, "unseen": False, "arm": "global", "density": 1.0, "target_density": 1.0, "val_accuracy": 0.5,
        "test_accuracy": 0.5, "num_train": 3, "val_loss": 1.0, "test_loss": 1.0, "num_val": 1, "num_test": 1,
    }  # fmt: skip
    rows = base if kind is MetricRow else {k: v for k, v in base.items() if k not in ("target_density", "num_train")}
    read(kind, rows | {name: 3.4e38}, strict=False)
    for wrong in ({name: 1.7e308}, {f"{name[:-5]}_metrics": {"mse": -1.7e308}}):
        assert wrong.keys() <= {f.name for f in fields(kind)}
        with pytest.raises(ValueError, match=rf"{next(iter(wrong))} must be"):
            read(kind, rows | wrong, strict=False)


@pytest.mark.parametrize("name", ["loss", "val_metric", "of_its_own"])
def test_a_visits_numbers_have_a_mean(name: str) -> None:
    assert isinstance(visit_record({"num_examples": 3, name: 3.4e38}), VisitRecord)
    with pytest.raises(ValueError, match=name):
        visit_record({"num_examples": 3, name: 1.7e308})


def spoilt(name: str, value: float) -> Callable[[Job, Reply], Reply]:
    """Return what sends a message with its numbers replaced, if the answer has one of that name."""

    def change(job: Job, reply: Reply) -> Reply:
        experiment, outbox = open_experiment(job.study), []
        for message in reply.outbox:
            if message.name == name:
                layout = experiment.message_layout(experiment.phase(job.phase), name, message.kind)
                got = payload.decode(message.payload, message.kind, layout)
                assert got.floats is not None
                floats = np.where(got.floats == 0, 0, np.float32(value)) if layout.num_prunable else np.float32(value)
                bad = replace(got, floats=np.broadcast_to(floats, got.floats.shape).astype(np.float32))
                message = Message(message.kind, name, payload.encode(message.kind, layout, bad))
            outbox.append(message)
        return replace(reply, outbox=tuple(outbox))

    return change


BESIDE = {  # all that crosses with numbers beside the moved state: (method, phase, message)
    ("salientgrads", "saliency", "saliency"), ("ssfl", "saliency", "saliency"),
    ("scaffold", "federate", "control_change"), ("prunefl", "federate", "squared_gradients"),
    ("flash", "sensitivity", "densities"), ("fedtiny", "measure", "statistics"), ("fedtiny", "select", "loss"),
    ("fedtiny", "federate", "gradients"),
}  # fmt: skip


def test_the_sweep_has_all_that_crosses_beside_the_state() -> None:
    found = set()
    for method in tiny.METHODS:
        for phase in method_of(tiny.of_method(method)).phases:
            for name, kind in phase.update.sends:
                if kind != "mask" and name != UPDATE:
                    found.add((method, phase.name, name))
    assert found == BESIDE


CASES = [pytest.param(*case, marks=[] if case[0] == "salientgrads" else [pytest.mark.long]) for case in sorted(BESIDE)]


@pytest.mark.parametrize(("method", "phase", "name"), CASES)
def test_absurd_numbers_of_one_client_cost_it_alone(tmp_path: Path, method: str, phase: str, name: str) -> None:
    """In every method, whatever it sends beside the state: the run is as if this client had not answered."""
    norms_of_its_own = {"model": NORMED} if phase == "measure" else {}  # which have the statistics
    made = tiny.of_method(method, federate={"rounds": 3, "clients_per_round": 3}, wire="raw", **norms_of_its_own)
    bad = seen(made)[1]

    def when(job: Job) -> bool:
        return job.phase == phase and job.client == bad and name in sent(made, job)

    run(tmp_path / "r", made, when, spoilt(name, 9e29))
    run(tmp_path / "lost", made, when, lambda job, reply: lost(job, reply))
    failed = [f for r in tiny.rows(tmp_path / "r", "rounds") for f in r["failed"]]
    assert failed and {(f["client"], f["kind"]) for f in failed} == {(bad, "refused")}
    assert all(f["reason"].startswith(f"{name}: ") for f in failed), failed
    assert tiny.digests(tmp_path / "r") == tiny.digests(tmp_path / "lost")


def sent(made: Any, job: Job) -> set[str]:
    experiment = open_experiment(job.study)
    return {name for name, _ in sends_in(experiment.phase(job.phase).update, job.round)}


@pytest.mark.parametrize(
    ("name", "value"), [("balanced_accuracy", 5.0), ("macro_f1", -0.1), ("perplexity", 0.5), ("majority", 2.0)]
)
def test_a_metric_is_held_to_what_it_can_be(name: str, value: float) -> None:
    """Accuracies were; balanced accuracy 5.0 was shown as 500 %, and decided which model was kept."""
    made = judged(None if name == "majority" else name, (name,) if name == "majority" else (), "classes")
    with pytest.raises(ValueError, match=rf"val_metrics: {name} must be in \["):
        _check_metrics("val_metrics", {name: value}, made)
    _check_metrics("val_metrics", {name: 1.0}, made)
