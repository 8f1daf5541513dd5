"""BERT-Tickets with tiny random transformers: its arms, and the transfer matrix with a masked-language-model ticket."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlth import api, cli
from fedlth.errors import StudyError
from fedlth.experiment.experiment import Experiment
from fedlth.experiment.other_ticket import other_ticket
from fedlth.experiment.resolve import resolve
from fedlth.federation.transfer import ticket_name
from fedlth.output import lines_to
from fedlth.report.transfer import grid_of, notes
from fedlth.storage.header import read_header
from fedlth.storage.transfer_cells import DENSE, THETA_0, path_of
from tests import tiny
from tests.text import sentences
from tests.text.test_text_studies import MASKED, task_of

pytest.importorskip("transformers")
BERT_TICKETS: dict[str, Any] = {
    "finder": {"schedule": "linear", "scope": "global", "rewind": "init", "densities": [0.8, 0.7]},
    "personalise": {
        "steps": 2, "epochs": None, "lr": 1e-5, "arms": ["ticket", "dense", "init_mask", "shuffled_values", "random"],
    },
}  # fmt: skip


def pretrained(tmp_path: Path) -> dict[str, Any]:
    """Return a model section with the weights of a tiny encoder that lies in a folder."""
    task_of(sentences.study(tmp_path / "data")).model.module().save_pretrained(tmp_path / "weights")
    return {"path": str(tmp_path / "weights")}


def test_the_study_and_its_matrix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """K x (K + 2): two tasks, MLM, theta_0's own mask; the encoder is one, the heads are each client's own."""
    weights = pretrained(tmp_path)
    made = sentences.study(
        tmp_path / "data", model={"name": "hf", "options": weights, "personal": ["head.*"]},
        tasks={"books": {"num_classes": 3}, "films": {}}, federate={"rounds": 0, "clients_per_round": 2},
        workers=1, **BERT_TICKETS,
    )  # fmt: skip
    tiny.run(made, tmp_path / "run")
    union = {
        **MASKED, "options": None, "model": {"name": "hf", "options": {**MASKED["options"], **weights}},
        "clients": {"count": 1, "unseen": 0.0}, "partition": "iid", "method": {"name": "standalone"},
        "personalise": {**BERT_TICKETS["personalise"], "arms": ["ticket"]}, "finder": BERT_TICKETS["finder"],
    }  # fmt: skip
    lines: list[str] = []
    tiny.run(sentences.study(tmp_path / "data", **union), tmp_path / "mlm")
    with lines_to(lines.append):
        assert cli.main(["transfer", str(tmp_path / "run"), "--mask", f"MLM={tmp_path / 'mlm'}"]) == 0
    assert not [line for line in lines if line.startswith("note: mask")], "the encoder is the very same"
    told = json.loads((tmp_path / "run" / "transfer" / "transfer.json").read_text())
    names = [row["mask"] for row in told["rows"]]
    assert names == [DENSE, ticket_name(0), ticket_name(1), "MLM", THETA_0]
    assert [t["name"] for t in told["targets"]] == ["client 0 (books)", "client 1 (films)"]
    for row in told["rows"][1:]:
        assert all(cell["density"] == pytest.approx(0.7, abs=1e-3) for cell in row["cells"])
    mlm = next(row for row in told["rows"] if row["mask"] == "MLM")
    assert 0.9 < mlm["mean_jaccard"] < 1, "such a rate hardly moves a weight: nothing can be said of universality"
    assert "All masks agree" in capsys.readouterr().out
    for metric in tiny.rows(tmp_path / "run", "metrics"):
        if metric["target_density"] == 0.7 and metric["arm"] in ("ticket", "init_mask"):
            name = ticket_name(metric["client"]) if metric["arm"] == "ticket" else THETA_0
            cell = next(r for r in told["rows"] if r["mask"] == name)["cells"][metric["client"]]
            assert cell["test"] == metric["test_accuracy"]


def test_the_row_of_masked_words(tmp_path: Path) -> None:
    """configs/bert_mlm.yaml in small: every client's ticket is the largest weights of the global encoder it trained."""
    arms = {"personalise": {"arms": ["ticket"]}, "finder": {"densities": [0.5], "main": 0.5}}
    tiny.run(sentences.bert_tickets(tmp_path, **arms), tmp_path / "run")
    mlm = tiny.run(sentences.bert_mlm(tmp_path), tmp_path / "mlm")
    experiment = Experiment.of(mlm.study())
    layout, finder = experiment.task.exchange, experiment.finder
    full = np.ones(layout.num_prunable, bool)
    at_0, at_g = (
        finder.pick(np.abs(params.floats[: full.size]), full, layout, 0.5)
        for params in (experiment.initial(), mlm.load_state(mlm.progress().theta).theta)
    )
    assert not np.array_equal(at_0, at_g)
    for client in range(5):
        assert np.array_equal(other_ticket(mlm.root, client, 0).mask("MLM", layout), at_g)
    curve = tiny.rows(mlm.root, "curve")
    assert {row["round"] for row in curve} == {1, 2} and all(np.isfinite(row["val_loss"]) for row in curve)
    lines: list[str] = []
    with lines_to(lines.append):
        (cells,) = api.transfer(tmp_path / "run", {"MLM": f"{mlm.root}:0"}, clients=[0, 3], workers=1)
    assert not [line for line in lines if line.startswith("note: mask")], "the encoder is the very same"
    mine = [cell for cell in cells if cell.mask == "MLM"]
    assert [cell.target for cell in mine] == [0, 3] and all(cell.density == pytest.approx(0.5) for cell in mine)
    grid = grid_of([read_header(tmp_path / "run")], [cells])
    counts = [np.bincount(labels_of(tmp_path / "run", client)) for client in (0, 3)]
    assert grid.majority == pytest.approx([count.max() / count.sum() for count in counts])
    assert f"every time reaches {100 * grid.majority[0]:.1f} % (client 0), " in "\n".join(notes(grid))


def labels_of(run: Path, client: int) -> np.ndarray:
    return tiny.task_of(run).part(client, "test").y.numpy()


def test_workers_and_a_second_call_change_nothing(tmp_path: Path) -> None:
    sections = {**BERT_TICKETS, "personalise": {**BERT_TICKETS["personalise"], "arms": ["ticket"]}}
    made = sentences.study(tmp_path / "data", workers=1, **sections)
    for name in ("one", "two"):
        tiny.run(made, tmp_path / name)
    first = api.transfer(tmp_path / "one", {}, workers=1)
    assert first == api.transfer(tmp_path / "two", {}, workers=2) == api.transfer(tmp_path / "two", {})
    assert path_of(tmp_path / "one").read_bytes() == path_of(tmp_path / "two").read_bytes()


def test_a_pretrained_encoder_has_no_reinit_but_by_its_options(tmp_path: Path) -> None:
    options = pretrained(tmp_path)
    arms = {"personalise": {"steps": 2, "epochs": None, "arms": ["ticket", "reinit"]}, "finder": {"densities": [0.5]}}
    with pytest.raises(StudyError, match="personalise.arms: model hf brings its own weights"):
        resolve(sentences.study(tmp_path / "data", model={"name": "hf", "options": options}, **arms))
    drawn = {"name": "hf", "options": options, "reinit_options": {"init": "random"}}
    run = tiny.run(sentences.study(tmp_path / "data", model=drawn, **arms), tmp_path / "r")
    rows = [r for r in tiny.rows(run.root, "metrics") if r["arm"] == "reinit"]
    tickets = {r["client"]: r["ticket"] for r in tiny.rows(run.root, "metrics") if r["arm"] == "ticket"}
    assert {r["client"]: r["ticket"] for r in rows} == tickets and all(r["start"] == "reinit" for r in rows)
    assert all(np.isfinite(r["test_loss"]) for r in rows)
