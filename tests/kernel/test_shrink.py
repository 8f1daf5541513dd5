"""A ticket that drops whole channels trains as the smaller network that it leaves, and ends as the whole one does."""

from __future__ import annotations

import math
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("numba")
pytestmark = pytest.mark.timeout(600)  # the first use on a machine compiles

from fedlth.kernel import columns as col  # noqa: E402
from fedlth.kernel import compact, kernel, shrink  # noqa: E402
from fedlth.kernel.bounds_check import check_bounds, check_folds  # noqa: E402
from fedlth.kernel.graph import compile_layers  # noqa: E402
from fedlth.kernel.live_channels import costs  # noqa: E402
from fedlth.kernel.memory_layout import lay_out  # noqa: E402
from fedlth.kernel.table import LayerTable  # noqa: E402
from fedlth.models.layout import Layout, layout_of  # noqa: E402
from fedlth.models.prunable import prunable_names  # noqa: E402
from fedlth.models.registry import build  # noqa: E402
from fedlth.tickets.granularity import GRANULARITIES  # noqa: E402
from tests.kernel.nets import Case, Residual, case, small  # noqa: E402
from tests.kernel.test_backends import FACTOR, ROUNDING, networks  # noqa: E402

KINDS = ("row", "channel", "both", "row and weights")


def ticket(layout: Layout, kind: str, density: float, seed: int = 0) -> np.ndarray:
    """Return a random mask that keeps a share of each layer's rows, of its channels, of both, or of rows' weights."""
    rng, mask = np.random.default_rng(seed), np.ones(layout.num_prunable, bool)
    for granularity in ("row", "channel") if kind == "both" else (kind.split()[0],):
        groups = GRANULARITIES[granularity]().groups(layout)
        kept = np.zeros(groups.layout.num_prunable, bool)
        for e in groups.layout.prunable:
            kept[e.offset + rng.permutation(e.size)[: max(1, round(density * e.size))]] = True
        mask &= groups.spread(kept)
    return mask & (rng.random(mask.size) < 0.4) if kind == "row and weights" else mask


def structured(found: Case, kind: str, density: float, seed: int = 0) -> Case:
    return replace(found, mask=ticket(found.layout, kind, density, seed))


def shrunk(found: Case) -> shrink.Shrunk | None:
    assert found.mask is not None
    return shrink.shrink(found.table, found.mask)


def network(name: str = "lenet5", **options: float) -> Case:
    torch.manual_seed(0)
    module = build(name, num_classes=10, input_shape=(1, 28, 28), options={})
    return case(module, (1, 28, 28), **{"examples": 40, "momentum": 0.9, "weight_decay": 0.01, **options})  # type: ignore[arg-type]


def agrees(found: Case) -> None:
    """Assert that training ends as near to float64 as torch float32 and the whole network in the kernel do."""
    reference, loss = found.reference()
    outcome, truth = found.kernel(debug=True), found.judge()
    with mock.patch.object(compact, "shrink", lambda *_: None):
        whole = found.kernel().floats
    # The whole one too: a norm over a constant channel enlarges whatever rounding its order of addition leaves.
    allowed = max(np.abs(reference - truth).max(), np.abs(whole - truth).max())
    assert np.abs(outcome.floats - truth).max() <= FACTOR * allowed + ROUNDING
    assert outcome.loss == pytest.approx(loss, rel=1e-4, abs=1e-6)
    assert found.mask is not None and not outcome.floats[: found.mask.size][~found.mask].any()


def predicts(found: Case) -> None:
    """Assert that prediction inside the ticket equals the module's in float64."""
    assert found.mask is not None
    floats = found.start.masked(found.mask).floats
    module = found.module.double()
    named = dict(module.named_parameters())
    for e in found.layout.floats:
        named[e.name].data = torch.from_numpy(floats[e.slice].reshape(e.shape).astype(np.float64))
    with torch.no_grad():
        wanted = module(found.x.double()).numpy()
    logits = kernel.predict(found.table, floats, found.x.numpy())
    assert np.abs(logits - wanted).max() <= 1e-5 * max(1.0, np.abs(wanted).max())


@pytest.mark.parametrize("density", [0.5, 0.25])
@pytest.mark.parametrize("kind", KINDS[:3])
def test_lenet_shrinks_and_equals_the_reference(kind: str, density: float) -> None:
    """Batches of 40 in 32 lanes: the constants' gradients come from all of a step's examples."""
    found = structured(network(examples=80, batch_size=40), kind, density)
    assert shrunk(found) is not None
    agrees(found)
    predicts(found)


def test_dense_and_single_weights_behind_constants() -> None:
    """Of the rows left two fifths of the weights are kept: some layers become lists, whose places fold too."""
    found = structured(network(examples=80, batch_size=40), "row and weights", 0.5)
    with mock.patch.object(shrink, "_WORTH", math.inf):
        agrees(found)
        predicts(found)


@pytest.mark.parametrize("kind", ["row", "channel"])
def test_leaf_cnn_shrinks_and_equals_the_reference(kind: str) -> None:
    found = structured(network("leaf_cnn", examples=20, epochs=1, lr=0.02), kind, 0.25)
    assert shrunk(found) is not None
    agrees(found)


@settings(max_examples=40, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    chain=st.booleans(),
    drawn=networks(),
    seed=st.integers(0, 1000),
    kind=st.sampled_from(KINDS),
    density=st.sampled_from([0.5, 0.25]),
    movable=st.sampled_from([None, 0.5]),
    momentum=st.sampled_from([0.0, 0.9]),
)
def test_random_networks_equal_the_reference(
    chain: bool,
    drawn: tuple[nn.Module, tuple[int, int, int]],
    seed: int,
    kind: str,
    density: float,
    movable: float | None,
    momentum: float,
) -> None:
    """Every ticket is taken for worth it, also those that drop a single feature."""
    module, shape = small(np.random.default_rng(seed)) if chain else drawn
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3)
        options = {"examples": 19, "epochs": 1, "batch_size": 8, "lr": 0.01, "weight_decay": 0.01}
        found = case(module, shape, seed=seed, movable=movable, momentum=momentum, **options)  # type: ignore[arg-type]
        found = structured(found, kind, density, seed)
        with mock.patch.object(shrink, "_WORTH", math.inf):
            assert shrunk(found) is not None
            agrees(found)
            predicts(found)


@pytest.mark.parametrize("kind", KINDS)
def test_two_layers_that_read_one_value_and_an_addition(kind: str) -> None:
    torch.manual_seed(1)
    found = structured(case(Residual(), (1, 9, 9), momentum=0.9, weight_decay=0.01), kind, 0.5)
    with mock.patch.object(shrink, "_WORTH", math.inf):
        small_one = shrunk(found)
        agrees(found)
    assert small_one is not None
    kept = [op for op in found.table.ops if op.kind in (col.ADD, col.GROUP_NORM)]
    assert all(small_one.table.shapes[op.out] == found.table.shapes[op.out] for op in kept)


class Around(nn.Module):
    """Convolutions between maps of which every channel stays: of the input, norms and an addition."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3, padding=1, bias=bias)
        self.first, self.second = (nn.Conv2d(8, 8, 3, padding=1, bias=bias) for _ in range(2))
        self.norm = nn.GroupNorm(2, 8)
        self.head = nn.Conv2d(8, 5, 7, stride=2, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(torch.relu(self.stem(x)))
        x = torch.relu(self.first(x)) + self.second(x) + x
        return self.head(x).flatten(1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS[:3])
def test_convolutions_choose_among_channels_that_stay(kind: str, bias: bool) -> None:
    torch.manual_seed(0)
    found = case(Around(bias), (4, 7, 7), movable=0.7, momentum=0.9, weight_decay=0.01)
    found = structured(found, kind, 0.5)
    with mock.patch.object(shrink, "_WORTH", math.inf):
        small_one = shrunk(found)
        agrees(found)
        predicts(found)
    assert small_one is not None
    chosen = [op for op in small_one.table.ops if op.kind == col.CHOOSE]
    # By rows each of the four puts its outputs in place, by channels it picks its inputs, and by both it does both.
    assert len(chosen) == (8 if kind == "both" else 4)
    plan = lay_out(small_one.table, 16)
    for column, by in ((col.CHOICE, 10**6), (col.X, 10**7), (col.DX, -(10**7)), (col.BIAS, 10**7)):
        rows = plan.rows.copy()
        used = (rows[:, col.KIND] == col.CHOOSE) & (rows[:, column] != -1)
        rows[used, column] += by
        if used.any() and (column != col.DX or rows[used, col.NEEDS_DX].any()):
            with pytest.raises(ValueError, match="would reach outside"):
                check_bounds(replace(plan, rows=rows), 16, small_one.table.num_params)
    index = plan.index.copy()
    index[plan.rows[plan.rows[:, col.KIND] == col.CHOOSE, col.CHOICE][0]] = 8
    with pytest.raises(ValueError, match="would reach outside its map"):
        check_bounds(replace(plan, index=index), 16, small_one.table.num_params)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layer", range(3))
def test_a_layer_without_any_output_left(layer: int, bias: bool) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1, bias=bias), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(5, 4, 3, bias=bias),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip
    found = case(module, (2, 12, 12), momentum=0.9, weight_decay=0.01)
    mask = np.ones(found.layout.num_prunable, bool)
    mask[found.layout.prunable[layer].slice] = False
    found = replace(found, mask=mask)
    agrees(found)
    predicts(found)


def test_rows_and_the_columns_behind_them_leave_the_narrow_network() -> None:
    """Where nothing reads what has no weights, the shapes are those of a network with fewer channels."""
    found = network()
    mask = np.ones(found.layout.num_prunable, bool)
    entries = {e.name: e for e in found.layout.prunable}
    for name, out, rest in (("conv1", 6, 1), ("conv2", 16, 6), ("fc1", 120, 16), ("fc2", 84, 120), ("fc3", 10, 84)):
        view = mask[entries[f"{name}.weight"].slice].reshape(out, rest, -1)
        view[out if name == "fc3" else out // 2 :] = False
        view[:, rest if name == "conv1" else rest // 2 :] = False
    small_one = shrunk(replace(found, mask=mask))
    assert small_one is not None and not small_one.folds
    assert [small_one.table.shapes[op.out][0] for op in small_one.table.ops if op.weight >= 0] == [3, 8, 60, 42, 10]
    assert small_one.kept.all() and small_one.kept.size == np.count_nonzero(mask)


@pytest.mark.parametrize(
    ("name", "density", "most"), [("leaf_cnn", 0.5, 0.35), ("leaf_cnn", 0.25, 0.2), ("lenet5", 0.5, 0.55)]
)
def test_half_the_rows_need_far_less_than_half_the_work_of_single_weights(
    name: str, density: float, most: float
) -> None:
    """Multiply-adds, of which the kernel does as many in the same time; unstructured tickets of the density need 1."""
    found = network(name)
    before, after = costs(found.table, ticket(found.layout, "row", density))
    assert after <= most * before
    single = np.random.default_rng(0).random(found.layout.num_prunable) < density
    before, after = costs(found.table, single)
    assert after >= 0.95 * before and shrink.shrink(found.table, single) is None


def test_shared_weights_stay_whole() -> None:
    found = structured(network(), "row", 0.25)
    first, second = (op for op in found.table.ops if op.kind == col.CONVOLUTION)
    ops = tuple(replace(op, bias=first.bias) if op is second else op for op in found.table.ops)
    assert shrunk(replace(found, table=replace(found.table, ops=ops))) is None


@pytest.mark.parametrize(
    "column", [col.FOLD_BLOCK, col.FOLD_TOTAL, col.FOLD_VALUES, col.FOLD_PLACES, col.FOLD_BIASES, col.FOLD_COUNT]
)
def test_a_fold_that_is_off_is_refused(column: int) -> None:
    found = structured(network(), "row", 0.5)
    small_one = shrunk(found)
    assert small_one is not None
    inner = np.zeros((len(small_one.table.ops), col.NUM_COLUMNS), np.int64)
    rows, lists = small_one.folded(inner, np.zeros(5, np.int32), None)
    check_folds(rows, lists, len(small_one.places))
    for by in (10**6, -(10**6)):
        wrong = rows.copy()
        wrong[rows[:, col.CONSTANTS] > 0, column] += by
        with pytest.raises(ValueError, match="outside its constants"):
            check_folds(wrong, lists, len(small_one.places))
    lists[rows[rows[:, col.CONSTANTS] > 0, col.FOLD_BIASES]] = len(small_one.places)
    with pytest.raises(ValueError, match="outside its constants"):
        check_folds(rows, lists, len(small_one.places))


def test_a_large_network_goes_to_torch_while_it_is_dense() -> None:
    module = build("resnet9", num_classes=10, input_shape=(3, 32, 32), options={})
    layout = layout_of(module, prunable_names(module, None))
    table = compile_layers(module, layout, (3, 32, 32))
    assert isinstance(table, LayerTable) and kernel.large(table)
    assert not kernel.suits(table, None) and not kernel.suits(table, np.ones(layout.num_prunable, bool))
    thin = np.random.default_rng(0).random(layout.num_prunable)
    assert kernel.suits(table, thin < 0.2) and not kernel.suits(table, thin < 0.58)
    assert kernel.suits(table, (thin < 0.2).astype(np.float32)), "weights say it too: zero is dead"


def test_a_small_network_stays_in_the_kernel() -> None:
    module = build("lenet5", num_classes=10, input_shape=(1, 28, 28), options={})
    table = compile_layers(module, layout_of(module, prunable_names(module, None)), (1, 28, 28))
    assert isinstance(table, LayerTable) and not kernel.large(table) and kernel.suits(table, None)
