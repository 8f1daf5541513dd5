"""GFLOP a second and share of the core's peak of each dense layer's three sums: forward, input's gradient, weights'.

python benchmarks/layers.py [MODEL ...]      leaf_cnn lenet5 resnet9 by default
FEDLTH_KERNEL_TILES=narrow python benchmarks/layers.py      the same in another variant of tiles

Each layer runs alone, where the kernel lays it out, again and again: in a training its maps and weights are colder. CPU
time of the thread, the best of many runs. Multiply-adds on padding are counted nowhere, and only the sums are timed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from core_peak import core_peak, multiply_adds
from numba import njit

from fedlth.kernel import columns as col
from fedlth.kernel import dense_forward, kernel, weights
from fedlth.kernel.graph import compile_layers
from fedlth.kernel.loop import backward_job, forward_job
from fedlth.kernel.memory_layout import lay_out
from fedlth.kernel.table import LayerTable
from fedlth.kernel.tile_choice import CHOSEN
from fedlth.models.layout import layout_of
from fedlth.models.prunable import prunable_names
from fedlth.models.registry import build

MODELS = {"leaf_cnn": (1, 28, 28), "lenet5": (1, 28, 28), "resnet9": (3, 32, 32)}
_SECONDS, _AT_ONCE = 0.1, 2e-3


@njit(nogil=True)
def _forward(row: Any, index: Any, work: Any, w: Any, lanes: int, times: int) -> None:
    for _ in range(times):
        if row[col.KIND] == col.LINEAR:
            dense_forward.sum_taps_of_vector(work, index, w, forward_job(row, lanes))
        else:
            dense_forward.sum_taps(work, index, w, forward_job(row, lanes))


@njit(nogil=True)
def _input(row: Any, index: Any, work: Any, w: Any, lanes: int, times: int) -> None:
    for _ in range(times):
        if row[col.KIND] == col.LINEAR:
            dense_forward.sum_taps_of_vector(work, index, w, backward_job(row, lanes))
        else:
            dense_forward.sum_taps(work, index, w, backward_job(row, lanes))


@njit(nogil=True)
def _weights(row: Any, index: Any, work: Any, grad: Any, lanes: int, times: int) -> None:
    for _ in range(times):
        if row[col.KIND] == col.LINEAR:
            weights.linear_weights(work, index, grad, row, lanes)
        else:
            weights.convolution_weights(work, index, grad, row, lanes)


SUMS: dict[str, Callable[..., None]] = {"forward": _forward, "input": _input, "weights": _weights}


def layers(name: str, peak: float) -> None:
    """Print a line a layer of one model."""
    shape = MODELS[name]
    module = build(name, num_classes=10, input_shape=shape, options={})
    table = compile_layers(module, layout_of(module, prunable_names(module, None)), shape)
    assert isinstance(table, LayerTable), table
    lanes = 16 if kernel.large(table) else 32
    plan, rng = lay_out(table, lanes), np.random.default_rng(0)
    work, w = (rng.standard_normal(size, np.float32) for size in (plan.work_size + 16, table.num_params))
    work = work[-(work.ctypes.data // 4) % 16 :][: plan.work_size]
    for op, row in zip(table.ops, plan.rows, strict=True):
        flop = 2 * multiply_adds(op, table) * lanes
        if not flop:
            continue
        cells = []
        for what, run in SUMS.items():
            if what == "input" and not row[col.NEEDS_DX]:
                cells.append("")
                continue
            at, array = (row, plan.index, work), w.copy()
            run(*at, array, lanes, 1)
            times, best, spent = max(1, round(_AT_ONCE * 1e11 / flop)), float("inf"), 0.0
            while spent < _SECONDS:
                start = time.thread_time()
                run(*at, array, lanes, times)
                took = time.thread_time() - start
                best, spent = min(best, took / times), spent + took
            cells.append(f"{1e3 * best:.3f} ms, {flop / best / 1e9:.0f} GFLOP/s, {flop / best / 1e9 / peak:.0%}")
        kind = "linear" if op.kind == col.LINEAR else "x".join(map(str, op.window))
        sizes = " -> ".join("x".join(map(str, table.shapes[at])) for at in (op.source, op.out))
        print(f"| {name}: {kind}, {sizes} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    measured = core_peak()
    peak = max(measured.values())
    told = ", ".join(f"{gflops:.0f} GFLOP/s in vectors of {width}" for width, gflops in measured.items())
    print(f"tiles {CHOSEN}; one core's peak: {told}\n\n| batch of 32 (16 in resnet9) | {' | '.join(SUMS)} |")
    print("|---|---|---|---|")
    for name in sys.argv[1:] or MODELS:
        layers(name, peak)
