"""A device's ticket beside its state: one file that says what it is, and predicts without run or data set."""

from __future__ import annotations

from pathlib import Path

from fedlth.experiment import saved_ticket
from fedlth.experiment.experiment import Experiment
from fedlth.storage import ticket_file
from fedlth.storage.client_state import ClientState


def keep(
    experiment: Experiment, client: int, phase: str, state: ClientState, folder: Path, *, name: str
) -> Path | None:
    """Write the ticket that a step of `phase` has left in a client's state into `folder`; None where there is none.

    `name` is the study's, which the text that a device has of it is without.
    A later one takes its place. `load_ticket` reads it, with the code of a user's model and nothing else.
    """
    if not experiment.phase(phase).in_waves or "ticket" not in state.masks:
        return None
    task = experiment.task_of(client)
    arm = "refined" if phase == "refined" else experiment.kept_arm or ""
    meta = saved_ticket.origin(experiment, client, arm) | {"study": name}
    meta |= saved_ticket.metadata(saved_ticket.about(task))
    params, mask = saved_ticket.kept_ticket(task, state)
    ticket_file.save(folder, "compact", task.layout, params, mask, meta, frozen=saved_ticket.frozen(task))
    return ticket_file.path_of(folder, client)
