"""Which numbers a message may hold at all, whoever sends it: what no honest client can have is refused at the door."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedlth.experiment.experiment import Experiment
from fedlth.methods.client_update import UPDATE, sends_in
from fedlth.methods.method import Phase
from fedlth.models.layout import Layout
from fedlth.wire.errors import PayloadError
from fedlth.wire.payload import Content

Range = tuple[np.ndarray, np.ndarray]  # the least and the most that each number may be, (num_floats,)


def ranges_of(experiment: Experiment, phase: Phase, round: int) -> Mapping[str, Range]:
    """Return what the numbers of a round's messages may be, by name; what may be anything is left out.

    The variances of a state are at least 0; an update says of its other messages what it knows (`ClientUpdate.range`).
    """
    said, found = getattr(phase.update, "range", None), dict[str, Range]()
    for name, kind in sends_in(phase.update, round):
        layout = experiment.message_layout(phase, name, kind)
        if kind == "values" and name == UPDATE:
            found[name] = np.where(layout.variances, 0.0, -np.inf), np.full(layout.num_floats, np.inf)
        elif kind != "mask" and said is not None and (limits := said(name, experiment.task)) is not None:
            least, most = limits
            found[name] = np.broadcast_to(least, layout.num_floats), np.broadcast_to(most, layout.num_floats)
    return {n: limits for n, limits in found.items() if any(np.isfinite(part).any() for part in limits)}


def check_range(name: str, content: Content, limits: Range, layout: Layout) -> None:
    """Raise PayloadError at the first number outside its range, naming its tensor."""
    if content.floats is None:
        return
    least, most = limits
    wrong = np.flatnonzero((content.floats < least) | (content.floats > most))
    if wrong.size:
        at = int(wrong[0])
        entry = next(e for e in layout.floats if e.offset <= at < e.offset + e.size)
        raise PayloadError(
            f"{name}: {entry.name} must be in [{least[at]:g}, {most[at]:g}], got {float(content.floats[at]):.4g}"
        )
