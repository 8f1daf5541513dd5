"""What a secure sum of clients' updates would cost: how much of the model each cohort's masks cover together.

Nothing here encrypts anything. A secure sum (Bonawitz et al., CCS 2017) adds integers that look random, so that they
cannot be coded shorter, and all clients of a cohort must send the same positions: those of a mask that all share, those
that any of them keeps, or all. A position that one client alone keeps is that client's value, whatever hides the rest
(arXiv 2508.04285).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from fedlth.privacy.subject import Subject
from fedlth.storage.audit_records import FEW, Coverage
from fedlth.storage.records import RoundRow
from fedlth.storage.run_folder import RunFolder

BITS = 16  # of one client's value; a sum over K clients needs log2 K more


def coverages(subject: Subject, folder: RunFolder) -> Iterator[Coverage]:
    """Yield each cohort's coverage by its tickets: of the rounds inside tickets, or else of those of step 1.

    Tickets stay the same in the rounds inside them. Without such rounds the cohorts of step 1 stand for theirs.
    """
    masks = {client: state.masks["ticket"] for client, state in subject.states.items()}
    inside = subject.experiment.study.refine.rounds > 0
    phases = ("refine",) if inside else tuple(one.name for one in subject.experiment.federated_phases)
    layout = subject.task.layout
    for row in folder.rows(RoundRow):
        found = [masks[client] for client in row.clients if client in masks]
        if row.phase in phases and len(found) > 1:
            yield coverage(row.phase, row.round, found, layout.num_floats - layout.num_prunable)


def coverage(phase: str, round: int, masks: Sequence[np.ndarray], rest: int) -> Coverage:
    """Return what masks, each (num_prunable,) bool, cover together; `rest` numbers go up beside what they keep."""
    keepers = np.sum(masks, axis=0, dtype=np.int64)
    kept = int(keepers.sum()) // len(masks)
    union, alone, few = (int(np.count_nonzero(one)) for one in (keepers, keepers == 1, (keepers > 0) & (keepers < FEW)))
    common_bytes, union_bytes, dense_bytes = (
        summed_bytes(count + rest, len(masks)) for count in (kept, union, keepers.size)
    )
    return Coverage(
        phase=phase, round=round, clients=len(masks), density=kept / keepers.size, union=union / keepers.size,
        alone=alone / max(1, union), few=few / max(1, union), common_bytes=common_bytes, union_bytes=union_bytes,
        dense_bytes=dense_bytes,
    )  # fmt: skip


def summed_bytes(count: int, clients: int) -> int:
    """Return the bytes of so many integers of one client, in a ring that holds the sum of all clients'."""
    return -(-count * (BITS + (clients - 1).bit_length()) // 8)
