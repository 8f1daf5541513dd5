"""A finder is a composition of parts, as a value; its repr is its name."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import numpy as np

from fedlth.errors import StudyError
from fedlth.models.layout import Layout
from fedlth.tickets.checks import check_chains, check_kept, check_parts
from fedlth.tickets.dead import Dead, Zero
from fedlth.tickets.gate import Always, AtTarget, Gate, Stop
from fedlth.tickets.granularity import Element, Granularity, Groups, kept_units
from fedlth.tickets.rewind import Rewind
from fedlth.tickets.schedule import Schedule
from fedlth.tickets.scope import Scope
from fedlth.tickets.score import Score


@dataclass(frozen=True)
class Finder:
    """A ticket finder as a value. Raises StudyError where two parts cannot go together."""

    score: Score
    schedule: Schedule
    scope: Scope
    rewind: Rewind
    granularity: Granularity = field(default_factory=Element)
    dead: Dead = field(default_factory=Zero)
    gate: Gate = field(default_factory=Always)
    stop: Stop = field(default_factory=AtTarget)

    def __post_init__(self) -> None:
        check_parts({f.name: getattr(self, f.name) for f in fields(self)})
        if getattr(self.scope, "elements", False) and not isinstance(self.granularity, Element):
            raise StudyError(
                f"finder.granularity: must be element under the scope {self.scope}, which counts weights, "
                f"got {self.granularity}"
            )
        learned, kept = getattr(self.score, "weights", None), getattr(self.rewind, "weights", None)
        if learned is not None and learned != kept:
            raise StudyError(
                f"finder.rewind: must be frozen with weights {learned!r}, over which the score {self.score} learns "
                f"its mask, got {self.rewind}"
            )
        if self.moves and (self.rewind.anchor is not None or hasattr(self.rewind, "steps")):
            raise StudyError(
                f"finder.rewind: must be none under {self.schedule}, whose mask moves inside one training, "
                f"got {self.rewind}"
            )
        if self.window and not self.dense_first:
            raise StudyError(
                f"finder.score: must not look back under {self.schedule}, which trains nothing before a prune, "
                f"got {self.score}"
            )
        if not isinstance(self.gate, Always) and not self.dense_first:
            raise StudyError(f"finder.gate: must be always under {self.schedule}, which trains nothing before a prune")
        if not isinstance(self.stop, AtTarget) and not self.dense_first:
            raise StudyError(
                f"finder.stop: must be target under {self.schedule}, which trains no dense network to compare with"
            )

    @property
    def dense_first(self) -> bool:
        """Say whether a dense training comes before the first prune."""
        return bool(getattr(self.schedule, "dense_first", True))

    @property
    def trains(self) -> bool:
        """Say whether the network trains between two prunes."""
        return bool(getattr(self.schedule, "trains", True))

    @property
    def moves(self) -> bool:
        """Say whether the mask moves inside one training."""
        return bool(getattr(getattr(self.schedule, "regrow", None), "every", 0))

    @property
    def window(self) -> int:
        """Return how many earlier epochs' weights the score wants to see."""
        return int(getattr(self.score, "window", 0))

    @property
    def open_ended(self) -> bool:
        """Say whether only the search itself tells how many trainings it takes."""
        return not (isinstance(self.gate, Always) and isinstance(self.stop, AtTarget))

    def trainings(self, targets: tuple[float, ...], kept: tuple[float, ...] = ()) -> tuple[int, int]:
        """Return how many trainings the longest chain takes, and how many all of them, with every gate open.

        A ticket's own last training counts; the dense one counts once, as all chains begin with the same. `kept`: only
        what leads to the tickets of these targets.
        """
        last, chains = int(bool(getattr(self.rewind, "trains", True))), self._leading(targets, kept)
        if self.moves:
            return 1, len(chains)
        after = [(len(chain) - 1 if self.trains and last else 0) + last for chain in chains]
        return self.dense_first + max(after), self.dense_first + sum(after)

    def learned(self, targets: tuple[float, ...], kept: tuple[float, ...] = ()) -> tuple[int, int]:
        """Return how many epochs of learning masks the longest chain takes, and how many all of them."""
        epochs = int(getattr(self.score, "epochs", 0))
        prunes = [len(chain) for chain in self._leading(targets, kept)] if epochs else [0]
        return epochs * max(prunes), epochs * sum(prunes)

    def _leading(self, targets: tuple[float, ...], kept: tuple[float, ...]) -> list[tuple[float, ...]]:
        """Return the chains as far as they lead to a target in `kept`; whole where it is empty."""
        if not kept:
            return [*self.chains(targets)]
        places = [(chain, [k for k, density in enumerate(chain) if density in kept]) for chain in self.chains(targets)]
        return [chain[: found[-1] + 1] for chain, found in places if found]

    def pick(self, score: np.ndarray, alive: np.ndarray, layout: Layout, density: float) -> np.ndarray:
        """Return the mask (num_prunable,) of what stays of `alive` at `density`, in whole groups."""
        groups = self.granularity.groups(layout)
        return groups.spread(self.kept(groups.reduced(score), groups.reduced(alive) > 0, groups, density))

    def chains(self, targets: tuple[float, ...]) -> tuple[tuple[float, ...], ...]:
        """Return the schedule's chains; raise StudyError where they are none."""
        return check_chains(self.schedule, self.schedule(targets), targets)

    def kept(self, score: np.ndarray, alive: np.ndarray, groups: Groups, density: float) -> np.ndarray:
        """Return the mask (num_groups,) that the scope keeps; raise StudyError where its count is not exact."""

        def choose(score: np.ndarray, alive: np.ndarray, layout: Layout) -> np.ndarray:
            return check_kept(self.scope, self.scope(score, alive, layout, density), alive, layout, density)

        if groups.weights is None:
            return choose(score, alive, groups.layout)
        return kept_units(groups, score, alive, choose)
