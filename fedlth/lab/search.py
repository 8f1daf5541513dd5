"""A search on the bench: the finder of fedlth.tickets, given a way to train; the masks of every round come out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedlth.errors import StudyError
from fedlth.lab.bench import Bench, open_bench
from fedlth.lab.recipe import Recipe
from fedlth.lab.study import Lottery, Search
from fedlth.lab.training import Run
from fedlth.params import Params
from fedlth.parts import make
from fedlth.tickets.finder import Finder, find
from fedlth.tickets.rewind import REWINDS
from fedlth.tickets.schedule import SCHEDULES
from fedlth.tickets.scope import SCOPES
from fedlth.tickets.score import SCORES


@dataclass(frozen=True)
class Round:
    """One round of a search: its mask (num_prunable,), where the training under it began, how it went."""

    number: int
    mask: np.ndarray
    start: Params
    run: Run


def finder_of(search: Search, place: str) -> Finder:
    """Build a search's finder; raise StudyError naming the part that is wrong."""
    tables: dict[str, Mapping[str, Callable[..., Any]]] = {
        "score": SCORES,
        "schedule": SCHEDULES,
        "scope": SCOPES,
        "rewind": REWINDS,
    }
    return Finder(**{part: make(tables[part], getattr(search, part), f"{place}.{part}") for part in tables})


def rounds(bench: Bench, name: str) -> Iterator[Round]:
    """Yield the rounds of the search called `name`; round 0 is the dense training. Done trainings are read back."""
    search = bench.study.searches[name]
    finder = finder_of(search, f"searches.{name}")
    recipe = bench.recipe(dict(search.train))
    runs: list[tuple[Params, Run]] = []

    def train(start: Params, mask: np.ndarray, replay_lr: bool) -> Params:
        how = recipe if replay_lr else Recipe(train=recipe.train, constant_lr=True)
        runs.append((start, bench.trained(start, mask, how)))
        return runs[-1][1].final

    def anchors(anchor: str) -> Params:
        if anchor == "theta_0":
            return bench.theta_0
        raise StudyError(f"searches.{name}.rewind: the laboratory has no weights called {anchor!r}")

    def gradient(weights: np.ndarray) -> np.ndarray:
        floats = (runs[-1][1].final if runs else bench.theta_0).floats.copy()
        floats[: weights.size] = weights
        return bench.gradient(Params(floats, bench.theta_0.ints), 100 * bench.dataset.num_classes)

    found = find(
        finder,
        start=bench.theta_0,
        start_name="theta_0",
        targets=search.targets,
        layout=bench.layout,
        anchors=anchors,
        train=train,
        gradient=gradient,
        rng=lambda what: bench.rng(f"search/{name}/{what}"),
    )
    for number, ticket in enumerate(found, 1):
        if number == 1:
            yield Round(0, bench.full, *runs[0])
        yield Round(number, ticket.mask, *runs[-1])


def ladder(study: Lottery) -> str:
    """Return the survivors of every round of every search, all and layer by layer: counts ask for no training."""
    lines = []
    for name, search in study.searches.items():
        bench = open_bench(study.science(), study.seeds[0], None)
        lines.append(f"{name}: {finder_of(search, f'searches.{name}')}")
        for number, mask in enumerate(_dry(bench, name)):
            layers = ", ".join(f"{e.name} {np.count_nonzero(mask[e.slice])}" for e in bench.layout.prunable)
            kept = np.count_nonzero(mask)
            lines.append(f"  round {number:2}: {kept:8} of {mask.size} ({100 * kept / mask.size:6.2f} %)  {layers}")
    return "\n".join(lines)


def _dry(bench: Bench, name: str) -> Iterator[np.ndarray]:
    """Yield the masks of a search whose trainings leave every weight where it is."""
    yield bench.full
    for found in find(
        finder_of(bench.study.searches[name], f"searches.{name}"),
        start=bench.theta_0,
        start_name="theta_0",
        targets=bench.study.searches[name].targets,
        layout=bench.layout,
        anchors=lambda anchor: bench.theta_0,
        train=lambda start, mask, replay_lr: start,
        gradient=lambda weights: weights,
        rng=lambda what: bench.rng(f"search/{name}/{what}"),
    ):
        yield found.mask
