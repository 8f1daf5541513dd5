"""CPU milliseconds a training step of the kernel against eager torch, one thread: python benchmarks/kernel.py."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from fedlth.compute import kernel
from fedlth.compute.graph import compile_layers
from fedlth.compute.table import LayerTable
from fedlth.models.prunable import prunable_names
from fedlth.models.registry import build
from fedlth.params import layout_of, read
from fedlth.train import Bound, Plan, batches, train

DENSITIES = (1.0, 0.5, 0.2, 0.1, 0.05)
EXAMPLES, BATCH, SHAPE = 600, 32, (1, 28, 28)


def cpu_seconds(work: Callable[[], object]) -> float:
    """Return the CPU time of this thread, which a busy machine changes less than the clock's."""
    start = time.thread_time()
    work()
    return time.thread_time() - start


def measure(name: str, epochs: int, repeats: int) -> None:
    """Print one line a density; each measurement is the least of interleaved repeats."""
    torch.manual_seed(0)
    module = build(name, num_classes=10, input_shape=SHAPE, options={})
    layout = layout_of(module, prunable_names(module, None))
    start, table = read(module, layout), compile_layers(module, layout, SHAPE)
    assert isinstance(table, LayerTable), table
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((EXAMPLES, *SHAPE)).astype(np.float32))
    y = torch.from_numpy(rng.integers(0, 10, EXAMPLES))
    plan, bound = Plan(epochs=epochs, batch_size=BATCH, lr=0.05), Bound(module, layout, "cpu")
    parts = [batches(EXAMPLES, BATCH, np.random.default_rng(1)) for _ in range(epochs)]
    steps = sum(map(len, parts))
    masks = {d: rng.random(layout.num_prunable) < d if d < 1 else None for d in DENSITIES}

    def fast(mask: np.ndarray | None) -> object:
        rates = np.full(steps, plan.lr)
        return kernel.train_epochs(table, start.floats, x.numpy(), y.numpy(), parts, rates=rates, mask=mask)

    def eager() -> object:
        return train(bound, start, data=(x, y), plan=plan, order=np.random.default_rng(1), torch_seed=0)

    fast(None)
    fast(masks[0.5])
    best: dict[float, float] = dict.fromkeys((0.0, *DENSITIES), float("inf"))
    for _ in range(repeats):
        best[0.0] = min(best[0.0], cpu_seconds(eager))
        for density, mask in masks.items():
            best[density] = min(best[density], cpu_seconds(lambda mask=mask: fast(mask)))  # type: ignore[misc]
    print(f"{name}: eager torch {best[0.0] / steps * 1e3:.2f} ms a step")
    for density in DENSITIES:
        ms, ratio = best[density] / steps * 1e3, best[density] / best[0.0]
        print(f"  density {density:<4}: {ms:6.2f} ms, {ratio:.3f} of eager, {1 / ratio:4.1f} times as fast", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    few = "--quick" in sys.argv
    measure("lenet5", epochs=1, repeats=2 if few else 7)
    measure("leaf_cnn", epochs=1, repeats=1 if few else 3)
