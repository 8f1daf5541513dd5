"""Tickets of pre-trained weights: found on one task, trained on another. BERT-Tickets' protocol with clients as tasks.

Chen et al., The Lottery Ticket Hypothesis for Pre-trained BERT Networks, NeurIPS 2020, arXiv 2007.12223.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedlth.lab.bench import Bench
from fedlth.lab.search import walked
from fedlth.lab.tasks import deal, distance
from fedlth.lab.train_config import TrainConfig
from fedlth.models.layout import Params
from fedlth.tickets.controls import Random
from fedlth.tickets.criteria import Magnitude
from fedlth.tickets.finder import Finder
from fedlth.tickets.rewind import ToInit
from fedlth.tickets.schedule import Linear
from fedlth.tickets.scope import Global


def pretrained(bench: Bench, iterations: int) -> Params:
    """Return the weights after a training on the union of all clients' data: theta_0 of what follows."""
    config = bench.train_config()
    union = replace(config, train=config.train.model_copy(update={"iterations": iterations}))
    return bench.trained(bench.theta_0, bench.full, union).final


def down(score: Any) -> Finder:
    """Return BERT-Tickets' finder: a tenth of the original size a round, all layers in one list, back to theta_0."""
    return Finder(score=score, schedule=Linear(0.1), scope=Global(), rewind=ToInit())


@dataclass(frozen=True)
class Pretrained:
    """Tickets of pre-trained weights on each client's task, ten points of the original size at a time.

    Beside each ticket a random mask of the same density from the same weights. model.prunable says what is exempt.
    """

    clients: int = 3
    alpha: float = 0.3
    examples: int = 500
    pretraining: int = 2000

    def __call__(self, bench: Bench, /) -> Iterator[dict[str, Any]]:
        deal(bench, self.clients, self.alpha, self.examples)
        theta_0 = pretrained(bench, self.pretraining)
        targets = tuple(1 - k / 10 for k in range(1, 10))
        for client in range(self.clients):
            for arm, score in (("ticket", Magnitude()), ("random", Random())):
                found = walked(
                    bench, down(score), targets, bench.train_config(), what=f"pretrained/{client}/{arm}",
                    data=f"client{client}", start=theta_0,
                )  # fmt: skip
                for one in found:
                    yield {
                        "client": client, "arm": arm, "round": one.number, "kept": int(one.mask.sum()),
                        "size": one.mask.size, "accuracy": one.run.test,
                    }  # fmt: skip


@dataclass(frozen=True)
class Transfer:
    """The K x (K + 2) matrix: a mask found on each client, on all data, or by pruning theta_0; trained on each client.

    `difference` is to the dense network trained on the target; a cell is `dark` where the mask does at least as well
    as the target's own. `shift` is the total variation distance of the two clients' labels.
    """

    clients: int = 5
    alpha: float = 0.3
    density: float = 0.3
    examples: int = 500
    pretraining: int = 2000

    def __call__(self, bench: Bench, /) -> Iterator[dict[str, Any]]:
        shares = deal(bench, self.clients, self.alpha, self.examples)
        theta_0, config = pretrained(bench, self.pretraining), bench.train_config()
        targets = [f"client{j}" for j in range(self.clients)]
        masks = {name: self._found(bench, theta_0, config, name) for name in targets}
        masks["all data"] = self._found(bench, theta_0, config, "")
        size = bench.layout.num_prunable
        masks["theta_0 itself"] = Global()(np.abs(theta_0.floats[:size]), bench.full, bench.layout, self.density)
        dense = {t: bench.trained(theta_0, bench.full, config, data=t).test for t in targets}
        found = {
            (source, t): bench.trained(theta_0.masked(mask), mask, config, data=t).test
            for source, mask in masks.items()
            for t in targets
        }
        for (source, t), accuracy in found.items():
            row: dict[str, Any] = {
                "source": source,
                "target": t,
                "accuracy": accuracy,
                "difference": accuracy - dense[t],
            }
            row["dark"] = float(accuracy >= found[t, t])
            if source in targets:
                row["shift"] = distance(shares[targets.index(source)], shares[targets.index(t)])
            yield row

    def _found(self, bench: Bench, theta_0: Params, config: TrainConfig, data: str) -> np.ndarray:
        *_, last = walked(
            bench, down(Magnitude()), (self.density,), config, what=f"transfer/{data}", data=data, start=theta_0
        )
        return last.mask
