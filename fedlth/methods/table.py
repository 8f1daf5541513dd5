"""Every method by name; each is a function in the file of its family, whose options are the function's."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fedlth.methods.baselines import fedavg, fedavg_ft, local, standalone, two_step
from fedlth.methods.fedpm import fedpm
from fedlth.methods.fedselect import fedselect
from fedlth.methods.fiarse import fiarse
from fedlth.methods.fjord import fjord
from fedlth.methods.heterofl import heterofl
from fedlth.methods.lotteryfl import lotteryfl
from fedlth.methods.method import FederatedMethod
from fedlth.methods.sparsyfed import sparsyfed
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
        heterofl,
        fjord,
        fiarse,
        sparsyfed,
    )
}
