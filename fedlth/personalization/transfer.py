"""One cell of a transfer matrix as a client update: a mask that was handed over, trained as a ticket is.

Chen et al., The Lottery Ticket Hypothesis for Pre-trained BERT Networks, NeurIPS 2020, arXiv 2007.12223.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedlth.methods.client_update import Inbox, Update
from fedlth.methods.method import Everyone, Phase
from fedlth.models.layout import Layout
from fedlth.personalization.arms import trained
from fedlth.personalization.personalise import Personalise, row_of
from fedlth.storage.client_state import ClientState
from fedlth.storage.transfer_cells import TRANSFER
from fedlth.storage.typed_record import as_record
from fedlth.tickets.rewind import changed
from fedlth.training.local_client import LocalClient
from fedlth.training.task import Task

MASK = "mask"  # the message's name


def in_common(task: Task) -> Layout:
    """Return the layout that masks are handed over in: its prunable tensors are those that all clients have.

    That is what is exchanged, and beside it what nothing trains, which is theta_0's everywhere.
    """
    if all(e.trainable for e in task.layout.prunable):
        return task.exchange
    crosses = {e.name for e in task.exchange.entries}
    return task.layout.select(lambda e: e.prunable and (not e.trainable or e.name in crosses))


@dataclass(frozen=True, kw_only=True)
class Transferred:
    """Train and evaluate the mask in the inbox from the finder's rewind target, in the batches of step 2.

    Of tensors that stay with the client the mask is that of its own ticket. A full mask is the dense twin, which
    begins with the rewind target as it is. A rewind to trained weights begins with theta_g here.
    """

    step2: Personalise
    sends: tuple[tuple[str, str], ...] = ()

    def __call__(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Update:
        twin = replace(local, stage="personalise")  # its batches, and its other streams
        step, shared, rewind = self.step2.step2(twin, inbox, state), inbox[MASK].mask, self.step2.finder.rewind
        start = rewind.anchor or "theta_g"
        begin, mask = step.anchor(start), twin.full
        if not shared.all():
            mask = in_common(local.task).mask_into(state.masks["ticket"], local.task.layout, shared)
            begin = changed(rewind, begin, mask, local.task.layout, twin.rng("rewind"))
        density = int(np.count_nonzero(mask)) / mask.size
        result = trained(step, TRANSFER, start, mask, target=density, begin=begin)
        return Update(state, rows=(as_record(row_of(local, result)),))


def phase_of(step2: Any) -> Phase:
    """Return the phase that no run has: `fedlth transfer` asks clients for it after a run, one job a cell."""
    return Phase(name=TRANSFER, update=Transferred(step2=step2), who=Everyone(), rounds=1, changes_state=False)
