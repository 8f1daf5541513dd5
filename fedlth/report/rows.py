"""The typed rows of a run folder: what one line of each file must carry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, TypeVar

from fedlth.errors import StudyError, wrong

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
    """One round as the server saw it; `val_accuracy` is None where no client answered."""

    round: int
    phase: str
    clients: list[int]
    up_bytes: int
    down_bytes: int
    val_accuracy: float | None = None
    failed: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class MetricRow:
    """One client under one arm at one density, read once at the end.

    diverged: there is no such model, for a training did not end in numbers; it counts as a uniform guess.
    """

    client: int
    unseen: bool
    arm: str
    density: float
    target_density: float
    val_accuracy: float
    test_accuracy: float
    num_train: int
    start: str = ""
    epochs: float = 0.0
    search_epochs: float = 0.0
    train_flops: float = 0.0
    train_flops_effective: float = 0.0
    val_loss: float = float("nan")
    test_loss: float = float("nan")
    num_val: int = 0
    num_test: int = 0
    ticket: str = ""
    layer_density: dict[str, Any] = field(default_factory=dict)
    diverged: bool = False


_ACCEPTED: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
    "int | None": (int, type(None)),
    "float | None": (int, float, type(None)),
    "str | None": (str, type(None)),
}


def parse(kind: type[Row], row: Mapping[str, Any], *, place: str) -> Row:
    """Return `row` as a value of `kind`; fields that `kind` does not know are left out (a newer writer may add some).

    Raises StudyError naming `place` and the field where one is missing or of another type.
    """
    found: dict[str, Any] = {}
    for spec in fields(kind):  # type: ignore[arg-type]
        if spec.name not in row:
            if spec.default is MISSING and spec.default_factory is MISSING:
                raise StudyError(f"{place}: {spec.name} is wanted, got only {', '.join(sorted(row)) or 'nothing'}")
            continue
        value = row[spec.name]
        name = str(spec.type)
        accepted = _ACCEPTED.get(name) or ((list,) if name.startswith("list") else (dict,))
        # bool is an int to Python, and true is not a count
        if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in accepted):
            raise wrong(f"{place}: {spec.name}", name, value)
        found[spec.name] = value
    return kind(**found)
