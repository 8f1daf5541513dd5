"""What crossed the wire, from ledger rows alone: by direction, kind, client and round, beside the dense baseline."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TypeVar

from fedlth.report.facts import Facts, grouped
from fedlth.storage.records import DROPPED, LATE, LedgerRow, RoundRow, client_of, party

Key = TypeVar("Key")
SERVER = party(None)


@dataclass(frozen=True)
class Flow:
    """Payload bytes and messages of some rows, by direction.

    What a client sends another is the one's up and the other's down: `between_bytes` are counted in both.
    """

    messages: int
    up_bytes: int
    down_bytes: int
    between_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Return both directions together, every message once."""
        return self.up_bytes + self.down_bytes - self.between_bytes


@dataclass(frozen=True)
class Frames:
    """What the transport told. A frame carries one visit's messages of one direction, of which one row has its size.

    frames: those whose size was told; all_frames: how many there were. framed: bytes of the former as the transport
    sent them; payload: bytes of the payloads in them.
    """

    frames: int
    all_frames: int
    framed_up_bytes: int
    framed_down_bytes: int
    payload_up_bytes: int
    payload_down_bytes: int

    @property
    def framed_bytes(self) -> int:
        """Return both directions together."""
        return self.framed_up_bytes + self.framed_down_bytes


@dataclass(frozen=True)
class RoundFlow:
    """One round of one phase, and all bytes up to its end."""

    round: int
    phase: str
    flow: Flow
    cumulative_bytes: int


@dataclass(frozen=True)
class Traffic:
    """The traffic of one run. Refused and failed messages are in every total: they were sent.

    unicast: every message counts. once: a payload broadcast to many receivers counts once a round (see `once`).
    late: replies after a fleet's deadline. framed_bytes: as the transport sent it, None unless every frame's size was
    told. dense_bytes: what dense FedAvg would have moved for the same visits through the same codec: one dense model
    down and one dense update up for each visit in rounds that join updates (only the model down where the client
    dropped out), one down for each other visit; `dense_firsts` of these are theta_0, sent before a round had joined
    anything, at `dense_first_bytes`. A dense update is the mean of those that this run did send (dense_seen of them);
    with none, it counts as much as a dense model down. `evaluation` is what the evaluations between the
    rounds moved, every receiver counted: no other field holds any of it. `busiest` is the party that moved most, what
    only controls and tables need left aside, and its flow: the server, where there is one.
    """

    unicast: Flow
    once: Flow
    framed_bytes: int | None
    refused: Flow
    late: Flow
    by_kind: dict[str, Flow]
    by_phase: dict[str, Flow]
    by_client: dict[int, Flow]
    by_round: tuple[RoundFlow, ...]
    dense_ups: int
    dense_downs: int
    dense_firsts: int
    dense_first_bytes: int
    dense_payload_bytes: int
    dense_up_payload_bytes: int
    dense_seen: int
    evaluation: Flow
    busiest: tuple[str, Flow]

    @property
    def dense_up_bytes(self) -> int:
        """Return what dense uploads would have moved."""
        return self.dense_ups * self.dense_up_payload_bytes

    @property
    def dense_down_bytes(self) -> int:
        """Return what dense downloads would have moved."""
        later = self.dense_downs - self.dense_firsts
        return self.dense_firsts * self.dense_first_bytes + later * self.dense_payload_bytes

    @property
    def dense_bytes(self) -> int:
        """Return the dense baseline, both ways."""
        return self.dense_up_bytes + self.dense_down_bytes


def flow(rows: Iterable[LedgerRow], clients: Collection[int] | None = None) -> Flow:
    """Return the sum of payload bytes of `rows`, by direction; with `clients`, of what these sent and received."""
    messages = up = down = between = 0
    for row in rows:
        messages += 1
        sent, received = (_is_client(name, clients) for name in (row.sender, row.receiver))
        up += row.payload_bytes if sent else 0
        down += row.payload_bytes if received else 0
        between += row.payload_bytes if sent and received else 0
    return Flow(messages, up, down, between)


def _is_client(name: str, among: Collection[int] | None) -> bool:
    client = client_of(name)
    return client is not None and (among is None or client in among)


def frames(rows: Iterable[LedgerRow]) -> Frames:
    """Return what the transport told of `rows`; an answer that never came had no frame.

    What several clients sent to one is relayed to it in one frame.
    """
    sent = (row for row in rows if row.payload_bytes or row.framed_bytes is not None)
    held = grouped(
        ((row.round, row.phase, row.receiver, row.sender if row.receiver == SERVER else ""), row) for row in sent
    )
    told = [inner for inner in held.values() if any(row.framed_bytes is not None for row in inner)]
    ups = [row for inner in told for row in inner if row.receiver == SERVER]
    downs = [row for inner in told for row in inner if row.receiver != SERVER]
    return Frames(
        frames=len(told),
        all_frames=len(held),
        framed_up_bytes=sum(row.framed_bytes or 0 for row in ups),
        framed_down_bytes=sum(row.framed_bytes or 0 for row in downs),
        payload_up_bytes=sum(row.payload_bytes for row in ups),
        payload_down_bytes=sum(row.payload_bytes for row in downs),
    )


def clients_of(row: LedgerRow) -> list[int]:
    """Return the client ids at the ends of a message."""
    found = (client_of(row.sender), client_of(row.receiver))
    return [client for client in found if client is not None]


def visitors_of(row: LedgerRow) -> list[int]:
    """Return the clients whose visit a message belongs to: of two clients, who receives it."""
    return clients_of(row)[-1:]


def is_refused(row: LedgerRow) -> bool:
    """Say whether a message was refused or failed; late ones, and clients that dropped out, are counted apart."""
    return row.status not in ("ok", LATE, f"failed: {LATE}", f"failed: {DROPPED}")


def once(rows: Iterable[LedgerRow]) -> list[LedgerRow]:
    """Return the rows with each broadcast counted once: one row a round, phase, sender, name and coding of it.

    A row's kind says what a payload was to its receiver (install, values, evaluation, resync), not which it was. A
    model with a mask is broadcast in two forms, with the mask's bits and without: two payloads, each counted once.
    """
    kept: dict[tuple[object, ...], LedgerRow] = {}
    for place, row in enumerate(rows):
        which = (row.round, row.phase, row.sender, row.name, row.coding)
        kept.setdefault(which if row.broadcast else (place,), row)
    return list(kept.values())


def traffic(facts: Facts) -> Traffic:
    """Return what crossed the wire in one run."""
    rows = facts.ledger
    visits = {(row.round, row.phase, client) for row in rows for client in visitors_of(row)}
    # who dropped out of a round would not have sent a dense update either
    gone = {(row.round, row.phase, c) for row in rows if row.status == f"failed: {DROPPED}" for c in clients_of(row)}
    by_round, cumulative = [], 0
    # rounds stand in the order in which they were committed: a later phase may count its rounds from zero again
    for inner in grouped(((row.round, row.phase), row) for row in rows).values():
        summed = flow(inner)
        cumulative += summed.total_bytes
        by_round.append(RoundFlow(inner[0].round, inner[0].phase, summed, cumulative))
    told, joining = frames(rows), facts.header.joining()
    first, before = facts.header.dense_first_bytes, _before_any_joined(facts.rounds, joining)
    seen = [r.payload_bytes for r in rows if r.sender != SERVER and r.kind == "values" and r.coding.startswith("full ")]
    held = grouped((client, row) for row in rows for client in clients_of(row))
    by_client = {client: flow(inner, {client}) for client, inner in sorted(held.items())}
    return Traffic(
        unicast=flow(rows),
        once=flow(once(rows)),
        framed_bytes=told.framed_bytes if told.frames and told.frames == told.all_frames else None,
        refused=flow(filter(is_refused, rows)),
        late=flow(row for row in rows if row.status == LATE),
        by_kind=dict(sorted(_flows((row.kind, row) for row in rows).items())),
        by_phase=_flows((row.phase, row) for row in rows),
        by_client=by_client,
        by_round=tuple(by_round),
        dense_ups=sum(phase in joining for _, phase, _ in visits - gone),
        dense_downs=len(visits),
        dense_firsts=sum((round, phase) in before for round, phase, _ in visits),
        dense_first_bytes=facts.header.dense_payload_bytes if first is None else first,
        dense_payload_bytes=facts.header.dense_payload_bytes,
        dense_up_payload_bytes=round(sum(seen) / len(seen)) if seen else facts.header.dense_payload_bytes,
        dense_seen=len(seen),
        evaluation=flow(facts.evaluation),
        busiest=_busiest(row for row in rows if row.kind not in ("evaluation", "metrics")),
    )


def _before_any_joined(rounds: Iterable[RoundRow], joining: Collection[str]) -> set[tuple[int, str]]:
    """Return the rounds whose clients were sent what no round had moved: up to the first that joined something."""
    found = set[tuple[int, str]]()
    for row in rounds:
        found.add((row.round, row.phase))
        if row.phase in joining and not row.void:
            break
    return found


def _busiest(rows: Iterable[LedgerRow]) -> tuple[str, Flow]:
    """Return the party at whose ends most bytes lie, and its flow; of equals the first by name."""
    held = grouped((name, row) for row in rows for name in (row.sender, row.receiver))
    flows = {}
    for name, inner in sorted(held.items()):
        client = client_of(name)
        flows[name] = flow(inner, None if client is None else {client})
    return max(flows.items(), key=lambda item: item[1].total_bytes, default=("nobody", Flow(0, 0, 0)))


def _flows(pairs: Iterable[tuple[Key, LedgerRow]]) -> dict[Key, Flow]:
    return {key: flow(inner) for key, inner in grouped(pairs).items()}
