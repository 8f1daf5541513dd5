"""Jobs and answers survive the crossing, and nothing else gets through."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from fedlth.engines import flower_record
from fedlth.engines.flower_record import Order, of_answer, of_order, to_answer, to_order
from fedlth.federation.jobs import Failure, Job, Message, Reply

JOB = Job(
    study='{"a": 1}', phase="federate", round=3, client=2, version="federate-2",
    inbox=(Message("values", "theta_g", b"\x00\xff", True), Message("mask", "", b"")),
)  # fmt: skip
REPLY = Reply(round=3, client=2, outbox=(Message("values", "update", b"up"),), seconds=1.5, worker="w", device="cpu")


def test_an_order_comes_back_equal() -> None:
    order = Order(JOB, "0" * 16, 60.0, "wards")
    assert to_order(of_order(order)) == order


def test_a_name_that_no_file_can_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="surrogates not allowed"):
        to_order(of_order(Order(JOB, "0" * 16, 60.0, "\ud800")))


def test_a_payload_lies_where_it_costs_least(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client's own in the head, a broadcast apart, what is longer than a piece, but not as long, in pieces."""
    monkeypatch.setattr(flower_record, "PIECE_BYTES", 4)
    inbox = (
        Message("values", "own", b"1234"), Message("values", "all", b"1234", True),
        Message("values", "own", b"12345"), Message("values", "all", b"987654321", True), Message("values", "", b""),
        Message("values", "own", b"1"),
    )  # fmt: skip
    order = Order(replace(JOB, inbox=inbox), "0" * 16, 60.0)
    records = of_order(order)
    assert {k: v for k, v in records["head"].items() if k != "b"} == {"0": b"1234", "4": b""}
    assert {name: record["b"] for name, record in records.items() if name != "head"} == {
        "p1.0": b"1234", "p2.0": b"1234", "p2.1": b"5", "p3.0": b"9876", "p3.1": b"5432", "p3.2": b"1", "p5.0": b"1",
    }  # fmt: skip
    assert to_order(records) == order
    for missing in ("p2.0", "p3.1"):
        with pytest.raises(ValueError, match="not a fedlth message"):
            to_order({name: record for name, record in records.items() if name != missing})


def test_state_never_crosses() -> None:
    with_state = Job(study="", phase="federate", round=1, client=0, inbox=(), state=b"secret")
    assert to_order(of_order(Order(with_state, "", 1.0))).job.state is None
    answered = Reply(round=3, client=2, outbox=(), state=b"secret")
    assert b"secret" not in repr(of_answer(answered)).encode()


@pytest.mark.parametrize("answer", [REPLY, Failure(round=3, client=2, kind="memory", reason="no room", worker="w")])
def test_an_answer_comes_back_equal(answer: Reply | Failure) -> None:
    assert to_answer(of_answer(answer), JOB) == answer


def _head(**changes: Any) -> dict[str, dict[str, Any]]:
    records = of_answer(REPLY)
    head = json.loads(str(records["head"]["b"]))
    return {**records, "head": {"b": json.dumps({**head, **changes})}}


@pytest.mark.parametrize(
    "records",
    [
        {},
        {"head": {"b": b"bytes"}},
        {"head": {"b": "not json"}},
        {"head": {"b": "[]"}},
        {"head": {"b": "{}"}},
        {"head": {"b": of_answer(REPLY)["head"]["b"]}},
        {"head": {**of_answer(REPLY)["head"], "0": "text"}},
        {"head": {**of_answer(REPLY)["head"], "1": b"more"}},
        {**of_answer(REPLY), "p0.0": {"b": b"up"}},  # twice
        {**of_answer(REPLY), "p0.1": {"b": b"up"}},
        {**of_answer(REPLY), "p1.0": {"b": b"more"}},
        {**of_answer(REPLY), "p0": {"b": b"more"}},
        {**of_answer(REPLY), "x": {}},
        {"head": {"b": "[" * 100_000}},
        {"head": {"b": " " * (1 << 20) + str(of_answer(REPLY)["head"]["b"]), "0": b"up"}},
        _head(client=1),
        _head(round=2),
        _head(client=True),
        _head(seconds="long"),
        _head(seconds=float("nan")),
        _head(seconds=10**400),
        _head(kind="odd"),
        _head(messages=[["values", "update"]]),
        _head(messages=[["values", 1, False]]),
        _head(messages=[["values", "x" * 101, False]]),
        _head(messages=[["values", "a\x1b[2J", False]]),
        _head(messages=17 * [["values", "update", False]]),
        _head(messages=7),
    ],
)
def test_what_is_not_an_answer_is_refused(records: dict[str, dict[str, Any]]) -> None:
    with pytest.raises(ValueError):
        to_answer(records, JOB)


def test_what_a_client_says_of_itself_cannot_leave_its_line() -> None:
    hostile = "a\nb\x1b[2Jc\ud800" + 1000 * "x"
    failed = to_answer(of_answer(Failure(round=3, client=2, kind="raised", reason=hostile, worker=hostile)), JOB)
    assert isinstance(failed, Failure)
    assert failed.reason.startswith("a b?[2Jc?x") and (len(failed.reason), len(failed.worker)) == (300, 100)
    answered = to_answer(of_answer(replace(REPLY, device=hostile)), JOB)
    assert isinstance(answered, Reply) and answered.device.isprintable()
