"""The kernel equals fedlth.training.train to float32 rounding, with float64 as the judge."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("numba")
pytestmark = pytest.mark.timeout(600)  # the first use on a machine compiles

from fedlth.kernel import compact, kernel  # noqa: E402
from fedlth.models.registry import build  # noqa: E402
from tests.kernel.nets import Case, Residual, case, small  # noqa: E402


def agrees(found: Case) -> None:
    """Assert that the kernel is as near to float64 as torch float32 is, in weights and in loss."""
    reference, loss = found.reference()
    outcome, truth = found.kernel(), found.judge()
    error, allowed = np.abs(outcome.floats - truth).max(), np.abs(reference - truth).max()
    assert error <= 2 * allowed + 1e-6, (error, allowed)
    assert outcome.loss == pytest.approx(loss, rel=1e-4, abs=1e-6)
    if found.mask is not None:
        assert not outcome.floats[: found.mask.size][~found.mask].any()


def lenet(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build("lenet5", num_classes=10, input_shape=(1, 28, 28), options={})


@pytest.mark.parametrize("density", [None, 0.5, 0.2, 0.05])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_lenet_equals_the_reference(density: float | None, momentum: float) -> None:
    agrees(
        case(lenet(), (1, 28, 28), examples=50, batch_size=32, density=density, momentum=momentum, weight_decay=0.01)
    )


@pytest.mark.parametrize("density", [None, 0.05])
def test_leaf_cnn_equals_the_reference(density: float | None) -> None:
    torch.manual_seed(0)
    module = build("leaf_cnn", num_classes=10, input_shape=(1, 28, 28), options={})
    agrees(case(module, (1, 28, 28), examples=20, epochs=1, density=density, lr=0.02))


@pytest.mark.parametrize("seed", range(20))
def test_random_networks_equal_the_reference(seed: int) -> None:
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    module, shape = small(rng)
    density = (None, 0.7, 0.3, 0.1)[seed % 4]
    movable = 0.5 if seed % 3 == 0 else None
    agrees(case(module, shape, seed=seed, density=density, movable=movable, momentum=0.5 * (seed % 2), lr=0.02))


@pytest.mark.parametrize("density", [None, 0.3])
def test_residual_strided_and_depthwise(density: float | None) -> None:
    torch.manual_seed(1)
    agrees(case(Residual(), (1, 9, 9), density=density, momentum=0.9, weight_decay=0.01))


@pytest.mark.parametrize(("examples", "batch_size"), [(1, 32), (7, 3), (33, 32), (50, 40), (65, 64), (100, 100)])
def test_any_batch_size(examples: int, batch_size: int) -> None:
    agrees(case(lenet(), (1, 28, 28), examples=examples, batch_size=batch_size))


def test_frozen_parameters_stay() -> None:
    module = lenet()
    module.conv1.requires_grad_(False)
    found = case(module, (1, 28, 28), weight_decay=0.1)
    agrees(found)
    frozen = [e for e in found.layout.floats if not e.trainable]
    assert frozen and all((found.kernel().floats[e.slice] == found.start.floats[e.slice]).all() for e in frozen)


def test_cosine_rates_and_snapshots() -> None:
    found = case(lenet(), (1, 28, 28), epochs=3, schedule="cosine", momentum=0.9, density=0.2)  # type: ignore[arg-type]
    agrees(found)
    outcome = found.kernel(snapshots=(1, 3))
    assert sorted(outcome.snapshots) == [1, 3]
    assert (outcome.snapshots[3] == outcome.floats).all() and (outcome.floats == found.kernel().floats).all()
    assert (outcome.snapshots[1] != outcome.floats).any()


def test_repeats_and_threads_are_bit_identical() -> None:
    found = case(lenet(), (1, 28, 28), density=0.4, momentum=0.9)
    first, others = found.kernel().floats, []
    threads = [threading.Thread(target=lambda: others.append(found.kernel().floats)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(others) == 4 and all((one == first).all() for one in others)


@pytest.mark.parametrize("density", [None, 0.1])
def test_predict_equals_the_module(density: float | None) -> None:
    found = case(lenet(), (1, 28, 28), examples=77, density=density)
    floats = found.start.floats if found.mask is None else found.start.masked(found.mask).floats
    for e in found.layout.floats:
        dict(found.module.named_parameters())[e.name].data = torch.from_numpy(floats[e.slice].reshape(e.shape).copy())
    with torch.no_grad():
        wanted = found.module(found.x).numpy()
    assert np.abs(kernel.predict(found.table, floats, found.x.numpy()) - wanted).max() < 1e-5
    assert kernel.predict(found.table, floats, found.x.numpy()[:0]).shape == (0, 10)


def test_a_diverged_training_has_a_loss_that_is_not_finite() -> None:
    assert not np.isfinite(case(lenet(), (1, 28, 28), epochs=4, lr=1e6).kernel().loss)


def test_arrays_that_do_not_fit_are_refused() -> None:
    found = case(lenet(), (1, 28, 28))
    x, y, floats = found.x.numpy(), found.y.numpy(), found.start.floats
    batches, rates = [[np.arange(4)]], np.ones(1)
    for bad in (
        {"x": x[:, :, :20]},
        {"y": y + 10},
        {"y": y[:5]},
        {"floats": floats[:-1]},
        {"floats": floats.astype(np.float64)},
        {"epochs": [[np.array([40])]]},
        {"epochs": [[np.array([-1])]]},
        {"epochs": [[]]},
        {"rates": np.ones(2)},
        {"mask": np.ones(3, bool)},
    ):
        given = {"floats": floats, "x": x, "y": y, "epochs": batches, "rates": rates, **bad}
        with pytest.raises(ValueError, match="kernel: "):
            kernel.train_epochs(found.table, **given)


@pytest.mark.parametrize("density", [None, 0.1])
def test_what_a_thread_holds_from_before_changes_nothing(density: float | None) -> None:
    found = case(lenet(), (1, 28, 28), examples=40, density=density)
    compact._last.held = None
    fresh = found.kernel(debug=True).floats
    held = compact._last.held
    assert held is not None and (found.kernel().floats == fresh).all() and compact._last.held is held
    shown = kernel.predict(found.table, fresh, found.x.numpy())
    other = np.random.default_rng(1).random(found.layout.num_prunable) < 0.2
    kernel.predict(found.table, found.start.masked(other).floats, found.x.numpy())
    assert compact._last.held is not held
    assert (kernel.predict(found.table, fresh, found.x.numpy()) == shown).all()
    assert (found.kernel(debug=True).floats == fresh).all()


def test_a_dead_channel_is_its_own_mean_exactly() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 6, 3), nn.GroupNorm(6, 6), nn.Flatten(), nn.Linear(6 * 49, 3))
    module[3].weight.data[:] = torch.eye(3, 6 * 49)  # logits: the first pixels of the first map
    found = case(module, (1, 9, 9))
    dead = np.ones(found.layout.num_prunable, bool)
    dead[:9] = False
    logits = kernel.predict(found.table, found.start.masked(dead).floats, found.x.numpy())
    assert (logits == module[3].bias.detach().numpy()).all()
