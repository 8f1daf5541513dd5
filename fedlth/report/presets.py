"""What papers would have reported for a run, recomputed from its ledger, and what each way of counting leaves out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fedlth.report.facts import Facts
from fedlth.report.traffic import SERVER, once
from fedlth.storage.records import LedgerRow

MIB = 2**20
MODELS = ("values", "install", "resync")  # a model's weights, whatever the occasion


@dataclass(frozen=True)
class Claim:
    """Bytes as a paper counts them, None in a direction that it does not count; `printed` is in the paper's unit."""

    up_bytes: float | None
    down_bytes: float | None
    printed: str

    @property
    def total_bytes(self) -> float | None:
        """Return what was counted, both ways; None where the preset does not apply."""
        counted = [part for part in (self.up_bytes, self.down_bytes) if part is not None]
        return sum(counted) if counted else None


class Preset(Protocol):
    """A way of counting: its name, its source, what it counts and what it leaves out, and the count itself."""

    @property
    def name(self) -> str: ...
    @property
    def paper(self) -> str: ...
    @property
    def counts(self) -> str: ...
    @property
    def leaves_out(self) -> str: ...
    def __call__(self, facts: Facts, /) -> Claim: ...


@dataclass(frozen=True)
class Sizes:
    """A model's parameters as papers split them: under the mask, other weights (two axes or more), biases and norms."""

    prunable: int
    weights: int
    rest: int

    def kept(self, row: LedgerRow) -> int:
        """Return how many of the maskable weights a message held; its density is their exact share."""
        return round(row.density * self.prunable)


def sizes_of(facts: Facts) -> Sizes:
    """Return a run's sizes from its header's layers; what nothing trains is in no message."""
    layers = [layer for layer in facts.header.layers if not layer.frozen]
    prunable = sum(layer.size for layer in layers if layer.prunable)
    weights = sum(layer.size for layer in layers if not layer.prunable and len(layer.shape) > 1)
    return Sizes(prunable, weights, sum(layer.size for layer in layers) - prunable - weights)


def lotteryfl_bytes(kept_weights: float, *, rounds: int, clients_per_round: int) -> float:
    """Return what LotteryFL's Table 2 counts: 4 bytes per kept weight without biases, one way, masks free."""
    return 4 * kept_weights * clients_per_round * rounds


def values_in_rounds(facts: Facts) -> list[LedgerRow]:
    """Return the believed messages of weights in federated rounds: all that any of these papers looks at.

    None of them has a rule for what one client sends another.
    """
    joining = facts.header.joining()
    found = (row for row in facts.ledger if row.phase in joining and row.kind in MODELS and row.status == "ok")
    return [row for row in found if SERVER in (row.sender, row.receiver)]


def _up(rows: Sequence[LedgerRow]) -> list[LedgerRow]:
    return [row for row in rows if row.receiver == SERVER]


def _not_here(facts: Facts) -> Claim:
    joining = facts.header.joining()
    met = any(row.phase in joining for row in facts.ledger)
    if any(SERVER not in (row.sender, row.receiver) for row in facts.ledger):
        return Claim(None, None, "clients send to one another")
    return Claim(None, None, "no weights go up in these rounds" if met else "no federated rounds")


@dataclass(frozen=True)
class LotteryFL:
    """Weights only, one way. Derived: it reproduces the published FedAvg column to 0.01 MiB."""

    name: str = "lotteryfl"
    paper: str = "LotteryFL, Li et al., SEC 2021, arXiv 2008.03371"
    counts: str = "4 B per kept weight of every upload, in MiB (printed there as MB)"
    leaves_out: str = "the whole downlink, biases and norms, masks, headers, metrics, refused uploads, step 2"

    def __call__(self, facts: Facts, /) -> Claim:
        sizes, up = sizes_of(facts), _up(values_in_rounds(facts))
        if not up:
            return _not_here(facts)
        total = sum(lotteryfl_bytes(sizes.kept(r) + sizes.weights, rounds=1, clients_per_round=1) for r in up)
        return Claim(total, None, f"{total / MIB:.2f} MiB")


@dataclass(frozen=True)
class FedDST:
    """Bits both ways, as the released code's formula has them."""

    name: str = "feddst"
    paper: str = "FedDST, Bibikar et al., AAAI 2022"
    counts: str = "32 bit per kept and dense parameter both ways; a new mask as n bit down, density x n bit up"
    leaves_out: str = (
        "each client's first download (called a seed), most of an uploaded mask (density x n bit lies below its "
        "entropy), buffers, headers, metrics, refused uploads, step 2; the released code also drops visits that were "
        "overwritten before they were printed, which is not done here"
    )

    def __call__(self, facts: Facts, /) -> Claim:
        sizes, rows = sizes_of(facts), values_in_rounds(facts)
        if not _up(rows):
            return _not_here(facts)
        counted = {id(row) for row in rows}
        held: dict[str, str] = {}  # the mask that a client has, by name; "" is the full one
        met: set[str] = set()
        up = down = 0
        for row in facts.ledger:
            goes_up = row.receiver == SERVER
            client = row.sender if goes_up else row.receiver
            bits = 32 * (sizes.kept(row) + sizes.weights + sizes.rest)
            changed = row.ticket != held.get(client, "")
            if id(row) in counted and goes_up:
                up += bits + changed * sizes.kept(row)
            elif id(row) in counted:
                down += (bits if client in met else 0) + changed * sizes.prunable
                met.add(client)
            if row.status == "ok" and row.kind in (*MODELS, "mask"):
                held[client] = row.ticket
        return Claim(up / 8, down / 8, f"{up:,} bit up, {down:,} bit down")


@dataclass(frozen=True)
class FedPM:
    """The entropy of the uploaded masks."""

    name: str = "fedpm"
    paper: str = "FedPM, Isik et al., ICLR 2023, arXiv 2209.15328"
    counts: str = "n H(p) + log2 n bit per uploaded mask of n weights, p its share of ones"
    leaves_out: str = "the downlink (float scores), weights beside a mask, a coder's needs, headers, metrics, refusals"

    def __call__(self, facts: Facts, /) -> Claim:
        size = sizes_of(facts).prunable
        masks = [row for row in _up(facts.ledger) if row.kind == "mask" and row.status == "ok"]
        if not masks or not size:
            return Claim(None, None, "no bare mask goes up")
        bits = sum(size * entropy(row.density) + math.log2(size) for row in masks)
        return Claim(bits / 8, None, f"{bits / len(masks) / size:.4f} bit per weight and mask")


@dataclass(frozen=True)
class Cell:
    """Both ways in float32, where a dense model for all counts once a round and a ticket counts per receiver."""

    name: str = "cell"
    once: bool = True
    paper: str = "CELL, Seo et al., arXiv 2104.12501"

    @property
    def counts(self) -> str:
        how = (
            "a broadcast once a round, a ticket per receiver" if self.once else "every receiver (the other convention)"
        )
        return f"4 B per kept and dense parameter up and down; down: {how}"

    @property
    def leaves_out(self) -> str:
        receivers = "all receivers of a broadcast but one, " if self.once else ""
        return f"{receivers}masks, buffers, headers, metrics, refused uploads, step 2"

    def __call__(self, facts: Facts, /) -> Claim:
        sizes, rows = sizes_of(facts), values_in_rounds(facts)
        if not _up(rows):
            return _not_here(facts)
        up = down = 0
        for row in once(rows) if self.once else rows:
            size = 4 * (sizes.kept(row) + sizes.weights + sizes.rest)
            if row.receiver == SERVER:
                up += size
            else:
                down += size
        return Claim(up, down, f"{(up + down) / 1e6:.1f} MB")


def entropy(share: float) -> float:
    """Return the binary entropy of a share, in bits."""
    return -sum(p * math.log2(p) for p in (share, 1 - share) if p > 0)


PRESETS: tuple[Preset, ...] = (LotteryFL(), FedDST(), FedPM(), Cell(), Cell(name="cell, unicast", once=False))
