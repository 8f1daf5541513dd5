"""What the clients of an arm got: means, tails, harm, unseen clients, with intervals and paired differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedlth.report.choice import Choice, baseline_of, chosen_choices, rows_of, with_mask
from fedlth.report.facts import Facts
from fedlth.report.intervals import Interval, interval
from fedlth.report.known_arms import arm_order
from fedlth.report.measure import others_of, shown_of

Values = NDArray[np.float64]


@dataclass(frozen=True)
class ArmSummary:
    """One arm at one target density, over the clients of every seed.

    Every statistic is taken within a seed and then averaged over seeds, of the study's metric on test data (accuracies
    are shares in [0, 1]). None: there was nothing to take it from. tail: the percentile behind which the worst tenth
    lies. worst_decile: mean of the worst tenth of clients (rounded up). hurt_*: share of clients strictly worse than
    their own baseline. density: of masks that clients make in the rounds, over those that a round could see. others:
    means of the further metrics. Epochs and FLOPs are means a client. diverged: clients (of every seed) whose training
    did, which all other statistics but the density count too, as a constant guess.
    """

    choice: Choice
    density: float
    num_seeds: int
    num_clients: int
    mean: float
    interval: Interval
    standard_deviation: float
    tail: float
    worst_decile: float
    hurt_global: float | None
    hurt_local: float | None
    unseen: float | None
    val_mean: float | None
    epochs: float
    search_epochs: float
    train_flops: float
    train_flops_effective: float
    starts: tuple[str, ...]
    diverged: int = 0
    others: tuple[float, ...] = ()

    @property
    def density_text(self) -> str:
        """Return the density as people read it: that of the models, which may have stopped above their target."""
        return f"{self.density:.3g}, chosen" if self.choice.chosen else f"{self.density:.3g}"

    @property
    def at_text(self) -> str:
        """Return " at density 0.2", "" for a dense model."""
        if self.choice.chosen:
            return f" at each client's own density (mean {self.density:.3g})"
        return "" if self.choice.target_density == 1 else f" at density {self.density_text}"


def paired(group: Sequence[Facts], choice: Choice, baseline: Choice) -> list[Values]:
    """Return the metric on test data of `choice` less `baseline`, one array a seed, over clients that have both."""
    found, shown = [], shown_of(group)
    for facts in group:
        ours, theirs = rows_of(facts, choice), rows_of(facts, baseline)
        both = [client for client in ours if client in theirs]
        if both:
            found.append(np.array([shown.of(ours[c]) - shown.of(theirs[c]) for c in both]))
    return found


@dataclass(frozen=True)
class Difference:
    """A paired difference of means and its interval, in the metric's unit (of accuracy 0.01 is one point)."""

    mean: float
    interval: Interval


def difference(group: Sequence[Facts], choice: Choice, baseline: Choice) -> Difference | None:
    """Return how far `choice` lies above `baseline`, paired by (seed, client); None where no client has both."""
    samples = paired(group, choice, baseline)
    if not samples:
        return None
    return Difference(over_seeds(np.mean, samples), interval(samples, what="difference"))


def over_seeds(take: Callable[[Values], object], samples: Sequence[Values]) -> float:
    """Return the mean over seeds of a statistic taken within each seed."""
    return float(np.mean([float(take(values)) for values in samples]))  # type: ignore[arg-type]


def _hurt(group: Sequence[Facts], choice: Choice, arm: str) -> float | None:
    baseline = baseline_of(group, arm)
    if baseline is None or choice.arm == arm:
        return None
    samples, shown = paired(group, choice, baseline), shown_of(group)
    return over_seeds(lambda moved: np.mean(shown.gain(moved) < 0), samples) if samples else None


def summarise_arm(group: Sequence[Facts], choice: Choice) -> ArmSummary:
    """Return the statistics of one arm and density; at least one client must have been evaluated there."""
    tables = [list(found.values()) for facts in group if (found := rows_of(facts, choice))]
    rows = [row for table in tables for row in table]
    masked = [row.density for row in with_mask(rows, choice.arm) if not row.diverged]
    shown = shown_of(group)
    samples = [np.array([shown.of(row) for row in table]) for table in tables]
    unseen = [v for t in tables if len(v := np.array([shown.of(r) for r in t if r.unseen]))]
    seen = [
        v for t in tables if len(v := np.array([shown.of(r, "val") for r in t if r.num_val or r.val_loss is not None]))
    ]
    return ArmSummary(
        choice=choice,
        density=float(np.mean(masked or [choice.target_density])),
        num_seeds=len(tables),
        num_clients=len(rows),
        mean=over_seeds(np.mean, samples),
        interval=interval(samples),
        standard_deviation=over_seeds(lambda v: np.std(v, ddof=1) if len(v) > 1 else 0.0, samples),
        tail=over_seeds(shown.tail_of, samples),
        worst_decile=over_seeds(shown.worst_decile, samples),
        hurt_global=_hurt(group, choice, "global"),
        hurt_local=_hurt(group, choice, "local"),
        unseen=over_seeds(np.mean, unseen) if unseen else None,
        val_mean=over_seeds(np.mean, seen) if seen else None,
        epochs=float(np.mean([row.epochs for row in rows])),
        search_epochs=float(np.mean([row.search_epochs for row in rows])),
        train_flops=float(np.mean([row.train_flops for row in rows])),
        train_flops_effective=float(np.mean([row.train_flops_effective for row in rows])),
        starts=tuple(sorted({row.start for row in rows if row.start})),
        diverged=sum(row.diverged for row in rows),
        others=tuple(
            over_seeds(np.mean, [np.array([other.of(row) for row in table]) for table in tables])
            for other in others_of(group)
        ),
    )


def summarise(group: Sequence[Facts]) -> tuple[ArmSummary, ...]:
    """Return every arm at every density, in the order of arms.ARMS and from dense to sparse."""
    own = chosen_choices(group)
    alone = {"refined"} if own else set()  # it has no other density
    choices = {Choice(r.arm, r.target_density) for facts in group for r in facts.metrics if r.arm not in alone}
    ordered = sorted((*choices, *own), key=lambda one: (arm_order(one.arm), one.chosen, -one.target_density))
    return tuple(summarise_arm(group, choice) for choice in ordered)
