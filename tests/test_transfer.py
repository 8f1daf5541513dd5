"""The transfer matrix: every cell is a training of step 2, and neither workers nor a kill change a number."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fedlth import api, cli
from fedlth.errors import StudyError
from fedlth.federation import transfer
from fedlth.output import lines_to
from fedlth.report.transfer import AGREE, grid_of, notes, write_transfer
from fedlth.storage.header import read_header
from fedlth.storage.run_folder import RunFolder
from fedlth.storage.transfer_cells import DENSE, THETA_0, Cell, path_of, recovered
from tests import tiny

ROOT = Path(__file__).parents[1]
ARMS = ["ticket", "dense", "init_mask"]
SECTIONS: dict[str, Any] = {
    "clients": {"count": 3, "unseen": 0.0, "test_samples": 40}, "partition": {"name": "dirichlet", "alpha": 0.3},
    "finder": {"rewind": "init", "densities": [0.3]}, "personalise": {"epochs": 1, "arms": ARMS}, "workers": 1,
}  # fmt: skip
ALONE: dict[str, Any] = {
    **SECTIONS, "clients": {"count": 1, "unseen": 0.0}, "federate": {"rounds": 1, "clients_per_round": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.run(tiny.study(**SECTIONS), tmp_path_factory.mktemp("transfer") / "run").root


def copied(run: Path, folder: Path) -> Path:
    """Return a copy of a run, in which nothing has been transferred yet."""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("transfer"))
    return folder


def by_place(cells: tuple[Cell, ...]) -> dict[tuple[str, int], Cell]:
    return {(cell.mask, cell.target): cell for cell in cells}


def test_cells_are_the_trainings_of_step_2(run: Path) -> None:
    """A ticket on its own data is the arm ticket, theta_0's own mask the arm init_mask: same bits, same batches."""
    (cells,) = api.transfer(run, {})
    found = by_place(cells)
    assert len(cells) == len(found) == 3 * (3 + 2)
    for row in tiny.rows(run, "metrics"):
        name = {"ticket": transfer.ticket_name(row["client"]), "init_mask": THETA_0}.get(row["arm"])
        if name:
            cell = found[name, row["client"]]
            told = (cell.ticket, cell.test_accuracy, cell.test_loss, cell.density, cell.start)
            assert told == tuple(row[k] for k in ("ticket", "test_accuracy", "test_loss", "density", "start"))
    assert all(found[transfer.ticket_name(c), c].jaccard == 1 for c in range(3))
    assert all(found[DENSE, c].density == 1 and found[DENSE, c].start == "theta_0" for c in range(3))
    away = found[transfer.ticket_name(0), 1]
    assert away.ticket == found[transfer.ticket_name(0), 0].ticket and 0 < away.jaccard < 1


@pytest.mark.parametrize("rewind", ["global", {"name": "global", "round": 1}, "reshuffle"])
def test_every_rewind_target_is_the_runs_own(rewind: Any, tmp_path: Path) -> None:
    """The global model, an earlier one that the run has kept, values that a rewind changes."""
    personalise = {"arms": ["ticket", "init_mask"], "epochs": 1}
    tiny.run(tiny.study(**{**SECTIONS, "finder": {"rewind": rewind}, "personalise": personalise}), tmp_path / "r")
    found = by_place(api.transfer(tmp_path / "r", {}, clients=[0, 2])[0])
    assert {target for _, target in found} == {0, 2} and len(found) == 2 * 4
    rows = [r for r in tiny.rows(tmp_path / "r", "metrics") if r["client"] != 1 and r["target_density"] == 0.2]
    for row in rows:
        name = transfer.ticket_name(row["client"]) if row["arm"] == "ticket" else THETA_0
        cell = found[name, row["client"]]
        assert (cell.ticket, cell.test_loss, cell.start) == (row["ticket"], row["test_loss"], row["start"])


def test_workers_change_nothing(run: Path, tmp_path: Path) -> None:
    one, two = copied(run, tmp_path / "one"), copied(run, tmp_path / "two")
    assert api.transfer(one, {}, workers=1) == api.transfer(two, {}, workers=2)
    assert path_of(one).read_bytes() == path_of(two).read_bytes()


def test_a_kill_and_the_same_command_again_change_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = copied(run, tmp_path / "whole"), copied(run, tmp_path / "cut")
    write_transfer(whole, api.transfer(whole, {}))
    original, come = transfer.append, list[Cell]()

    def dies(folder: Path, cell: Cell) -> None:
        if len(come) == 4:
            raise KeyboardInterrupt
        come.append(cell)
        original(folder, cell)

    with monkeypatch.context() as patch:
        patch.setattr(transfer, "append", dies)
        with pytest.raises(KeyboardInterrupt):
            api.transfer(cut, {})
    with path_of(cut).open("ab") as file:
        file.write(b'{"half": ')  # of a line, as kill -9 may leave it
    lines: list[str] = []
    with lines_to(lines.append):
        write_transfer(cut, api.transfer(cut, {}))
    assert "4 of 15 cells done" in lines[0] and lines[1].startswith("[5/15]") and lines[-1].startswith("[15/15]")
    assert path_of(whole).read_bytes() == path_of(cut).read_bytes()
    for name in ("json", "csv", "md", "png"):
        file = Path("transfer") / f"transfer.{name}"
        assert (whole / file).read_bytes() == (cut / file).read_bytes(), name


def test_a_cell_that_fails_costs_itself_and_is_tried_again(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedlth.personalization.transfer import Transferred

    original, folder = Transferred.__call__, copied(run, tmp_path / "r")

    def fails(self: Transferred, local: Any, inbox: Any, state: Any) -> Any:
        if local.client == 1:
            raise ValueError("no luck")
        return original(self, local, inbox, state)

    lines: list[str] = []
    with monkeypatch.context() as patch, lines_to(lines.append):
        patch.setattr(Transferred, "__call__", fails)
        found = api.transfer(folder, {})
    assert len(found[0]) == 10 and sum("client 1: failed: ValueError: no luck" in line for line in lines) == 5
    grid = grid_of([read_header(folder)], [*found, *api.transfer(copied(run, tmp_path / "w"), {})])
    assert any("5 of 30 cells are missing" in note for note in notes(grid))
    assert len(api.transfer(folder, {})[0]) == 15


def test_the_command_writes_what_it_says(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, other = copied(run, tmp_path / "run"), tmp_path / "other"
    tiny.run(tiny.study(**ALONE), other)
    words = ["transfer", str(folder), "--mask", f"all={other}", "--mask", f"first={run}:0", "--workers", "1"]
    assert cli.main(words) == 0
    out = capsys.readouterr()
    assert "all" in out.out and "standard error of one accuracy" in out.out
    assert "[18/18]" in out.err, "one mask under two names is trained once"
    told = json.loads((folder / "transfer" / "transfer.json").read_text())
    assert [row["mask"] for row in told["rows"]] == [
        DENSE, *map(transfer.ticket_name, range(3)), "all", "first", THETA_0
    ]  # fmt: skip
    first, named = (next(r for r in told["rows"] if r["mask"] == m) for m in (transfer.ticket_name(0), "first"))
    assert first["cells"] == named["cells"] and first["client"] == 0 and named["client"] is None
    with (folder / "transfer" / "transfer.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 21 and all(0 <= float(row["test"]) <= 1 for row in rows)
    own = {r["target"]: float(r["test"]) for r in rows if r["mask"] == transfer.ticket_name(int(r["target"]))}
    for row in rows:
        wanted = "" if row["mask"] == DENSE else str(int(float(row["test"]) >= own[row["target"]]))
        assert row["dark"] == wanted
    assert (folder / "transfer" / "transfer.png").read_bytes().startswith(b"\x89PNG")


def test_masks_of_other_weights_are_said_to_be_so(run: Path, tmp_path: Path) -> None:
    """theta_0 is drawn from the seed here, so another seed's ticket is one of another network."""
    tiny.run(tiny.study(**ALONE, seed=1), tmp_path / "other")
    lines: list[str] = []
    with lines_to(lines.append):
        api.transfer(copied(run, tmp_path / "r"), {"alien": str(tmp_path / "other")}, clients=[0])
    assert any("mask alien:" in line and "other values in 2 of 2 prunable tensors" in line for line in lines)


def test_seeds_are_averaged(run: Path, tmp_path: Path) -> None:
    made = tiny.study(**SECTIONS)
    for seed in (0, 1):
        tiny.run(made.model_copy(update={"seed": seed}), tmp_path / f"seed-{seed}")
    first, second = found = api.transfer(tmp_path, {})
    assert [c.mask for c in first] == [c.mask for c in second] and first == api.transfer(run, {})[0]
    write_transfer(tmp_path, found)
    told = json.loads((tmp_path / "transfer" / "transfer.json").read_text())
    cell = told["rows"][1]["cells"][2]
    values = [by_place(cells)[transfer.ticket_name(0), 2].test_accuracy for cells in found]
    assert told["seeds"] == [0, 1] and cell["by_seed"] == values and cell["test"] == pytest.approx(np.mean(values))
    own = [by_place(cells)[transfer.ticket_name(2), 2].test_accuracy for cells in found]
    assert cell["dark"] == (np.mean(values) >= np.mean(own))
    assert told["notes"][0].startswith("Means of 2 seeds. ")


def test_an_equal_mean_is_dark_whatever_its_last_bit(run: Path) -> None:
    """(.1 + .1 + .3) less (.1 + .2 + .2), seed by seed, is -9e-18 in floats."""
    (cells,) = api.transfer(run, {})
    own, other = (0.1, 0.2, 0.2), (0.1, 0.1, 0.3)
    seeds = [
        [_with(c, test_accuracy=own[seed] if c.source == c.target else other[seed]) for c in cells] for seed in range(3)
    ]
    grid = grid_of([read_header(run)], seeds)
    assert np.mean([a - b for a, b in zip(other, own, strict=True)]) < 0 and grid.dark.all()


def test_masks_that_agree_cannot_be_told_apart(run: Path) -> None:
    """Both ways: nearly equal masks are said to be no test of universality, others are not."""
    (cells,) = api.transfer(run, {})
    header = read_header(run)

    def told(jaccard: float) -> str:
        moved = [c if c.source == c.target else _with(c, jaccard=jaccard) for c in cells]
        return "\n".join(notes(grid_of([header], [moved])))

    claim = 'That "tickets of the pre-training task transfer universally, others in a limited fashion" is not testable'
    assert claim in told(AGREE + 0.05) and "All masks agree" in told(AGREE + 0.05)
    assert claim not in told(AGREE - 0.05)
    mixed = [_with(c, jaccard=0.95) if c.mask == THETA_0 else _with(c, jaccard=0.5) for c in cells]
    assert f"The masks {THETA_0} agree" in "\n".join(notes(grid_of([header], [mixed])))


def _with(cell: Cell, **values: Any) -> Cell:
    return Cell(**{**vars(cell), **values})


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"method": {"name": "fedavg"}, "personalise": {"epochs": 1}}, "must be a run with the arm ticket"),
        (
            {"finder": {"rewind": "init", "dead": "init"}, "tickets": "dense"},
            "must have tickets that train among zeros",
        ),
        ({"finder": {"rewind": "init", "densities": [1.0]}}, "expected sparse tickets"),
        (
            {"finder": {"rewind": "global"}, "refine": {"rounds": 1, "clients_per_round": 3}},
            "must rewind to weights that refine.rounds did not move",
        ),
        (
            {
                "finder": {"rewind": {"name": "global", "round": 1}},
                "refine": {"rounds": 1, "clients_per_round": 3},
                "model": {"personal": ["@head"]},
            },
            "must rewind to weights that refine.rounds did not move",
        ),
        (
            {"model": {"prunable": ["3.weight"], "personal": ["3.*"]}},
            "must have prunable tensors that all clients have in common, got none: model.personal",
        ),
    ],
)
def test_what_has_no_matrix_is_refused(sections: dict[str, Any], words: str, tmp_path: Path) -> None:
    tiny.run(tiny.study(**{**SECTIONS, **sections}), tmp_path / "r")
    with pytest.raises(StudyError, match=words):
        api.transfer(tmp_path / "r", {})


def test_mistakes_name_their_place(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StudyError, match=r"expected a ticket of client 9, there are those of 0, 1, 2"):
        api.transfer(run, {}, clients=[9])
    with pytest.raises(StudyError, match=r"tickets: expected one ticket, got 3; RUN:CLIENT names one"):
        api.transfer(run, {"MLM": str(run)})
    with pytest.raises(StudyError, match=r"tickets: expected a ticket of client 7, got none"):
        api.transfer(run, {"MLM": f"{run}:7"})
    with pytest.raises(StudyError, match=r"--mask: must be a name that no row has, got dense twin"):
        api.transfer(run, {DENSE: f"{run}:0"})
    with pytest.raises(StudyError, match="no run here"):
        api.transfer(tmp_path, {})
    other = {**SECTIONS, "model": {"name": "mlp", "options": {"hidden": [7]}}}
    tiny.run(tiny.study(**other), tmp_path / "other")
    with pytest.raises(StudyError, match=r"--mask MLM: .*must mask \S+weight, \d+ weights, got one of about"):
        api.transfer(run, {"MLM": f"{tmp_path / 'other'}:0"})
    assert cli.main(["transfer", str(run), "--mask", "MLM"]) == 2
    assert "--mask must be NAME=RUN or NAME=RUN:CLIENT, got 'MLM'" in capsys.readouterr().err
    unfinished = copied(run, tmp_path / "unfinished")
    told = json.loads((unfinished / "header.json").read_text())
    (unfinished / "header.json").write_text(json.dumps({**told, "finished": False}))
    with pytest.raises(StudyError, match="must have ended"):
        api.transfer(unfinished, {})


def test_a_metric_of_which_less_is_better_is_dark_the_other_way(tmp_path: Path) -> None:
    tiny.run(tiny.study(**{**SECTIONS, "metric": "loss"}), tmp_path / "r")
    found = api.transfer(tmp_path / "r", {})
    grid = grid_of([read_header(tmp_path / "r")], found)
    own = by_place(found[0])
    for i, name in grid.rows():
        for c, target in enumerate(grid.targets):
            wanted = own[name, target].test_loss <= own[transfer.ticket_name(target), target].test_loss
            assert grid.dark[i, c] == wanted
    assert "standard error" not in "".join(notes(grid))
    assert write_transfer(tmp_path / "r", found).exists()


def test_killed_by_a_signal_the_command_goes_on(run: Path, tmp_path: Path) -> None:
    """A process killed hard in the middle: two workers are its children, and end with it."""
    folder = copied(run, tmp_path / "r")
    code = (
        "import os, signal, sys\n"
        "from fedlth import api\n"
        "from fedlth.federation import transfer\n"
        "append, come = transfer.append, []\n"
        "def dies(*args):\n"
        "    append(*args)\n"
        "    come.append(1)\n"
        "    if len(come) == 3:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "transfer.append = dies\n"
        f"api.transfer({str(folder)!r}, {{}}, workers=2)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == -9
    assert len(recovered(folder)) == 3
    assert api.transfer(folder, {}) == api.transfer(run, {})


def test_private_tensors_are_the_targets_own(tmp_path: Path) -> None:
    """A head that stays with the client, and is prunable here, keeps the mask of the client's own ticket."""
    made = {**SECTIONS, "model": {"name": "mlp", "options": {"hidden": [12]}, "personal": ["@head"]}}
    tiny.run(tiny.study(**made), tmp_path / "r")
    found = by_place(api.transfer(tmp_path / "r", {})[0])
    task = tiny.task_of(tmp_path / "r")
    assert task.exchange.num_prunable < task.layout.num_prunable
    for row in (r for r in tiny.rows(tmp_path / "r", "metrics") if r["arm"] == "ticket"):
        assert found[transfer.ticket_name(row["client"]), row["client"]].ticket == row["ticket"]
    assert len({found[transfer.ticket_name(0), target].ticket for target in range(3)}) == 3
    assert yaml.safe_load((tmp_path / "r" / "config.yaml").read_text())["model"]["personal"] == ["@head"]
    assert RunFolder(tmp_path / "r").progress().versions.keys() == {"0", "1", "2"}


def test_a_refined_run_has_the_matrix_of_its_search(tmp_path: Path) -> None:
    """From theta_0 the rounds inside the tickets change nothing: the diagonal is the arm ticket, bit by bit."""
    made = {**SECTIONS, "refine": {"rounds": 1, "clients_per_round": 3}, "model": {"personal": ["@head"]}}
    tiny.run(tiny.study(**made), tmp_path / "r")
    found = by_place(api.transfer(tmp_path / "r", {})[0])
    for row in (r for r in tiny.rows(tmp_path / "r", "metrics") if r["arm"] == "ticket"):
        cell = found[transfer.ticket_name(row["client"]), row["client"]]
        assert (cell.ticket, cell.test_loss, cell.start) == (row["ticket"], row["test_loss"], row["start"])


def test_masks_over_frozen_weights_are_transferred(tmp_path: Path) -> None:
    """Nothing prunable is exchanged, yet all have the weights: masks differ, and the diagonal is the arm ticket."""
    frozen = {
        **SECTIONS, "method": {"name": "ticket_lora", "density": 0.4}, "model": tiny.SECTIONS["ticket_lora"]["model"],
        "finder": {"rewind": "init", "densities": [0.3], "score": "snip"},
    }  # fmt: skip
    tiny.run(tiny.study(**frozen), tmp_path / "r")
    task = tiny.task_of(tmp_path / "r")
    assert (task.exchange.num_prunable, task.layout.num_prunable) == (0, 64 * 12)
    own = api.transfer(tmp_path / "r", {"other": f"{tmp_path / 'r'}:1"})
    found = by_place(own[0])
    for row in (r for r in tiny.rows(tmp_path / "r", "metrics") if r["arm"] in ("ticket", "init_mask")):
        name = transfer.ticket_name(row["client"]) if row["arm"] == "ticket" else THETA_0
        cell = found[name, row["client"]]
        assert (cell.ticket, cell.test_loss) == (row["ticket"], row["test_loss"]) and 0.29 < cell.density < 0.31
    away = found[transfer.ticket_name(1), 0]
    assert away.ticket == found[transfer.ticket_name(1), 1].ticket == found["other", 0].ticket
    assert 0 < away.jaccard < 1 and found[DENSE, 0].density == 1
