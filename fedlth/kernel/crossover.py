"""Below which density a layer's list of kept weights beats the dense layer on this processor: measured layer by layer.

Each layer is trained alone inside a random ticket, dense and on lists of two densities. Between these, and a little
beyond, a list's time is a line; where it meets the dense layer's is the answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from fedlth.kernel import columns as col
from fedlth.kernel import kernel
from fedlth.kernel.graph import LANES
from fedlth.kernel.step_time import TRAINING_STEPS, StepTimer, in_turns
from fedlth.kernel.table import LayerTable, Op

THIN, HALF = 0.25, 0.5  # densities that are timed
_FLAT = 0.02  # of the dense layer's time: where a list's changes less between the densities, it says nothing


def lists_below(table: LayerTable, examples: int, cpu_s: float) -> tuple[float, ...]:
    """Return the density of each weighted layer, for batches of so many examples, in about `cpu_s` CPU seconds.

    A layer that no ticket prunes keeps what it has without a measurement.
    """
    large, runs = kernel.large(table), dict[tuple[LayerTable, str], StepTimer]()
    layers = [op for op in table.ops if op.weighted]
    # As many examples side by side as the whole network has, dense and on lists: what they do to either is not asked.
    narrow, examples = (2.0, min(examples, 16)) if large else (0.0, min(examples, LANES))
    alone = {op.out: replace(_alone(table, op), narrow_below=narrow) for op in layers if _prunable(table, op)}
    for one in alone.values():  # equal layers are equal keys
        dense, listed = one.with_lists_below((0.0, 0.0)), one.with_lists_below((2.0, 0.0))
        rng = np.random.Generator(np.random.PCG64(0))
        floats = rng.standard_normal(one.num_floats, np.float32) * np.float32(0.05)
        runs[one, "dense"] = timed(dense, floats, HALF, examples)
        runs[one, "half"] = timed(listed, floats, HALF, examples)
        runs[one, "thin"] = timed(listed, floats, THIN, examples)
    best = in_turns(runs, cpu_s) if runs else {}
    found = {one: met(*(best[one, what] for what in ("dense", "half", "thin"))) for one in alone.values()}
    below = (op.sparse_below if op.out not in alone else found[alone[op.out]] for op in layers)
    return tuple(op.sparse_below if one is None else one for op, one in zip(layers, below, strict=True))


def met(dense: float, half: float, thin: float) -> float | None:
    """Return where the line through a list's times meets the dense layer's; None where it is too flat to say."""
    slope = half - thin
    if slope <= _FLAT * dense:
        return None
    return round(min(max(THIN + (HALF - THIN) * (dense - thin) / slope, 0.0), 1.0), 2)


def timed(table: LayerTable, floats: np.ndarray, density: float, examples: int) -> StepTimer:
    """Return the timer of a network's trainings on random data, dense or inside a random ticket.

    floats (num_floats,) float32: as they are initialised, or the loss may saturate, and its slopes are too small for
    float32's fast range, which takes twice as long.
    """
    rng = np.random.Generator(np.random.PCG64(0))
    x, y = rng.standard_normal((examples, math.prod(table.shapes[0])), np.float32), np.zeros(examples, np.int64)
    mask = None if density == 1 else ticket(table, density)

    def train(step: Callable[[], None]) -> object:
        def shown(_: int) -> np.ndarray:
            step()
            return x

        epochs = [[np.arange(examples)]] * (TRAINING_STEPS + 1)
        rates = np.zeros(len(epochs))
        return kernel.train_epochs(table, floats, x, y, epochs, rates=rates, mask=mask, shown=shown)

    return StepTimer(train, lambda: kernel.prepared(table, examples, mask))


def ticket(table: LayerTable, density: float) -> np.ndarray:
    """Return a random mask that keeps a share of each layer's prunable weights."""
    rng = np.random.Generator(np.random.PCG64(0))
    return rng.random(table.num_prunable) < density


def _prunable(table: LayerTable, op: Op) -> bool:
    return op.weight + _weights(table, op) <= table.num_prunable


def _weights(table: LayerTable, op: Op) -> int:
    channels, *size = table.shapes[op.source]
    area = math.prod(op.window if op.kind == col.CONVOLUTION else size)
    return table.shapes[op.out][0] * (channels // op.groups) * area


def _alone(table: LayerTable, op: Op) -> LayerTable:
    """Return a network that is nearly this layer alone: a norm before it where its input's gradient is wanted."""
    source, out, size = table.shapes[op.source], table.shapes[op.out], _weights(table, op)
    shapes, ops, end = [source], list[Op](), size
    if op.source:
        ops.append(Op(kind=col.GROUP_NORM, source=0, out=1, weight=end, bias=end + source[0], scale=1e-5))
        shapes.append(source)
        end += 2 * source[0]
    at = len(shapes)
    ops.append(replace(op, source=at - 1, out=at, weight=0, bias=end if op.bias >= 0 else -1, measured_below=None))
    shapes += [out, (out[0], 1, 1), (2, 1, 1)]
    end += out[0] * (op.bias >= 0)
    ops.append(
        Op(kind=col.AVERAGE_POOL, source=at, out=at + 1, window=out[1:], stride=out[1:], scale=1 / math.prod(out[1:]))
    )
    ops.append(Op(kind=col.LINEAR, source=at + 1, out=at + 2, weight=end, bias=end + 2 * out[0]))
    end += 2 * out[0] + 2
    return LayerTable(
        ops=tuple(ops), shapes=tuple(shapes), output=at + 2, num_floats=end, num_params=end, num_prunable=size
    )
