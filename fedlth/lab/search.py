"""A search on the bench: the finder of fedlth.tickets, given a way to train; the masks of every round come out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fedlth.errors import StudyError
from fedlth.lab.bench import Bench, few, open_bench
from fedlth.lab.study import Lottery, Search
from fedlth.lab.train_config import TrainConfig
from fedlth.lab.training import Run
from fedlth.models.layout import Params
from fedlth.study.parts import make
from fedlth.tickets.dead import DEADS
from fedlth.tickets.finder import Finder
from fedlth.tickets.gate import GATES, STOPS
from fedlth.tickets.granularity import GRANULARITIES
from fedlth.tickets.rewind import REWINDS
from fedlth.tickets.schedule import SCHEDULES
from fedlth.tickets.scope import SCOPES
from fedlth.tickets.score import SCORES
from fedlth.tickets.search import Walked, find
from fedlth.training.loss_probe import LossProbe

TABLES: Mapping[str, Mapping[str, Callable[..., Any]]] = {
    "score": SCORES,
    "schedule": SCHEDULES,
    "scope": SCOPES,
    "rewind": REWINDS,
    "granularity": GRANULARITIES,
    "dead": DEADS,
    "gate": GATES,
    "stop": STOPS,
}
EXAMPLES_A_CLASS = 100  # of what a score that asks for gradients sees; a mask that is learned sees all


@dataclass(frozen=True)
class Round:
    """One round of a search: its mask (num_prunable,), where the ticket's training began, how it went.

    `before` is what was scored to find the mask, `fallen` (num_prunable,) each weight at the end of the last training
    that it took part in; `trainings` counts those that the search took until then.
    """

    number: int
    mask: np.ndarray
    start: Params
    run: Run
    before: Params
    fallen: np.ndarray
    trainings: int


@dataclass
class Trainer:
    """The way to train that `find` is given: it remembers its trainings, newest last."""

    bench: Bench
    config: TrainConfig
    data: str = ""
    done: list[tuple[Params, Run]] = field(default_factory=list)

    def __call__(
        self, start: Params, mask: np.ndarray, /, *, replay_lr: bool, held: bool = False, window: int = 0,
        first_step: int = 0, last_step: int | None = None,
    ) -> Walked:  # fmt: skip
        steps = self.config.train.iterations
        if last_step is not None and last_step >= steps:
            place = "rewind.step" if mask.all() else "schedule.every"
            raise StudyError(f"finder.{place}: must lie inside a training's {steps} steps, got {last_step}")
        how = replace(self.config, first=first_step, last=last_step, constant_lr=not replay_lr)
        run = self.bench.trained(start, mask, how, free=held, data=self.data, window=window)
        self.done.append((start, run))
        return Walked(run.final, run.previous)


def finder_of(search: Search, place: str) -> Finder:
    """Build a search's finder; raise StudyError naming the part that is wrong."""
    specs = {part: getattr(search, part) for part in TABLES}
    for part, name in (("schedule", "shrink"), ("scope", "half_output")):  # one prune a round, whatever the rate
        if search.rounds is not None and specs[part]["name"] == name:
            specs[part] = {"rate": search.rate, **specs[part]}
    with _named(place):
        return Finder(**{part: make(table, specs[part], f"{place}.{part}") for part, table in TABLES.items()})


@contextmanager
def _named(place: str) -> Iterator[None]:
    """Name the study's own place in an error about a finder: parts know only that they are one's."""
    try:
        yield
    except StudyError as error:
        told = str(error)
        raise StudyError(place + told.removeprefix("finder") if told.startswith("finder") else told) from error


def rounds(bench: Bench, name: str) -> Iterator[Round]:
    """Yield the rounds of the search called `name`; round 0 is the dense network, trained. Done trainings are read."""
    search = bench.study.searches[name]
    finder = finder_of(search, f"searches.{name}")
    with _named(f"searches.{name}"):
        yield from walked(bench, finder, search.targets, bench.train_config(dict(search.train)), what=f"search/{name}")


def walked(
    bench: Bench, finder: Finder, targets: tuple[float, ...], config: TrainConfig, *, what: str, data: str = "",
    start: Params | None = None,
) -> Iterator[Round]:  # fmt: skip
    """Yield the rounds of a finder from `start` (theta_0) on one task's data; `what` names its random streams."""
    theta_0 = bench.theta_0 if start is None else start
    trainer = Trainer(bench, config, data)

    def anchors(anchor: str) -> Params:
        if anchor == "theta_0":
            return theta_0
        if anchor == "reinit":
            return bench.model.fresh("reinit")
        raise StudyError(f"finder.rewind: the laboratory has no weights called {anchor!r}")

    def network(at: Params) -> LossProbe:
        most = None if hasattr(finder.score, "epochs") else EXAMPLES_A_CLASS * bench.dataset.num_classes
        return network_of(bench, at, what, data, most)

    found = find(
        finder, start=theta_0, start_name="theta_0", targets=targets, layout=bench.layout, anchors=anchors,
        train=trainer, rng=lambda part: bench.rng(f"{what}/{part}"), network=network,
        val_accuracy=lambda params: bench.accuracy(params, f"{data}/validation" if data else "validation"),
        normalised=lambda params, _: bench.normalised(params, data=data),
    )  # fmt: skip
    if finder.dense_first:
        trainer(theta_0, bench.full, replay_lr=True, window=finder.window)  # kept on disk: find's own is read back
        yield Round(0, bench.full, *trainer.done[0], theta_0, theta_0.floats[: bench.full.size], 0)
    seen: set[float] = set()
    for ticket in found:
        if ticket.diverged:  # a learned mask; trainings of weights end where they were numbers last
            raise FloatingPointError(ticket.diverged)
        if ticket.target in seen:  # a chain to a sparser target came through here as well
            continue
        seen.add(ticket.target)
        number = targets.index(ticket.target) + 1
        # Not always the newest: a stop gives all targets that were not reached the ticket before.
        done = next((one for one in reversed(trainer.done) if one[1].final is ticket.params), None)
        if done is None:  # a strong ticket: nothing of it was trained
            done = ticket.params, bench.untrained(ticket.params, ticket.mask, data=data)
        yield Round(number, ticket.mask, *done, ticket.before, ticket.fallen, ticket.trainings)


def network_of(bench: Bench, at: Params, what: str, data: str = "", most: int | None = None) -> LossProbe:
    """Return the network at `at` over `most` of the training examples, or all, as scores ask it."""
    return LossProbe(
        model=bench.flat_model, params=at, data=few(bench.task(data)["train"], most),
        layer_flops=lambda: bench.model.flops, order=lambda: bench.rng(f"{what}/mask order"),
        torch_seed=bench.torch_seed(f"{what}/mask bits"),
        batch_size=bench.study.train.batch_size,
    )  # fmt: skip


def ladder(study: Lottery) -> str:
    """Return the survivors of every round of every search, all and layer by layer: counts ask for no training."""
    lines = []
    for name, search in study.searches.items():
        bench = open_bench(study.science(), study.seeds[0], None)
        finder = finder_of(search, f"searches.{name}")
        lines.append(f"{name}: {finder}")
        with _named(f"searches.{name}"):
            masks = list(enumerate(dry(bench, finder, search.targets)))
        for number, mask in masks if finder.dense_first else masks[1:]:
            layers = ", ".join(f"{e.name} {np.count_nonzero(mask[e.slice])}" for e in bench.layout.prunable)
            kept = np.count_nonzero(mask)
            lines.append(f"  round {number:2}: {kept:8} of {mask.size} ({100 * kept / mask.size:6.2f} %)  {layers}")
    return "\n".join(lines)


def dry(bench: Bench, finder: Finder, targets: tuple[float, ...], *, part: str = "train") -> Iterator[np.ndarray]:
    """Yield the masks of a search whose trainings leave every weight where it is; scores see ten examples a class."""
    most = 10 * bench.dataset.num_classes

    def stay(start: Params, mask: np.ndarray, /, **_: Any) -> Walked:
        return Walked(start, (start.floats[: mask.size],) * finder.window)

    yield bench.full
    for found in find(
        finder, start=bench.theta_0, start_name="theta_0", targets=targets, layout=bench.layout,
        anchors=lambda anchor: bench.theta_0, train=stay, rng=bench.rng, val_accuracy=lambda params: 1.0,
        network=lambda at: replace(network_of(bench, at, "dry"), data=few(bench.parts[part], most)),
    ):  # fmt: skip
        yield found.mask
