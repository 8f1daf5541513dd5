"""Kinds of layers: read from torch, equal to it wherever they are, and in tickets that drop whole channels."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("numba")
pytestmark = pytest.mark.timeout(600)  # the first use on a machine compiles

from fedlth.kernel import columns as col  # noqa: E402
from fedlth.kernel import kernel, shrink  # noqa: E402
from fedlth.kernel.bounds_check import check_bounds  # noqa: E402
from fedlth.kernel.graph import compile_layers  # noqa: E402
from fedlth.kernel.kinds import ALL, KINDS  # noqa: E402
from fedlth.kernel.memory_layout import lay_out  # noqa: E402
from fedlth.kernel.table import LayerTable  # noqa: E402
from fedlth.models.layout import layout_of  # noqa: E402
from fedlth.models.prunable import prunable_names  # noqa: E402
from tests.kernel.nets import Case, case  # noqa: E402
from tests.kernel.test_shrink import agrees as agrees_in_a_ticket  # noqa: E402
from tests.kernel.test_shrink import predicts, shrunk, structured  # noqa: E402

Layer = Callable[[int], nn.Module]
# Layers of C channels that keep a map's shape.
ALIKE: dict[str, Layer] = {
    "relu": lambda channels: nn.ReLU(),
    "leaky relu": lambda channels: nn.LeakyReLU(0.1),
    "leaky relu that falls": lambda channels: nn.LeakyReLU(-0.3),
    "leaky relu in place": lambda channels: nn.LeakyReLU(0.3, inplace=True),
    "silu": lambda channels: nn.SiLU(),
    "tanh": lambda channels: nn.Tanh(),
    "group norm": lambda channels: nn.GroupNorm(2, channels),
    "instance norm": lambda channels: nn.InstanceNorm2d(channels),
    "instance norm with a gain": lambda channels: nn.InstanceNorm2d(channels, affine=True),
}


class Functions(nn.Module):
    """A layer that is no module."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


# Layers that may be after the first convolution, whose maps are 9 x 8.
OTHERS: dict[str, nn.Module] = {
    "max pool": nn.MaxPool2d(3, 2, 1),
    "average pool": nn.AvgPool2d(2),
    "as many": nn.AdaptiveAvgPool2d((None, 8)),
    "adaptive, equal windows": nn.AdaptiveAvgPool2d((3, 4)),
    "adaptive, windows that overlap": nn.AdaptiveAvgPool2d((4, 3)),
    "adaptive to more than there are": nn.AdaptiveAvgPool2d((12, 8)),
    "adaptive max pool": nn.AdaptiveMaxPool2d((3, 2)),
    "layer norm": nn.LayerNorm((6, 9, 8), elementwise_affine=False),
    "add": Functions(lambda x: x + x),
    "functions": Functions(lambda x: F.leaky_relu(F.silu(torch.tanh(x).tanh()), 0.2, True)),
}


class Net(nn.Module):
    """A layer whose input two others read, one that follows it alone, and one between linear layers."""

    def __init__(self, layer: nn.Module, behind: nn.Module, features: int, linear: nn.Module) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.third = nn.Conv2d(6, 4, 2)
        self.layer, self.behind, self.linear = layer, behind, linear
        self.wide, self.head = nn.Linear(features, 10), nn.Linear(10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = self.layer(x) if getattr(self.layer, "inplace", False) else x + self.layer(x)
        x = self.third(self.behind(self.second(x)))
        logits: torch.Tensor = self.head(self.linear(self.wide(x.flatten(1))))
        return logits


def network(layer: nn.Module, behind: nn.Module, linear: nn.Module, **options: float) -> Case:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), behind, nn.Conv2d(6, 4, 2), nn.Flatten())
    with torch.no_grad():
        features = module(torch.zeros(2, 6, 9, 8)).shape[1]
    made = Net(layer, behind, features, linear)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return case(made, (2, 9, 8), examples=19, epochs=1, batch_size=8, lr=0.02, momentum=0.9, **options)  # type: ignore[arg-type]


def agrees(found: Case) -> None:
    """Assert that the kernel is as near to float64 as torch float32 is, and writes nowhere else."""
    reference, loss = found.reference()
    outcome, truth = found.kernel(debug=True), found.judge()
    error, allowed = np.abs(outcome.floats - truth).max(), np.abs(reference - truth).max()
    assert error <= 2 * allowed + 1e-6, (error, allowed)
    assert outcome.loss == pytest.approx(loss, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("density", [None, 0.3])
@pytest.mark.parametrize("name", ALIKE)
def test_layers_that_keep_a_shape_equal_torch(name: str, density: float | None) -> None:
    make = ALIKE[name]
    linear = nn.LayerNorm(10) if "norm" in name else make(10)
    found = network(make(6), make(6), linear, density=density)  # type: ignore[arg-type]
    agrees(found)


@pytest.mark.parametrize("density", [None, 0.3])
@pytest.mark.parametrize("name", OTHERS)
def test_other_layers_equal_torch(name: str, density: float | None) -> None:
    agrees(network(nn.SiLU(), OTHERS[name], nn.LayerNorm(10), density=density))  # type: ignore[arg-type]


def whole_maps(**options: float) -> Case:
    """Return a case of a network of the largest value and the mean of each map, of which some are zero throughout."""
    torch.manual_seed(0)
    most = Functions(lambda x: x.amax((2, 3)) + torch.amax(x, (3, 2), keepdim=True).flatten(1) + x.mean((2, 3)))
    made = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), most, nn.Linear(6, 3))
    nn.init.constant_(made[0].bias, -0.5)
    return case(made, (2, 6, 5), examples=19, epochs=1, batch_size=8, lr=0.02, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("density", [None, 0.3])
def test_reductions_of_whole_maps_equal_torch(density: float | None) -> None:
    agrees(whole_maps(density=density))  # type: ignore[arg-type]


def test_every_kind_is_tried_here() -> None:
    tried = [network(make(6), make(6), make(10)) for name, make in ALIKE.items() if "norm" not in name]
    tried += [network(nn.GroupNorm(2, 6), behind, nn.SiLU()) for behind in OTHERS.values()]
    names = {op.name for one in [*tried, whole_maps()] for op in one.table.ops}
    assert {kind.name for kind in ALL} <= names


class Chain(nn.Module):
    """Convolutions and linear layers with one kind between them, so that channels may go."""

    def __init__(self, layer: Layer, behind: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2, 8, 3, padding=1), layer(8), nn.Conv2d(8, 6, 3, padding=1), layer(6), behind, nn.Flatten()
        )
        with torch.no_grad():
            features = self.layers(torch.zeros(2, 2, 9, 8)).shape[1]
        self.layers.extend([nn.Linear(features, 10), layer(10) if "Norm" not in repr(layer(10)) else nn.ReLU()])
        self.layers.append(nn.Linear(10, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.layers(x)
        return logits


@pytest.mark.parametrize("kind", ["row", "channel", "both", "row and weights"])
@pytest.mark.parametrize("name", [*ALIKE, *(name for name in OTHERS if name != "layer norm")])
def test_a_ticket_of_whole_channels_ends_as_the_whole_network_does(name: str, kind: str) -> None:
    torch.manual_seed(0)
    made = Chain(ALIKE.get(name, ALIKE["relu"]), OTHERS.get(name, nn.MaxPool2d(2)))
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    options = {"examples": 19, "epochs": 1, "batch_size": 8, "lr": 0.02, "momentum": 0.9, "weight_decay": 0.01}
    found = structured(case(made, (2, 9, 8), **options), kind, 0.5)  # type: ignore[arg-type]
    with mock.patch.object(shrink, "_WORTH", math.inf):
        small = shrunk(found)
        agrees_in_a_ticket(found)
        predicts(found)
    assert small is not None
    widths = [small.table.shapes[op.out][0] for op in small.table.ops if op.kind == col.CONVOLUTION]
    folds = name == "relu" or name in OTHERS  # what a channel without weights becomes behind them is its bias still
    if "norm" not in name:
        assert folds or not small.folds
        assert sum(widths) < 14 or not (folds or kind in ("channel", "both"))


def compiled(module: nn.Module, shape: tuple[int, ...]) -> LayerTable | str:
    return compile_layers(module, layout_of(module, prunable_names(module, None)), shape)


def test_functions_are_read_as_the_modules_are() -> None:
    class Same(nn.Module):
        def __init__(self, functions: bool) -> None:
            super().__init__()
            self.functions = functions
            self.first, self.head = nn.Conv2d(1, 4, 3), nn.Linear(24, 2)
            self.leaky, self.silu = nn.LeakyReLU(0.2), nn.SiLU()
            self.pool, self.most = nn.AdaptiveAvgPool2d((3, 4)), nn.AdaptiveMaxPool2d((3, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            if self.functions:
                x = F.silu(F.leaky_relu(x, 0.2), inplace=True)
                x = F.adaptive_max_pool2d(F.adaptive_avg_pool2d(x, (3, 4)), (3, 2))
            else:
                x = self.most(self.pool(self.silu(self.leaky(x))))
            logits: torch.Tensor = self.head(x.flatten(1))
            return logits

    table = compiled(Same(False), (1, 9, 9))
    assert isinstance(table, LayerTable) and table == compiled(Same(True), (1, 9, 9))
    assert [line.partition(":")[0] for line in table.describe()] == [
        "convolution", "leaky relu", "silu", "adaptive average pool", "max pool", "linear",
    ]  # fmt: skip


class Again(nn.Module):
    """A value that a kind changes in place, and that is read again."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        return F.leaky_relu(y, 0.1, True) + y


@pytest.mark.parametrize(
    ("module", "shape", "reason"),
    [
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveMaxPool2d(4), nn.Flatten(), nn.Linear(32, 2)), (1, 8, 8), "to"),
        (
            nn.Sequential(nn.Conv2d(1, 2, 3), nn.InstanceNorm2d(2, track_running_stats=True), nn.Flatten(),
                          nn.Linear(72, 2)),
            (1, 8, 8), "running statistics",
        ),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.LayerNorm(6), nn.Flatten(), nn.Linear(72, 2)), (1, 8, 8), "wants (6,)"),
        (
            nn.Sequential(nn.Conv2d(1, 2, 3), nn.LayerNorm((2, 6, 6)), nn.Flatten(), nn.Linear(72, 2)),
            (1, 8, 8), "of a map, with a gain",
        ),
        (Again(), (4,), "in place"),
    ],
)  # fmt: skip
def test_what_a_kind_does_not_do_it_says(module: nn.Module, shape: tuple[int, ...], reason: str) -> None:
    answer = compiled(module, shape)
    assert isinstance(answer, str) and reason in answer and "\n" not in answer


def test_no_two_kinds_share_a_number_or_read_the_same_call() -> None:
    assert len(KINDS) == len(ALL) and not set(KINDS) & {col.CONVOLUTION, col.LINEAR, col.CHOOSE}
    reads = Counter(call for kind in ALL for calls in (kind.modules, kind.functions, kind.methods) for call in calls)
    assert not [call for call, count in reads.items() if count > 1]


def test_numbers_that_no_kind_has_are_refused() -> None:
    table = network(nn.SiLU(), nn.SiLU(), nn.SiLU()).table
    plan = lay_out(table, 16)
    for column, value, what in ((col.KIND, 99, "kinds"), (col.NEEDS_DX, 0, "gradients")):
        rows = plan.rows.copy()
        rows[[op.name == "silu" for op in table.ops], column] = value
        with pytest.raises(ValueError, match=f"would reach outside its {what}"):
            check_bounds(plan.__class__(**{**vars(plan), "rows": rows}), 16, table.num_params)


@pytest.mark.parametrize("name", ["leaky relu", "silu", "tanh"])
def test_activations_far_from_zero_and_near_it(name: str) -> None:
    layer = ALIKE[name](1)
    module = nn.Sequential(nn.Flatten(), nn.Linear(1, 1, bias=False), layer, nn.Linear(1, 1, bias=False))
    for parameter in module.parameters():
        nn.init.ones_(parameter)
    found = case(module, (1, 1, 1))
    sizes = np.concatenate([np.logspace(-20, 1, 400), np.linspace(0, 20, 400), [80, 87, 88, 89, 200, 1e30]])
    x = np.concatenate([-sizes, sizes]).astype(np.float32)[:, None]
    logits = kernel.predict(found.table, found.start.floats, x)[:, 0]
    truth = layer(torch.from_numpy(x).double()).numpy()[:, 0]
    assert (np.abs(logits - truth) <= 3e-7 * np.abs(truth) + 1e-33).all()
    assert np.isnan(kernel.predict(found.table, found.start.floats, np.full((1, 1), np.nan, np.float32))).all()
