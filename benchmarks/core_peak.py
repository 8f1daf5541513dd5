"""What a share of the core's peak is a share of, and how much work a training step is.

The peak: a loop of independent multiply-adds in registers, compiled by numba as the kernel is, of vectors of 16 and of
8 float32; where vectors are of 8 both are the same. The best of many short runs in CPU time of the thread: other work
on the machine, and a hyperthread's neighbour most of all, can only lower it.

python benchmarks/core_peak.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from fedlth.kernel import columns as col
from fedlth.kernel.table import LayerTable, Op

_CHAINS, _TURNS = 12, 200_000  # a chain waits 4 cycles for itself, and two units want 8 chains


@lru_cache
def _loops() -> dict[int, Callable[[np.ndarray, int], Any]]:
    """Return the compiled loop by how many values a vector has."""
    from numba import njit

    from fedlth.kernel.arithmetic import filled, multiply_add
    from fedlth.kernel.vectors import load, store

    def loop(width: int) -> Callable[[np.ndarray, int], Any]:
        zeros = filled(_CHAINS, width)

        @njit(nogil=True)
        def run(x: Any, turns: int) -> None:
            tile, factor, shift = zeros(), load(zeros(), x, 0, 0), load(zeros(), x, 16, 0)
            for _ in range(turns):
                tile = multiply_add(tile, factor, shift)
            store(tile, x, 32, 16)

        return run

    return {width: loop(width) for width in (16, 8)}


def core_peak(runs: int = 20) -> dict[int, float]:
    """Return the GFLOP a second of one core by values a vector: the best of `runs` runs, taken in turns."""
    x = np.full(32 + 16 * _CHAINS, 0.5, np.float32)
    best = dict.fromkeys(_loops(), 0.0)
    for at in range(runs + 1):
        for width, run in _loops().items():
            start = time.thread_time()
            run(x, _TURNS if at else 1)
            if at:  # the first compiles
                best[width] = max(best[width], 2e-9 * width * _CHAINS * _TURNS / (time.thread_time() - start))
    return best


def multiply_adds(op: Op, table: LayerTable) -> int:
    """Return those of one example in one pass of a convolution or linear layer, on padding none; else 0."""
    source, out = table.shapes[op.source], table.shapes[op.out]
    if op.kind == col.LINEAR:
        return out[0] * (len(op.picks) or int(np.prod(source)))
    if op.kind != col.CONVOLUTION:
        return 0
    inside = 1
    for size, count, taps, step, rim in zip(source[1:], out[1:], op.window, op.stride, op.padding, strict=True):
        at = np.arange(count)[:, None] * step - rim + np.arange(taps)
        inside *= int(np.count_nonzero((at >= 0) & (at < size)))
    return out[0] * source[0] // op.groups * inside


def training_flop(table: LayerTable) -> int:
    """Return the floating point operations of one example in a dense training step: forward, weights, inputs.

    Convolutions and linear layers alone, and no gradient of an input that no weight comes before.
    """
    trained: set[int] = set()
    total = 0
    for op in table.ops:
        total += 2 * multiply_adds(op, table) * (3 if op.source in trained else 2)
        if op.weight >= 0 or trained & set(op.reads):
            trained.add(op.out)
    return total


if __name__ == "__main__":
    for width, gflops in core_peak().items():
        print(f"vectors of {width} values: {gflops:.0f} GFLOP/s")
