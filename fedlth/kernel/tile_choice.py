"""The variant of tiles that is compiled here: the one FEDLTH_KERNEL_TILES names, else the fastest by measurement.

Measured once for a processor, a version of numba and one of the source, in about a tenth of a second and one or two to
compile the loops for it; the answer lies beside numba's machine code. Importing this file decides.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding
import numba
import numpy as np

from fedlth.kernel.arithmetic import filled
from fedlth.kernel.jit import cache_folder, probe, source_stamp
from fedlth.kernel.tile_variable import forced
from fedlth.kernel.tiles import VARIANTS, Tiles
from fedlth.kernel.vectors import dots, outer, paired_dots, store

_TAPS, _TURNS, _RUNS = 64, 600, 30  # a run is about a tenth of a millisecond, in the nearest cache


def _chosen() -> str:
    """Return the name of the variant to compile."""
    if name := forced():
        return name
    folder = cache_folder()
    file = None if folder is None else folder / f"tiles-{_place()}.txt"
    if file is not None and file.exists() and (known := file.read_text()) in VARIANTS:
        return known
    seconds = measured()
    name = min(seconds, key=lambda one: seconds[one])
    if file is not None:
        _keep(file, name)
    return name


def _place() -> str:
    """Return a digest of what the fastest variant depends on."""
    features = llvmlite.binding.get_host_cpu_features().flatten()
    told = (
        llvmlite.binding.get_process_triple(), llvmlite.binding.get_host_cpu_name(), features, numba.__version__,
        llvmlite.__version__, str(source_stamp()),
    )  # fmt: skip
    return hashlib.blake2b("\n".join(told).encode(), digest_size=8).hexdigest()


def _keep(file: Path, name: str) -> None:
    """Write the answer whole or not at all; without a place for it the next process measures again."""
    with contextlib.suppress(OSError):
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as made:
            made.write(name)
        os.replace(made.name, file)


def measured() -> dict[str, float]:
    """Return the least CPU seconds of each variant's tallest tiles, in turns, for as many multiply-adds each."""
    loops = {name: _loops(tiles) for name, tiles in VARIANTS.items()}
    x, sums = np.full(64 * _TAPS, 0.5, np.float32), np.zeros(1024, np.float32)
    best = {name: [float("inf")] * 2 for name in loops}
    for run in range(_RUNS + 1):
        for name, made in loops.items():
            for at, (loop, values) in enumerate(made):
                start = time.thread_time()
                loop(x, sums, _TURNS if run else 1)
                if run:  # the first compiles
                    best[name][at] = min(best[name][at], (time.thread_time() - start) / values)
    return {name: sum(parts) for name, parts in best.items()}


def _loops(tiles: Tiles) -> tuple[tuple[Any, int], tuple[Any, int]]:
    """Return a variant's sum over taps and its weight gradient, and how many multiply-adds each does at a tap."""
    height, width = tiles.taps[0]
    zero, many = filled(height, width), tiles.pairs[0] if tiles.pairs else 2
    pairs = filled(5 * many // 2, 16) if tiles.pairs else filled(10, 8)

    @probe
    def forward(x: Any, out: Any, turns: int) -> None:
        for _ in range(turns):
            tile = zero()
            for k in range(_TAPS):
                tile = outer(tile, x, k * height, 1, x, k * 16)
            store(tile, out, 0, width)

    @probe
    def paired(x: Any, out: Any, turns: int) -> None:
        for _ in range(turns):
            tile = pairs()
            for k in range(_TAPS):
                tile = paired_dots(tile, x, 0, 64, x, (0, 32, 64, 96, 128), 8 * k)
            store(tile, out, 0, 16)

    @probe
    def two(x: Any, out: Any, turns: int) -> None:
        for _ in range(turns):
            tile = pairs()
            for k in range(_TAPS):
                tile = dots(tile, x, (0, 64), 8 * k, x, (0, 32, 64, 96, 128), 8 * k)
            store(tile, out, 0, 8)

    return (forward, height * width), (paired if tiles.pairs else two, many * 40)


CHOSEN = _chosen()
TILES = VARIANTS[CHOSEN]
