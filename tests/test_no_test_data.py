"""No decision looks at test data: other test labels change test accuracy and loss, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedlth.data.examples import Examples
from fedlth.study.schema import Study
from fedlth.training import task as world_module
from tests import tiny

TEST_COLUMNS = {"test_accuracy", "test_loss"}


@contextmanager
def permuted_test_labels() -> Iterator[None]:
    """Shift every test label that is handed out, after the partition has drawn the clients' test parts."""
    honest = world_module.inputs

    def lying(dataset: Any, indices: Any, train: bool) -> Examples:
        part = honest(dataset, indices, train)
        return part if train else replace(part, y=(part.y + 1) % dataset.num_classes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world_module, "inputs", lying)
        yield


@pytest.mark.parametrize("name", tiny.KINDS)
def test_permuting_test_labels_changes_nothing_but_the_test_columns(tmp_path: Path, name: str) -> None:
    more: dict[str, Any] = {}
    if name == "two_step":
        arms = ["global", "local", "dense", "dense_total", "ticket", "ticket_0", "one_shot", "global_mask", "random"]
        more = {"personalise": {"arms": arms}, "refine": {"rounds": 1, "clients_per_round": 2}}
    unaltered(tiny.of_method(name, train={"epochs": 2}, **more), tmp_path)


@pytest.mark.parametrize("main", ["auto", "capacity"])
def test_no_client_chooses_its_density_by_test_data(tmp_path: Path, main: str) -> None:
    capacity = [{"clients": [0], "density": 0.3}]
    made = tiny.study(
        finder={"main": main, "densities": [0.5, 0.3, 0.1]}, refine={"rounds": 1, "clients_per_round": 2},
        clients={"capacity": capacity}, federate={"rounds": 4},
    )  # fmt: skip
    unaltered(made, tmp_path)
    assert sum(r.get("chosen", False) for r in tiny.rows(tmp_path / "honest", "metrics")) == 2 * 4


def unaltered(made: Study, tmp_path: Path) -> None:
    """Run a study with honest and with permuted test labels; only the test columns may differ."""
    # Real gates, so that there is something to decide.
    gates = {k: 0.3 for k in ("val_accuracy",) if k in made.method}
    made = made.model_copy(update={"method": {**made.method, **gates}})
    tiny.run(made, tmp_path / "honest")
    with permuted_test_labels():
        tiny.run(made, tmp_path / "permuted")
    honest, permuted = (tiny.facts(tmp_path / n) for n in ("honest", "permuted"))
    assert honest.pop("metrics.jsonl") != permuted.pop("metrics.jsonl"), "test accuracy does change"
    assert honest == permuted, "ledger (with every byte count), rounds, digests and tickets do not"
    strip = [
        [{k: v for k, v in row.items() if k not in TEST_COLUMNS} for row in tiny.rows(tmp_path / n, "metrics")]
        for n in ("honest", "permuted")
    ]
    assert strip[0] == strip[1]
