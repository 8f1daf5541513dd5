"""What a user's own method brings: its phases count where the header says, its arms stand under their own names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_run import write_rows, write_run

from fedlth.report import compare, read_results, summary_text
from fedlth.report.canvas import drawn, drawn_png
from fedlth.report.facts import read_run
from fedlth.report.figures import pictures
from fedlth.report.headline import against, done
from fedlth.report.known_arms import ARMS, arm_of
from fedlth.report.presets import PRESETS
from fedlth.report.tables import bytes_table, summary_table
from fedlth.report.traffic import traffic
from fedlth.storage.header import Header, Phase
from fedlth.storage.json_lines import lines
from fedlth.storage.records import RoundRow, parse

NEW = [("saliency", 1, 1, True), ("federate", 2, 1, True), ("personalise", 1, 2, False)]
PHASES = [{"name": name, "rounds": rounds, "step": step, "joins": joins} for name, rounds, step, joins in NEW]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", num_clients=8, rounds=3)


def change(run: Path, name: str, add: Any) -> None:
    rows = [json.loads(line) for line in (run / name).read_text().splitlines()]
    write_rows(run / name, [row for old in rows for row in add(old)])


def test_a_phase_before_the_training_is_part_of_step_1(run: Path) -> None:
    def counted() -> tuple[object, ...]:
        facts, results = read_run(run), read_results(run)
        found = traffic(facts)
        return found.dense_ups, found.dense_downs, found.once, [preset(facts) for preset in PRESETS], done(results)

    before = counted()
    assert "in 3 federated rounds" in str(before[-1])
    for name in ("ledger.jsonl", "rounds.jsonl"):
        change(run, name, lambda row: [row | {"phase": "saliency"} if row["round"] == 0 else row])
    assert counted() != before, "without a word of it, a phase is not known to join anything"
    header = json.loads((run / "header.json").read_text())
    (run / "header.json").write_text(json.dumps(header | {"phases": PHASES}))
    assert counted() == before
    assert [row[0] for row in bytes_table(read_results(run)).rows if row[0].startswith("phase")] == [
        "phase: saliency", "phase: federate", "phase: personalise"
    ]  # fmt: skip
    first, *others = pictures(read_results(run))[:3]
    assert drawn(first).png == drawn_png(first) and all(drawn(picture).png for picture in others)


def test_an_own_arm_stands_in_tables_figures_and_comparisons(run: Path) -> None:
    def mine(row: dict[str, Any]) -> list[dict[str, Any]]:
        own = {"arm": "my_arm", "density": 0.3, "target_density": 0.3, "test_accuracy": 1.0}
        return [row, row | own] if row["arm"] == "dense" else [row]

    change(run, "metrics.jsonl", mine)
    results = read_results(run)
    assert summary_table(results).rows[-1][:3] == ("my arm", "0.3", "100.0")
    assert "my arm" in [row[0] for row in against(results).rows] and "my arm" in summary_text(results)
    assert compare([run, run], arm="my_arm").table().rows[0][1] == "my arm"
    change(run, "metrics.jsonl", lambda row: [] if row["arm"] in ("ticket", "one_shot") else [row])
    assert compare([run, run]).reference.choice.arm == "my_arm", "it speaks for its method before the dense models do"
    looks = {(arm_of(name).style.light, arm_of(name).style.marker) for name in ("my_arm", *(arm.name for arm in ARMS))}
    assert arm_of("my_arm").style == arm_of("my_arm").style and len(looks) == 1 + len({arm.style for arm in ARMS})


def test_a_row_is_written_as_it_is_read() -> None:
    """An optional field stands in the file only where it says something."""
    row = RoundRow(round=1, phase="federate", clients=[1], up_bytes=2, down_bytes=3)
    written = json.loads(lines([row]))
    assert "rolled_back_to" not in written and written["val_accuracy"] is None
    assert parse(RoundRow, written, place="here") == row
    header = {
        "study": "s", "method": "m", "seed": 0, "engine": "e", "partition_digest": "", "data_digest": "",
        "num_clients": 1, "num_classes": 2, "dense_payload_bytes": 3, "finished": True,
    }  # fmt: skip
    found = parse(Header, header, place="here")
    assert (found.joining(), found.joining(2)) == ({"federate", "refine"}, {"refine"})
    named = parse(Header, header | {"phases": PHASES}, place="here")
    assert named.phases[0] == Phase(name="saliency", rounds=1, step=1, joins=True)
    assert named.joining(1) == {"saliency", "federate"} and json.loads(lines([named]))["phases"] == PHASES
