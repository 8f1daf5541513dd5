"""The methods that every other is held against: FedAvg, fine-tuning, no federation at all, and this project's own."""

from __future__ import annotations

from fedlth.methods.method import FederatedMethod
from fedlth.methods.options import averaged


def fedavg() -> FederatedMethod:
    return FederatedMethod(
        name="fedavg", paper="McMahan et al., AISTATS 2017, arXiv 1602.05629",
        summary="one global model, mean weighted by examples",
        phases=(averaged(),), arms=("global",),
    )  # fmt: skip


def fedavg_ft() -> FederatedMethod:
    return FederatedMethod(
        name="fedavg_ft", paper="Yu, Bagdasaryan, Shmatikov, 2020, arXiv 2002.04758",
        summary="FedAvg, then every client fine-tunes the whole model: the baseline most papers leave out",
        phases=(averaged(),), arms=("global", "local", "dense"),
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
        phases=(averaged(),),
        arms=("global", "local", "dense", "dense_total", "ticket", "global_mask", "random"),
    )  # fmt: skip
