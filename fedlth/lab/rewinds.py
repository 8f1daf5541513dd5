"""Is a rewind a rewind: the weights that a search trains next, bit by bit, and the first learning rate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedlth.lab.bench import Bench
from fedlth.lab.search import finder_of, rounds
from fedlth.tickets.rewind import changed


@dataclass(frozen=True)
class Rewinds:
    """Check every round of these searches: survivors start exactly where the rewind says, the dead likewise.

    What a moving mask brought back begins at zero. A strong ticket is checked as it ends, for nothing may have trained
    it; the running statistics of its norms are of its data. `furthest` is the largest |start - wanted|, which must be
    0; `first_rate` the learning rate of the first step.
    """

    searches: tuple[str, ...]

    def __call__(self, bench: Bench, /) -> Iterator[dict[str, Any]]:
        for name in self.searches:
            search = bench.study.searches[name]
            finder, config = finder_of(search, f"searches.{name}"), bench.train_config(dict(search.train))
            steps, regrow = int(getattr(finder.rewind, "steps", 0)), getattr(finder.schedule, "regrow", None)
            begin = regrow.window(regrow.rounds)[0] if regrow is not None and finder.moves else steps
            for one in rounds(bench, name):
                if one.number == 0:
                    continue
                origin = one.before if finder.rewind.anchor is None else bench.theta_0
                if finder.rewind.anchor == "reinit":
                    origin = bench.model.fresh("reinit")
                if steps:
                    origin = bench.trained(bench.theta_0, bench.full, replace(config, last=steps)).final
                dice = bench.rng(f"search/{name}/rewind")
                wanted = changed(finder.rewind, origin, one.mask, bench.layout, dice).masked(one.mask)
                if finder.dead.holds:
                    dead, first = ~one.mask, bench.theta_0 if origin is one.before else origin
                    held = finder.dead(first.floats[: dead.size], one.before.floats[: dead.size])
                    wanted.floats[: dead.size][dead] = held[dead]
                size = wanted.floats.size if getattr(finder.rewind, "trains", True) else bench.layout.num_params
                if regrow is not None and finder.rewind.anchor is None:
                    wanted.floats[: one.mask.size][one.start.floats[: one.mask.size] == 0] = 0
                gap = np.abs(one.start.floats[:size] - wanted.floats[:size]).max()
                there = replace(config, first=begin, constant_lr=not (finder.rewind.replay_lr or finder.moves))
                yield {
                    "search": name, "round": one.number, "rewind": str(finder.rewind), "furthest": float(gap),
                    "first_rate": there.rate(begin), "schedule_there": config.rate(begin),
                }  # fmt: skip
