"""Reference, tuned and sparse agree on random networks and masks; float64 says how far each may be from the truth."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("numba")
pytestmark = pytest.mark.timeout(600)  # the first use on a machine compiles

from fedlth.data.examples import Examples  # noqa: E402
from fedlth.training.evaluation import evaluate  # noqa: E402
from fedlth.training.flat_model import FlatModel  # noqa: E402
from fedlth.training.train import train  # noqa: E402
from fedlth.training.tuned import tune  # noqa: E402
from tests.kernel.nets import Case, case  # noqa: E402

# The kernel adds in another order than torch; an error of twice torch's own, against float64, is no worse arithmetic.
FACTOR, ROUNDING = 2.0, 1e-6


class Block(nn.Module):
    """A convolution, or one with a norm, around which the input may go."""

    def __init__(self, layers: list[nn.Module], around: bool) -> None:
        super().__init__()
        self.layers, self.around = nn.Sequential(*layers), around

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x) if self.around else self.layers(x)


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, int, int]]:
    """Kernels, strides, paddings, groups, norms, relus, pools, shortcuts and linear layers, as they come."""
    shape = (draw(st.integers(1, 4)), draw(st.integers(6, 11)), draw(st.integers(6, 11)))
    layers: list[nn.Module] = []
    channels, sizes = shape[0], list(shape[1:])
    for _ in range(draw(st.integers(1, 3))):
        around = draw(st.booleans()) and channels > 1
        groups = draw(st.sampled_from([1, channels]))
        window = [draw(st.sampled_from([1, 3])) if around else draw(st.integers(1, min(4, n))) for n in sizes]
        stride = 1 if around else draw(st.integers(1, 2))
        padding = [k // 2 if around else draw(st.integers(0, 2)) for k in window]
        out = channels if around else groups * draw(st.integers(1, 7)) if groups > 1 else draw(st.integers(1, 9))
        block: list[nn.Module] = [
            nn.Conv2d(channels, out, window, stride, padding, groups=groups, bias=draw(st.booleans()))
        ]
        if draw(st.booleans()):
            block.append(nn.GroupNorm(draw(st.sampled_from([n for n in (1, 2, 3, out) if out % n == 0])), out))
        if draw(st.booleans()):
            block.append(nn.ReLU())
        layers.append(Block(block, around))
        channels = out
        sizes = [(n + 2 * p - k) // stride + 1 for n, p, k in zip(sizes, padding, window, strict=True)]
        if min(sizes) > 2:
            pools = nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2), nn.Identity()
            layers.append(pools[draw(st.integers(0, 3))])
            layers.append(nn.ReLU() if draw(st.booleans()) else nn.Identity())
            with torch.no_grad():
                sizes = list(nn.Sequential(*layers)(torch.zeros(1, *shape)).shape[2:])
    if draw(st.booleans()):
        layers.append(draw(st.sampled_from([nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(1)])))
        sizes = [1, 1]
    features, hidden = channels * sizes[0] * sizes[1], draw(st.integers(3, 20))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, 3)), shape


def agrees(found: Case) -> None:
    """Assert that tuned and sparse are as near to float64 as the reference is."""
    reference, loss = found.reference()
    module = copy.deepcopy(found.module)
    tuned = train(FlatModel(module, found.layout, "cpu", None, tune(module, found.x[:3])), found.request)
    outcome, truth = found.kernel(debug=True), found.judge()
    allowed = FACTOR * np.abs(reference - truth).max() + ROUNDING
    for name, floats, its_loss in (
        ("sparse", outcome.floats, outcome.loss),
        ("tuned", tuned.params.floats, tuned.loss),
    ):
        assert np.abs(floats - truth).max() <= allowed, name
        assert its_loss == pytest.approx(loss, rel=1e-4, abs=1e-6), name
        if found.mask is not None:
            assert not floats[: found.mask.size][~found.mask].any(), name


@settings(
    max_examples=25,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    network=networks(),
    seed=st.integers(0, 1000),
    density=st.sampled_from([None, 0.7, 0.4, 0.15, 0.03]),
    movable=st.sampled_from([None, 0.5]),
    momentum=st.sampled_from([0.0, 0.9]),
)
def test_backends_agree_on_random_networks(
    network: tuple[nn.Module, tuple[int, int, int]],
    seed: int,
    density: float | None,
    movable: float | None,
    momentum: float,
) -> None:
    module, shape = network
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for parameter in module.parameters():  # hypothesis built it before the seed
            nn.init.normal_(parameter, std=0.3)
        agrees(
            case(
                module,
                shape,
                seed=seed,
                examples=19,
                epochs=1,
                batch_size=8,
                lr=0.01,
                density=density,
                movable=movable,
                momentum=momentum,
                weight_decay=0.01,
            )  # fmt: skip
        )


@pytest.mark.parametrize("density", [None, 0.2])
def test_threads_that_share_a_model_are_bit_identical_to_one(density: float | None) -> None:
    """The kernel runs side by side; torch's backends of one FlatModel take turns."""
    found = case(
        nn.Sequential(nn.Conv2d(1, 5, 3), nn.GroupNorm(5, 5), nn.ReLU(), nn.Flatten(), nn.Linear(180, 3)),
        (1, 8, 8),
        density=density,
    )
    for table in (found.table, None):
        model = FlatModel(copy.deepcopy(found.module), found.layout, "cpu", table)

        def one(model: FlatModel = model) -> tuple[bytes, float, float]:
            done = train(model, found.request)
            scores = evaluate(model, done.params, Examples(found.x, found.y))
            return done.params.floats.tobytes(), scores.accuracy, scores.loss

        with torch.random.fork_rng(devices=[]):
            alone = one()
            with ThreadPoolExecutor(4) as pool:
                together = [work.result() for work in [pool.submit(one) for _ in range(4)]]
        assert together == [alone] * 4
