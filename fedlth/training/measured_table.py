"""The layer table of a study's network, with the crossovers that were measured of it."""

from __future__ import annotations

import math
from dataclasses import replace

from fedlth.kernel.table import LayerTable
from fedlth.models.layout import Layout
from fedlth.study.compute_section import Crossovers


def measured_table(table: LayerTable | str, layout: Layout, crossovers: Crossovers | None) -> LayerTable | str:
    """Return a network with a study's crossovers; a layer that these do not name keeps the kernel's own."""
    if crossovers is None or isinstance(table, str):
        return table
    places = {e.offset: e.name for e in layout.floats if e.name in crossovers.sparse_below}
    weighted = [op for op in table.ops if op.weighted]
    below = (crossovers.sparse_below[places[op.weight]] if op.weight in places else op.sparse_below for op in weighted)
    above = math.inf if crossovers.torch_above is None else crossovers.torch_above
    found = table.with_lists_below(tuple(below))
    return replace(found, torch_above=above, narrow_below=crossovers.narrow_below)


def by_name(table: LayerTable, layout: Layout) -> dict[str, float]:
    """Return the density below which each weighted layer's kept weights are a list, by the name of the weights."""
    names = {e.offset: e.name for e in layout.floats}
    return {names[op.weight]: op.sparse_below for op in table.ops if op.weighted}
