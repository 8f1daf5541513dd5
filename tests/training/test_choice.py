"""What computes a study: `compute: auto`, what check says of it, and short studies equal in every backend."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

numba = pytest.importorskip("numba")
pytestmark = pytest.mark.timeout(600)  # the first use on a machine compiles

from fedlth.errors import StudyError  # noqa: E402
from fedlth.experiment.resolve import resolve  # noqa: E402
from fedlth.forecast import forecast  # noqa: E402
from fedlth.kernel import kernel  # noqa: E402
from fedlth.output import lines_to  # noqa: E402
from tests import tiny  # noqa: E402
from tests.tiny import Small  # noqa: E402


def batch_norm(num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    return Small(num_classes)


def group_norm(num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    layers = (
        nn.Conv2d(1, 4, 3),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(36, num_classes),
    )
    return nn.Sequential(*layers)


def study(model: str, compute: str, **more: Any) -> Any:
    return tiny.study(model={"name": f"tests.training.test_choice:{model}", "options": {}}, compute=compute, **more)


@pytest.mark.parametrize(
    ("model", "possible", "why"),
    [
        ("batch_norm", ("reference", "tuned", "sparse"), "BatchNorm2d"),
        ("group_norm", ("reference", "tuned", "sparse"), "CPU ms a step of"),
    ],
)
def test_auto_is_one_of_what_can_run_and_says_why(model: str, possible: tuple[str, ...], why: str) -> None:
    made, notes = resolve(study(model, "auto"))
    assert made.study.compute in possible
    assert any(f"compute: {made.study.compute}" in note and why in note for note in notes)


def convolutions(num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    conv = nn.Conv2d(1, num_classes, 8, padding_mode="reflect")
    return nn.Sequential(conv, nn.BatchNorm2d(num_classes), nn.Flatten())


def test_the_kernel_is_not_forced_on_what_it_cannot_run(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="tuned or reference.*number of zeros; and it has no plain linear layer"):
        tiny.run(study("convolutions", "sparse"), tmp_path / "run")


def test_check_says_what_runs_where() -> None:
    tuned, sparse = forecast(study("batch_norm", "tuned")), forecast(study("group_norm", "sparse"))
    assert "torch, channels_last" in tuned and "cannot run this study" in tuned and "BatchNorm2d" in tuned
    assert "the kernel runs every layer" in sparse and "group norm" in sparse
    assert "could run" in forecast(study("group_norm", "tuned"))
    kept = forecast(study("batch_norm", "sparse"))
    assert "cannot run this study" in kept and "below density 0.25: conv.weight and 1 more" in kept


@pytest.mark.parametrize(
    ("model", "backend"), [("group_norm", "tuned"), ("group_norm", "sparse"), ("batch_norm", "sparse")]
)
def test_a_short_study_ends_as_the_reference_does(tmp_path: Path, model: str, backend: str) -> None:
    """Weights and evaluation; a ticket near a tie may differ in a weight, so tickets are compared by their size."""
    found = {}
    for compute in ("reference", backend):
        tiny.run(study(model, compute, finder={"densities": [0.2]}), tmp_path / compute)
        found[compute] = tiny.rows(tmp_path / compute, "metrics")
    for one, other in zip(found["reference"], found[backend], strict=True):
        assert one.keys() == other.keys()
        for key in one:
            if isinstance(one[key], float):
                assert one[key] == pytest.approx(other[key], rel=0.02, abs=0.05), key


def test_warming_tells_only_of_a_compilation() -> None:
    told: list[str] = []
    with lines_to(told.append):
        kernel.warm()
    with lines_to(told.append):
        kernel.warm()  # now it is loaded at the latest
    assert len(told) <= 1


def test_a_slow_load_is_no_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 36: the kernel's cache is warm and the machine busy."""
    monkeypatch.setattr(kernel, "train_epochs", lambda *_, **__: time.sleep(3.2))
    monkeypatch.setattr(kernel, "predict", lambda *_: np.zeros(1))
    told: list[str] = []
    with lines_to(told.append):
        kernel.warm()
    assert not told


def test_a_compilation_is_told_when_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 36: by numba's own event, once however many functions are compiled."""
    told: list[str] = []

    def compile(*_: Any, **__: Any) -> None:
        for function in (lambda x: x + 1, lambda x: x + 2):
            numba.njit(function)(1)
            assert len(told) == 1 and "once for this machine" in told[0]

    monkeypatch.setattr(kernel, "train_epochs", compile)
    monkeypatch.setattr(kernel, "predict", lambda *_: np.zeros(1))
    with lines_to(told.append):
        kernel.warm()
    assert len(told) == 1
