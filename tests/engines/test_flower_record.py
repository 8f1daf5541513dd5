"""Jobs and answers survive the crossing, and nothing else gets through."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fedlth.engines.flower_record import Order, of_answer, of_order, to_answer, to_order
from fedlth.jobs import Failure, Job, Message, Reply

JOB = Job(
    study='{"a": 1}', phase="federate", round=3, client=2, version="federate-2",
    inbox=(Message("values", "theta_g", b"\x00\xff", True), Message("mask", "", b"")),
)  # fmt: skip
REPLY = Reply(round=3, client=2, outbox=(Message("values", "update", b"up"),), seconds=1.5, worker="w", device="cpu")


def test_an_order_comes_back_equal() -> None:
    order = Order(JOB, "0" * 16, 60.0)
    assert to_order(of_order(order)) == order


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
        {"head": of_answer(REPLY)["head"]},
        {**of_answer(REPLY), "p0": {"b": "text"}},
        _head(client=1),
        _head(round=2),
        _head(client=True),
        _head(seconds="long"),
        _head(kind="odd"),
        _head(messages=[["values", "update"]]),
        _head(messages=[["values", 1, False]]),
        _head(messages=7),
    ],
)
def test_what_is_not_an_answer_is_refused(records: dict[str, dict[str, Any]]) -> None:
    with pytest.raises(ValueError):
        to_answer(records, JOB)
