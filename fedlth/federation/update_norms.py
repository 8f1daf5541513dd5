"""How far an update may lie from the state it began with, held against those accepted before it.

A guard against damage, not against skill: one client whose numbers are finite but absurd costs only itself. An update
is refused when its L2 distance from the global state is above both FACTOR times the median of the accepted ones and
OF_STATE times the norm of the global state itself. Parameters and buffers are held apart: running statistics are on
the scale of the data. What honest clients differ by stays far within: steps in one visit (each adds at most the rate
times a gradient), how far each has converged (which makes the median small; hence the second bound), and rewinds,
whose distance is at most a few norms of the model. docs/decisions.md has what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from fedlth.models.layout import Layout, Params
from fedlth.wire.errors import PayloadError
from fedlth.wire.payload import Content

FACTOR = 100.0
OF_STATE = 10.0
ENOUGH = 3  # with fewer distances known there is no majority to be held against
ALONE = 1e4  # times the state's norm: all that can then be said
WINDOW = 101  # how many of the last accepted distances make the median
MOST_COUNTED = 2**40  # how far one visit may move a counter (num_batches_tracked)
GROUPS = ("parameters", "buffers")

Distances = Mapping[str, float]


@dataclass
class UpdateNorms:
    """The distances that were accepted in this phase, oldest first, by group, and the state that this round sent."""

    theta: Params
    layout: Layout
    accepted: dict[str, list[float]] = field(default_factory=dict)

    def distances(self, content: Content) -> Distances:
        """Return the L2 distances of an update from the state, over the coordinates that it carries.

        Raises PayloadError where a counter moved further than any visit counts.
        """
        assert content.floats is not None and content.ints is not None
        if np.abs(content.ints.astype(np.float64) - self.theta.ints).max(initial=0) > MOST_COUNTED:
            raise PayloadError(f"update: a counter moved by more than {MOST_COUNTED} in one visit")
        away = content.floats - self.theta.floats
        if not content.mask.all():
            away[: content.mask.size] *= content.mask
        return self._norms(away)

    def known(self, more: Sequence[Distances] = ()) -> bool:
        """Say whether there are enough distances for a median, `more` counted in."""
        return len(self.accepted.get(GROUPS[0], ())) + len(more) >= ENOUGH

    def check(self, distances: Distances, more: Sequence[Distances] = ()) -> None:
        """Raise PayloadError at an absurd update; `more` are those that wait with it for a first majority."""
        for group, distance in distances.items():
            state, size = self._state[group], math.sqrt(self.layout.num_params)
            if self.known(more):
                median = float(np.median([*self.accepted.get(group, ()), *(m[group] for m in more)]))
                most = max(FACTOR * median, OF_STATE * max(state, 0.01 * size))
                why = (
                    f"{FACTOR:g} times the median {median:.2g} of others, or {OF_STATE:g} times the model's {state:.2g}"
                )
            elif group == "parameters":
                most, why = ALONE * max(state, size), "with few others to compare"
            else:
                continue  # statistics of unscaled data may be anything
            if not distance <= most:
                raise PayloadError(
                    f"update: its {group} must be within {most:.2g} of what was sent ({why}), got {distance:.2g}"
                )

    def accept(self, distances: Distances) -> None:
        """Keep the distances of an update that was accepted."""
        for group, distance in distances.items():
            self.accepted[group] = [*self.accepted.get(group, ()), distance][-WINDOW:]

    @cached_property
    def _state(self) -> Distances:
        return self._norms(self.theta.floats)

    def _norms(self, floats: np.ndarray) -> dict[str, float]:
        cut = self.layout.num_params
        with np.errstate(over="ignore"):  # beyond float32 is beyond any limit
            parts = [float(np.dot(part, part)) for part in (floats[:cut], floats[cut:])]
        return {group: math.sqrt(part) for group, part in zip(GROUPS, parts, strict=True)}
