"""No layer can be built that would reach outside its maps, and the kernel writes nowhere else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("numba")
pytestmark = pytest.mark.timeout(600)  # the first use on a machine compiles

from fedlth.kernel import columns as col  # noqa: E402
from fedlth.kernel import kernel  # noqa: E402
from fedlth.kernel.bounds_check import check_bounds, stray_writes  # noqa: E402
from fedlth.kernel.memory_layout import lay_out  # noqa: E402
from fedlth.kernel.reach import EXTENTS, MemoryLayout  # noqa: E402
from fedlth.kernel.table import LayerTable  # noqa: E402
from tests.kernel.nets import Residual, case, small  # noqa: E402

LANES = 16


def residual() -> tuple[LayerTable, MemoryLayout]:
    table = case(Residual(), (1, 9, 9)).table
    return table, lay_out(table, LANES)


PLACES = [
    col.X, col.Y, col.DX, col.DY, col.X_PLANE, col.Y_ROW, col.DX_PLANE, col.DY_ROW, col.X2, col.DX2, col.SPREAD,
    col.SPREAD_ROW, col.TAP_ROW, col.TAP_STEP, col.TAP_GROUP, col.BACK_GROUP, col.PACK, col.STATS, col.WEIGHT, col.BIAS,
    col.CHANNELS, col.OUT_CHANNELS, col.HEIGHT, col.OUT_WIDTH, col.TAPS, col.SPAN, col.TAP_PLACES, col.OUT_PLACES,
    col.FORWARD_PLACES, col.BACKWARD_PLACES, col.FORWARD_WEIGHTS, col.BACKWARD_WEIGHTS, col.TOP, col.BACK_LEFT,
]  # fmt: skip


@pytest.mark.parametrize("column", PLACES)
def test_a_place_that_is_off_is_refused(column: int) -> None:
    """For each column some layer uses it: moved far up or down in all layers that do, one of them must be refused."""
    table, plan = residual()
    for by in (plan.work_size, -plan.work_size):
        rows = plan.rows.copy()
        used = rows[:, col.KIND] == col.GROUP_NORM if column == col.STATS else rows[:, column] != 0
        assert used.any()
        rows[used, column] += by
        with pytest.raises(ValueError, match="would reach outside"):
            check_bounds(replace(plan, rows=rows), LANES, table.num_params)


@pytest.mark.parametrize("column", [col.TAP_PLACES, col.OUT_PLACES, col.BACK_PLACES, col.BACK_OUT_PLACES, col.TOP])
def test_a_list_with_one_wrong_number_is_refused(column: int) -> None:
    table, plan = residual()
    index = plan.index.copy()
    at = int(plan.rows[1, column])  # the strided convolution
    index[at] = plan.work_size
    with pytest.raises(ValueError, match="would reach outside"):
        check_bounds(replace(plan, index=index), LANES, table.num_params)


@pytest.mark.parametrize("column", [col.X, col.Y, col.DX, col.DY])
def test_one_float_too_far_is_refused(column: int) -> None:
    """Every addition's map may move as far as its extent goes, and not one float farther."""
    table, plan = residual()
    for at, row in enumerate(plan.rows):
        if not (row[column] and row[col.KIND] == col.ADD):
            continue
        channels, height, width = row[col.OUT_CHANNELS : col.OUT_WIDTH + 1]
        end = row[column] + (channels - 1) * row[column + 1] + (height - 1) * row[column + 2] + width * LANES
        room = int(plan.extents[at, EXTENTS.index(column), 1] - end)
        for by in (room, room + 1):
            rows = plan.rows.copy()
            rows[at, column] += by
            if by == room:
                check_bounds(replace(plan, rows=rows), LANES, table.num_params)
            else:
                with pytest.raises(ValueError, match="would reach outside"):
                    check_bounds(replace(plan, rows=rows), LANES, table.num_params)


@pytest.mark.parametrize("seed", range(30))
def test_random_networks_are_arranged_inside(seed: int) -> None:
    torch.manual_seed(seed)
    module, shape = small(np.random.default_rng(seed))
    table = case(module, shape).table
    for lanes in (16, 32):
        check_bounds(lay_out(table, lanes), lanes, table.num_params)


@pytest.mark.parametrize("density", [pytest.param(None, marks=pytest.mark.long), 0.3])
def test_nothing_is_written_between_the_maps(density: float | None) -> None:
    torch.manual_seed(0)
    first = nn.Sequential(nn.AvgPool2d(2), nn.ReLU(), nn.GroupNorm(1, 1, affine=False), nn.Conv2d(1, 4, 3, padding=1))
    behind = nn.Sequential(*first, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3))
    for module in (Residual(), behind):
        found = case(module, (1, 9, 9), density=density, momentum=0.9)
        plain, checked = found.kernel(), found.kernel(debug=True)
        assert (plain.floats == checked.floats).all()


def test_a_stray_value_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    _, plan = residual()
    work = np.zeros(plan.work_size, np.float32)
    assert stray_writes(plan, work, LANES) == 0
    work[3] = 1.0
    assert stray_writes(plan, work, LANES) == 1
    monkeypatch.setattr(kernel, "stray_writes", lambda *_: 1)
    with pytest.raises(RuntimeError, match="no layer may write"):
        case(Residual(), (1, 9, 9)).kernel(debug=True)
