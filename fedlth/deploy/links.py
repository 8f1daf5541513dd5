"""The links that a study states (clients.capacity, fleet): what a dense model takes on them, and what is too thin."""

from __future__ import annotations

from collections.abc import Iterator

from fedlth.data.capacity import named
from fedlth.engines.flower_link import THINNEST_BYTES_S, crossing_s
from fedlth.experiment.experiment import Experiment
from fedlth.federation.answer_bytes import most_of_one
from fedlth.study.sections import Tier
from fedlth.wire import metrics


def stated(experiment: Experiment) -> Iterator[tuple[str, float, float]]:
    """Yield what each stated link is called, and its bytes per second down and up."""
    study, task = experiment.study, experiment.task
    held = {task.capacity(client) for client in range(study.clients.count)}
    for name, tier in named(study.clients.capacity):
        down, up = _rates(tier, experiment)
        if tier in held and down and up:
            yield name, down, up


def dense_bytes(experiment: Experiment) -> int:
    """Return the most bytes of a model or an update in a round, 0 where nothing is federated."""
    joined = [phase for phase in experiment.phases if phase.join is not None]
    return max((most_of_one(experiment, phase) - metrics.LONGEST for phase in joined), default=0)


def notes(experiment: Experiment) -> Iterator[str]:
    """Yield what a dense model takes on each stated link."""
    size = dense_bytes(experiment)
    for name, down, up in stated(experiment):
        yield (
            f"{name}: a dense model of {1e-6 * size:.3g} MB takes about {crossing_s(size, down):.0f} s down at "
            f"{_kbit(down)} kbit/s, {crossing_s(size, up):.0f} s up at {_kbit(up)}"
        )


def faults(experiment: Experiment) -> Iterator[tuple[str, str]]:
    """Yield what does not fit of each stated link, and what to do."""
    size, deadline_s = dense_bytes(experiment), experiment.study.federate.deadline_s
    for name, down, up in stated(experiment):
        if min(down, up) < THINNEST_BYTES_S:
            yield (
                f"{name}: a link of {_kbit(min(down, up))} kbit/s: Flower's client sends a piece again, and again, "
                f"that does not cross within 30 s", f"at least {_kbit(THINNEST_BYTES_S)} kbit/s each way",
            )  # fmt: skip
        both_s = crossing_s(size, down) + crossing_s(size, up)
        if deadline_s is not None and deadline_s < both_s:
            yield (
                f"{name}: federate.deadline_s is {deadline_s:g}, a dense model takes about {both_s:.0f} s both ways",
                "a deadline of at least that and a training, or a smaller model",
            )


def _rates(tier: Tier, experiment: Experiment) -> tuple[float | None, float | None]:
    fleet = experiment.study.fleet
    if fleet is None:
        return tier.down_bytes_s, tier.up_bytes_s
    return tier.down_bytes_s or fleet.down_bytes_s, tier.up_bytes_s or fleet.up_bytes_s


def _kbit(bytes_s: float) -> str:
    return f"{8e-3 * bytes_s:.3g}"
