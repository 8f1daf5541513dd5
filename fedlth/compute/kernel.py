"""Train and evaluate a network in the batch-innermost kernel; equal to fedlth.train up to float32 rounding."""

from __future__ import annotations

import importlib.util
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fedlth.compute import columns as col
from fedlth.compute.arrange import arrange
from fedlth.compute.places import Arrangement, stray
from fedlth.compute.shrink import give, shrink, take
from fedlth.compute.table import LayerTable, Op

# Below these densities the lists of kept weights beat the dense layer: `python benchmarks/kernel.py --crossover`
# (5 x 5 and 3 x 3 convolutions .6 to .7, linear layers .4, over two sizes each).
SPARSE_BELOW = {col.CONVOLUTION: 0.6, col.LINEAR: 0.4}
_LARGE_BYTES = 64 << 20
_NEAR, _TAPS = 5120, 16  # floats of a chunk's inputs (20 of 32 KB), kept weights of a chunk


@dataclass(frozen=True)
class Outcome:
    """Where a training ended: floats (num_floats,), the last epoch's mean loss, floats after the epochs asked for."""

    floats: np.ndarray
    loss: float
    snapshots: dict[int, np.ndarray] = field(default_factory=dict)


def warm(tell: Callable[[str], None], *, patience_s: float = 3.0) -> None:
    """Load the compiled kernel, or compile it once for this machine, before workers that would each do so.

    What takes longer than `patience_s` is no load, and is told.
    """
    told = threading.Timer(patience_s, tell, ["note: compiling the kernel once for this machine, about 45 s of CPU"])
    told.daemon = True
    told.start()
    try:
        op = Op(kind=col.LINEAR, source=0, out=1, weight=0, bias=6)
        table = LayerTable(
            ops=(op,), shapes=((3, 1, 1), (2, 1, 1)), output=1, num_floats=8, num_params=8, num_prunable=6
        )
        floats, x = np.zeros(8, np.float32), np.zeros((1, 3), np.float32)
        mask = np.array([True, False, False, False, False, False])
        train_epochs(table, floats, x, np.zeros(1, np.int64), [[np.zeros(1, np.int64)]], rates=np.ones(1), mask=mask)
        predict(table, floats, x)
    finally:
        told.cancel()


@dataclass(frozen=True)
class _Prepared:
    """An arrangement whose sparse layers have their lists; keep: which parameters are in the compact vector."""

    plan: Arrangement
    lists: np.ndarray
    work: np.ndarray
    lanes: int
    keep: np.ndarray | None


def available() -> str:
    """Return "" where the kernel can run, else one line that says what is missing."""
    missing = [name for name in ("numba", "llvmlite") if importlib.util.find_spec(name) is None]
    return f"the fast kernel needs {missing[0]} (pip install 'fedlth[fast]')" if missing else ""


def train_epochs(
    table: LayerTable,
    floats: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    epochs: Sequence[Sequence[np.ndarray]],
    *,
    rates: np.ndarray,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    mask: np.ndarray | None = None,
    moves: np.ndarray | None = None,
    snapshots: tuple[int, ...] = (),
    debug: bool = False,
) -> Outcome:
    """Train from `floats` (num_floats,) float32, which is not changed.

    x (N, ...) float32, y (N,) int64 in [0, num_classes). epochs: batches of positions in x, by epoch, of any size.
    rates: (steps,) learning rate of each step. mask (num_prunable,) bool: weights outside are zero from the first
    forward on. moves (num_params,) float32: a factor on each parameter's step. The GIL is released; the result
    depends on neither threads nor repeats. Raises ValueError on arrays that do not fit the table. `debug` looks
    afterwards for values where no layer may write, and raises RuntimeError.
    """
    from fedlth.compute import loop

    x, y = _examples(table, x), np.require(y, np.int64, ["C", "W"])
    batches = [np.asarray(part, np.int64) for parts in epochs for part in parts]
    order = np.concatenate(batches) if batches else np.zeros(0, np.int64)
    starts = np.concatenate([[0], np.cumsum([len(part) for part in batches])]).astype(np.int64)
    rates = np.asarray(rates, np.float32)
    _check(table, floats, mask, moves)
    if y.shape != (len(x),) or (len(y) and not (y.min() >= 0 and y.max() < table.num_classes)):
        raise ValueError(f"kernel: y must be {len(x)} labels in [0, {table.num_classes})")
    if not len(order) or (np.diff(starts) < 1).any() or order.min() < 0 or order.max() >= len(x):
        raise ValueError(f"kernel: batches must be positions in [0, {len(x)}), at least one each")
    if rates.shape != (len(batches),):
        raise ValueError(f"kernel: rates must be one a step, {len(batches)}, got {rates.shape}")
    weights, factor = floats[: table.num_params].copy(), _moves(table, mask, moves)
    if mask is not None:
        np.copyto(weights[: table.num_prunable], 0.0, where=~mask)
    ready = _prepare(table, _lanes(table, int(np.diff(starts).max())), mask)
    w = take(weights, ready.keep, 1.0)
    factor = take(factor, ready.keep, 0.0) if len(factor) else factor
    factor = factor[:0] if (factor == 1).all() else factor
    grad, losses = np.zeros_like(w), np.zeros(len(batches))
    velocity = np.zeros_like(w) if momentum else np.zeros(0, np.float32)
    kept: dict[int, np.ndarray] = {}

    def state() -> np.ndarray:
        out = floats.copy()
        out[: table.num_params] = give(w, ready.keep, table.num_params)
        return out

    ends = np.cumsum([len(parts) for parts in epochs])
    at = 0
    for epoch, end in enumerate(ends, 1):
        if epoch not in snapshots and epoch != len(ends):
            continue
        loop.train(
            ready.plan.rows,
            ready.plan.inlet,
            ready.plan.index,
            ready.lists,
            ready.plan.scales,
            ready.work,
            w,
            grad,
            velocity,
            factor,
            x,
            y,
            order,
            starts[at : end + 1],
            losses[at:end],
            rates[at:end],
            np.float32(momentum),
            np.float32(weight_decay),
            ready.lanes,
        )
        at = end
        if epoch in snapshots:
            kept[epoch] = state()
    if debug and (strays := stray(ready.plan, ready.work, ready.lanes)):
        raise RuntimeError(f"kernel: {strays} values were written where no layer may write")
    last = len(epochs[-1])
    return Outcome(state(), float(losses[-last:].sum() / (starts[-1] - starts[-1 - last])), kept)


def predict(table: LayerTable, floats: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return the logits (N, num_classes) float32 of x (N, ...) float32; weights that are zero are skipped."""
    from fedlth.compute import loop

    x = _examples(table, x)
    _check(table, floats, None, None)
    weights = floats[: table.num_params]
    ready = _prepare(table, _lanes(table, len(x)), weights != 0)
    w = take(weights, ready.keep, 1.0)
    logits = np.empty((len(x), table.num_classes), np.float32)
    order = np.arange(len(x))
    plan = ready.plan
    loop.predict(
        plan.rows, plan.inlet, plan.index, ready.lists, plan.scales, ready.work, w, x, order, logits, ready.lanes
    )
    return logits


def _lanes(table: LayerTable, largest: int) -> int:
    """Return how many examples go side by side: the fewest wasted, and the most where that is equal.

    Few where the maps of many would leave the last-level cache: ResNet-9 at 32 x 32 takes 1.09 s a step with 16 (129
    MB) and 1.50 s with 32 (249 MB), on one thread of a machine with 32 MB that others used too.
    """
    if 4 * arrange(table, 32).work_size > _LARGE_BYTES:
        return 16
    return min((32, 16), key=lambda lanes: -(-largest // lanes) * lanes)


def _examples(table: LayerTable, x: np.ndarray) -> np.ndarray:
    shape = table.shapes[0]
    if x.dtype != np.float32 or int(np.prod(x.shape[1:], dtype=np.int64)) != shape[0] * shape[1] * shape[2]:
        raise ValueError(f"kernel: x must be float32 of {shape} each, got {x.dtype} {x.shape}")
    # Numba would compile once more for a read-only array, such as a mapped file.
    return np.require(x.reshape(len(x), shape[0] * shape[1] * shape[2]), requirements=["C", "W"])


def _check(table: LayerTable, floats: np.ndarray, mask: np.ndarray | None, moves: np.ndarray | None) -> None:
    for name, array, size, kind in (
        ("floats", floats, table.num_floats, np.float32),
        ("mask", mask, table.num_prunable, np.bool_),
        ("moves", moves, table.num_params, np.float32),
    ):
        if array is not None and (array.shape != (size,) or array.dtype != kind):
            raise ValueError(f"kernel: {name} must be ({size},) {np.dtype(kind)}, got {array.shape} {array.dtype}")


def _moves(table: LayerTable, mask: np.ndarray | None, moves: np.ndarray | None) -> np.ndarray:
    """Return the factor on each parameter's step; empty where all move alike."""
    if mask is None and moves is None and not table.frozen:
        return np.zeros(0, np.float32)
    factor = np.ones(table.num_params, np.float32) if moves is None else moves.copy()
    if mask is not None:
        factor[: table.num_prunable] *= mask
    for start, end in table.frozen:
        factor[start:end] = 0.0
    return factor


def _prepare(table: LayerTable, lanes: int, kept: np.ndarray | None) -> _Prepared:
    """Arrange the network, or the smaller one that is all that a structured ticket leaves of it."""
    small = None if kept is None else shrink(table, kept, SPARSE_BELOW)
    if small is None:
        return _arranged(table, lanes, kept)
    inner = _arranged(small.table, lanes, small.kept)
    rows, lists = small.folded(inner.plan.rows, inner.lists, inner.keep)
    keep = small.places if inner.keep is None else small.places[inner.keep]
    return replace(inner, plan=replace(inner.plan, rows=rows), lists=lists, keep=keep)


def _arranged(table: LayerTable, lanes: int, kept: np.ndarray | None) -> _Prepared:
    """Choose sparse layers by their density, and give every weight its place in the compact vector."""
    from fedlth.compute import loop

    plan = arrange(table, lanes)
    rows = plan.rows.copy()
    work = np.zeros(plan.work_size + 16, np.float32)
    start = -(work.ctypes.data // 4) % 16
    work = work[start : start + plan.work_size]
    dropped: dict[int, int] = {}
    size, keep = 0, None
    for row, op in zip(rows, table.ops, strict=True):
        if kept is None or op.kind not in SPARSE_BELOW:
            continue
        count = _count(row, op)
        if op.weight + count > len(kept):
            continue
        alive = int(np.count_nonzero(kept[op.weight : op.weight + count]))
        if alive >= SPARSE_BELOW[op.kind] * count:
            continue
        keep = np.ones(table.num_params, bool) if keep is None else keep
        keep[op.weight : op.weight + count] = kept[op.weight : op.weight + count]
        dropped[op.weight] = count - alive
        row[col.SPARSE] = 1
        _cut(row, op, alive / count, lanes)
        for column, length in (
            (col.KEPT_STARTS, row[col.OUT_CHANNELS] * row[col.CHUNKS] + 1),
            (col.KEPT_PLACES, alive + 1),  # the last place is written, and not read
            (col.BACK_STARTS, row[col.CHANNELS] * row[col.BACK_CHUNKS] + 1 if op.kind == col.CONVOLUTION else 0),
            (col.BACK_KEPT_PLACES, alive + 1),
            (col.BACK_KEPT_WEIGHTS, alive if op.kind == col.CONVOLUTION else 0),
        ):
            row[column] = size
            size += int(length)
    lists = np.zeros(max(size, 1), np.int32)
    if keep is None or kept is None:
        return _Prepared(replace(plan, rows=rows), lists, work, lanes, None)
    for row, op in zip(rows, table.ops, strict=True):
        for column, place in ((col.WEIGHT, op.weight), (col.BIAS, op.bias)):
            if place >= 0:
                row[column] = place - sum(count for offset, count in dropped.items() if offset < place)
    most = [
        int(row[col.WEIGHT]) + int(np.count_nonzero(keep[op.weight : op.weight + _count(row, op)]))
        for row, op in zip(rows, table.ops, strict=True)
        if op.weight >= 0
    ]
    if max(most) > np.count_nonzero(keep) or (rows[:, [col.WEIGHT, col.BIAS]] < -1).any():
        raise ValueError("kernel: a layer would reach outside the kept parameters")
    loop.list_layers(rows, plan.index, lists, kept)
    return _Prepared(replace(plan, rows=rows), lists, work, lanes, np.flatnonzero(keep))


def _count(row: np.ndarray, op: Op) -> int:
    return int(row[col.OUT_CHANNELS]) * (int(row[col.TAPS]) if op.kind in SPARSE_BELOW else 1)


def _cut(row: np.ndarray, op: Op, density: float, lanes: int) -> None:
    """Cut the channels that a sum runs over into chunks whose inputs fit the first-level cache beside the rest.

    A chunk has at least _TAPS kept weights an output channel, since its partial sums pass through memory.
    """
    pixels = 3 if row[col.SPAN] > lanes else 1
    values = op.window[0] * (pixels + op.window[1] - 1) * lanes
    taps = int(row[col.KERNEL_AREA]) * max(density, 1e-9)
    for size, chunk, chunks in (
        (row[col.TAPS] // row[col.KERNEL_AREA], col.CHUNK, col.CHUNKS),
        (row[col.OUT_CHANNELS] // row[col.GROUPS], col.BACK_CHUNK, col.BACK_CHUNKS),
    ):
        row[chunk] = min(int(size), max(1, _NEAR // values, math.ceil(_TAPS / taps)))
        row[chunks] = -(-int(size) // int(row[chunk]))
