"""Published rows that need no training: densities, shares of communication, and what selection by test data adds.

Rows R1 (megabytes) and R4 (codec) are in tests/report/test_report_presets.py and tests/wire/test_payload.py, R5 in
tests/laws/test_aggregate.py, R6 in each method's tests, R7 in tests/methods/test_every_method.py and tests/engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

import numpy as np
import pytest

from fedlth.bench.reproduce import row_of, selected
from fedlth.methods.client_update import Shrinking, geometric
from fedlth.storage.records import CurveRow
from tests import tiny


def released(target: float) -> tuple[float, ...]:
    """Return the densities of LotteryFL's released code: it prunes while what is left is above the target."""
    found = [1.0]
    while found[-1] > target:
        found.append(found[-1] * 0.8)
    return tuple(found)


@pytest.mark.parametrize(("target", "stop"), [(0.1, 0.0859), (0.3, 0.2621), (0.5, 0.4096)])
def test_the_released_code_stops_past_its_target_and_ours_at_it(target: float, stop: float, tmp_path: Path) -> None:
    """R2."""
    assert released(target)[-1] == pytest.approx(stop, abs=5e-5)
    ours = geometric(0.2, target)
    powers = list(takewhile(lambda density: density > target, (0.8**k for k in range(20))))
    assert ours == pytest.approx((*powers, target))
    method = {"name": "lotteryfl", "rate": 0.2, "density": target, "val_accuracy": -1.0}
    made = tiny.study(
        method=method, federate={"rounds": len(ours) + 1, "clients_per_round": 3}, personalise={"arms": ["own"]},
        model={"name": "mlp", "options": {"hidden": [40]}},
    )  # fmt: skip
    folder = tiny.run(made, tmp_path / "run")
    sizes = [e.size for e in tiny.task_of(folder.root).layout.prunable]
    ups = [r for r in tiny.rows(folder.root, "ledger") if r["sender"] == "client:0" and r["name"] == "update"]
    for row, density in zip(ups, (*ours[1:], *[target] * 9), strict=False):
        assert row["density"] == pytest.approx(density, abs=len(sizes) / sum(sizes))


@pytest.mark.parametrize(
    ("visits", "targets", "after", "before", "paper"),
    [
        (20, (0.1, 0.3, 0.5), (0.221, 0.331, 0.446), (0.267, 0.368, 0.475), (0.246, 0.347, 0.459)),
        (100, (0.1, 0.3, 0.5), (0.113, 0.276, 0.417), (), (0.259, 0.378, 0.478)),
    ],
)
def test_the_share_of_communication_is_a_function_of_the_visits(
    visits: int, targets: Sequence[float], after: Sequence[float], before: Sequence[float], paper: Sequence[float]
) -> None:
    """R3: a bound, where every participation prunes until the target; the paper's rows lie between it and one."""
    for i, target in enumerate(targets):
        shrinking = Shrinking(released(target))
        held = [shrinking.densities[shrinking.prunes(visit)] for visit in range(visits + 1)]
        assert np.mean(held[1:]) == pytest.approx(after[i], abs=6e-4)
        assert np.mean(held[1:]) < paper[i] < 1
        if before:
            assert np.mean(held[:-1]) == pytest.approx(before[i], abs=6e-4)


@pytest.mark.parametrize(("rounds", "wanted"), [(20, 0.837), (100, 0.864), (400, 0.884), (2000, 0.902)])
def test_the_best_of_many_looks_at_80_test_images_is_no_accuracy(rounds: int, wanted: float) -> None:
    """R8: a client that is right in three cases of four, judged as the released code does."""
    row = replace(row_of("lotteryfl_cifar10_0.1"), selects="client_rounds")
    looks = np.random.default_rng(1).binomial(80, 0.75, (200, rounds)) / 80
    curve = [
        CurveRow(
            round=number, phase="federate", client=client, unseen=False, arm="own", density=1.0, val_accuracy=None,
            test_accuracy=float(found), val_loss=None, test_loss=0.0, num_val=0, num_test=80,
        )
        for client, of in enumerate(looks)
        for number, found in enumerate(of)
    ]  # fmt: skip
    assert selected(row, curve) == pytest.approx(100 * wanted, abs=0.3)
    assert looks.mean() == pytest.approx(0.75, abs=0.003)
