"""The account of one run: the truth of its ledger, and beside it what papers would have reported from the same rows."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from textwrap import fill
from typing import Any

from fedlth.report.facts import Facts, grouped
from fedlth.report.presets import PRESETS, Claim, Preset, sizes_of
from fedlth.report.tables import WIDTH, Table, aligned
from fedlth.report.traffic import SERVER, Flow, Frames, Traffic, flow, frames, traffic
from fedlth.report.units import NOTHING, percent
from fedlth.storage.records import LedgerRow


@dataclass(frozen=True)
class Spread:
    """Cumulative bytes of the clients in the ledger: the least, the mean, the most."""

    least: int
    mean: float
    most: int


@dataclass(frozen=True)
class Masks:
    """Uploaded sparse masks: how many, as sent, as bitmaps, and the i.i.d. reference: the sum over layers of n H(p).

    The latter is a reference, never a minimum: trained masks, and a receiver's own mask, beat it.
    """

    messages: int
    sent_bytes: int
    bitmap_bytes: int
    iid_bytes: float


@dataclass(frozen=True)
class Coded:
    """All messages of one coding: payload, mask section, value section, and the i.i.d. reference of their masks."""

    messages: int
    payload_bytes: int
    mask_bytes: int
    value_bytes: int
    iid_bytes: float


@dataclass(frozen=True)
class Account:
    """One run's bytes. `installs` are each client's first model; `dense_raw` is the dense baseline without a codec."""

    facts: Facts
    traffic: Traffic
    frames: Frames
    installs: Flow
    masks: Masks
    codings: dict[str, Coded]
    dense_raw: Flow
    clients: dict[str, Spread]
    claims: tuple[tuple[Preset, Claim], ...]


def account(facts: Facts) -> Account:
    """Return the account of one run from its header and ledger alone."""
    found = traffic(facts)
    first: dict[str, LedgerRow] = {}
    for row in facts.ledger:
        if row.sender == SERVER and row.kind in ("install", "values", "scores", "thresholds"):
            first.setdefault(row.receiver, row)
    size = sizes_of(facts).prunable
    masked = [row for row in facts.ledger if row.sender != SERVER and row.ticket]
    codings = grouped((row.coding, row) for row in facts.ledger if row.coding)
    return Account(
        facts=facts,
        traffic=found,
        frames=frames(facts.ledger),
        installs=flow(first.values()),
        masks=Masks(
            messages=len(masked),
            sent_bytes=sum(row.mask_bytes for row in masked),
            bitmap_bytes=len(masked) * math.ceil(size / 8),
            iid_bytes=sum(row.iid_bytes or 0.0 for row in masked),
        ),
        codings={key: _coded(rows) for key, rows in sorted(codings.items())},
        dense_raw=_dense(
            found, found.dense_ups * facts.header.dense_raw_bytes, found.dense_downs * facts.header.dense_raw_bytes
        ),
        clients={key: _spread(found, key) for key in ("up_bytes", "down_bytes", "total_bytes")},
        claims=tuple((preset, preset(facts)) for preset in PRESETS),
    )


def _coded(rows: list[LedgerRow]) -> Coded:
    return Coded(
        messages=len(rows),
        payload_bytes=sum(row.payload_bytes for row in rows),
        mask_bytes=sum(row.mask_bytes for row in rows),
        value_bytes=sum(row.value_bytes for row in rows),
        iid_bytes=sum(row.iid_bytes or 0.0 for row in rows),
    )


def _dense(found: Traffic, up_bytes: int, down_bytes: int) -> Flow:
    return Flow(found.dense_ups + found.dense_downs, up_bytes, down_bytes)


def _spread(found: Traffic, key: str) -> Spread:
    held = [getattr(one, key) for one in found.by_client.values()]
    return Spread(min(held), sum(held) / len(held), max(held)) if held else Spread(0, 0.0, 0)


def account_json(found: Account) -> dict[str, Any]:
    """Return the account as plain JSON values, in bytes."""
    header, wire = found.facts.header, found.traffic

    def told(one: Flow) -> dict[str, int]:
        return asdict(one) | {"total_bytes": one.total_bytes}

    def claimed(preset: Preset, claim: Claim) -> dict[str, Any]:
        words = {key: getattr(preset, key) for key in ("name", "paper", "counts", "leaves_out")}
        return words | asdict(claim) | {"total_bytes": claim.total_bytes}

    return {
        "run": str(found.facts.path), "study": header.study, "method": header.method, "seed": header.seed,
        "finished": header.finished, "unicast": told(wire.unicast), "broadcast_once": told(wire.once),
        "frames": asdict(found.frames), "refused_or_failed": told(wire.refused), "first_install": told(found.installs),
        "by_phase": {key: told(one) for key, one in wire.by_phase.items()},
        "by_kind": {key: told(one) for key, one in wire.by_kind.items()},
        "by_client": {str(key): told(one) for key, one in wire.by_client.items()},
        "clients": {key: asdict(one) for key, one in found.clients.items()},
        "uploaded_masks": asdict(found.masks),
        "by_coding": {key: asdict(one) for key, one in found.codings.items()},
        "dense_same_codec": told(_dense(wire, wire.dense_up_bytes, wire.dense_down_bytes)),
        "dense_raw": told(found.dense_raw),
        "busiest": {"node": wire.busiest[0]} | told(wire.busiest[1]),
        "evaluation": told(wire.evaluation),
        "presets": [claimed(preset, claim) for preset, claim in found.claims],
    }  # fmt: skip


def truth_table(found: Account) -> Table:
    """Return the ledger's sums, in bytes, with their share of all that was sent."""
    wire = found.traffic
    whole = wire.unicast.total_bytes

    def row(name: str, one: Flow, *, messages: bool = True) -> tuple[str, ...]:
        share = percent(one.total_bytes / whole) if whole else NOTHING
        number = f"{one.messages:,}" if messages else NOTHING
        return (name, number, *(f"{size:,}" for size in (one.up_bytes, one.down_bytes, one.total_bytes)), share)

    rows = [row("all messages, unicast", wire.unicast), row("the same, a broadcast once a round", wire.once)]
    rows += [row(f"phase: {phase}", one) for phase, one in wire.by_phase.items()]
    rows += [row(f"kind: {kind}", one) for kind, one in wire.by_kind.items()]
    rows.append(row("of all: each client's first model", found.installs))
    rows.append(row("of all: refused or failed", wire.refused))
    rows.append(row(f"the busiest node, {wire.busiest[0]}", wire.busiest[1]))
    dense = _dense(wire, wire.dense_up_bytes, wire.dense_down_bytes)
    rows.append(row("dense, same visits, same codec", dense, messages=False))
    rows.append(row("dense, same visits, raw float32", found.dense_raw, messages=False))
    if wire.evaluation.messages:
        rows.append(row("beside all: evaluation between rounds", wire.evaluation))
    return Table("Bytes in the ledger", ("what", "messages", "up B", "down B", "both B", "% of all"), tuple(rows))


def codings_table(found: Account) -> Table:
    """Return what payloads are made of, by how they were coded; headers and checksums are the rest."""
    rows = [
        (key, *(f"{size:,.0f}" for size in (c.messages, c.mask_bytes, c.iid_bytes, c.value_bytes, c.payload_bytes)))
        for key, c in found.codings.items()
    ]
    header = ("coding: mask + values", "messages", "mask B", "i.i.d. B", "values B", "payload B")
    return Table("What payloads are made of", header, tuple(rows))


def clients_table(found: Account) -> Table:
    """Return what one client moved over the run: least, mean, most."""
    names = {"up_bytes": "up B", "down_bytes": "down B", "total_bytes": "both B"}
    rows = [(names[key], f"{one.least:,}", f"{one.mean:,.0f}", f"{one.most:,}") for key, one in found.clients.items()]
    return Table("Bytes of a client", ("per client, cumulative", "min", "mean", "max"), tuple(rows))


def claims_table(found: Account) -> Table:
    """Return what each preset counts, beside its share of the ledger's bytes."""
    whole = found.traffic.unicast.total_bytes
    rows = []
    for preset, claim in found.claims:
        sizes = (NOTHING if part is None else f"{part:,.0f}" for part in (claim.up_bytes, claim.down_bytes))
        total = claim.total_bytes
        share = percent(total / whole) if whole and total is not None else NOTHING
        rows.append((preset.name, claim.printed, *sizes, share))
    header = ("as counted by", "as printed there", "up B", "down B", "% of all")
    return Table("What a paper would have reported", header, tuple(rows), left=2)


def account_text(found: Account) -> str:
    """Return the account for a terminal: the truth, then the presets and what each leaves out."""
    header, told, masks = found.facts.header, found.frames, found.masks
    parts = [f"{header.study} · {header.method} · seed {header.seed} · {len(found.traffic.by_client)} clients"]
    parts.append(aligned(truth_table(found)))
    if found.traffic.dense_ups:
        seen = found.traffic.dense_seen
        source = (
            f"the mean of the {seen} that this run sent"
            if seen
            else "as large as a model sent down, since this run sent none"
        )
        parts.append(f"a dense update through the codec: {found.traffic.dense_up_payload_bytes:,} B, {source}")
    if told.frames:
        text = (
            f"as the transport framed it: up {told.framed_up_bytes:,} B for {told.payload_up_bytes:,} B of payload, "
            f"down {told.framed_down_bytes:,} B for {told.payload_down_bytes:,} B "
            f"({told.frames} of {told.all_frames} frames reported)"
        )
        parts.append(fill(text, WIDTH))
    if masks.messages:
        parts.append(
            f"{masks.messages} uploads name a sparse mask: {masks.sent_bytes:,} B as sent, "
            f"{masks.bitmap_bytes:,} B as bitmaps, {masks.iid_bytes:,.0f} B i.i.d. reference (n H(p), by layer)"
        )
    parts.append(aligned(codings_table(found)))
    parts.append(aligned(clients_table(found)))
    parts.append(aligned(claims_table(found)))
    lines = []
    for preset, _ in found.claims:
        text = f"{preset.name} ({preset.paper}) counts {preset.counts}; leaves out {preset.leaves_out}."
        lines.append(fill(text, WIDTH, subsequent_indent="    "))
    parts.append("\n".join(lines))
    parts += [fill(f"note: {note}", WIDTH) for note in found.facts.notes]
    return "\n\n".join(parts) + "\n"
