"""An independent counter at the transport: the ledger's sum is what crossed it, to the byte, for every method."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedlth import cli
from fedlth.federation.jobs import Failure, Job, Message, Reply
from tests import tiny

REFINED = ("two_step", "lotteryfl", "sub_fedavg", "fedselect")
CASES = [*((name, False) for name in tiny.KINDS), *((name, True) for name in REFINED)]


class Counting(tiny.Lists):
    """The in-process engine with a meter on both directions; it knows nothing of ledgers.

    `lose` gives no answer of a client in a phase, `damage` breaks what a client sends.
    """

    def __init__(self, *, lose: tuple[str, int] = ("", -1), damage: tuple[str, int] = ("", -1)) -> None:
        self.lose, self.damage = lose, damage
        self.down: dict[int, int] = {}
        self.up: dict[int, int] = {}
        self.messages = 0

    def _meter(self, totals: dict[int, int], client: int, box: Sequence[Message]) -> None:
        totals[client] = totals.get(client, 0) + sum(len(message.payload) for message in box)
        self.messages += len(box)

    def run(self, jobs: list[Job]) -> list[Reply | Failure]:
        answers: list[Reply | Failure] = []
        for job in jobs:
            self._meter(self.down, job.client, job.inbox)
            if (job.phase, job.client) == self.lose:
                answers.append(Failure(round=job.round, client=job.client, kind="died", reason="gone"))
                continue
            (answer,) = super().run([job])
            assert isinstance(answer, Reply), answer
            if (job.phase, job.client) == self.damage:
                first, *rest = answer.outbox
                answer = replace(answer, outbox=(replace(first, payload=first.payload[:-5]), *rest))
            self._meter(self.up, job.client, answer.outbox)
            answers.append(answer)
        return answers


def told(out: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.main(["bytes", str(out), "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def check(meter: Counting, out: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    rows = [row for row in tiny.rows(out, "ledger") if row["kind"] != "none"]  # a row for an answer that never came
    assert sum(row["payload_bytes"] for row in rows) == sum(meter.up.values()) + sum(meter.down.values())
    assert len(rows) == meter.messages
    found = told(out, capsys)
    assert found["unicast"]["up_bytes"] == sum(meter.up.values())
    assert found["unicast"]["down_bytes"] == sum(meter.down.values())
    by_client = {int(client): (one["up_bytes"], one["down_bytes"]) for client, one in found["by_client"].items()}
    assert by_client == {client: (meter.up.get(client, 0), size) for client, size in meter.down.items()}
    return found


@pytest.mark.parametrize(("name", "refine"), CASES, ids=lambda v: v if isinstance(v, str) else ("refine" if v else ""))
def test_the_ledger_is_what_crossed(
    name: str, refine: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more: dict[str, Any] = {}
    if refine:
        arms = ["global", "dense", "ticket"]
        more = {"refine": {"rounds": 2, "clients_per_round": 3}, "personalise": {"arms": arms}}
    meter = Counting()
    tiny.run(tiny.of_method(name, **more), tmp_path / "r", engine=meter)
    found = check(meter, tmp_path / "r", capsys)
    assert found["refused_or_failed"]["messages"] == 0
    assert ("refine" in found["by_phase"]) == refine
    counted = [one["name"] for one in found["presets"] if one["total_bytes"] is not None]
    assert bool(counted) == (name not in ("local", "standalone"))
    assert ("fedpm" in counted) == (name == "fedpm" or refine) and ("lotteryfl" in counted) == (
        name not in ("fedpm", "local", "standalone")
    )


def test_what_was_lost_or_refused_was_sent_all_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = tiny.of_method("lotteryfl", federate={"rounds": 3, "clients_per_round": 3})
    clients = tiny.open_task(made.science()).splits.unseen
    seen = [client for client in range(4) if client not in clients]
    meter = Counting(lose=("federate", seen[0]), damage=("federate", seen[1]))
    tiny.run(made, tmp_path / "r", engine=meter)
    found = check(meter, tmp_path / "r", capsys)
    assert found["refused_or_failed"]["up_bytes"] > 0
    assert {r["status"].split(":")[0] for r in tiny.rows(tmp_path / "r", "ledger")} == {"ok", "failed", "refused"}
