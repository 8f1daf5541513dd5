"""Runs with a published protocol's settings: own tests, no validation, wrong labels, shares of clients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedlth import api
from fedlth.data.divided import opened
from fedlth.engines.inprocess import InProcess
from fedlth.errors import StudyError
from fedlth.experiment.resolve import read
from fedlth.federation import session
from fedlth.forecast import forecast
from fedlth.report.build import read_results, write_report
from fedlth.report.headline import done
from fedlth.storage.header import read_header
from fedlth.training.task import forget_tasks
from tests import tiny

PROTOCOL: dict[str, Any] = {
    "method": "fedavg_ft",
    "data": {"pool": True},
    "clients": {"test": "own", "validation": 0, "label_noise": {"rate": 0.5, "share": 0.5, "kind": "pair"}},
    "federate": {"clients_per_round": 1.0},
}


def test_a_run_without_validation_records_none_and_reports(tmp_path: Path) -> None:
    folder = tiny.run(tiny.study(**PROTOCOL), tmp_path / "run")
    header, rows = read_header(folder.root), tiny.rows(folder.root, "metrics")
    assert header.test == "own" and len(header.noisy) == 2 and "the next class" in header.label_noise
    assert all(row["val_accuracy"] is None and row["val_loss"] is None and row["num_val"] == 0 for row in rows)
    assert all(row["val_accuracy"] is None for row in tiny.rows(folder.root, "rounds"))
    assert all(len(row["clients"]) == 3 for row in tiny.rows(folder.root, "rounds") if row["phase"] == "federate")
    sizes = {c: len(split.test) for c, split in enumerate(tiny.task_of(folder.root).splits.clients)}
    assert all(row["num_test"] == sizes[row["client"]] for row in rows)
    page = write_report(folder.root).read_text()
    assert "wrong labels" in page and "own examples" in page
    assert "Of 2 clients, some training and validation labels are wrong: 0.5" in done(read_results(folder.root))


def test_stopped_and_resumed_and_on_forked_workers_it_is_the_same(tmp_path: Path) -> None:
    study = tiny.study(**PROTOCOL, workers=1)
    whole = tiny.run(study, tmp_path / "whole")
    folder = tiny.RunFolder(tmp_path / "stopped")
    folder.create(read(study)[0].study)
    tiny.opened(folder).run(stop_after=1)
    forget_tasks()
    opened.cache_clear()
    session.resume(folder.root, InProcess())
    assert tiny.facts(whole.root) == tiny.facts(folder.root)
    forked = api.run(study.model_copy(update={"workers": 2, "out": str(tmp_path / "forked")}))
    assert tiny.facts(whole.root) == tiny.facts(forked)


def test_tests_are_read_where_the_split_says() -> None:
    task = tiny.task(**PROTOCOL)
    own = task.splits.clients[1]
    assert task.part(1, "test").y.tolist() == task.dataset.y_train[own.test].tolist()
    assert len(task.part(1, "val")) == 0
    clean = tiny.task(**{**PROTOCOL, "clients": {"test": "own", "validation": 0}})
    assert task.part(1, "test").y.tolist() == clean.part(1, "test").y.tolist()
    assert task.splits.digest != clean.splits.digest


@pytest.mark.parametrize(
    ("sections", "who"),
    [
        ({"tune": {"lr": [0.1, 0.2]}}, "tune.lr"),
        ({"personalise": {"arms": ["random"]}}, "the arm random"),
        ({"finder": {"gate": "val_accuracy"}, "personalise": {"arms": ["ticket"]}}, "finder.gate"),
        ({"finder": {"gate": "adaptive"}, "personalise": {"arms": ["ticket_0"]}}, "finder.gate"),
        ({"finder": {"stop": "val_drop"}, "personalise": {"arms": ["ticket"]}}, "finder.stop"),
        ({"method": "lotteryfl"}, "method lotteryfl"),
        ({"method": "sub_fedavg"}, "method sub_fedavg"),
    ],
)
def test_no_validation_is_refused_where_something_decides_on_it(sections: dict[str, Any], who: str) -> None:
    study = tiny.study(**{"method": "fedavg_ft", "clients": {"validation": 0}, **sections})
    with pytest.raises(StudyError, match=f"clients.validation: must be above 0, {who} decides on validation data"):
        read(study)


@pytest.mark.usefixtures("unpainted")  # test_a_run_without_validation_records_none_and_reports paints
@pytest.mark.parametrize("name", ["fedavg", "fedselect", "fedpm", "local"])
def test_methods_that_decide_nothing_on_validation_run_without(tmp_path: Path, name: str) -> None:
    folder = tiny.run(tiny.of_method(name, clients={"validation": 0}), tmp_path / "run")
    assert all(row["val_accuracy"] is None for row in tiny.rows(folder.root, "metrics"))
    write_report(folder.root)


def test_the_forecast_knows_own_tests_and_shares() -> None:
    text = forecast(tiny.study(**PROTOCOL))
    assert "own test examples" in text and "partition " in text
    three, share = (
        forecast(tiny.study(**{**PROTOCOL, "federate": {"clients_per_round": n}, "refine": {"rounds": 0}}))
        for n in (3, 1.0)
    )
    assert next(line for line in three.splitlines() if "up" in line) == next(
        line for line in share.splitlines() if "up" in line
    )
