"""A method as a user writes one: a saliency round first, a private head, server momentum, and an arm of its own."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedlth.methods.aggregate import Contribution, FedAvg
from fedlth.methods.client_update import Inbox, MaskedUpdate, Update, merged
from fedlth.methods.method import FederatedMethod, Phase, Seen
from fedlth.models.layout import Layout, Params
from fedlth.personalization.arms import trained
from fedlth.personalization.step2 import Result, Step2
from fedlth.storage.client_state import ClientState
from fedlth.storage.server_state import ServerState
from fedlth.training.local_client import LocalClient
from fedlth.wire.payload import Content


@dataclass(frozen=True)
class Saliency:
    """Send |weight x gradient| of the shared weights on the client's own data; train nothing."""

    sends: tuple[tuple[str, str], ...] = (("saliency", "scores"),)

    def __call__(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Update:
        whole = merged(local, inbox, state)
        weights = whole.floats[: local.full.size]
        score = local.task.shared_mask(np.abs(weights * local.network(whole).gradient(weights)))
        return Update(state, {"saliency": Content(np.ones(score.size, bool), score, np.zeros(0, np.int64))})


@dataclass(frozen=True)
class TopMask:
    """Keep the `density` of shared weights that are salient to all clients together."""

    density: float

    def init(self, state: ServerState, layout: Layout, /) -> Any:
        return [state, np.zeros(layout.num_prunable)]

    def add(self, so_far: Any, c: Contribution, /) -> None:
        so_far[1] += c.content.floats

    def result(self, so_far: Any, /) -> ServerState:
        state, score = so_far
        mask = np.zeros(score.size, bool)
        mask[np.argsort(-score, kind="stable")[: round(self.density * score.size)]] = True
        return ServerState(state.theta.masked(mask), mask=mask)


@dataclass(frozen=True)
class Momentum:
    """FedAvgM: the server moves along a running sum of the mean changes (Hsu et al., 2019, arXiv 1909.06335)."""

    beta: float

    def init(self, state: ServerState, layout: Layout, /) -> Any:
        return state, FedAvg().init(state, layout)

    def add(self, so_far: Any, c: Contribution, /) -> None:
        FedAvg().add(so_far[1], c)

    def result(self, so_far: Any, /) -> ServerState:
        old, mean = so_far[0], FedAvg().result(so_far[1]).theta
        velocity = self.beta * old.memory.get("velocity", np.float32(0)) + (mean.floats - old.theta.floats)
        moved = (old.theta.floats + velocity).astype(np.float32)
        return ServerState(Params(moved, mean.ints), {"velocity": velocity.astype(np.float32)})


def head_only(step: Step2) -> Iterator[Result]:
    """The global mask with the client's own head, fine-tuned."""
    held = step.method.own(step.local, step.inbox, step.state)
    yield trained(step, "head_only", "theta_g", held.mask, begin=held.params)


def method(density: float = 0.3, beta: float = 0.5, head: str = "3.*") -> FederatedMethod:
    saliency = Phase(name="saliency", rounds=1, who=Seen(), update=Saliency(), join=TopMask(density))
    rounds = Phase(name="federate", update=MaskedUpdate(), join=Momentum(beta))
    return FederatedMethod(
        name="salient_momentum", paper="a test", summary="one mask for all, server momentum, private heads",
        phases=(saliency, rounds), personal=(head,), arms=("global", "own_tuned", "tests.outside_method:head_only"),
    )  # fmt: skip
