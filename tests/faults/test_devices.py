"""Devices that are late, repeat themselves, are wiped or have another version: each costs at most itself."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedlth.engines.flower_client import Place, answer_roll_call, roll_call, serve
from fedlth.engines.flower_engine import Back, Sent
from fedlth.engines.flower_record import SPEAKS, Order, Records, of_answer, of_order, to_answer
from fedlth.engines.flower_versions import VERSIONS, asked, here
from fedlth.errors import StudyError
from fedlth.federation.jobs import Failure, Job
from fedlth.output import lines_to
from tests import tiny
from tests.engines.test_flower_engine import NODES, Loopback, echo, engine_over

ROUNDS: dict[str, Any] = {"federate": {"rounds": 4, "clients_per_round": 3}}


def victim(made: Any) -> int:
    return min(set(range(4)) - set(tiny.open_task(made.science()).splits.unseen))


class Repeating(Loopback):
    """A transport that brings every message twice, and in later rounds also what came first."""

    first: Back | None = None

    def collect(self, ids: Iterable[str]) -> list[Back]:
        found = super().collect(ids)
        self.first = self.first or next(iter(found), None)
        return [one for one in found for _ in range(2)] + ([self.first] if self.first else [])


def test_a_message_that_comes_twice_counts_once(tmp_path: Path) -> None:
    made = tiny.of_method("fedavg", **ROUNDS)
    tiny.run(made, tmp_path / "once")
    out = tmp_path / "twice"
    tiny.run(made, out, engine=engine_over(Repeating(out, NODES), made))
    assert tiny.digests(out) == tiny.digests(tmp_path / "once")
    assert not any(row["failed"] for row in tiny.rows(out, "rounds"))
    names = ("sender", "receiver", "payload_bytes", "status", "round", "name")
    rows = [[{n: row[n] for n in names} for row in tiny.rows(tmp_path / run, "ledger")] for run in ("once", "twice")]
    assert rows[0] == rows[1], "and its bytes once"


def test_an_answer_replayed_under_another_rounds_message_is_refused(tmp_path: Path) -> None:
    class Replaying(Loopback):
        old: Back | None = None

        def send(self, records: Records, *, node: int, kind: str) -> Sent:
            sent = super().send(records, node=node, kind=kind)
            if kind == "train" and self.partitions[node] == bad:
                if self.old is not None:
                    self._backs[0] = (2, replace(self.old, id=sent.id))
                else:
                    self.old = self._backs[0][1]
            return sent

    made = tiny.of_method("fedavg", **ROUNDS)
    bad, out = victim(made), tmp_path / "r"
    tiny.run(made, out, engine=engine_over(Replaying(out, NODES), made))
    failed = [f for r in tiny.rows(out, "rounds") for f in r["failed"]]
    assert failed and {f["client"] for f in failed} == {bad}
    rounds = [f for r in tiny.rows(out, "rounds") for f in r["failed"] if r["phase"] == "federate"]
    assert rounds and all("answers another job than round" in f["reason"] for f in rounds)
    # A wave of the same number is told by what it asks for.
    assert {f["kind"] for f in failed if f not in rounds} <= {"refused"}


def test_an_order_that_comes_twice_is_answered_alike(tmp_path: Path) -> None:
    place = Place.of({"partition-id": 2, "state-dir": str(tmp_path)}, "")
    made = tiny.of_method("fedavg")
    order = of_order(Order(Job(study=made.science(), phase="federate", round=1, client=2, inbox=()), "0" * 16, 60.0))
    answers = [serve(order, place) for _ in range(2)]
    (one, other) = ({k: v for k, v in a["head"].items() if k != "b"} for a in answers)
    assert one and one == other


@pytest.mark.parametrize("method", ["lotteryfl", "fedper", pytest.param("fedselect", marks=pytest.mark.long)])
def test_a_device_that_is_wiped_gets_what_it_needs_again(tmp_path: Path, method: str) -> None:
    """Its mask comes back from the server's copy; what was its alone, and nobody else has, begins anew.

    Of FedPer a head was: its download refers to nothing, and yet the device must not go on as if nothing were lost.
    """

    class Wiped(Loopback):
        def send(self, records: Records, *, node: int, kind: str) -> Sent:
            if kind == "train" and self.partitions[node] == bad and json.loads(records["head"]["b"])["round"] == 3:
                shutil.rmtree(self.out / "devices" / f"{bad:06d}", ignore_errors=True)
            return super().send(records, node=node, kind=kind)

    made = tiny.of_method(method, **ROUNDS)
    bad, out = victim(made), tmp_path / "wiped"
    tiny.run(made, out, engine=engine_over(Wiped(out, NODES), made))
    assert not any(row["failed"] for row in tiny.rows(out, "rounds"))
    rows = tiny.rows(out, "ledger")
    again, asked = ([r for r in rows if r["kind"] == kind] for kind in ("resync", "control"))
    assert {r["receiver"] for r in again} == {f"client:{bad}"}, "and the ledger says so"
    assert {(r["sender"], r["round"], r["payload_bytes"]) for r in asked} == {(f"client:{bad}", 3, 8)}
    downs = [r for r in rows if (r["phase"], r["round"], r["receiver"]) == ("federate", 3, f"client:{bad}")]
    assert len(downs) == 2, "what was sent in vain has crossed too"
    assert bad in {row["client"] for row in tiny.rows(out, "metrics")}
    if method == "lotteryfl":  # which keeps nothing but its mask
        tiny.run(made, tmp_path / "whole")
        assert tiny.digests(out) == tiny.digests(tmp_path / "whole")


def other(records: Records, version: str | None) -> Records:
    """Return a message as another version of this package would send it."""
    head = json.loads(str(records["head"]["b"]))
    del head["v"]
    if version is not None:
        head["v"] = version
    return {**records, "head": {**records["head"], "b": json.dumps(head)}}


JOB = Job(study="{}", phase="federate", round=3, client=2, inbox=())


@pytest.mark.parametrize(("version", "said"), [("9.1.0/7", "9.1.0/7"), (None, "an earlier one")])
def test_other_versions_are_refused_at_both_ends_and_both_are_named(
    tmp_path: Path, version: str | None, said: str
) -> None:
    told = f"this end has fedlth {SPEAKS} (its version, the wire format's), the other end {said}"
    with pytest.raises(ValueError, match=re.escape(told)):
        to_answer(other(of_answer(echo(JOB)), version), JOB)
    place = Place.of({"partition-id": 2, "state-dir": str(tmp_path)}, "")
    answer = to_answer(serve(other(of_order(Order(JOB, "0" * 16, 60.0)), version), place, step=echo), JOB)
    assert isinstance(answer, Failure) and answer.reason == told
    assert not list(tmp_path.iterdir()), "nothing was done for it"


def test_a_run_with_one_device_of_another_version_says_so_and_goes_on(tmp_path: Path) -> None:
    class Old(Loopback):
        def send(self, records: Records, *, node: int, kind: str) -> Sent:
            sent = super().send(records, node=node, kind=kind)
            if kind == "train" and self.partitions[node] == bad:
                late, back = self._backs[0]
                assert back.records is not None
                self._backs[0] = late, replace(back, records=other(dict(back.records), "0.0.9/1"))  # type: ignore[arg-type]
            return sent

    made = tiny.of_method("fedavg", **ROUNDS)
    bad, out = victim(made), tmp_path / "r"
    tiny.run(made, out, engine=engine_over(Old(out, NODES), made))
    failed = [f for r in tiny.rows(out, "rounds") for f in r["failed"]]
    assert failed and {f["client"] for f in failed} == {bad}
    assert all(SPEAKS in f["reason"] and "0.0.9/1" in f["reason"] for f in failed)


@pytest.mark.parametrize(
    ("name", "version"), [("fedlth", "0.0.9/2"), ("fedlth", "0.1.0/1"), ("flwr", "1.20.0"), ("", "")]
)
def test_another_version_is_told_at_the_roll_call(tmp_path: Path, name: str, version: str) -> None:
    """It was told by the first order: the device had been drawn, sent a model, and lost its round."""

    class Old(Loopback):
        def send(self, records: Records, *, node: int, kind: str) -> Sent:
            sent = super().send(records, node=node, kind=kind)
            assert kind == "query" or self.partitions[node] != 2, "it is never asked to train"
            if kind == "query" and self.partitions[node] == 2:
                theirs = json.loads(str(records[VERSIONS]["b"])) | {name: version}
                question = {**records, VERSIONS: {"b": json.dumps(theirs)}} if name else {"head": records["head"]}
                self._backs[0] = 2, Back(sent.id, records=answer_roll_call(question, {"partition-id": 2}))
            return sent

    made = tiny.study(federate={"quorum": 3}, engine="flower")
    told: list[str] = []
    with lines_to(told.append):
        engine = engine_over(Old(tmp_path, NODES), made)
        engine.ready()
    assert engine.present() == {0, 1, 3}
    said = f"{name or 'fedlth'} {here()[name or 'fedlth']} (the server: {version or 'an earlier one'})"
    assert any(f"partition-id 2: has {said}" in line for line in told), told


def test_a_version_that_may_change_bits_is_said_and_costs_nothing(tmp_path: Path) -> None:
    class Newer(Loopback):
        def send(self, records: Records, *, node: int, kind: str) -> Sent:
            sent = super().send(records, node=node, kind=kind)
            if kind == "query" and self.partitions[node] == 2:
                theirs = json.loads(str(records[VERSIONS]["b"])) | {"torch": "2.99.0"}
                question = {**records, VERSIONS: {"b": json.dumps(theirs)}}
                self._backs[0] = 2, Back(sent.id, records=answer_roll_call(question, {"partition-id": 2}))
            return sent

    told: list[str] = []
    with lines_to(told.append):
        engine = engine_over(Newer(tmp_path, NODES), tiny.study())
        engine.ready()
    assert engine.present() == {0, 1, 2, 3}
    says = f"note: the device of client 2 has torch {here()['torch']} (the server: 2.99.0): equal bits are not promised"
    assert told.count(says) == 1, told
    assert "remark" not in answer_roll_call({"head": {"b": ""}, VERSIONS: asked()}, {"partition-id": 2})


@pytest.mark.parametrize("odd", [{}, {"b": 3}, {"b": "["}, {"b": "[" * 100_000}, {"b": "3"}, {"b": "{}"}])
def test_an_odd_question_is_one_of_another_version(odd: dict[str, Any]) -> None:
    said = roll_call({"head": {"b": ""}, VERSIONS: odd}, {"partition-id": 1})
    assert str(said).startswith("partition-id 1: has fedlth ") and len(str(said)) < 300


def test_where_all_are_of_another_version_the_run_ends_and_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class AllOld(Loopback):
        def send(self, records: Records, *, node: int, kind: str) -> Sent:
            return super().send(other(records, "0.0.9/1") if kind == "train" else records, node=node, kind=kind)

    made = tiny.of_method("fedavg", federate={"rounds": 3})
    with pytest.raises(StudyError, match="3 rounds without one usable reply; last: this end has .*0.0.9/1"):
        tiny.run(made, tmp_path / "r", engine=engine_over(AllOld(tmp_path / "r", NODES), made))
