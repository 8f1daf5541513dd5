"""The attack question: are tickets easier or harder to fool than the dense network and than random masks?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fedlth.errors import wrong
from fedlth.lab.arms import controlled
from fedlth.lab.attack import evaluate_attacked
from fedlth.lab.bench import Bench, few
from fedlth.lab.search import rounds
from fedlth.models.layout import Params

DENSE = "dense"


@dataclass(frozen=True)
class Attack:
    """Accuracy under FGSM and PGD-10 by strength (pixels of [0, 1]): dense, ticket, and arms at one round's mask.

    `from_dense`: the attack was made on the dense network and carried over. Madry et al., ICLR 2018, arXiv 1706.06083.
    """

    search: str
    round: int
    arms: tuple[str, ...] = ()
    eps: tuple[float, ...] = (0.0, 0.02, 0.05, 0.1)
    examples: int = 1000

    def __post_init__(self) -> None:
        if DENSE in (self.search, *self.arms):
            raise wrong("probes.attack", f"of a search and arms that are not called {DENSE}, as round 0 is here", DENSE)

    def __call__(self, bench: Bench, /) -> Iterator[dict[str, Any]]:
        networks: dict[str, Params] = {}
        for one in rounds(bench, self.search):
            if one.number == 0:
                networks[DENSE] = one.run.best
            if one.number == self.round:
                networks[self.search] = one.run.best
                for arm in self.arms:
                    networks[arm] = controlled(bench, arm, one)[1].best
        data = few(bench.parts["test"], self.examples)
        for name, params in networks.items():
            for kind in ("fgsm", "pgd"):
                for eps in self.eps:
                    found = {
                        "robust_accuracy": evaluate_attacked(
                            bench.flat_model, bench.dataset, params, data, kind=kind, eps=eps
                        )[0]
                    }
                    if DENSE in networks:
                        found["from_dense"], _ = evaluate_attacked(
                            bench.flat_model,
                            bench.dataset,
                            params,
                            data,
                            kind=kind,
                            eps=eps,
                            crafted_on=networks[DENSE],
                        )
                    yield {"network": name, "attack": kind, "eps": f"{eps:g}", **found}
