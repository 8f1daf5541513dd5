"""Runs of several seeds, learning rates chosen on validation data, and the Python API that README shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlth import api, config, tune
from fedlth.engines import choose
from fedlth.errors import StudyError
from tests import tiny


def study(out: Path, **sections: Any) -> config.Study:
    return tiny.study(**sections, out=str(out))


def test_seeds_go_on_where_a_stop_left_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop in the second seed loses neither the first nor the third, which had not begun."""
    api.run(study(tmp_path / "whole", seeds=[0, 1, 2]))
    began: list[int] = []

    def stopped(one: config.Study, out: Path, tell: api.Tell, *, again: bool) -> None:
        began.append(one.seed)
        if one.seed == 1:
            raise KeyboardInterrupt
        choose.drive(one, out, tell, again=again)

    monkeypatch.setattr(api, "drive", stopped)
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        api.run(study(tmp_path / "cut", seeds=[0, 1, 2]), tell=said.append)
    assert began == [0, 1] and said[-1] == f"stopped; to go on: fedlth resume {tmp_path / 'cut'}"
    monkeypatch.undo()
    api.resume(tmp_path / "cut")
    for seed in (0, 1, 2):
        assert tiny.facts(tmp_path / "cut" / f"seed-{seed}") == tiny.facts(tmp_path / "whole" / f"seed-{seed}")


def test_a_folder_is_never_run_over(tmp_path: Path) -> None:
    api.run(study(tmp_path / "a", seeds=[0]))
    for sections in ({"seeds": [0]}, {}):
        with pytest.raises(StudyError, match="holds a run already"):
            api.run(study(tmp_path / "a", **sections))


def test_validation_chooses_the_learning_rate(tmp_path: Path) -> None:
    out = api.run(study(tmp_path / "t", tune={"lr": [1e-6, 0.2], "rounds": 1}))
    chosen = json.loads((out / "tune" / "chosen.json").read_bytes())
    assert chosen["lr"] == 0.2 and config.load(out / "config.yaml").train.lr == 0.2
    trial = [json.loads(line) for line in (out / "tune" / "lr-0.2" / "metrics.jsonl").read_bytes().splitlines()]
    kept = [row["val_accuracy"] for row in trial if row["arm"] == "ticket"]
    assert chosen["val_accuracy"]["0.2"] == pytest.approx(sum(kept) / len(kept))
    assert len((out / "tune" / "lr-0.2" / "rounds.jsonl").read_bytes().splitlines()) < len(
        (out / "rounds.jsonl").read_bytes().splitlines()
    )


def test_tuning_goes_on_after_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"tune": {"lr": [0.05, 0.2], "rounds": 1}}
    api.run(study(tmp_path / "whole", **asked))

    def stopped(one: config.Study, out: Path, tell: api.Tell, *, again: bool) -> None:
        if one.train.lr == 0.2:
            raise KeyboardInterrupt
        choose.drive(one, out, tell, again=again)

    monkeypatch.setattr(tune, "drive", stopped)
    with pytest.raises(KeyboardInterrupt):
        api.run(study(tmp_path / "cut", **asked))
    monkeypatch.undo()
    api.resume(tmp_path / "cut")
    assert tiny.facts(tmp_path / "cut") == tiny.facts(tmp_path / "whole")


def test_readme_predicts_with_a_ticket_in_three_lines(tmp_path: Path) -> None:
    run = api.run(study(tmp_path / "r"))
    model = api.load_ticket(run, client=1)
    logits = model(torch.zeros(2, 1, tiny.SIDE, tiny.SIDE))
    assert logits.shape == (2, tiny.NUM_CLASSES)
    with pytest.raises(StudyError, match="no ticket of client 99"):
        api.load_ticket(run, client=99)
