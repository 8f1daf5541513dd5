"""How large the numbers of an answer may be, held against those accepted before it.

A guard against damage, not against skill: one client whose numbers are finite but absurd costs only itself.

The new state that an update holds is judged by its L2 distance from the global state: refused when that is above both
FACTOR times the median of the accepted ones and OF_STATE times the norm of the global state itself. Parameters and
buffers are held apart: running statistics are on the scale of the data. What honest clients differ by stays far within:
steps in one visit (each adds at most the rate times a gradient), how far each has converged (which makes the median
small; hence the second bound), and rewinds, whose distance is at most a few norms of the model.

All else that is summed or ranked (changes of a control variate, scores, statistics) is judged by its own L2 norm, each
message by those of its name. Clients differ by far more there, squared gradients by how far each has converged; hence
the wider bounds. docs/decisions.md has what was measured.

No majority is believed at any size: what all clients of a first round send may be absurd too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from fedlth.methods.client_update import UPDATE
from fedlth.models.layout import Layout, Params
from fedlth.wire.errors import PayloadError
from fedlth.wire.payload import Content

FACTOR = 100.0
OF_STATE = 10.0
ENOUGH = 3  # with fewer distances known there is no majority to be held against
ALONE = 1e4  # times the state's norm: all that can then be said
TOGETHER = 1e6  # times the state's norm: whatever the others sent
STATISTICS = 1e12  # times the norm of a state's buffers, alone and together: of unscaled data they may be large
OTHERS, FREE, MOST = 1e6, 1e6, 1e12  # of all else: times the median; a mean size below which all passes; one never
WINDOW = 101  # how many of the last accepted distances make the median
MOST_COUNTED = 2**40  # how far one visit may move a counter (num_batches_tracked)
GROUPS = ("parameters", "buffers")

Distances = Mapping[str, float]


@dataclass(frozen=True)
class Sizes:
    """What is judged of one answer: by group (GROUPS, or a message's name) its norm; of messages, how many numbers."""

    norms: Distances
    counts: Mapping[str, int] = field(default_factory=dict)


@dataclass
class UpdateNorms:
    """The norms that were accepted in this phase, oldest first, by group, and the state that this round sent.

    `fresh` counts those of this round.
    """

    theta: Params
    layout: Layout
    accepted: dict[str, list[float]] = field(default_factory=dict)
    fresh: dict[str, int] = field(default_factory=dict)

    def sizes(self, contents: Mapping[str, Content], *, moves_state: bool) -> Sizes:
        """Return the norms of an answer's messages that have numbers; `moves_state`: UPDATE is the state, moved.

        Raises PayloadError where a counter moved further than any visit counts.
        """
        norms, counts = dict[str, float](), dict[str, int]()
        for name, content in contents.items():
            if content.floats is None:
                continue
            if name == UPDATE and moves_state:
                norms |= self.distances(content)
            else:
                norms[name], counts[name] = _norm(content.floats), content.floats.size
        return Sizes(norms, counts)

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

    def known(self, more: Sequence[Sizes] = ()) -> bool:
        """Say whether there are enough norms for a median in every group that `more` have, these counted in."""
        groups = {group for one in more for group in one.norms} or {GROUPS[0]}
        return all(len(self._of(group, more)) >= ENOUGH for group in groups)

    def check(self, sizes: Sizes, more: Sequence[Sizes] = ()) -> None:
        """Raise PayloadError at absurd numbers; `more` are those that wait with them for a first majority."""
        for group, norm in sizes.norms.items():
            others = self._of(group, more)
            median = float(np.median(others)) if len(others) >= ENOUGH else None
            if group in GROUPS:
                self._check_state(group, norm, median)
            else:
                _check_other(group, norm, sizes.counts[group], median)

    def _check_state(self, group: str, distance: float, median: float | None) -> None:
        state, size = self._state[group], math.sqrt(self.layout.num_params)
        alone, together = (ALONE, TOGETHER) if group == "parameters" else (STATISTICS, STATISTICS)
        most, why = alone * max(state, size), "with few others to compare"
        if median is not None:
            most = max(FACTOR * median, OF_STATE * max(state, 0.01 * size))
            why = f"{FACTOR:g} times the median {median:.2g} of others, or {OF_STATE:g} times the model's {state:.2g}"
            if most > together * max(state, size):
                most, why = together * max(state, size), "whatever others send"
        if not distance <= most:
            raise PayloadError(
                f"update: its {group} must be within {most:.2g} of what was sent ({why}), got {distance:.2g}"
            )

    def accept(self, sizes: Sizes) -> None:
        """Keep the norms of an answer that was accepted."""
        for group, norm in sizes.norms.items():
            self.accepted[group] = [*self.accepted.get(group, ()), norm][-WINDOW:]
            self.fresh[group] = self.fresh.get(group, 0) + 1

    def _of(self, group: str, more: Sequence[Sizes]) -> list[float]:
        return [*self.accepted.get(group, ()), *(one.norms[group] for one in more if group in one.norms)]

    @cached_property
    def _state(self) -> Distances:
        return self._norms(self.theta.floats)

    def _norms(self, floats: np.ndarray) -> dict[str, float]:
        cut = self.layout.num_params
        return {group: _norm(part) for group, part in zip(GROUPS, (floats[:cut], floats[cut:]), strict=True)}


def without_last(accepted: Mapping[str, Sequence[float]], fresh: Mapping[str, int]) -> dict[str, list[float]]:
    """Return the norms without the last ones of each group, whose round has been undone."""
    return {group: list(held[: max(0, len(held) - fresh.get(group, 0))]) for group, held in accepted.items()}


def _check_other(name: str, norm: float, count: int, median: float | None) -> None:
    size = math.sqrt(count)
    most, why = MOST * size, "with few others to compare" if median is None else "whatever others send"
    if median is not None and (fits := max(OTHERS * median, FREE * size)) < most:
        most, why = fits, f"{OTHERS:g} times the median {median:.2g} of others"
    if not norm <= most:
        raise PayloadError(f"{name}: its norm must be within {most:.2g} ({why}), got {norm:.2g}")


def _norm(floats: np.ndarray) -> float:
    with np.errstate(over="ignore"):  # beyond float32 is beyond any limit
        return math.sqrt(float(np.dot(floats, floats)))
