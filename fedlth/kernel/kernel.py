"""Train and evaluate a network in the batch-innermost kernel; equals plain torch up to float32 rounding."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from fedlth.kernel import columns as col
from fedlth.kernel.bounds_check import stray_writes
from fedlth.kernel.compact import Prepared, prepare
from fedlth.kernel.graph import LANES
from fedlth.kernel.live_channels import costs
from fedlth.kernel.memory_layout import lay_out
from fedlth.kernel.table import SPARSE_BELOW, LayerTable, Op
from fedlth.kernel.tile_variable import misnamed

log = logging.getLogger(__name__)

Shown = Callable[[int], np.ndarray]

_LARGE_BYTES = 64 << 20
_FASTER = 0.9  # of the dense multiply-adds: with fewer the kernel beats torch in a large network


@dataclass(frozen=True)
class Outcome:
    """Where a training ended: floats (num_floats,), the last epoch's mean loss, floats after the epochs asked for."""

    floats: np.ndarray
    loss: float
    snapshots: dict[int, np.ndarray] = field(default_factory=dict)


def warm() -> None:
    """Load the compiled kernel before workers that would each do so; compile it first, and say so, where it must be."""
    with told_of_compiling():
        op = Op(kind=col.LINEAR, source=0, out=1, weight=0, bias=9)
        table = LayerTable(
            ops=(op,), shapes=((3, 1, 1), (3, 1, 1)), output=1, num_floats=12, num_params=12, num_prunable=9
        )
        floats, x = np.zeros(12, np.float32), np.zeros((1, 3), np.float32)
        # Thin, and no row or column without a weight: a list, which must be compiled too, and no smaller layer.
        mask = np.eye(3, dtype=bool).reshape(-1)
        train_epochs(table, floats, x, np.zeros(1, np.int64), [[np.zeros(1, np.int64)]], rates=np.ones(1), mask=mask)
        predict(table, floats, x)


@contextmanager
def told_of_compiling() -> Iterator[None]:
    """Say once when numba begins to compile; what it loads from its disk cache, however slowly, is no compilation."""
    from numba.core import event

    class Once(event.Listener):
        def __init__(self) -> None:
            self.due = True

        def on_start(self, event: object) -> None:
            if self.due:
                self.due = False
                log.info("note: compiling the kernel once for this machine, about 45 s of CPU")

        def on_end(self, event: object) -> None:
            pass

    with event.install_listener("numba:compile", Once()):
        yield


def available() -> str:
    """Return "" where the kernel can run, else one line that says what is missing, or set wrongly."""
    missing = [name for name in ("numba", "llvmlite") if importlib.util.find_spec(name) is None]
    return f"the fast kernel needs {missing[0]} (pip install 'fedlth[fast]')" if missing else misnamed()


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
    pull: tuple[float, np.ndarray] | None = None,
    snapshots: tuple[int, ...] = (),
    shown: Shown | None = None,
    debug: bool = False,
) -> Outcome:
    """Train from `floats` (num_floats,) float32, which is not changed.

    x (N, ...) float32, y (N,) int64 in [0, num_classes). epochs: batches of positions in x, by epoch, of any size.
    rates: (steps,) learning rate of each step. mask (num_prunable,) bool: weights outside are zero from the first
    forward on. moves (num_params,) float32: a factor on each parameter's step. pull (strength, slope (num_params,)
    float32): strength w + slope is added to every gradient. shown: gives, for an epoch (from 0), the
    images to train on in place of those of x, in the order of its batches. The GIL is released; the result
    depends on neither threads nor repeats. Raises ValueError on arrays that do not fit the table. `debug` looks
    afterwards for values where no layer may write, and raises RuntimeError.
    """
    from fedlth.kernel import loop

    x, y = _examples(table, x), np.require(y, np.int64, ["C", "W"])
    batches = [np.asarray(part, np.int64) for parts in epochs for part in parts]
    order = np.concatenate(batches) if batches else np.zeros(0, np.int64)
    starts = np.concatenate([[0], np.cumsum([len(part) for part in batches])]).astype(np.int64)
    rates = np.asarray(rates, np.float32)
    strength, slope = (0.0, None) if pull is None else pull
    _check(table, floats, mask, moves, slope)
    if y.shape != (len(x),) or (len(y) and not (y.min() >= 0 and y.max() < table.num_classes)):
        raise ValueError(f"kernel: y must be {len(x)} labels in [0, {table.num_classes})")
    if not len(order) or (np.diff(starts) < 1).any() or order.min() < 0 or order.max() >= len(x):
        raise ValueError(f"kernel: batches must be positions in [0, {len(x)}), at least one each")
    if rates.shape != (len(batches),):
        raise ValueError(f"kernel: rates must be one a step, {len(batches)}, got {rates.shape}")
    ready = prepared(table, int(np.diff(starts).max()), mask)
    w, still = _compact(table, floats, ready.keep, mask)
    factor = _moves(table, moves, ready.keep, still)
    drawn = np.zeros(0, np.float32) if slope is None else _placed(slope, ready.keep, still)
    grad, losses = np.zeros_like(w), np.zeros(len(batches))
    velocity = np.zeros_like(w) if momentum else np.zeros(0, np.float32)
    kept: dict[int, np.ndarray] = {}

    def state() -> np.ndarray:
        out = np.zeros(len(floats) + 2, np.float32)  # with places for the zero and the one of `keep`
        out[slice(table.num_params) if ready.keep is None else ready.keep] = w
        out[table.num_params : len(floats)] = floats[table.num_params :]
        return out[: len(floats)]

    ends = np.cumsum([len(parts) for parts in epochs])
    at = 0
    for epoch, end in enumerate(ends, 1):
        if shown is None and epoch not in snapshots and epoch != len(ends):
            continue
        if shown is not None:
            chosen = order[starts[at] : starts[end]]
            x_now, y_now, order_now = _examples(table, shown(epoch - 1)), y[chosen], np.arange(len(chosen))
            if len(x_now) != len(chosen):
                raise ValueError(f"kernel: shown must give {len(chosen)} examples, got {len(x_now)}")
            starts_now = starts[at : end + 1] - starts[at]
        else:
            x_now, y_now, order_now, starts_now = x, y, order, starts[at : end + 1]
        loop.run(
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
            drawn,
            np.float32(strength),
            x_now,
            y_now,
            order_now,
            starts_now,
            losses[at:end],
            rates[at:end],
            np.float32(momentum),
            np.float32(weight_decay),
            np.empty((0, table.num_classes), np.float32),
            ready.lanes,
        )
        at = end
        if epoch in snapshots:
            kept[epoch] = state()
    if debug and (strays := stray_writes(ready.plan, ready.work, ready.lanes)):
        raise RuntimeError(f"kernel: {strays} values were written where no layer may write")
    last = len(epochs[-1])
    return Outcome(state(), float(losses[-last:].sum() / (starts[-1] - starts[-1 - last])), kept)


def predict(table: LayerTable, floats: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return the logits (N, num_classes) float32 of x (N, ...) float32; weights that are zero are skipped."""
    from fedlth.kernel import loop

    x = _examples(table, x)
    _check(table, floats)
    kept = floats[: table.num_prunable] != 0
    ready = prepared(table, len(x), kept)
    w, _ = _compact(table, floats, ready.keep, None)
    logits = np.empty((len(x), table.num_classes), np.float32)
    order = np.arange(len(x))
    plan, nothing = ready.plan, np.zeros(0, np.float32)
    loop.run(
        plan.rows, plan.inlet, plan.index, ready.lists, plan.scales, ready.work, w, nothing, nothing, nothing, nothing,
        np.float32(0), x, np.zeros(0, np.int64), order, np.zeros(1, np.int64), np.zeros(0), nothing, np.float32(0),
        np.float32(0), logits, ready.lanes,
    )  # fmt: skip
    return logits


def prepared(table: LayerTable, largest: int, kept: np.ndarray | None) -> Prepared:
    """Arrange a network for batches of at most `largest` examples inside a ticket; a thread holds its last one."""
    return prepare(table, _lanes(table, largest, kept), kept)


def large(table: LayerTable) -> bool:
    """Say whether the maps of 32 examples leave the last-level cache, where the kernel's layout loses its lead."""
    return 4 * lay_out(table, LANES).work_size > _LARGE_BYTES


def suits(table: LayerTable, kept: np.ndarray | None) -> bool:
    """Say whether the kernel is the faster backend for a training; kept: (num_prunable,) bool, or floats, 0 for dead.

    Where that was not measured: dense, a large network is as fast or faster in torch (ResNet-9 at 32 x 32: the kernel
    takes 1.0 to 1.2 of its time).
    """
    above = table.torch_above
    if above is None:
        above = _FASTER if large(table) else math.inf
    return above > 1 or (kept is not None and share(table, kept) < above)


def share(table: LayerTable, kept: np.ndarray) -> float:
    """Return what a ticket leaves of the dense multiply-adds; one on a list counts as more, by its layer."""
    return costs(table, kept[: table.num_prunable] != 0)[1] / _dense_cost(table)


@lru_cache(maxsize=4)
def _dense_cost(table: LayerTable) -> float:
    return costs(table, np.ones(table.num_prunable, bool))[0]


def _lanes(table: LayerTable, largest: int, kept: np.ndarray | None) -> int:
    """Return how many examples go side by side: the fewest wasted, and the most where that is equal.

    Few in a large network: ResNet-9 at 32 x 32 takes 1.09 s a step with 16 (129 MB) and 1.50 s with 32 (249 MB), on
    one thread of a machine with 32 MB of last-level cache that others used too. Few in a ticket, whose maps are most
    of what it reads: LeNet-5 and the LEAF CNN at density .05 take .85 to .95 of the time with 32 (AVX2).
    """
    below = SPARSE_BELOW[col.CONVOLUTION] if table.narrow_below is None else table.narrow_below
    if large(table) or (kept is not None and np.count_nonzero(kept) < below * kept.size):
        return 16
    return min((32, 16), key=lambda lanes: -(-largest // lanes) * lanes)


def _examples(table: LayerTable, x: np.ndarray) -> np.ndarray:
    shape = table.shapes[0]
    if x.dtype != np.float32 or int(np.prod(x.shape[1:], dtype=np.int64)) != shape[0] * shape[1] * shape[2]:
        raise ValueError(f"kernel: x must be float32 of {shape} each, got {x.dtype} {x.shape}")
    # Numba would compile once more for a read-only array, such as a mapped file.
    return np.require(x.reshape(len(x), shape[0] * shape[1] * shape[2]), requirements=["C", "W"])


def _check(
    table: LayerTable,
    floats: np.ndarray,
    mask: np.ndarray | None = None,
    moves: np.ndarray | None = None,
    slope: np.ndarray | None = None,
) -> None:
    for name, array, size, kind in (
        ("floats", floats, table.num_floats, np.float32),
        ("mask", mask, table.num_prunable, np.bool_),
        ("moves", moves, table.num_params, np.float32),
        ("slope", slope, table.num_params, np.float32),
    ):
        if array is not None and (array.shape != (size,) or array.dtype != kind):
            raise ValueError(f"kernel: {name} must be ({size},) {np.dtype(kind)}, got {array.shape} {array.dtype}")


def _compact(
    table: LayerTable, floats: np.ndarray, keep: np.ndarray | None, mask: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return a copy of the parameters that are kept, inside the mask, and the places in it that must not move."""
    if keep is None:
        w, still = floats[: table.num_params].copy(), np.zeros(0, bool) if mask is None else ~mask
    else:
        w, still = floats.take(keep, mode="clip"), keep >= table.num_params
        if mask is not None:
            still |= ~mask.take(keep, mode="clip") & (keep < len(mask))
    places = np.flatnonzero(still)
    w[places] = 0.0
    if keep is not None:
        w[keep == table.num_params + 1] = 1.0
    return w, places


def _moves(table: LayerTable, moves: np.ndarray | None, keep: np.ndarray | None, still: np.ndarray) -> np.ndarray:
    """Return the factor on each step of the compact vector, none at `still` places; empty where all move alike."""
    if not still.size and moves is None and not table.frozen:
        return np.zeros(0, np.float32)
    factor = np.ones(table.num_params, np.float32) if moves is None else moves.copy()
    for start, end in table.frozen:
        factor[start:end] = 0.0
    factor = _placed(factor, keep, still)
    return factor[:0] if (factor == 1).all() else factor


def _placed(values: np.ndarray, keep: np.ndarray | None, still: np.ndarray) -> np.ndarray:
    """Return values of all parameters at their places in the compact vector, zero at `still` places; a copy."""
    found: np.ndarray = values.copy() if keep is None else values.take(keep, mode="clip")
    found[still] = 0.0
    return found
