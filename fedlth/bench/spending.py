"""What a method's run cost: bytes both ways, bits a parameter, training FLOPs, epochs, simulated time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from fedlth.report.choice import Choice, rows_of
from fedlth.report.facts import Facts
from fedlth.report.fleet import simulated_s
from fedlth.report.traffic import flow, once, visitors_of
from fedlth.storage.header import Header
from fedlth.storage.records import EVALUATE, LedgerRow


@dataclass(frozen=True)
class Spending:
    """What one run took, or the mean over several.

    down_bytes, up_bytes: payloads, every receiver counted; total_bytes counts what one client sends another once;
    once_*: a broadcast counted once a round. All are without `beside_bytes`: what only serves to judge a run (the
    whole model for controls beside a slice, the metrics of step 2, evaluation between rounds). *_bits: bits of payload
    for each shared number of the model and visit in a round of the last federated phase; what earlier phases (a search
    for a mask, say) moved is in the bytes alone. flops: of all clients' training as it
    was done, 3 forwards an example, counted dense; alive_flops: by what was alive in it; epochs: of a client. Step 2
    counts with the arm that speaks for the method, not with its controls. None: nothing was federated, there is no
    fleet, or an earlier version made the run (alive_flops, *_bits).
    """

    down_bytes: float
    up_bytes: float
    total_bytes: float
    once_down_bytes: float
    once_up_bytes: float
    beside_bytes: float
    down_bits: float | None
    up_bits: float | None
    flops: float
    alive_flops: float | None
    round_epochs: float
    own_epochs: float
    simulated_s: float | None


def spending(facts: Facts, choice: Choice) -> Spending:
    """Return what one run took with `choice` as its result."""
    joining = federated_phases(facts.header)
    counted = [row for row in facts.ledger if _of_method(row, joining)]
    moved, all_moved = flow(counted), flow((*facts.ledger, *facts.evaluation))
    single = flow(once(counted))
    last = [row for row in counted if row.phase == _last_phase(facts.header)]
    rounds, visits = flow(last), {(row.round, client) for row in last for client in visitors_of(row)}
    numbers = len(visits) * (shared_numbers(facts.header) or 0)
    simulated = [simulated_s(facts, step=step) for step in (1, 2)]
    (flops, alive_flops), epochs = _rounds(facts, joining)
    rows = rows_of(facts, choice).values()
    if alive_flops is not None:
        alive_flops += math.fsum(row.train_flops_effective for row in rows)
    return Spending(
        down_bytes=moved.down_bytes,
        up_bytes=moved.up_bytes,
        total_bytes=moved.total_bytes,
        once_down_bytes=single.down_bytes,
        once_up_bytes=single.up_bytes,
        beside_bytes=all_moved.total_bytes - moved.total_bytes,
        down_bits=8 * rounds.down_bytes / numbers if numbers else None,
        up_bits=8 * rounds.up_bytes / numbers if numbers else None,
        flops=flops + math.fsum(row.train_flops for row in rows),
        alive_flops=alive_flops,
        round_epochs=epochs / max(1, facts.header.num_clients),
        own_epochs=float(np.mean([row.epochs + row.search_epochs for row in rows])) if rows else 0.0,
        simulated_s=None if simulated == [None, None] else math.fsum(found or 0.0 for found in simulated),
    )


def federated_phases(header: Header, step: int | None = None) -> frozenset[str]:
    """Return the names of the phases (of one step) in which clients train together, with a server or without one."""
    return frozenset(
        p.name for p in header.phases if (p.step == 1 or p.joins) and p.name != EVALUATE and step in (None, p.step)
    )


def _last_phase(header: Header) -> str:
    """Return the last phase of step 1 in which clients train together: those before it look for something first."""
    found = federated_phases(header, 1)
    return next((phase.name for phase in reversed(header.phases) if phase.name in found), "")


def shared_numbers(header: Header) -> int | None:
    """Return how many numbers of the model clients share; None where an earlier version's header does not tell.

    It told the global state's. That is of weights where the raw model has nothing more than a counter a norm; else all
    parameters are shared, where they are the raw model.
    """
    if header.num_shared is not None:
        return header.num_shared
    norms = sum(len(layer.shape) == 1 and layer.name.endswith("weight") for layer in header.layers)
    if header.num_exchanged and header.dense_raw_bytes - 4 * header.num_exchanged in range(0, 8 * norms + 1, 8):
        return header.num_exchanged
    return header.num_parameters if header.dense_raw_bytes == 4 * header.num_parameters else None


def mean_spending(runs: Sequence[Spending]) -> Spending:
    """Return the mean over runs; a field that any of them lacks is lacking."""
    found = {field.name: [getattr(run, field.name) for run in runs] for field in fields(Spending)}
    means = {name: None if None in values else float(np.mean(values)) for name, values in found.items()}
    return Spending(**means)  # type: ignore[arg-type]


def moved_bytes(facts: Facts) -> int:
    """Return every payload byte of a run, whatever it served."""
    return flow((*facts.ledger, *facts.evaluation)).total_bytes


def _of_method(row: LedgerRow, joining: frozenset[str]) -> bool:
    return row.kind != "evaluation" and (row.kind != "metrics" or row.phase in joining)


def _rounds(facts: Facts, joining: frozenset[str]) -> tuple[tuple[float, float | None], float]:
    """Return FLOPs (dense, alive) and epochs of all trainings in federated rounds, of all clients together.

    Of a run of an earlier version they are those of an epoch on the dense network, and None.
    """
    sizes = {row.client: row.num_train for row in facts.metrics}
    usual = float(np.median(list(sizes.values()))) if sizes else 0.0
    visits = [row for row in facts.times if row.phase in joining and row.client is not None]
    done = [(row.client, one) for row in visits for one in row.work if one.epochs and one.density is not None]
    epochs = math.fsum(one.epochs or 0.0 for _, one in done)
    if all(one.flops is not None and one.alive_flops is not None for _, one in done):
        counted = (one.flops or 0.0 for _, one in done), (one.alive_flops or 0.0 for _, one in done)
        return (math.fsum(counted[0]), math.fsum(counted[1])), epochs
    dense = (
        3 * (one.epochs or 0.0) * sizes.get(client, usual) * facts.header.network(client)[1]
        for client, one in done if client is not None
    )  # fmt: skip
    return (math.fsum(dense), None), epochs
