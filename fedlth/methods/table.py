"""Every method by name; each is a function in the file of its family, whose options are the function's."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fedlth.methods.apfl import apfl
from fedlth.methods.baselines import fedavg, fedavg_ft, local, standalone, two_step
from fedlth.methods.dispfl import dispfl
from fedlth.methods.fedpm import fedpm
from fedlth.methods.fedselect import fedselect
from fedlth.methods.gossip import dfedavg
from fedlth.methods.lotteryfl import lotteryfl
from fedlth.methods.method import FederatedMethod
from fedlth.methods.private_layers import fedbn, fedper, fedrep
from fedlth.methods.proximal import ditto, fedprox, pfedme
from fedlth.methods.scaffold import scaffold
from fedlth.methods.server_optimizer import fedadam, fedavgm, fedyogi
from fedlth.methods.sub_fedavg import sub_fedavg

METHODS: Mapping[str, Callable[..., FederatedMethod]] = {
    f.__name__: f
    for f in (
        fedavg,
        fedavg_ft,
        local,
        standalone,
        two_step,
        lotteryfl,
        sub_fedavg,
        fedselect,
        fedpm,
        fedavgm,
        fedadam,
        fedyogi,
        scaffold,
        fedprox,
        ditto,
        pfedme,
        apfl,
        fedper,
        fedrep,
        fedbn,
        dfedavg,
        dispfl,
    )
}
