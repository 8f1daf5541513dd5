"""A ticket under shared adapters: a mask of frozen weights that never leaves its client; what trains is averaged.

The setting of FedSLIP (a sparse ticket strictly local, low-rank adapters shared), which was read in a summary only, so
all that follows is ours. theta_0 is pre-trained and nothing trains it; adapters beside it do (model hf, trains: lora),
and the head. At its first visit a client scores the frozen weights at theta_0 on its own data by |weight x gradient|
(SNIP: Lee, Ajanthan, Torr, ICLR 2019, arXiv 1810.02340), in evaluation mode, over one pass (`batches: 0`) or so many
minibatches, and keeps the same share of every tensor. (Magnitudes after a short training of the encoder would need an
optimizer over all of it, which adapters are there to avoid; `score: magnitude` is theta_0's own mask, everyone's.) The
client keeps its mask, and trains adapters and head under the masked weights. Up goes what trains, dense; a mask is in
no message. Clients that no round has visited find theirs in step 2, in the same way. Control: `score: random`, as many
of each tensor by chance.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from fedlth.methods.client_update import Inbox, MaskedUpdate, Own, merged
from fedlth.methods.global_mask import mean_gradient
from fedlth.methods.method import FederatedMethod
from fedlth.methods.options import OWN, at_least, averaged, check, density_of, score_of
from fedlth.models.prunable import FROZEN
from fedlth.storage.client_state import ClientState
from fedlth.tickets.scope import Layerwise
from fedlth.tickets.score import Score
from fedlth.tickets.sensitivity import Snip
from fedlth.training.local_client import LocalClient


@dataclass(frozen=True, kw_only=True)
class UnderOwnMask(MaskedUpdate):
    """Train what is shared under the client's own mask of frozen weights, found once, at theta_0."""

    density: float
    score: Score = field(default_factory=Snip)
    batches: int = 0
    private_mask: ClassVar[bool] = True

    def own(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Own:
        mask, theta_0 = state.masks.get("active"), local.task.theta_0
        if mask is None:
            first = replace(local, stage="own mask", round=0)  # whatever the round in which it is first asked for
            evidence = replace(
                first.evidence(start=theta_0, now=theta_0, mask=local.full, density=self.density),
                gradient=lambda weights: mean_gradient(first, theta_0, self.batches),  # counted, as a device's work is
            )
            mask = Layerwise()(self.score(evidence), local.full, local.task.layout, self.density)
        return Own(merged(local, inbox, state).masked(mask), mask)


def ticket_lora(density: float = 0.5, score: str | dict[str, Any] = "snip", batches: int = 0) -> FederatedMethod:
    check(density=density_of(density), batches=at_least(0, batches))
    update = UnderOwnMask(density=density, score=score_of(score), batches=batches)
    return FederatedMethod(
        name="ticket_lora", paper="FedSLIP's setting, by a summary; score: Lee et al., ICLR 2019, arXiv 1810.02340",
        summary="a local mask of frozen pre-trained weights under adapters that all share (control: score: random)",
        phases=(averaged(update),), arms=(*OWN, "own_random", "own_global_mask"), prunable=(FROZEN,),
    )  # fmt: skip
