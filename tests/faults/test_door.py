"""What clients report is held against one schema: nothing passes that a report then refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedlth.errors import NothingUsable
from fedlth.federation.client_step import client_step
from fedlth.federation.door import Accepted, Asked, Held, accept
from fedlth.federation.jobs import RESYNC, Failure, Job, Message, Reply
from fedlth.methods.aggregate import FedAvg
from fedlth.methods.client_update import Inbox, MaskedUpdate, Update
from fedlth.methods.method import FederatedMethod, Phase
from fedlth.report.build import page
from fedlth.report.facts import read_run
from fedlth.report.headline import summary_text
from fedlth.report.results import results_of
from fedlth.report.tables import bytes_table, clients_table, summary_table
from fedlth.storage.client_state import ClientState
from fedlth.storage.records import MetricRow, VisitRecord, visit_record
from fedlth.storage.typed_record import read
from fedlth.training.local_client import LocalClient
from fedlth.wire import metrics, payload
from fedlth.wire.codec import CODECS
from fedlth.wire.errors import PayloadError
from fedlth.wire.payload import Content
from tests import tiny
from tests.faults.test_resume import Meddling

ARMS = ("global", "dense", "ticket")
STUDY = tiny.study(
    federate={"rounds": 1, "clients_per_round": 3}, refine={"rounds": 1, "clients_per_round": 2},
    personalise={"arms": list(ARMS), "epochs": 1, "clients_per_wave": 4},
)  # fmt: skip
CLIENT = 2
NONE = np.zeros(0, np.int64)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("door") / "run"
    tiny.run(STUDY, out)
    return out


@pytest.fixture(scope="module")
def reply() -> Reply:
    """An honest answer to step 2, from theta_0."""
    made = STUDY.model_copy(update={"wire": "raw"})
    return client_step(Job(study=made.science(), phase="personalise", round=1, client=CLIENT, inbox=()))


def judged(answer: Reply) -> Accepted:
    task = tiny.open_task(STUDY.model_copy(update={"wire": "raw"}).science())
    asked = Asked(
        task.splits.clients[CLIENT], CLIENT in task.splits.unseen, sends={"ticket": ("mask", task.exchange)},
        own_mask=True, arms=frozenset(ARMS), targets=frozenset({1.0, 0.5, 0.2}),
        layers=frozenset(e.name for e in task.layout.prunable),
    )  # fmt: skip
    return accept(answer, codec=CODECS["raw"], held=Held(None, None), asked=asked)


def with_rows(answer: Reply, rows: Any) -> Reply:
    told = Message("metrics", "arms", metrics.encode({"rows": rows}))
    return replace(answer, outbox=(told, *answer.outbox[1:]))


def rows_of(answer: Reply) -> list[dict[str, Any]]:
    return list(metrics.decode(answer.outbox[0].payload)["rows"])


def test_an_honest_answer_passes_as_it_came(reply: Reply) -> None:
    assert judged(reply).rows == tuple(rows_of(reply))
    assert len(judged(reply).rows) == 4 and judged(reply).mask is not None


FIELDS = sorted({f.name for f in fields(MetricRow)} - MetricRow.OPTIONAL)


def test_a_row_without_any_of_its_fields_is_refused(reply: Reply) -> None:
    """Row 17: `{"client": 1}` was accepted, and then the report refused the whole run."""
    assert set(rows_of(reply)[0]) == set(FIELDS), "the client builds what the door wants"
    for name in FIELDS:
        rows = rows_of(reply)
        rows[1].pop(name)
        with pytest.raises(PayloadError, match=f"metrics: {name} is required"):
            judged(with_rows(reply, rows))
    with pytest.raises(PayloadError, match="metrics: unseen is required"):
        judged(with_rows(reply, [{"client": CLIENT}]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_accuracy": 5.0}, r"test_accuracy must be a number in \[0, 1\] or None, got 5.0"),
        ({"test_accuracy": None}, "test_accuracy must be a finite number"),
        ({"val_metrics": {"mse": 1.0}}, "val_metrics must name nothing"),
        ({"test_metrics": {"mse": "low"}}, "test_metrics must be a mapping of printable names to finite numbers"),
        ({"val_accuracy": True}, "val_accuracy must be"),
        ({"client": 1}, "client must be 2, got 1"),
        ({"unseen": 0}, "unseen must be bool, got 0"),
        ({"arm": "own"}, "arm 'own' at target_density 1.0 was not asked for"),
        ({"arm": "ticket", "target_density": 0.3}, "was not asked for"),
        ({"target_density": 0.0}, r"target_density must be a number in \(0, 1\]"),
        ({"density": -0.1}, "density must be"),
        ({"num_train": 10**9}, r"num_train must be \d+, got 1000000000"),
        ({"num_val": -1}, "num_val must be a whole number of at least 0"),
        ({"num_test": 1.0}, "num_test must be"),
        ({"epochs": 10**400}, "epochs must be"),
        ({"train_flops": -1.0}, "train_flops must be"),
        ({"val_loss": None}, "val_loss must be a finite number"),
        ({"start": "x" * 101}, "start must be printable text"),
        ({"start": "\ud800"}, "start must be printable text"),
        ({"ticket": 7}, "ticket must be printable text"),
        ({"layer_density": {}}, "layer_density must name the model's prunable tensors"),
        ({"layer_density": {"a": 2}}, "layer_density must be a mapping of names to shares"),
        ({"surprise": 1}, "'surprise' is not a field"),
        ({"diverged": 1}, "diverged must be bool"),
    ],
)
def test_a_row_that_no_honest_client_sends_is_refused_by_name(
    reply: Reply, changes: dict[str, Any], message: str
) -> None:
    """Row 17: right type, finite, in range, asked for, known to the server where it knows."""
    rows = rows_of(reply)
    rows[0] |= changes
    with pytest.raises(PayloadError, match=message):
        judged(with_rows(reply, rows))


def test_rows_fit_each_other_and_their_mask(reply: Reply) -> None:
    rows = rows_of(reply)
    with pytest.raises(PayloadError, match="arm 'global' at target_density 1.0 came twice"):
        judged(with_rows(reply, [*rows, rows[0]]))
    for nothing in ([], {}, 3, [3], "rows"):
        with pytest.raises(PayloadError, match="rows must be a list of records"):
            judged(with_rows(reply, nothing))
    rows[-1]["ticket"] = "0" * 16
    rows[-2]["ticket"] = ""
    with pytest.raises(PayloadError, match="ticket must name the mask that came"):
        judged(with_rows(reply, rows))
    assert judged(with_rows(reply, [r | {"diverged": True} for r in rows_of(reply)])).rows[0]["diverged"] is True


def test_only_the_messages_that_were_asked_for_under_their_names(reply: Reply) -> None:
    told, mask = reply.outbox
    layout = tiny.open_task(STUDY.science()).exchange
    dense = Content(np.ones(layout.num_prunable, bool), np.zeros(layout.num_floats, np.float32), np.zeros(0, np.int64))
    valued = replace(mask, payload=payload.encode("mask", layout, dense))
    for outbox, message in (
        ((told,), "no mask came"),
        ((mask,), "no metrics came"),
        ((told, mask, mask), "a 'mask' message 'ticket' came twice"),
        ((told, replace(mask, name="x" * 5000)), "a 'mask' message 'xxx.*' was not asked for"),
        ((told, mask, Message("control", RESYNC, bytes(8))), "a 'control' message 'resync' was not asked for"),
        ((told, replace(mask, kind="", name="ticket")), "a '' message 'ticket' was not asked for"),
        ((told, valued), "expected a bare mask, got values"),
    ):
        with pytest.raises(PayloadError, match=message) as refused:
            judged(replace(reply, outbox=outbox))
        assert len(str(refused.value)) < 300, "a refusal is written into two files"


def test_an_update_is_the_message_that_was_asked_for_first_whatever_came_first() -> None:
    """What came first was joined as the update: scores are no model, and the round ended with numpy's error."""
    task = tiny.task()
    layout, scores = task.exchange, task.exchange.select(lambda e: e.prunable)
    ones, theta = np.ones(layout.num_prunable, bool), task.shared_part(task.theta_0)
    sends = {"update": ("values", layout), "saliency": ("scores", scores)}
    outbox = (
        Message("scores", "saliency", payload.encode("scores", scores, Content(ones, theta.floats[: ones.size], NONE))),
        Message("metrics", "visit", metrics.encode({"num_examples": len(task.splits.clients[0].train)})),
        Message("values", "update", payload.encode("values", layout, Content(ones, theta.floats, theta.ints))),
    )
    asked = Asked(task.splits.clients[0], False, sends=sends, own_mask=False)
    got = accept(Reply(round=1, client=0, outbox=outbox), codec=CODECS["raw"], held=Held(None, None), asked=asked)
    assert got.contribution is not None and np.array_equal(got.contribution.content.floats, theta.floats)
    assert list(got.masks) == ["update", "saliency"] and list(got.contribution.others) == ["saliency"]


def test_an_update_lies_under_the_mask_of_what_was_sent() -> None:
    """What it leaves out would count as zero, and what it has beside would move weights that nobody else holds."""
    task = tiny.task()
    layout, theta = task.exchange, task.shared_part(task.theta_0)
    told = Message("metrics", "visit", metrics.encode({"num_examples": len(task.splits.clients[0].train)}))
    sent = np.arange(layout.num_prunable) % 2 == 0

    def answered(mask: np.ndarray, *, own_mask: bool) -> Accepted:
        content = Content(mask, theta.masked(mask).floats, theta.ints)
        update = Message("values", "update", payload.encode("values", layout, content))
        asked = Asked(task.splits.clients[0], False, sends={"update": ("values", layout)}, own_mask=own_mask)
        reply = Reply(round=1, client=0, outbox=(update, told))
        return accept(reply, codec=CODECS["raw"], held=Held(sent, None), asked=asked)

    assert answered(sent, own_mask=False).contribution is not None
    for other in (~sent, np.ones_like(sent), sent & (np.arange(sent.size) > 0)):
        with pytest.raises(PayloadError, match="expected an update of what was sent, got one under another mask"):
            answered(other, own_mask=False)
        assert answered(other, own_mask=True).contribution is not None, "where clients choose their masks"


@dataclass(frozen=True)
class Both(MaskedUpdate):
    """Send a bare mask beside the update, named in another order than promised, or under another name."""

    sends: tuple[tuple[str, str], ...] = (("update", "values"), ("extra", "mask"))
    name: str = "extra"

    def __call__(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Update:
        done = super().__call__(local, inbox, state)
        return replace(
            done, contents={self.name: Content(np.arange(local.full.size) % 2 == 0, None, None), **done.contents}
        )


def both(other: str = "extra") -> FederatedMethod:
    phase = Phase(name="federate", update=Both(name=other), join=FedAvg())
    return FederatedMethod(name="both", paper="", summary="", phases=(phase,), arms=("global",))


def test_messages_go_up_in_the_order_that_both_ends_know(tmp_path: Path) -> None:
    """The first message refers to the download: the client took the first it was given, the door the first promised."""
    tiny.run(tiny.study(method="tests.faults.test_door:both", wire="lossless"), tmp_path / "r")
    assert not any(r["failed"] for r in tiny.rows(tmp_path / "r", "rounds"))
    up = [
        r["name"] for r in tiny.rows(tmp_path / "r", "ledger") if r["sender"] != "server" and r["phase"] == "federate"
    ]
    assert up[:3] == ["update", "extra", "visit"]
    wrong = {"name": "tests.faults.test_door:both", "other": "other"}
    with pytest.raises(NothingUsable, match=r"federate: must send \['update', 'extra'\], got \['other', 'update'\]"):
        tiny.run(tiny.study(method=wrong, federate={"rounds": 3}), tmp_path / "wrong")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.integers() | st.floats(-2, 2) | st.floats(allow_nan=False)
    | st.text(max_size=3) | st.sampled_from(["ticket", "global", "dense", 0.2, 0.5, 1.0, 10**400]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip


def reported(run: Path) -> str:
    """Everything of a report but its figures, which take seconds to draw."""
    results = results_of((read_run(run),))
    tables = {"summary": summary_table(results), "clients": clients_table(results), "bytes": bytes_table(results)}
    return summary_text(results) + page(results, tables=tables, figures=())


@given(data=st.data())
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_passes_the_door_is_what_a_report_can_read(whole: Path, reply: Reply, data: st.DataObject) -> None:
    """Row 17: malformed rows never pass that the report then refuses."""
    rows = rows_of(reply)
    for _ in range(data.draw(st.integers(1, 3))):
        row = rows[data.draw(st.integers(0, len(rows) - 1))]
        name = data.draw(st.sampled_from(FIELDS) | st.text(max_size=3))
        if data.draw(st.booleans()):
            row[name] = data.draw(JSON)
        else:
            row.pop(name, None)
    drop = data.draw(st.integers(0, len(rows) - 1))
    try:
        got = judged(with_rows(reply, rows[drop:]))
    except (PayloadError, ValueError):  # ValueError: the encoder's own, for what no float holds
        return
    run = whole.parent / "fuzzed"
    shutil.copytree(whole, run, dirs_exist_ok=True)
    others = [r for r in tiny.rows(whole, "metrics") if r["client"] != CLIENT]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*others, *got.rows]))
    assert reported(run)


@given(st.dictionaries(st.sampled_from([f.name for f in fields(VisitRecord)]) | st.text(max_size=4), JSON))
def test_a_visit_that_passes_is_finite_and_in_range(record: dict[str, Any]) -> None:
    try:
        got = visit_record(record)
    except ValueError:
        return
    assert got.num_examples >= 1 and (got.val_accuracy is None or 0 <= got.val_accuracy <= 1)
    assert np.isfinite([v for v in record.values() if not isinstance(v, str)]).all()


def test_reading_a_run_forgives_what_a_client_may_not() -> None:
    old = {"client": 1, "unseen": False, "arm": "ticket", "density": 0.2, "target_density": 0.2, "val_accuracy": 1,
           "test_accuracy": 1, "num_train": 3, "later": 1}  # fmt: skip
    assert read(MetricRow, old, strict=False).diverged is False
    with pytest.raises(ValueError, match="start is required"):
        read(MetricRow, old, strict=True)


def meddled(out: Path, change: Callable[[Job, Reply], Reply], made: Any = STUDY) -> Path:
    def meddle(job: Job, answer: Reply | Failure) -> Reply | Failure:
        return change(job, answer) if isinstance(answer, Reply) and job.client == CLIENT else answer

    tiny.run(made, out, engine=Meddling(meddle))
    return out


def test_a_bad_row_costs_its_sender_alone_and_the_report_reads_the_rest(tmp_path: Path) -> None:
    """Row 17: the run ends well and its report stands, as the issue's reply is refused at the door."""

    def bare(job: Job, answer: Reply) -> Reply:
        return with_rows(answer, [{"client": CLIENT}]) if job.phase == "personalise" else answer

    out = meddled(tmp_path / "r", bare)
    assert {r["client"] for r in tiny.rows(out, "metrics") if r["arm"] == "ticket"} == {0, 1, 3}
    failed = [f for r in tiny.rows(out, "rounds") for f in r["failed"] if f["client"] == CLIENT]
    assert failed[0]["kind"] == "refused" and failed[0]["reason"].startswith("metrics: unseen is required")
    assert reported(out)


def test_a_visit_of_a_round_brings_no_rows(tmp_path: Path) -> None:
    """Row 17's brother: rows that came with an update went into metrics.jsonl as they were."""

    def early(job: Job, answer: Reply) -> Reply:
        if job.phase != "federate":
            return answer
        told = metrics.decode(answer.outbox[1].payload) | {"rows": [{"client": CLIENT, "arm": "ticket"}]}
        return replace(answer, outbox=(answer.outbox[0], replace(answer.outbox[1], payload=metrics.encode(told))))

    out = meddled(tmp_path / "r", early)
    reasons = [f["reason"] for r in tiny.rows(out, "rounds") for f in r["failed"]]
    assert reasons and all("a method's own metric must be a finite number" in reason for reason in reasons)
    assert all("test_accuracy" in row for row in tiny.rows(out, "metrics"))


def test_who_speaks_for_another_client_is_recorded_under_its_own_name(tmp_path: Path) -> None:
    """Row 17's brother: the ledger's and the times' rows of such a reply stood under the other client's name."""

    def other(job: Job, answer: Reply) -> Reply:
        if job.phase != "federate":
            return answer
        return replace(answer, client=10**30, outbox=(Message("control", RESYNC, bytes(8)),))

    out = meddled(tmp_path / "r", other)
    assert {r["client"] for r in tiny.rows(out, "times") if r["phase"] == "federate"} <= {0, 1, 2, 3, None}
    assert not any("000" in r["sender"] for r in tiny.rows(out, "ledger"))
    assert any("answered for client 2" in f["reason"] for r in tiny.rows(out, "rounds") for f in r["failed"])


def test_a_resync_that_nothing_can_have_made_needful_is_refused(tmp_path: Path) -> None:
    """Row 17's brother: a first visit holds nothing that its client could have lost."""

    def asks(job: Job, answer: Reply) -> Reply:
        if job.phase != "federate":
            return answer
        return replace(answer, outbox=(Message("control", RESYNC, bytes(8)),))

    out = meddled(tmp_path / "r", asks)
    assert not [r for r in tiny.rows(out, "ledger") if r["kind"] == "resync"]
    reasons = [f["reason"] for r in tiny.rows(out, "rounds") for f in r["failed"]]
    assert reasons == ["a 'control' message 'resync' was not asked for"]
