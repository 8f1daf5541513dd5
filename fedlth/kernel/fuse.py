"""Drop layers that nothing reads, and join each relu to the layer before it or to the max pool behind it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from fedlth.kernel.columns import COPY, MAX_POOL
from fedlth.kernel.kinds import KINDS
from fedlth.kernel.table import Op


def fuse(ops: list[Op], output: int) -> tuple[Op, ...]:
    """Return an equal list of layers with fewer passes over memory; value `output` stays."""
    ops = _reached(ops, output)
    for relu in [op for op in ops if op.kind == COPY and op.relu]:
        made = {op.out: op for op in ops}
        before = made.get(relu.source)
        if before is None or before.relu or not _clips(before) or _readers(ops, output)[relu.source] > 1:
            continue
        ops[ops.index(before)] = replace(before, relu=True, out=relu.out)
        ops.remove(relu)
    for pool in [op for op in ops if op.kind == MAX_POOL]:
        made = {op.out: op for op in ops}
        before = made.get(pool.source)
        # Clipping commutes with the maximum, and there are fewer values to clip behind it.
        if before is not None and before.relu and before.kind != MAX_POOL and _readers(ops, output)[pool.source] == 1:
            ops[ops.index(before)] = replace(before, relu=False)
            ops[ops.index(pool)] = replace(pool, relu=True)
    return tuple(ops)


def _clips(op: Op) -> bool:
    return op.weighted or KINDS[op.kind].clips


def _readers(ops: list[Op], output: int) -> Counter[int]:
    return Counter([output, *(value for op in ops for value in op.reads)])


def _reached(ops: list[Op], output: int) -> list[Op]:
    wanted, kept = {output}, []
    for op in reversed(ops):
        if op.out in wanted:
            wanted.update(op.reads)
            kept.append(op)
    return kept[::-1]
