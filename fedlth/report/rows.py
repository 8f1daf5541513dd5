"""The typed rows of a run folder: what one line of each file must carry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fedlth.errors import StudyError
from fedlth.storage.records import read

Row = TypeVar("Row")

FORMAT = 1


@dataclass(frozen=True)
class Layer:
    """One tensor of the model: its size, whether it may be pruned, and what its dense forward costs."""

    name: str
    shape: list[int]
    size: int
    prunable: bool
    flops_per_example: float = 0.0


@dataclass(frozen=True)
class Header:
    """What is true of a whole run."""

    format: int
    study: str
    method: str
    seed: int
    engine: str
    partition_digest: str
    data_digest: str
    num_clients: int
    num_classes: int
    dense_payload_bytes: int
    finished: bool
    unseen: list[int] = field(default_factory=list)
    client_labels: list[list[int]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, Any] = field(default_factory=dict)
    commit: str | None = None
    paper: str = ""
    compute: str = ""
    num_parameters: int = 0
    num_prunable: int = 0
    dense_raw_bytes: int = 0
    flops_forward_per_example: float = 0.0


@dataclass(frozen=True)
class LedgerRow:
    """One message: who sent what to whom, and the length of what was really serialised."""

    round: int
    phase: str
    sender: str
    receiver: str
    kind: str
    name: str
    payload_bytes: int
    framed_bytes: int | None = None
    density: float = 1.0
    ticket: str = ""
    broadcast: bool = False
    status: str = "ok"
    coding: str = ""
    mask_bytes: int = 0
    value_bytes: int = 0
    iid_bytes: float | None = None


@dataclass(frozen=True)
class RoundRow:
    """One round as the server saw it; `val_accuracy` is None where no client answered.

    `rolled_back_to` says which global model took the place of one that no client could use ("" for none).
    """

    round: int
    phase: str
    clients: list[int]
    up_bytes: int
    down_bytes: int
    val_accuracy: float | None = None
    failed: list[Any] = field(default_factory=list)
    rolled_back_to: str = ""


def parse(kind: type[Row], row: Mapping[str, Any], *, place: str) -> Row:
    """Return `row` as a value of `kind`; fields that `kind` does not know are left out (a newer writer may add some).

    Raises StudyError naming `place` and the field where one is missing or of another type.
    """
    try:
        return read(kind, row, strict=False)
    except ValueError as error:
        raise StudyError(f"{place}: {error}") from None
