"""Updates that are finite but absurd cost their sender alone; a global model that nobody can train is rolled back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedlth.engines.inprocess import InProcess
from fedlth.federation import session
from fedlth.federation.jobs import Failure, Job, Reply
from fedlth.federation.rounds import Federation
from fedlth.federation.update_norms import Sizes, UpdateNorms
from fedlth.models.layout import Params
from fedlth.report.facts import read_run
from fedlth.report.headline import summary_text
from fedlth.report.results import results_of
from fedlth.storage.run_folder import RunFolder
from fedlth.wire import metrics, payload
from fedlth.wire.codec import CODECS
from fedlth.wire.errors import PayloadError
from fedlth.wire.payload import Content
from tests import tiny
from tests.faults.test_resume import Meddling

Change = Callable[[np.ndarray, np.ndarray], None]
NORMED: dict[str, Any] = {"name": "tests.test_methods:normed", "options": {}}


def study(**sections: Any) -> Any:
    base: dict[str, Any] = {"method": "fedavg", "wire": "raw", "federate": {"rounds": 3, "clients_per_round": 3}}
    return tiny.study(**{**base, **sections})


def poisoned(job: Job, reply: Reply, change: Change) -> Reply:
    """Return an answer whose update a client has changed, in floats (num_floats,) or ints (num_ints,)."""
    layout, first = tiny.open_task(job.study).exchange, reply.outbox[0]
    got = payload.decode(first.payload, "values", layout, codec=CODECS["raw"])
    assert got.floats is not None and got.ints is not None
    floats, ints = got.floats.copy(), got.ints.copy()
    change(floats, ints)
    data = payload.encode("values", layout, Content(got.mask, floats, ints))
    return replace(reply, outbox=(replace(first, payload=data), *reply.outbox[1:]))


def run(out: Path, made: Any, when: Callable[[Job], bool], what: Callable[[Job, Reply], Reply | Failure]) -> list[str]:
    said: list[str] = []

    def meddle(job: Job, answer: Reply | Failure) -> Reply | Failure:
        return what(job, answer) if when(job) and isinstance(answer, Reply) else answer

    tiny.run(made, out, engine=Meddling(meddle), tell=said.append)
    return said


def lost(job: Job, reply: Reply) -> Failure:
    return Failure(round=job.round, client=job.client, kind="lost", reason="")


def seen(made: Any) -> list[int]:
    splits = tiny.open_task(made.science()).splits
    return [c for c in range(made.clients.count) if c not in splits.unseen]


def fill(value: float, part: slice = slice(None)) -> Change:
    def change(floats: np.ndarray, ints: np.ndarray) -> None:
        floats[part] = value

    return change


def count(value: int) -> Change:
    def change(floats: np.ndarray, ints: np.ndarray) -> None:
        ints[:] = value

    return change


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize(
    ("model", "change", "reason"),
    [
        ({}, fill(9e29), "update: its parameters must be within"),
        ({}, fill(1e3), "update: its parameters must be within"),
        (NORMED, fill(9e29, slice(-6, None)), "update: its buffers must be within"),
        (NORMED, count(2**50), "update: a counter moved by more than"),
    ],
)
def test_an_absurd_update_costs_its_sender_alone(
    tmp_path: Path, position: int, model: dict[str, Any], change: Change, reason: str
) -> None:
    """Row 27: refused in its place among the first three already, and the run is that without this client."""
    made = study(model=model) if model else study()
    bad = seen(made)[position]

    def when(job: Job) -> bool:
        return job.phase == "federate" and job.client == bad

    run(tmp_path / "r", made, when, lambda job, reply: poisoned(job, reply, change))
    run(tmp_path / "lost", made, when, lost)
    failed = [f for r in tiny.rows(tmp_path / "r", "rounds") for f in r["failed"]]
    assert {(f["client"], f["kind"]) for f in failed} == {(bad, "refused")} and len(failed) == 3
    assert all(f["reason"].startswith(reason) for f in failed), failed
    assert tiny.digests(tmp_path / "r") == tiny.digests(tmp_path / "lost")
    rows = [r for r in tiny.rows(tmp_path / "r", "ledger") if (r["phase"], r["round"]) == ("federate", 1)]
    senders = [r["sender"] for r in rows if r["receiver"] == "server"]
    assert senders == sorted(senders), "who waits for a first majority keeps its place"


def test_the_only_update_of_a_first_round_is_held_against_the_model(tmp_path: Path) -> None:
    """Row 27: without others to compare, 9e29 is still more than a visit could move."""
    made = study(federate={"rounds": 1, "clients_per_round": 1})
    run(tmp_path / "r", made, lambda job: job.phase == "federate", lambda j, r: poisoned(j, r, fill(9e29)))
    (failed,) = (f for r in tiny.rows(tmp_path / "r", "rounds") for f in r["failed"])
    assert "with few others to compare" in failed["reason"]


@pytest.mark.parametrize("more", [1, -1, 10**9])
def test_a_count_is_what_the_server_knows(tmp_path: Path, more: int) -> None:
    """Row 27: 10^9 examples made one client's constant the global model."""
    made = study()
    bad = seen(made)[1]

    def lies(job: Job, reply: Reply) -> Reply:
        record = metrics.decode(reply.outbox[1].payload)
        told = replace(
            reply.outbox[1], payload=metrics.encode(record | {"num_examples": record["num_examples"] + more})
        )
        return replace(reply, outbox=(reply.outbox[0], told))

    run(tmp_path / "r", made, lambda job: job.phase == "federate" and job.client == bad, lies)
    failed = [f for r in tiny.rows(tmp_path / "r", "rounds") for f in r["failed"]]
    assert len(failed) == 3 and all("metrics: num_examples must be" in f["reason"] for f in failed)


class Exponential(nn.Module):
    """A network whose numbers leave float32 where its weights are large, as those of deep or recurrent ones do."""

    def __init__(self, *, num_classes: int, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 8), nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(torch.exp(self.first(x.flatten(1))))
        return logits


def scatter(floats: np.ndarray, ints: np.ndarray) -> None:
    floats[:] = 1e3 * np.random.Generator(np.random.PCG64(0)).normal(size=floats.size)


def broken(out: Path, **sections: Any) -> list[str]:
    """Run a study whose second round's model is one that nobody can train; two clients a round are no majority."""
    model = {"name": "tests.faults.test_absurd_updates:Exponential", "options": {}}
    made = study(federate={"rounds": 5, "clients_per_round": 2}, model=model, train={"lr": 0.02}, **sections)

    def when(job: Job) -> bool:
        return job.phase == "federate" and job.round == 1

    return run(out, made, when, lambda j, r: poisoned(j, r, scatter))


def test_a_global_model_that_nobody_can_train_is_rolled_back(tmp_path: Path) -> None:
    """Row 27: it ended the run after three rounds; now it costs two, says so, and the rest goes on."""
    said = broken(tmp_path / "r")
    rows = [r for r in tiny.rows(tmp_path / "r", "rounds") if r["phase"] == "federate"]
    assert [len(r["failed"]) for r in rows] == [0, 2, 0, 0, 0]
    assert [r.get("rolled_back_to") for r in rows] == [None, "the initial one", None, None, None]
    assert said.count("note: no client could use this global model; it is rolled back to the initial one") == 1
    assert rows[-1]["val_accuracy"] > rows[2]["val_accuracy"]
    text = summary_text(results_of((read_run(tmp_path / "r"),)))
    assert "round 2 of federate: no client could use the global model" in " ".join(text.split())
    assert len(list((tmp_path / "r" / "checkpoints").iterdir())) <= 4, "of two commits, each with a good one"


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_roll_back_resumes_like_anything_else(tmp_path: Path, after: int) -> None:
    """Row 27: the good state, and what is known of norms, are part of the checkpoint."""
    broken(tmp_path / "whole")
    stepped = Federation.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Federation, "run", lambda self: stepped(self, stop_after=after))
        patch.setattr(session, "_finish", lambda *_: None)
        with pytest.raises(Exception, match="no client finished"):
            broken(tmp_path / "cut")
    session.resume(tmp_path / "cut", InProcess())
    assert tiny.facts(tmp_path / "cut") == tiny.facts(tmp_path / "whole")


def test_an_anchor_of_a_broken_model_is_rolled_back_too(tmp_path: Path) -> None:
    """Row 27: step 2 must not rewind to the model that was given up."""
    finder = {"rewind": {"name": "global", "round": 1}}
    broken(tmp_path / "r", method={"name": "two_step"}, finder=finder, personalise={"arms": ["ticket"]})
    folder = RunFolder(tmp_path / "r")
    task = tiny.open_task(folder.study().science())
    assert folder.load_params("theta_g@1").digest() == task.shared_part(task.theta_0).digest()
    assert {r["client"] for r in tiny.rows(tmp_path / "r", "metrics")} == {0, 1, 2, 3}


def test_lost_machines_and_a_single_client_roll_nothing_back(tmp_path: Path) -> None:
    made = study(federate={"rounds": 3, "clients_per_round": 2})
    run(tmp_path / "lost", made, lambda job: job.phase == "federate" and job.round == 2, lost)

    def raised(job: Job, reply: Reply) -> Failure:
        return Failure(
            round=job.round, client=job.client, kind="raised", reason="FloatingPointError: training diverged"
        )

    alone = study(federate={"rounds": 3, "clients_per_round": 1})
    run(tmp_path / "alone", alone, lambda job: job.phase == "federate" and job.round == 2, raised)
    for name in ("lost", "alone"):
        assert not any("rolled_back_to" in r for r in tiny.rows(tmp_path / name, "rounds"))


def test_what_is_known_is_a_window_of_the_phase(tmp_path: Path) -> None:
    layout = tiny.small_layout()
    theta = Params(np.ones(layout.num_floats, np.float32), np.zeros(layout.num_ints, np.int64))
    norms = UpdateNorms(theta, layout)
    for i in range(300):
        norms.accept(Sizes({"parameters": float(i), "buffers": 0.0}))
    assert norms.accepted["parameters"] == [float(i) for i in range(199, 300)]
    norms.check(Sizes({"parameters": 100 * 249.0, "buffers": 0.0}))
    with pytest.raises(PayloadError, match=r"its parameters must be within 2.5e\+04 .* got 2.5e\+04"):
        norms.check(Sizes({"parameters": 100 * 249.5, "buffers": 0.0}))
    mask = np.zeros(layout.num_prunable, bool)
    sliced = norms.distances(Content(mask, np.zeros_like(theta.floats), theta.ints))
    assert sliced["parameters"] == pytest.approx((layout.num_params - layout.num_prunable) ** 0.5), "what it carries"


def test_a_counter_at_the_end_of_its_range_is_no_small_step() -> None:
    """Found in review: |-2^63| is negative in int64, so it passed."""
    layout = tiny.experiment(tiny.study(model={"name": "tests.tiny:Small", "options": {}})).layout
    theta = Params(np.zeros(layout.num_floats, np.float32), np.zeros(layout.num_ints, np.int64))
    least = np.full(layout.num_ints, np.iinfo(np.int64).min)
    with pytest.raises(PayloadError, match="a counter moved"):
        UpdateNorms(theta, layout).distances(Content(np.ones(layout.num_prunable, bool), theta.floats, least))
