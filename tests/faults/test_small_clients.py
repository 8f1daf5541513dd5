"""Clients with next to nothing: no example, one, one class, a last batch of one; divisions that cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from torch import Tensor, nn

from fedlth import cli
from fedlth.errors import StudyError
from tests import tiny

SIZES = {0: 41, 1: 61, 2: 21, 3: 24}  # without what validates, all but the last have 16 n + 1 to train on
ONE_CLASS = 3


def data(*, sizes: dict[str, int]) -> dict[str, Any]:
    """Return images whose natural key is their client; client ONE_CLASS has a single class."""
    made = tiny.images(train=400, test=200)
    left = {part: list(range(len(made[f"y_{part}"]))) for part in ("train", "test")}
    found: dict[str, list[int]] = {"train": [], "test": []}
    keys: dict[str, list[int]] = {"train": [], "test": []}
    for client, size in ((int(c), n) for c, n in sizes.items()):
        for part, wanted in (("train", size), ("test", 8)):
            labels = made[f"y_{part}"]
            fit = [i for i in left[part] if client != ONE_CLASS or labels[i] == 0][:wanted]
            left[part] = [i for i in left[part] if i not in set(fit)]
            found[part] += fit
            keys[part] += [client] * len(fit)
    for part in found:
        made |= {f"{n}_{part}": made[f"{n}_{part}"][found[part]] for n in "xy"}
        made[f"key_{part}"] = np.array(keys[part])
    return made


class Flat(nn.Module):
    """A batch norm over the examples alone: of a single one torch trains none."""

    def __init__(self, num_classes: int, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.norm(self.first(x.flatten(1))).relu())
        return logits


def study(sizes: dict[int, int], **sections: Any) -> Any:
    named = {str(client): size for client, size in sizes.items()}
    base: dict[str, Any] = {
        "data": {"name": "tests.faults.test_small_clients:data", "options": {"sizes": named}},
        "partition": {"name": "natural"}, "clients": {"count": len(sizes), "unseen": 0.0, "test": "split"},
        "federate": {"rounds": 2, "clients_per_round": len(sizes)}, "method": "fedavg",
        "model": {"name": "tests.test_methods:normed", "options": {}}, "personalise": {"clients_per_wave": 4},
    }  # fmt: skip
    return tiny.study(**{**base, **sections})


def test_one_class_and_a_last_batch_of_one_train_like_any_other(tmp_path: Path) -> None:
    made = study(SIZES, model={"name": "tests.faults.test_small_clients:Flat", "options": {}})
    splits, size = tiny.open_task(made.science()).splits.clients, made.train.batch_size
    assert [len(split.train) % size for split in splits][:ONE_CLASS] == [1, 1, 1], "else nothing is injected"
    tiny.run(made, tmp_path / "r")
    assert not any(row["failed"] for row in tiny.rows(tmp_path / "r", "rounds"))
    assert {row["client"] for row in tiny.rows(tmp_path / "r", "metrics")} == set(SIZES)


def test_a_client_of_two_examples_trains_on_one(tmp_path: Path) -> None:
    """Its batch norm has the places of one image to look at; one over the examples alone would have a single number."""
    tiny.run(study({**SIZES, 2: 2}), tmp_path / "r")
    assert not any(row["failed"] for row in tiny.rows(tmp_path / "r", "rounds"))
    rows = {row["client"]: row for row in tiny.rows(tmp_path / "r", "metrics")}
    assert (rows[2]["num_train"], rows[2]["num_val"]) == (1, 1) and np.isfinite(rows[2]["test_loss"])


@pytest.mark.parametrize("size", [0, 1])
def test_who_has_no_example_to_train_on_is_left_out_by_a_stated_rule(tmp_path: Path, size: int) -> None:
    with pytest.raises(StudyError, match="min_samples 2 must have 4 keys of that size, got 3"):
        tiny.run(study({**SIZES, 2: size}), tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_a_division_that_cannot_be_ends_before_the_run_with_advice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "s.yaml"
    skew = {"name": "dirichlet", "alpha": 0.001, "min_samples": 55}
    file.write_text(yaml.safe_dump(tiny.tree(partition=skew)))
    assert cli.main(["run", str(file), f"out={tmp_path / 'r'}"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "partition" in said and "alpha" in said and not (tmp_path / "r").exists()
