"""Evaluation between the rounds as a client update: the global model and the method's own, on the client's data."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from fedlth.methods.client_update import Inbox, Update
from fedlth.personalization.arms import arm_of
from fedlth.personalization.personalise import Personalise, row_of
from fedlth.personalization.step2 import Result
from fedlth.storage.client_state import ClientState
from fedlth.storage.records import CurveRow
from fedlth.storage.typed_record import as_record
from fedlth.training.local_client import LocalClient

TAKEN = [spec.name for spec in fields(CurveRow) if spec.name not in ("round", "phase")]  # these the server knows


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Evaluate the untrained `arms` as step 2 would if it began now; nothing of the client changes, nothing goes up."""

    step2: Personalise
    arms: tuple[str, ...]
    sends: tuple[tuple[str, str], ...] = ()

    def __call__(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Update:
        step = self.step2.step2(local, inbox, state)
        rows = tuple(curve_row(local, result) for arm in self.arms for result in arm_of(arm)(step))
        return Update(state, rows=rows)


def curve_row(local: LocalClient, result: Result) -> dict[str, Any]:
    """Evaluate one model as a row of step 2 does, and return what the curve takes of it, as it goes up."""
    row = row_of(local, result)
    return as_record(CurveRow(**{name: getattr(row, name) for name in TAKEN}))
