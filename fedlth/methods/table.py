"""Every method by name; each is a function in the file of its family, whose options are the function's."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fedlth.methods.apfl import apfl
from fedlth.methods.baselines import fedavg, fedavg_ft, local, standalone, two_step
from fedlth.methods.cell import cell
from fedlth.methods.deltamask import deltamask
from fedlth.methods.dispfl import dispfl
from fedlth.methods.feddst import feddst
from fedlth.methods.fedltn import fedltn
from fedlth.methods.fedmask import fedmask
from fedlth.methods.fedpm import fedpm
from fedlth.methods.fedselect import fedselect
from fedlth.methods.fedspa import fedspa
from fedlth.methods.fedtiny import fedtiny
from fedlth.methods.fiarse import fiarse
from fedlth.methods.fjord import fjord
from fedlth.methods.flash import flash
from fedlth.methods.gossip import dfedavg
from fedlth.methods.hermes import hermes
from fedlth.methods.heterofl import heterofl
from fedlth.methods.lotteryfl import lotteryfl
from fedlth.methods.method import FederatedMethod
from fedlth.methods.pfedgate import pfedgate
from fedlth.methods.private_layers import fedbn, fedper, fedrep
from fedlth.methods.proximal import ditto, fedprox, pfedme
from fedlth.methods.prunefl import prunefl
from fedlth.methods.salient import salientgrads, ssfl
from fedlth.methods.scaffold import scaffold
from fedlth.methods.server_optimizer import fedadam, fedavgm, fedyogi
from fedlth.methods.spafl import spafl
from fedlth.methods.sparsyfed import sparsyfed
from fedlth.methods.sub_fedavg import sub_fedavg
from fedlth.methods.sub_fedavg_hybrid import sub_fedavg_hybrid
from fedlth.methods.ticket_lora import ticket_lora

METHODS: Mapping[str, Callable[..., FederatedMethod]] = {
    f.__name__: f
    for f in (
        # What every other is held against
        fedavg,
        fedavg_ft,
        local,
        standalone,
        two_step,
        # Another objective, or private layers
        fedprox,
        ditto,
        pfedme,
        apfl,
        fedper,
        fedrep,
        fedbn,
        # Another server
        fedavgm,
        fedadam,
        fedyogi,
        scaffold,
        # A personal mask for every client
        lotteryfl,
        cell,
        sub_fedavg,
        sub_fedavg_hybrid,
        hermes,
        fedltn,
        fedspa,
        fedselect,
        pfedgate,
        ticket_lora,
        # One mask for all
        salientgrads,
        ssfl,
        prunefl,
        fedtiny,
        feddst,
        flash,
        sparsyfed,
        # Masks or thresholds in place of weights
        fedpm,
        fedmask,
        deltamask,
        spafl,
        # Sub-models by what a client can carry
        heterofl,
        fjord,
        fiarse,
        # No server
        dfedavg,
        dispfl,
    )  # fmt: skip
}
