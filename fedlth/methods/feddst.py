"""FedDST: one sparse model for all, whose mask clients readjust now and then, and the server elects anew.

Bibikar, Vikalo, Wang, Chen. Federated Dynamic Sparse Training: Computing Less, Communicating Less, Yet Learning Better.
AAAI 2022, arXiv 2112.09824.

Both ends draw the first mask (Erdos-Renyi-Kernel) from the study's seed, so that it costs no bytes. In a round that
readjusts, a client drops the smallest weights of each tensor and grows as many by |gradient|, and its upload names its
new mask. The server weighs by examples over who holds a weight, drops what at most `min_votes` hold (fewer than a round
has clients), and prunes each tensor back to its count by magnitude; what nobody holds is zero. Left open, and chosen
here: the gradient is that of `batches` minibatches; by default clients readjust before their first local step
(`after: 0`), so that what has grown is trained before it is judged; the share that is dropped falls to nothing at round
`end` by a cosine.
"""

from __future__ import annotations

from fedlth.methods.global_mask import ARMS, ErkMask, HeldMean, Readjust, ReadjustUpdate
from fedlth.methods.method import FederatedMethod, Phase
from fedlth.methods.options import at_least, check, density_of


def feddst(
    density: float = 0.2, rate: float = 0.01, every: int = 15, end: int = 400, after: float = 0.0, batches: int = 1,
    min_votes: int = 0,
) -> FederatedMethod:  # fmt: skip
    check(
        density=density_of(density), rate=(rate, 0 <= rate < 1, "in [0, 1)"), every=at_least(1, every),
        end=at_least(1, end), after=(after, 0 <= after < 1, "in [0, 1)"), batches=at_least(0, batches),
        min_votes=at_least(0, min_votes),
    )  # fmt: skip
    update = ReadjustUpdate(before=Readjust(every, end, rate, after, batches))
    phase = Phase(name="federate", update=update, join=HeldMean(min_votes), own_mask=True)
    return FederatedMethod(
        name="feddst", paper="Bibikar et al., AAAI 2022, arXiv 2112.09824",
        summary="a sparse global model whose mask clients readjust by gradients (control: rate 0)",
        phases=(phase,), arms=ARMS, start_mask=ErkMask(density),
    )  # fmt: skip
