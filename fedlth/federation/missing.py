"""Which clients lack the result of a run's last phase, and may be visited again for it."""

from __future__ import annotations

from fedlth.federation.jobs import MACHINES
from fedlth.storage.records import RoundRow
from fedlth.storage.run_folder import RunFolder


def missing(folder: RunFolder) -> list[int]:
    """Return the clients whose visit in the run's last phase was lost with their machine, and not made up for since.

    One that was lost in an earlier phase is not among them: the others have gone on from there without it.
    """
    return sorted(client for client, kind in _failed(folder).items() if kind in MACHINES)


def unfinished(folder: RunFolder) -> list[int]:
    """Return the clients whose visit in the run's last phase failed, if all did: they are asked once more on a resume.

    What stops everybody is rather the study's own code, which may have been mended, than each client's own fault; and
    without a result of anybody all that the rounds have made is lost.
    """
    return [] if folder.progress().lengths["metrics"] else sorted(c for c, kind in _failed(folder).items() if kind)


def _failed(folder: RunFolder) -> dict[int, str]:
    """Return for each client of the last phase how its last visit failed; "" where it did not, or on purpose."""
    found: dict[int, str] = {}
    for row in last_waves(folder):
        injected = {i.client for i in row.injected}  # on purpose, so that a resume ends as a run without a stop
        kinds = {f.client: f.kind for f in row.failed if f.client not in injected}
        found |= {client: kinds.get(client, "") for client in row.clients}
    return found


def last_waves(folder: RunFolder) -> list[RoundRow]:
    """Return the committed waves of the run's last phase."""
    last = last_phase(folder)
    return [row for row in folder.rows(RoundRow) if row.phase == last]


def last_phase(folder: RunFolder) -> str:
    """Name the last phase that gives clients another state; newcomers may be handed a ticket after it."""
    return "refined" if folder.study().refine.rounds else "personalise"
