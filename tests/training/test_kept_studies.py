"""Studies whose network trains in torch, inside tickets with layers that go over their kept weights alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("numba")
pytestmark = pytest.mark.timeout(600)  # the first use on a machine compiles

from fedlth.data.tensors import inputs  # noqa: E402
from fedlth.engines.inprocess import InProcess  # noqa: E402
from fedlth.federation import session  # noqa: E402
from fedlth.federation.rounds import Federation  # noqa: E402
from fedlth.kernel import kept_matrix  # noqa: E402
from fedlth.training import kept_crossover  # noqa: E402
from tests import tiny  # noqa: E402
from tests.test_server_state import Stopped, stop  # noqa: E402


class Normed(nn.Module):
    """Convolutions with BatchNorm and a way around them; nothing that the kernel could run whole."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv, self.second = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=2)
        self.head = nn.Linear(16, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(self.stem(x)).relu()
        x = (x + self.second(self.conv(x))).relu()
        return self.head(self.grouped(x).relu().mean((2, 3)))


def normed(num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    return Normed(num_classes)


def study(compute: str) -> Any:
    model = {"name": "tests.training.test_kept_studies:normed", "options": {}}
    return tiny.study(model=model, compute=compute, finder={"densities": [0.2]})


def test_a_study_ends_as_the_reference_does_and_resumes_as_if_it_had_not_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and evaluation; a ticket near a tie may differ in a weight, so tickets are compared by their size."""
    made, used = study("sparse"), set[tuple[int, ...]]()
    forward = kept_matrix.KeptMatrix.forward

    def seen(self: Any, x: Any, *given: Any, **more: Any) -> Any:
        used.add((self.outputs, self.inputs, *self.layer.window))
        return forward(self, x, *given, **more)

    tiny.run(study("reference"), tmp_path / "reference")
    monkeypatch.setattr(kept_matrix.KeptMatrix, "forward", seen)
    tiny.run(made, tmp_path / "sparse")
    assert {(8, 8, 3, 3), (16, 8, 3, 3)} <= used
    rows = [tiny.rows(tmp_path / name, "metrics") for name in ("reference", "sparse")]
    for one, other in zip(*rows, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            if isinstance(one[key], float):
                assert one[key] == pytest.approx(other[key], rel=0.02, abs=0.05), key
    with monkeypatch.context() as patch:
        patch.setattr(Federation, "run", lambda self: stop(self, 2))
        with pytest.raises(Stopped):
            tiny.run(made, tmp_path / "cut")
    session.resume(tmp_path / "cut", InProcess())
    assert tiny.facts(tmp_path / "sparse") == tiny.facts(tmp_path / "cut")


def test_auto_exchanges_what_is_faster_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense 10; lists of half of the weights 12 and of a quarter 8, but of the layer with groups 30 and 20."""

    def told(runs: Mapping[Any, Any], cpu_s: float) -> dict[Any, float]:
        times = {"dense": 10.0, "half": 12.0, "thin": 8.0}
        worse = {"dense": 10.0, "half": 30.0, "thin": 20.0}
        return {(form, what): (worse if form.layer.groups > 1 else times)[what] for form, what in runs}

    monkeypatch.setattr(kept_crossover, "in_turns", told)
    task = tiny.experiment(study("reference")).task
    batch = inputs(task.dataset, task.few, train=True).batch(slice(None))
    found = kept_crossover.kept_below(task.flat_model, batch, 0.01)
    assert found == {"conv.weight": 0.38, "grouped.weight": 0.0, "head.weight": 0.38, "stem.weight": 0.38}
