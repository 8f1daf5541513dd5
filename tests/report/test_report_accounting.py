"""`fedlth bytes` and `fedlth tickets`: sums that fit the ledger, frames, and errors of one line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_run import LAYERS, message

from fedlth import cli
from fedlth.report.accounting import account, account_json, account_text
from fedlth.report.facts import read_run
from fedlth.report.traffic import Frames, frames, traffic
from fedlth.storage.records import LedgerRow


def ledger_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]


def test_every_cut_of_the_ledger_has_its_sum(fake: Path) -> None:
    total = sum(row["payload_bytes"] for row in ledger_of(fake))
    found = account_json(account(read_run(fake)))
    for cut in ("by_phase", "by_kind", "by_client"):
        assert sum(one["total_bytes"] for one in found[cut].values()) == total, cut
    assert found["unicast"]["total_bytes"] == total
    each = [one["total_bytes"] for one in found["by_client"].values()]
    assert found["clients"]["total_bytes"] == {"least": min(each), "mean": sum(each) / len(each), "most": max(each)}
    assert found["first_install"]["messages"] == len(each)
    assert found["dense_raw"]["total_bytes"] < found["dense_same_codec"]["total_bytes"]
    assert json.loads(json.dumps(found)) == found


def test_bytes_prints_the_truth_and_the_presets(fake: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bytes", str(fake)]) == 0
    text = capsys.readouterr().out
    total = sum(row["payload_bytes"] for row in ledger_of(fake))
    assert f"{total:,}" in text
    for word in (
        "unicast",
        "broadcast once",
        "refused",
        "same codec",
        "raw float32",
        "frames reported",
        "leaves out",
        "MiB",
    ):
        assert word in text
    assert cli.main(["bytes", str(fake), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["unicast"]["total_bytes"] == total


def test_bytes_of_seeds_is_one_account_each(seeds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bytes", str(seeds), "--json"]) == 0
    assert [json.loads(line)["seed"] for line in capsys.readouterr().out.splitlines()] == [0, 1, 10]


def test_an_empty_ledger_is_an_account_too(fake: Path) -> None:
    assert "all messages" in account_text(account(replace(read_run(fake), ledger=())))


def test_a_frame_holds_a_visits_messages_of_one_direction(fake: Path) -> None:
    def row(sender: str, receiver: str, kind: str, framed: int | None, size: int = 10) -> LedgerRow:
        return message(1, sender, receiver, size, kind=kind, framed_bytes=framed)

    rows = (
        row("server", "client:1", "values", 40), row("server", "client:1", "evaluation", None),
        row("client:1", "server", "values", 35), row("client:1", "server", "metrics", None),
    )  # fmt: skip
    assert frames(rows) == Frames(2, 2, 35, 40, 20, 20)
    lost = (*rows, row("server", "client:2", "values", None), row("client:2", "server", "none", None, 0))
    assert frames(lost) == Frames(2, 3, 35, 40, 20, 20)
    assert traffic(replace(read_run(fake), ledger=rows)).framed_bytes == 75
    assert traffic(replace(read_run(fake), ledger=lost)).framed_bytes is None


def test_dense_sends_nothing_back_after_refinement(fake: Path) -> None:
    phases = ("federate", "personalise", "refine", "refined")
    rows = tuple(message(1, "server", "client:1", 10, phase=phase) for phase in phases)
    found = traffic(replace(read_run(fake), ledger=rows))
    assert (found.dense_ups, found.dense_downs) == (2, 4)


def test_tickets_are_listed_shown_and_compared(fake: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: str) -> str:
        assert cli.main(["tickets", *words]) == 0
        return capsys.readouterr().out

    listed = said("ls", str(fake)).splitlines()
    assert len(listed) == 2 + 20 and "client-0019.safetensors" in listed[-1]
    assert len(said("ls", str(fake), "3", "1").splitlines()) == 2 + 2
    shown = said("show", str(fake), "3")
    for name, shape in LAYERS:
        assert name in shown and " x ".join(map(str, shape)) in shown
    assert "0000000000000004" in shown and "0.4500 " not in shown.splitlines()[0]
    assert "_mask" not in shown
    whole = said("overlap", str(fake))
    assert "20 tickets, 190 pairs" in whole and "Mantel" in whole and "chance" in whole
    few = said("overlap", str(fake), "0", "5", "7")
    assert "3 tickets, 3 pairs" in few and "cannot be tested" in few and "1.000" in few


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("show",), "expected a client"),
        (("show", "77"), "no ticket of client 77"),
        (("overlap", "3"), "at least two sparse tickets"),
    ],
)
def test_tickets_refuse_in_one_line(
    fake: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], wanted: str
) -> None:
    assert cli.main(["tickets", words[0], str(fake), *words[1:]]) == 2
    said = capsys.readouterr()
    assert wanted in said.err and said.err.count("\n") == 1 and not said.out


def test_a_run_without_tickets_says_so(fake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(fake, bare, ignore=shutil.ignore_patterns("tickets"))
    assert cli.main(["tickets", "ls", str(bare)]) == 2
    assert "got none (method " in capsys.readouterr().err
    assert cli.main(["bytes", str(bare)]) == 0
    header = json.loads((bare / "header.json").read_text())
    (bare / "header.json").write_text(json.dumps({**header, "engine": "flower"}))
    (bare / "flower-run").write_text("0f3a")
    for words in (["ls", str(bare)], ["show", str(bare), "3"], ["export", str(bare), "3", "--to", "compact"]):
        assert cli.main(["tickets", *words]) == 2
        assert "each device has its own, state/0f3a/client-NNNN.safetensors" in capsys.readouterr().err
    (bare / "devices").mkdir()
    assert cli.main(["tickets", "ls", str(bare)]) == 2
    assert "got none (method " in capsys.readouterr().err
