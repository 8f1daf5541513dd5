"""What a run spent of its clients' privacy (privacy.dp): RUN/privacy.json, written when it ends."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedlth.storage import store
from fedlth.storage.json_lines import read_object
from fedlth.storage.typed_record import as_record, read

SPENT = "privacy.json"


@dataclass(frozen=True)
class Spent:
    """One client's noisy steps in all its visits, and the epsilon of its training examples.

    `assumed` of the steps are those of visits whose answer was not used, and so may not be told: each counts as the
    longest of its phase.
    """

    client: int
    examples: int
    steps: int
    assumed: int
    epsilon: float


@dataclass(frozen=True)
class SpentPrivacy:
    """What noise there was, and what it left of each client that was visited."""

    noise_multiplier: float
    max_grad_norm: float
    delta: float
    accountant: str
    sampling: str
    clients: Sequence[Spent]


def write_spent(run: Path, spent: SpentPrivacy) -> None:
    record = {**as_record(spent), "clients": [as_record(one) for one in spent.clients]}
    store.write_atomic(run / SPENT, json.dumps(record, indent=1, allow_nan=False).encode())


def read_spent(run: Path) -> SpentPrivacy | None:
    """Return what a run spent; None where it has no such file: nothing was noisy, or it has not ended."""
    if not (run / SPENT).is_file():
        return None
    record = read_object(run / SPENT)
    return SpentPrivacy(**{**record, "clients": [read(Spent, one, strict=True) for one in record["clients"]]})
