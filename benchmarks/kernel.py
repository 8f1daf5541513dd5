"""Thread-CPU milliseconds a training step of our backends against raw torch, one thread, interleaved.

Rows that compute the whole network also say what share of the core's peak that is (core_peak.py); layers.py says where.

python benchmarks/kernel.py [MODEL ...]  ratios beside their limits, ok or MISSED (--quick: fewer repeats)
python benchmarks/kernel.py --crossover  dense and sparse by density and kind of layer: whence table.SPARSE_BELOW
python benchmarks/kernel.py --structured tickets of whole rows or channels beside narrow networks and single weights
python benchmarks/kernel.py --threads    one thread against two that train two clients at once
"""

from __future__ import annotations

import copy
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from core_peak import core_peak, training_flop
from torch import nn
from torch.nn import functional as F

from fedlth.data.examples import Examples
from fedlth.kernel import columns as col
from fedlth.kernel import compact, kernel
from fedlth.kernel.graph import compile_layers
from fedlth.kernel.table import SPARSE_BELOW, LayerTable
from fedlth.models.layout import layout_of, read
from fedlth.models.prunable import prunable_names
from fedlth.models.registry import build
from fedlth.tickets.granularity import GRANULARITIES
from fedlth.training.batches import batches
from fedlth.training.budget import Budget
from fedlth.training.flat_model import FlatModel
from fedlth.training.recipe import TrainingRecipe
from fedlth.training.request import drawn_request
from fedlth.training.train import train
from fedlth.training.tuned import tune

BATCH = 32
# Ratios to raw torch that a row must reach, by model and density; the last of each is torch, tuned.
LIMITS: dict[str, dict[float | str, float]] = {
    "lenet5": {1.0: 0.27, 0.5: 0.27, 0.2: 0.13, 0.1: 0.13, 0.05: 0.09, "tuned": 1.05},
    "leaf_cnn": {1.0: 0.80, 0.5: 0.80, 0.2: 0.40, 0.1: 0.40, 0.05: 0.20, "tuned": 1.05},
    "resnet9": {1.0: 1.0, 0.2: 0.60, "tuned": 1.05},
    "conv2": {"tuned": 1.05},
    "char_lstm": {"tuned": 1.05},
    "mlp": {"tuned": 1.05},
}
SHAPES = {"resnet9": (3, 32, 32), "conv2": (3, 32, 32), "char_lstm": (20,)}
EXAMPLES = {"resnet9": 64, "conv2": 64, "char_lstm": 128}


def cpu_seconds(work: Callable[[], object]) -> float:
    """Return the CPU time of this thread, which a busy machine changes less than the clock's."""
    start = time.thread_time()
    work()
    return time.thread_time() - start


@dataclass(frozen=True)
class Work:
    """One model with its data, and an epoch of it in each backend."""

    module: nn.Module
    shape: tuple[int, ...]
    x: torch.Tensor
    y: torch.Tensor

    @property
    def steps(self) -> int:
        return -(-len(self.x) // BATCH)

    @property
    def flop(self) -> int:
        """Return the operations of a dense epoch; 0 for a network that the kernel cannot read."""
        table = compile_layers(self.module, layout_of(self.module, prunable_names(self.module, None)), self.shape)
        return training_flop(table) * len(self.x) if isinstance(table, LayerTable) else 0

    def raw(self) -> Callable[[], object]:
        """Plain torch: no framework, no flat buffers, torch.optim.SGD."""
        module = copy.deepcopy(self.module)
        optimiser = torch.optim.SGD(module.parameters(), lr=0.05)

        def run() -> None:
            order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(0))
            for index in order.split(BATCH):
                optimiser.zero_grad(set_to_none=True)
                logits = module(self.x[index])
                F.cross_entropy(logits.reshape(-1, logits.shape[-1]), self.y[index].reshape(-1)).backward()
                optimiser.step()

        return run

    def tuned(self) -> Callable[[], object]:
        module = copy.deepcopy(self.module)
        layout = layout_of(module, prunable_names(module, None))
        start = read(module, layout)
        model = FlatModel(module, layout, "cpu", None, tune(module, self.x[:3]))
        recipe = TrainingRecipe(budget=Budget(epochs=1), batch_size=BATCH, lr=0.05)
        request = drawn_request(start, Examples(self.x, self.y), recipe, order=np.random.default_rng(1), torch_seed=0)
        return lambda: train(model, request)

    def kernel(self, density: float, granularity: str = "element", *, predict: bool = False) -> Callable[[], object]:
        layout = layout_of(self.module, prunable_names(self.module, None))
        start, table = read(self.module, layout), compile_layers(self.module, layout, self.shape)
        assert isinstance(table, LayerTable), table
        mask = ticket(self.module, density, granularity) if density < 1 else None
        parts = [batches(len(self.x), BATCH, np.random.default_rng(1))]
        given = {"rates": np.full(self.steps, 0.05), "mask": mask}
        x, y = self.x.numpy(), self.y.numpy()
        run: Callable[[], object] = lambda: kernel.train_epochs(table, start.floats, x, y, parts, **given)  # noqa: E731
        if predict:
            floats = start.floats if mask is None else start.masked(mask).floats
            run = lambda: kernel.predict(table, floats, x)  # noqa: E731
        run()  # compiled, and the memory touched
        return run


def ticket(module: nn.Module, density: float, granularity: str) -> np.ndarray:
    """Return a mask that keeps a share of each layer's groups, at least one.

    "narrow" keeps the rows and, behind them, the columns that a network with that share of the channels has.
    """
    layout, rng = layout_of(module, prunable_names(module, None)), np.random.default_rng(0)
    if granularity == "narrow":
        names = {part: f"{name}.weight" for name, part in module.named_modules()}
        kept, of = np.zeros(layout.num_prunable, bool), {e.name: e for e in layout.prunable}
        for layer, outputs, inputs in widths(module, density):
            e = of[names[layer]]
            kept[e.slice].reshape(e.shape)[:outputs, :inputs] = True
        return kept
    groups = GRANULARITIES[granularity]().groups(layout)
    kept = np.zeros(groups.layout.num_prunable, bool)
    for e in groups.layout.prunable:
        kept[e.offset + rng.permutation(e.size)[: max(1, round(density * e.size))]] = True
    return groups.spread(kept)


def widths(module: nn.Module, share: float) -> list[tuple[nn.Conv2d | nn.Linear, int, int]]:
    """Return each layer of a chain, and how many outputs and inputs it has with a share of the channels between."""
    layers = [part for part in module.modules() if isinstance(part, (nn.Conv2d, nn.Linear))]
    shapes = [layer.weight.shape for layer in layers]
    return [
        (layer, n if layer is layers[-1] else round(n * share), m if layer is layers[0] else round(m * share))
        for layer, (n, m, *_) in zip(layers, shapes, strict=True)
    ]


def narrow(module: nn.Module, share: float) -> nn.Module:
    """Return a chain of convolutions and linear layers with a share of the channels between them."""
    module = copy.deepcopy(module)
    for layer, outputs, inputs in widths(module, share):
        assert layer.bias is not None
        layer.weight = nn.Parameter(layer.weight[:outputs, :inputs].detach().clone())
        layer.bias = nn.Parameter(layer.bias[:outputs].detach().clone())
        if isinstance(layer, nn.Linear):
            layer.out_features, layer.in_features = outputs, inputs
        else:
            layer.out_channels, layer.in_channels = outputs, inputs
    return module


def work(name: str, module: nn.Module | None = None, shape: tuple[int, ...] | None = None, size: int = 0) -> Work:
    """Return a built-in model, or one's own, with random data."""
    torch.manual_seed(0)
    shape = shape or SHAPES.get(name, (1, 28, 28))
    module = module or build(name, num_classes=10, input_shape=shape, options={})
    size = size or EXAMPLES.get(name, 608)
    x = torch.randint(0, 10, (size, *shape)) if name == "char_lstm" else torch.randn(size, *shape)
    classes = module(x[:2]).shape
    return Work(module, shape, x, torch.randint(0, classes[-1], (size, *classes[1:-1])))


def interleaved(runs: dict[float | str, Callable[[], object]], repeats: int) -> dict[float | str, float]:
    """Return the least CPU seconds of each, taken in turns."""
    best: dict[float | str, float] = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats):
        for key, run in runs.items():
            best[key] = min(best[key], cpu_seconds(run))
    return best


def share(flop: float, seconds: float, peak: float) -> str:
    """Return what of the core's peak (GFLOP/s) work reaches, as words to add; nothing where its size is not known."""
    return f", {flop / seconds / 1e9:.0f} GFLOP/s, {flop / seconds / 1e9 / peak:.0%} of peak" if flop else ""


def ratios(name: str, repeats: int, peak: float) -> bool:
    """Print one line a backend; return whether all are within their limits."""
    given = work(name)
    flop = given.flop
    runs: dict[float | str, Callable[[], object]] = {"raw": given.raw()}
    for key in LIMITS[name]:
        runs[key] = given.kernel(key) if isinstance(key, float) else given.tuned()
    best, good = interleaved(runs, repeats), True
    print(f"{name}: raw torch {best['raw'] / given.steps * 1e3:.2f} ms a step{share(flop, best['raw'], peak)}")
    for key, limit in LIMITS[name].items():
        ratio = best[key] / best["raw"]
        good &= ratio <= limit
        what = f"density {key}" if isinstance(key, float) else "torch, tuned"
        verdict = "ok" if ratio <= limit else "MISSED"
        ms = best[key] / given.steps * 1e3
        told = share(flop, best[key], peak) if key in (1.0, "tuned") else ""
        print(f"  {what:12} {ms:8.2f} ms, {ratio:.3f} of raw torch (limit {limit:.2f}) {verdict}{told}", flush=True)
    return good


def prepared_anew(run: Callable[[], object]) -> Callable[[], object]:
    """Return the run with its lists made anew, as a client's first batch finds them."""

    def anew() -> object:
        compact.forget()
        return run()

    return anew


def crossover(densities: Iterable[float]) -> None:
    """Print a step of nets that are nearly one layer, dense and sparse, and where the two lines meet."""
    nets: dict[str, tuple[int, tuple[int, ...], nn.Module]] = {
        "convolution 5 x 5, 32 -> 64": (col.CONVOLUTION, (32, 14, 14), nn.Conv2d(32, 64, 5, padding=2)),
        "convolution 3 x 3, 64 -> 64": (col.CONVOLUTION, (64, 14, 14), nn.Conv2d(64, 64, 3, padding=1)),
        "convolution 5 x 5, 6 -> 16": (col.CONVOLUTION, (6, 14, 14), nn.Conv2d(6, 16, 5, padding=2)),
        "linear 3136 -> 512": (col.LINEAR, (3136, 1, 1), nn.Linear(3136, 512)),
        "linear 400 -> 120": (col.LINEAR, (400, 1, 1), nn.Linear(400, 120)),
    }
    before = dict(SPARSE_BELOW)
    for title, (kind, shape, layer) in nets.items():
        # A norm before it, so that the gradient of its input is wanted; the rest is small.
        if isinstance(layer, nn.Linear):
            parts = [nn.Flatten(), layer, nn.Linear(layer.out_features, 2)]
        else:
            parts = [layer, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(int(layer.out_channels), 2)]
        given, lines = work(title, nn.Sequential(nn.GroupNorm(1, shape[0]), *parts), shape, 608), []
        for density in densities:
            best = {}
            for below in (0.0, 2.0):
                SPARSE_BELOW[kind] = below
                run = given.kernel(density)
                best[below] = min(cpu_seconds(prepared_anew(run)) for _ in range(3)) / given.steps * 1e3
            lines.append((density, best[0.0], best[2.0]))
            print(f"{title}: density {density:.2f}: dense {best[0.0]:7.3f} ms, sparse {best[2.0]:7.3f} ms", flush=True)
        SPARSE_BELOW.update(before)
        meet = [d for d, dense, sparse in lines if sparse < dense]
        print(f"{title}: sparse is faster up to density {max(meet, default=0.0):.2f}")


def structured(repeats: int) -> None:
    """Print a step inside tickets of whole rows and whole channels, beside what else could train as much or little."""
    for name in ("leaf_cnn", "lenet5", "resnet9"):
        given = work(name)
        runs: dict[float | str, Callable[[], object]] = {"raw torch": given.raw(), "kernel": given.kernel(1.0)}
        for share in (0.5, 0.25):
            kinds = ["row", "channel", "element"]
            if name != "resnet9":  # whose channels go around by additions: no chain
                small = replace(given, module=narrow(given.module, share))
                runs[f"{share} raw torch, narrow"] = small.raw()
                runs[f"{share} kernel, narrow"] = small.kernel(1.0)
                kinds.insert(0, "narrow")
            for kind in kinds:
                runs[f"{share} ticket by {kind}"] = given.kernel(share, kind)
        for share, kind in ((1.0, "element"), (0.5, "narrow"), (0.5, "row"), (0.5, "element")):
            if name == "leaf_cnn":
                runs[f"{share} {kind}, evaluation"] = given.kernel(share, kind, predict=True)
        best = interleaved(runs, 2 if name == "resnet9" else repeats)
        print(f"{name}: raw torch {best['raw torch'] / given.steps * 1e3:.2f} ms a step")
        for key, seconds in best.items():
            print(f"  {key:24} {seconds / given.steps * 1e3:7.3f} ms, {seconds / best['raw torch']:.3f} of raw torch")


def threads() -> None:
    """Print how much more two threads do than one, in clock time; a busy machine shows less."""
    given = work("lenet5", size=1216)
    for density in (1.0, 0.2):
        runs = [given.kernel(density) for _ in range(2)]

        def clock(count: int, runs: list[Callable[[], object]] = runs) -> float:
            workers = [threading.Thread(target=run) for run in runs[:count]]
            start = time.perf_counter()
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            return time.perf_counter() - start

        one = min(clock(1) for _ in range(7))
        two = min(clock(2) for _ in range(7))
        print(f"lenet5 density {density}: two threads do {2 * one / two:.2f} times the work of one")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "--crossover" in sys.argv:
        crossover((0.2, 0.3, 0.4, 0.5, 0.6, 0.7))
    elif "--structured" in sys.argv:
        structured(3 if "--quick" in sys.argv else 5)
    elif "--threads" in sys.argv:
        threads()
    else:
        few, peaks = "--quick" in sys.argv, core_peak()
        print(", ".join(f"{gflops:.0f} GFLOP/s in vectors of {width}" for width, gflops in peaks.items()))
        names = [name for name in LIMITS if name in sys.argv] or LIMITS
        met = [ratios(name, 3 if few or name in ("resnet9", "conv2") else 7, max(peaks.values())) for name in names]
        sys.exit(0 if all(met) else 1)
