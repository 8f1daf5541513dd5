"""Which clients lack the result of a run's last phase because their machine was lost or away."""

from __future__ import annotations

from fedlth.federation.jobs import MACHINES
from fedlth.storage.records import RoundRow
from fedlth.storage.run_folder import RunFolder


def missing(folder: RunFolder) -> list[int]:
    """Return the clients whose visit in the run's last phase was lost with their machine, and not made up for since.

    One that was lost in an earlier phase is not among them: the others have gone on from there without it.
    """
    lost: dict[int, bool] = {}
    for row in last_waves(folder):
        injected = {i.client for i in row.injected}  # on purpose, so that a resume ends as a run without a stop
        kinds = {f.client: f.kind for f in row.failed if f.client not in injected}
        lost |= {client: kinds.get(client) in MACHINES for client in row.clients}
    return sorted(client for client, is_lost in lost.items() if is_lost)


def last_waves(folder: RunFolder) -> list[RoundRow]:
    """Return the committed waves of the run's last phase."""
    last = last_phase(folder)
    return [row for row in folder.rows(RoundRow) if row.phase == last]


def last_phase(folder: RunFolder) -> str:
    """Name the last phase that gives clients another state; newcomers may be handed a ticket after it."""
    return "refined" if folder.study().refine.rounds else "personalise"
