"""Every method on one screen. A new one is a function here; its options are the function's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from fedlth.errors import wrong
from fedlth.methods.aggregate import CountMean, FedAvg, MaskMean
from fedlth.methods.client_update import ClientUpdate, MaskedUpdate
from fedlth.methods.fedpm import ScoreUpdate
from fedlth.methods.fedselect import SelectUpdate
from fedlth.methods.lotteryfl import PruneAndRewind
from fedlth.methods.method import FederatedMethod, Phase
from fedlth.methods.sub_fedavg import PruneWhenMaskMoves
from fedlth.study.parts import make
from fedlth.tickets.score import SCORES

OWN = ("global", "local", "dense", "own", "own_tuned")
AVERAGED = (Phase(name="federate", update=MaskedUpdate(), join=FedAvg()),)


def _sliced(update: ClientUpdate) -> Phase:
    """A phase in which each client gets what it shares, and sends what it then shares."""
    return Phase(name="federate", update=update, join=CountMean(), down="slice", own_mask=True)


def fedavg() -> FederatedMethod:
    return FederatedMethod(
        name="fedavg", paper="McMahan et al., AISTATS 2017, arXiv 1602.05629",
        summary="one global model, mean weighted by examples",
        phases=AVERAGED, arms=("global",),
    )  # fmt: skip


def fedavg_ft() -> FederatedMethod:
    return FederatedMethod(
        name="fedavg_ft", paper="Yu, Bagdasaryan, Shmatikov, 2020, arXiv 2002.04758",
        summary="FedAvg, then every client fine-tunes the whole model: the baseline most papers leave out",
        phases=AVERAGED, arms=("global", "local", "dense"),
    )  # fmt: skip


def local() -> FederatedMethod:
    return FederatedMethod(
        name="local", paper="baseline",
        summary="every client trains alone; nothing is sent",
        phases=(), arms=("local",),
    )  # fmt: skip


def standalone() -> FederatedMethod:
    return FederatedMethod(
        name="standalone", paper="Frankle, Carbin, ICLR 2019, arXiv 1803.03635",
        summary="every client finds a ticket alone, from theta_0",
        phases=(), arms=("local", "dense", "ticket", "random"), rewind="init",
    )  # fmt: skip


def two_step() -> FederatedMethod:
    return FederatedMethod(
        name="two_step", paper="this project; late rewinding: Frankle et al., ICML 2020, arXiv 1912.05671",
        summary="FedAvg, then every client finds its ticket on its own data and fine-tunes it",
        phases=AVERAGED,
        arms=("global", "local", "dense", "dense_total", "ticket", "global_mask", "random"),
    )  # fmt: skip


def lotteryfl(
    rate: float = 0.2, density: float = 0.1, val_accuracy: float = 0.5, score: str | dict[str, Any] = "magnitude"
) -> FederatedMethod:
    _check(rate, density)
    before = PruneAndRewind(rate, density, val_accuracy, _score(score))
    return FederatedMethod(
        name="lotteryfl", paper="Li et al., SEC 2021, arXiv 2008.03371",
        summary="clients prune and rewind to theta_0 as accuracy allows; holders of a weight average it",
        phases=(_sliced(MaskedUpdate(before=before)),), arms=(*OWN, "own_random"),
    )  # fmt: skip


def sub_fedavg(
    rate: float = 0.1, density: float = 0.3, val_accuracy: float = 0.5, distance: float = 1e-4,
    score: str | dict[str, Any] = "magnitude",
) -> FederatedMethod:  # fmt: skip
    _check(rate, density)
    after = PruneWhenMaskMoves(rate, density, val_accuracy, distance, _score(score))
    return FederatedMethod(
        name="sub_fedavg", paper="Vahidian et al., ICDCS-W 2021, arXiv 2105.00562",
        summary="clients prune after training, without rewind; holders of a weight average it",
        phases=(_sliced(MaskedUpdate(after=after)),), arms=(*OWN, "own_random"),
    )  # fmt: skip


def fedselect(
    rate: float = 0.25, limit: float = 0.8, every: int = 1, score: str | dict[str, Any] = "movement"
) -> FederatedMethod:
    _check(rate, limit)
    if every < 1:
        raise wrong("method.every", "at least 1", every)
    return FederatedMethod(
        name="fedselect", paper="Tamirisa et al., CVPR 2024, arXiv 2404.02478",
        summary="clients turn their fastest-moving weights personal and share the rest (control: score: random)",
        phases=(_sliced(SelectUpdate(rate, limit, every, _score(score))),), arms=OWN,
    )  # fmt: skip


def fedpm(score_lr: float = 50.0) -> FederatedMethod:
    if not 0 < score_lr < math.inf:
        raise wrong("method.score_lr", "above 0", score_lr)
    return FederatedMethod(
        name="fedpm", paper="Isik et al., ICLR 2023, arXiv 2209.15328",
        summary="frozen weights, learnt Bernoulli masks: bits up, scores down",
        phases=(Phase(name="federate", update=ScoreUpdate(score_lr), join=MaskMean(), own_mask=True),), space="scores",
        arms=("global", "local", "own_tuned", "frozen_random"),
    )  # fmt: skip


METHODS: Mapping[str, Callable[..., FederatedMethod]] = {
    f.__name__: f for f in (fedavg, fedavg_ft, local, standalone, two_step, lotteryfl, sub_fedavg, fedselect, fedpm)
}


def _score(spec: str | dict[str, Any]) -> Any:
    spec = {"name": spec} if isinstance(spec, str) else spec
    score = make(SCORES, spec, "method.score", has="__call__(evidence)")
    if getattr(score, "window", 0) or hasattr(score, "weights"):
        raise wrong(
            "method.score", "one that neither looks back over epochs nor learns a mask of frozen weights", score
        )
    return score


def _check(rate: float, density: float) -> None:
    if not 0 < rate < 1:
        raise wrong("method.rate", "in (0, 1)", rate)
    if not 0 < density <= 1:
        raise wrong("method.density or limit", "in (0, 1]", density)
