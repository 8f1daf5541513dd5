"""Classes without a training example: sound data, told in a note, and nothing divides by their count."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlth.experiment.resolve import resolve
from fedlth.report import read_results, summary_text, write_report
from tests import tiny

AT = np.array([0, 2, 3, 6])  # of eight classes


def holes() -> dict[str, Any]:
    made = tiny.images()
    return {**made, "y_train": AT[made["y_train"]], "y_test": AT[made["y_test"]], "num_classes": 8}


@pytest.mark.parametrize(
    ("method", "sections"),
    [
        ("two_step", {"clients": {"newcomer": "label_histogram"}}),
        ("lotteryfl", {"partition": {"name": "classes", "classes_per_client": 2}}),
        ("heterofl", {"partition": {"name": "dirichlet", "alpha": 0.5, "min_samples": 4}}),
    ],
)
def test_a_class_without_examples_is_a_note(tmp_path: Path, method: str, sections: dict[str, Any]) -> None:
    metrics = {"metrics": ["balanced_accuracy", "macro_f1", "perplexity"]}
    made = tiny.of_method(method, data={"name": "tests.test_absent_class:holes"}, **metrics, **sections)
    assert "data: classes 1, 4, 5, 7 have no training example" in resolve(made)[1]
    with np.errstate(all="raise"):
        out = tiny.run(made, tmp_path / "r").root
    assert not [failed for row in tiny.rows(out, "rounds") for failed in row["failed"]]
    rows = tiny.rows(out, "metrics")
    values = [row["test_loss"] for row in rows] + [value for row in rows for value in row["test_metrics"].values()]
    assert values and all(math.isfinite(value) for value in values)
    assert summary_text(read_results(out)) and write_report(out).exists()
