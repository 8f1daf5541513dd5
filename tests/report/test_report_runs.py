"""Runs against runs: `diff` sees every fact and nothing else; `compare` pairs, or refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_run import write_run
from safetensors.numpy import load_file, save_file

from fedlth import cli
from fedlth.errors import StudyError
from fedlth.report import compare, diff
from fedlth.report.diff import notes


@pytest.fixture
def pair(fake: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Return two copies: what a test changes must not reach the tests after it."""
    runs = tmp_path / "run", tmp_path / "copy"
    for run in runs:
        shutil.copytree(fake, run)
    return runs


def change(run: Path, name: str, line: int, edit: Callable[[dict[str, Any]], None]) -> None:
    lines = (run / name).read_text().splitlines()
    row = json.loads(lines[line])
    edit(row)
    lines[line] = json.dumps(row)
    (run / name).write_text("\n".join(lines) + "\n")


def test_a_copy_is_equal(pair: tuple[Path, Path]) -> None:
    assert diff(*pair) == []


def test_what_stands_apart_may_differ(pair: tuple[Path, Path]) -> None:
    change(pair[1], "header.json", 0, lambda row: row.update(engine="ray", versions={}, commit=None))
    change(pair[1], "ledger.jsonl", 7, lambda row: row.update(framed_bytes=None))
    (pair[1] / "times.jsonl").write_text("")
    assert diff(*pair) == []


@pytest.mark.parametrize(
    ("name", "line"), [("header.json", 0), ("ledger.jsonl", 11), ("rounds.jsonl", 3), ("metrics.jsonl", 40),
                       ("digests.json", 0)],
)  # fmt: skip
def test_any_changed_value_is_found_and_named(pair: tuple[Path, Path], name: str, line: int) -> None:
    apart = {"engine", "versions", "commit", "framed_bytes"}
    keys = json.loads((pair[0] / name).read_text().splitlines()[line]).keys() - apart
    original = (pair[1] / name).read_text()
    for key in sorted(keys):
        change(pair[1], name, line, lambda row, key=key: row.update({key: "changed"}))  # type: ignore[misc]
        found = diff(*pair)
        assert len(found) == 1 and found[0].startswith(name) and key in found[0]
        (pair[1] / name).write_text(original)


def test_the_last_bit_counts(pair: tuple[Path, Path]) -> None:
    def nudge(row: dict[str, Any]) -> None:
        row["test_accuracy"] = float(np.nextafter(row["test_accuracy"], 2))

    change(pair[1], "metrics.jsonl", 5, nudge)
    assert len(diff(*pair)) == 1


def test_a_missing_row_and_a_missing_file_are_found(pair: tuple[Path, Path]) -> None:
    lines = (pair[1] / "ledger.jsonl").read_text().splitlines()
    (pair[1] / "ledger.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    (pair[1] / "digests.json").unlink()
    (pair[1] / "tickets" / "client-0000.safetensors").unlink()
    found = diff(*pair)
    assert [line.split(":")[0] for line in found] == [
        "digests.json", "ledger.jsonl", "tickets/client-0000.safetensors"
    ]  # fmt: skip


def left_on_devices(run: Path, clients: tuple[int, ...], engine: str) -> None:
    change(run, "header.json", 0, lambda row: row.update(engine=engine))
    change(run, "digests.json", 0, lambda row: [row["tickets"].pop(str(c)) for c in clients])
    for client in clients:
        (run / "tickets" / f"client-{client:04d}.safetensors").unlink()


def test_tickets_that_stay_on_devices_do_not_differ(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Row 28: a run over SuperNodes has no tickets of its devices; what both have is compared, and it says so."""
    left_on_devices(pair[1], (2, 4), "flower")
    for runs in (pair, pair[::-1]):
        assert diff(*runs) == []
        assert notes(*runs) == [f"{pair[1]}: 2 tickets stay on their devices; compared were their masks' names"]
    assert cli.main(["diff", *map(str, pair)]) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("note: ")
    change(pair[1], "metrics.jsonl", 3, lambda row: row.update(ticket="another mask"))
    assert len(diff(*pair)) == 1
    (pair[1] / "tickets" / "client-0003.safetensors").unlink()
    assert any("client-0003" in line for line in diff(*pair)), "its digest is there, so its file is missing"


def test_a_ticket_that_no_device_holds_is_missing(pair: tuple[Path, Path]) -> None:
    """Row 28: where the driver keeps all states, a ticket on one side only is a difference as ever."""
    left_on_devices(pair[1], (2,), "inprocess")
    assert len(diff(*pair)) == 2 and notes(*pair) == []


def test_a_study_that_keeps_no_ticket_files_is_compared_by_digests(pair: tuple[Path, Path]) -> None:
    """Row 28: `tickets: none` is a form of storage."""
    for path in (pair[1] / "tickets").iterdir():
        path.unlink()
    assert len(diff(*pair)) == 4
    (pair[1] / "config.yaml").write_text("study: fake\ntickets: none\n")
    assert diff(*pair) == [] and "tickets: none" in notes(*pair)[0]


@pytest.mark.parametrize("own", [False, True])
def test_other_data_are_found_where_targets_have_no_classes(pair: tuple[Path, Path], own: bool) -> None:
    """A server that has no labels since the targets are real numbers has data all the same, and names them."""
    change(pair[0], "header.json", 0, lambda row: row.update(engine="flower", client_labels=[[], []] if own else [[1]]))
    change(pair[1], "header.json", 0, lambda row: row.update(client_labels=[[1]]))
    if not own:
        for run in pair:
            change(run, "header.json", 0, lambda row: row.update(client_labels=[[], []]))
    change(pair[1], "header.json", 0, lambda row: row.update(data_digest="other"))
    (pair[0] / "config.yaml").write_text(f"study: fake\ndata: {{name: 'ward:read'{', own: {}' if own else ''}}}\n")
    if own:
        assert diff(*pair) == [] and "not which" in notes(*pair)[0]
    else:
        assert len(diff(*pair)) == 1 and "data_digest" in diff(*pair)[0] and notes(*pair) == []


def test_one_flipped_bit_of_a_mask_is_found(pair: tuple[Path, Path]) -> None:
    path = pair[1] / "tickets" / "client-0004.safetensors"
    tensors = load_file(path)
    tensors["fc1.weight_mask"][9] ^= 1
    save_file(tensors, path)
    found = diff(*pair)
    assert any("client-0004" in line and "fc1.weight_mask" in line for line in found)


def test_only_the_first_few_are_told(fake: Path, tmp_path: Path) -> None:
    found = diff(fake, write_run(tmp_path / "other", seed=5))
    assert len(found) < 25 and any("more" in line for line in found)


def test_groups_are_compared_seed_by_seed(seeds: Path, tmp_path: Path) -> None:
    shutil.copytree(seeds, tmp_path / "copy")
    assert diff(seeds, tmp_path / "copy") == []
    change(tmp_path / "copy" / "seed-1", "metrics.jsonl", 0, lambda row: row.update(epochs=99))
    assert diff(seeds, tmp_path / "copy")[0].startswith("seed-1/metrics.jsonl:1: epochs")


def lifted(run: Path, gain: float) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    told = [row | {"test_accuracy": row["test_accuracy"] + gain * (1 + row["client"] / 10)} for row in rows]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))


def test_a_lift_is_found_and_tested(pair: tuple[Path, Path]) -> None:
    lifted(pair[0], -0.01)  # nobody is above 1
    one = compare(pair).contrasts[0]
    assert one.difference.mean == pytest.approx(0.01 * (1 + 9.5 / 10))
    assert one.difference.interval.excludes(0) and one.effect == 1 and one.p_holm < 0.001
    assert (one.better, one.worse, one.pairs) == (20, 0, 20)


def test_equal_runs_do_not_differ(pair: tuple[Path, Path]) -> None:
    one = compare([*pair, pair[1]], arm="one_shot", density=0.1).contrasts[1]
    assert (one.difference.mean, one.p_holm, one.effect) == (0, 1, 0)


def test_the_same_client_over_seeds_is_one_unit(seeds: Path, tmp_path: Path) -> None:
    shutil.copytree(seeds, tmp_path / "copy")
    for run in (tmp_path / "copy").glob("seed-*"):
        lifted(run, -0.01)
    comparison = compare([seeds, tmp_path / "copy"])
    assert (comparison.contrasts[0].pairs, comparison.contrasts[0].units) == (30, 10)
    assert "reference" in comparison.text() and len(comparison.table().rows) == 2


@pytest.mark.parametrize(
    ("values", "told"), [({"partition_digest": "ff"}, "partition_digest"), ({"data_digest": "ff"}, "data_digest"),
                         ({"seed": 4}, "seeds")],
)  # fmt: skip
def test_runs_that_do_not_pair_are_refused(pair: tuple[Path, Path], values: dict[str, Any], told: str) -> None:
    change(pair[1], "header.json", 0, lambda row: row.update(values))
    with pytest.raises(StudyError, match=told):
        compare(pair)


def test_another_set_of_clients_is_refused(pair: tuple[Path, Path]) -> None:
    lines = (pair[1] / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["client"] != 7]
    (pair[1] / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    with pytest.raises(StudyError, match=r"got a difference in \[7\]"):
        compare(pair)


def test_one_run_is_not_a_comparison(fake: Path) -> None:
    with pytest.raises(StudyError, match="expected two runs or more, got 1"):
        compare([fake])
