"""SalientGrads and SSFL: every client scores theta_0 on its own data, and the mean score makes one mask for all.

SalientGrads: Ohib, Thapaliya, Gaggenapalli, Liu, Calhoun, Plis. SalientGrads: Sparse Models for Communication
Efficient and Data Aware Distributed Federated Training. 2023, arXiv 2304.07488. SSFL: Ohib, Thapaliya, Dziugaite, Liu,
Calhoun, Plis. SSFL: Discovering Sparse Unified Subnetworks at Initialization for Efficient Federated Learning.
TMLR 2026, arXiv 2405.09037.

Left open, and chosen here. SalientGrads scores each minibatch as SNIP does, |w x gradient|, and means the scores over
minibatches; SSFL takes |w x mean gradient|, so that what minibatches disagree on cancels. Either sees one pass over the
client's data (`batches: 0`) in evaluation mode. Clients count alike in the mean, as in the public code of both
(`weighted` counts by examples). All tensors compete in one list, ties by position, so that the density is exact.
Training begins at theta_0 under the mask. The control `random: true` keeps as many weights of each tensor by chance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedlth.methods.aggregate import CountMean, FedAvg
from fedlth.methods.client_update import Inbox, Update, merged
from fedlth.methods.global_mask import ARMS, TopMask, scores
from fedlth.methods.method import FederatedMethod, Phase, Seen
from fedlth.methods.options import at_least, averaged, check, density_of
from fedlth.storage.client_state import ClientState
from fedlth.training.local_client import LocalClient
from fedlth.training.task import Task


@dataclass(frozen=True)
class Saliency:
    """Send how salient each shared weight is on the client's own data; train nothing.

    `signed` takes the absolute value of the mean over minibatches, else the mean of absolute values is taken.
    """

    batches: int = 0
    signed: bool = False
    sends: tuple[tuple[str, str], ...] = (("saliency", "scores"),)

    def range(self, name: str, task: Task, /) -> tuple[float, float]:
        return 0.0, np.inf

    def __call__(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Update:
        whole = merged(local, inbox, state)
        weights, total, count = whole.floats[: local.full.size], np.zeros(local.full.size), 0
        for slope in local.gradients(whole, count=self.batches):
            product = weights * slope.astype(np.float64)
            total += product if self.signed else np.abs(product)
            count += 1
        return Update(state, {"saliency": scores(local.task.shared_mask(np.abs(total) / count))})


def _phases(density: float, batches: int, weighted: bool, random: bool, signed: bool) -> tuple[Phase, ...]:
    check(density=density_of(density), batches=at_least(0, batches))
    join = TopMask(density, FedAvg() if weighted else CountMean(), random)
    update = Saliency(batches, signed)
    first = Phase(name="saliency", rounds=1, who=Seen(), update=update, join=join, must_count=True)
    return first, averaged()


def salientgrads(
    density: float = 0.5, batches: int = 0, weighted: bool = False, random: bool = False
) -> FederatedMethod:
    return FederatedMethod(
        name="salientgrads", paper="Ohib et al., 2023, arXiv 2304.07488",
        summary="one mask by the mean of all clients' SNIP scores at theta_0, then FedAvg under it (control: random)",
        phases=_phases(density, batches, weighted, random, signed=False), arms=ARMS,
    )  # fmt: skip


def ssfl(density: float = 0.5, batches: int = 0, weighted: bool = False, random: bool = False) -> FederatedMethod:
    return FederatedMethod(
        name="ssfl", paper="Ohib et al., TMLR 2026, arXiv 2405.09037",
        summary="one mask by all clients' |weight x gradient| at theta_0, then FedAvg under it (control: random)",
        phases=_phases(density, batches, weighted, random, signed=True), arms=ARMS,
    )  # fmt: skip
