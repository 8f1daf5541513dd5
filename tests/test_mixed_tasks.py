"""Tasks whose targets differ in kind: classes for the clients of one key, real numbers for those of another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedlth.api import load_ticket
from fedlth.errors import StudyError
from fedlth.experiment.resolve import resolve
from fedlth.forecast import forecast
from fedlth.report import read_results, summary_text, write_report
from fedlth.study import schema
from tests import tiny

STUDY_DATA: dict[str, Any] = {"name": "tests.test_mixed_tasks:both"}
TASKS: dict[str, Any] = {"kinds": {"targets": "classes", "num_classes": 3}, "sizes": {"metric": "mae"}}


def both(*, whole: bool = False) -> dict[str, Any]:
    """Return points of two keys: `kinds` with one of three classes, `sizes` with a number; `whole`: int64 for both."""
    rng = np.random.default_rng(1)

    def part(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        x, keys = rng.normal(size=(size, 4)), np.array(["kinds", "sizes"])[np.arange(size) % 2]
        y = np.where(keys == "kinds", x[:, :3].argmax(1), 2 * x[:, 0] - x[:, 3])
        return x, (np.abs(y).round().astype(np.int64) % 3 if whole else y), keys

    fields = ("x", "y", "key")
    made = {f"{f}_{n}": a for n, s in (("train", 400), ("test", 120)) for f, a in zip(fields, part(s), strict=True)}
    return {**made, **({"num_classes": 3} if whole else {})}


class Shared(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(4, 16), nn.Linear(16, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.encoder(x)))


def study(**sections: Any) -> schema.Study:
    base: dict[str, Any] = {
        "data": {"name": "tests.test_mixed_tasks:both"},
        "model": {"name": "tests.test_mixed_tasks:Shared", "personal": ["head.*"]},
        "partition": {"name": "natural", "clients_per_key": 2},
        "clients": {"count": 4, "test_samples": 40},
        "train": {"epochs": 4, "batch_size": 16, "lr": 0.02, "optimizer": "adam"},
        "federate": {"rounds": 3, "clients_per_round": 4},
        "finder": {"densities": [0.5]},
        "tasks": TASKS,
    }
    return schema.build({**base, **sections})


def test_a_task_has_the_kind_of_targets_that_it_says() -> None:
    task = tiny.experiment(study()).task
    assert [task.of(c).dataset.targets for c in range(4)] == ["classes", "classes", "numbers", "numbers"]
    assert [task.of(c).dataset.num_classes for c in range(4)] == [3, 3, 1, 1]
    assert [task.of(c).part(c, "test").y.dtype for c in (0, 2)] == [torch.int64, torch.float32]
    for name in ("train", "val", "test"):
        part = task.of(1).part(1, name)
        assert torch.equal(part.y, part.x[:, :3].argmax(1))
    assert task.of(0).judged.main.name == "accuracy" and task.of(2).judged.main.name == "mae"


def test_whole_numbers_may_be_a_score() -> None:
    data = {"name": "tests.test_mixed_tasks:both", "options": {"whole": True}}
    task = tiny.experiment(study(data=data, tasks={"sizes": {"targets": "numbers"}})).task
    assert [task.of(c).dataset.targets for c in range(4)] == ["classes", "classes", "numbers", "numbers"]
    assert task.of(3).dataset.num_classes == 1 and task.of(3).judged.main.name == "mse"


def test_a_run_learns_both_and_reports_each(tmp_path: Path) -> None:
    run = tmp_path / "run"
    tiny.run(study(), run)
    results = read_results(run)
    rows = [row for row in results.group[0].metrics if row.arm == "dense"]
    assert all(row.test_accuracy > 0.6 for row in rows if row.client < 2 and row.test_accuracy is not None)
    assert all(row.value("test", "mae") < 1 for row in rows if row.client > 1)
    text = summary_text(results)
    assert "kinds" in text and "(mae)" in text and "overlap" in text
    page = write_report(run).read_text()
    assert "kinds (2 clients, 3 outputs), sizes (2 clients, 1 output)" in page and "about 0 training" not in page
    assert load_ticket(run, client=0)(torch.zeros(1, 4)).shape == (1, 3)
    assert load_ticket(run, client=3)(torch.zeros(1, 4)).shape == (1, 1)


ALIKE = {"kinds": TASKS["kinds"], "sizes": {"targets": "classes"}}


@pytest.mark.parametrize("tasks", [TASKS, ALIKE], ids=["two losses", "one loss"])
def test_a_tracker_has_no_mean_of_different_losses(tmp_path: Path, tasks: dict[str, Any]) -> None:
    data = {"name": "tests.test_mixed_tasks:both", "options": {"whole": True}} if tasks is ALIKE else STUDY_DATA
    tracker = {"name": "tests.test_trackers:Notes", "file": str(tmp_path / "notes")}
    more = {"federate": {"rounds": 1, "clients_per_round": 4}, "evaluate": {"every": 1}, "train": {"epochs": 1}}
    tiny.run(study(data=data, tasks=tasks, trackers=[tracker], **more), tmp_path / "run")
    lines = map(json.loads, (tmp_path / "notes").read_text().splitlines())
    names = {name for line in lines for name in line.get("scalars", ())}
    assert any(name.startswith("federate/") for name in names)
    assert any("loss" in name for name in names) == (tasks is ALIKE)


@pytest.mark.parametrize("pool", [False, True])
def test_tests_of_the_clients_own_go_with_tasks(pool: bool) -> None:
    data = {"name": "tests.test_mixed_tasks:both", "pool": pool}
    task = tiny.experiment(study(data=data, clients={"count": 4, "test": "own"})).task
    part = task.of(0).part(0, "test")
    assert task.names == ("kinds", "kinds", "sizes", "sizes") and torch.equal(part.y, part.x[:, :3].argmax(1))


def test_a_check_knows_the_metric_and_the_network_of_every_task() -> None:
    text = forecast(study(metric="accuracy", compute="auto"))
    assert "task sizes, 1 output, 2 clients" in text
    assert "the kernel cannot run this study: the targets are real numbers" in text


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({"sizes": {"targets": "classes"}}, "tasks.sizes.targets: classes must be whole numbers of at least 0, got "),
        ({"kinds": {"num_classes": 3}}, "tasks.kinds.num_classes: must be the number of outputs .* 1, got 3; targets"),
        ({"kinds": {"targets": "classes", "num_classes": 2}}, r"tasks.kinds.num_classes: .* \[0, 2\), got 2"),
        ({"sizes": {"metric": "accuracy"}}, "tasks.sizes: metric: must be one of .* real numbers, got 'accuracy'"),
    ],
)
def test_bad_input_names_its_place(tasks: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        resolve(study(tasks={**TASKS, **tasks}))
