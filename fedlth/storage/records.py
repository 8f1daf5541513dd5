"""What a run's folder holds beside its header, declared once: every record of every file, for writers and readers.

Field types say what a value may be: `typed_record.read` holds every record against them, wherever it comes from.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from fedlth.errors import StudyError
from fedlth.storage.json_lines import read_lines
from fedlth.storage.typed_record import (
    Amount,
    Count,
    Label,
    Name,
    Number,
    Numbers,
    Range,
    Share,
    Shares,
    Target,
    Text,
    has_mean,
    read,
)  # fmt: skip

T = TypeVar("T")

HANDED, INTRODUCE = "handed", "introduce"  # phases of newcomers; the first is an arm too
EVALUATE = "evaluate"  # the phase whose messages only serve the curve: no total of the training's traffic holds them

# Kinds of Failed that a fleet has (devices are late, too): they cost only the client's own round.
LATE, DROPPED = "late", "dropped"


@dataclass(frozen=True, kw_only=True)
class LedgerRow:
    """One message. `payload_bytes` is len() of what was serialised; `framed_bytes` is what the transport tells.

    `kind` is values, mask, scores, statistics, metrics or evaluation, as the message says; "install" is a client's
    first model, "control" a client's request, "resync" what was sent again because of it. `coding` names the mask mode
    and the value mode; `mask_bytes` and `value_bytes` are those sections (the rest is header and checksum); `iid_bytes`
    is the sum of n H(k / n) over the mask's layers: a reference beside `mask_bytes`, no minimum.
    """

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


def party(client: int | None) -> str:
    """Name a sender or receiver: "server" or "client:7"."""
    return "server" if client is None else f"client:{client}"


def client_of(party: str) -> int | None:
    """Return the client that a party's name stands for, None for any other name."""
    kind, _, number = party.partition(":")
    return int(number) if kind == "client" and number.isdecimal() else None


@dataclass(frozen=True)
class Failed:
    """A client without a usable answer: `kind` is refused, late, dropped, or a failure's; `reason` is one line."""

    client: int
    kind: str
    reason: str


@dataclass(frozen=True)
class Diverged:
    """An arm whose training diverged."""

    client: int
    arm: str
    target_density: float


@dataclass(frozen=True)
class FarMask:
    """A client whose mask is an outlier of its round: its median Jaccard distance to the others."""

    client: int
    distance: float


@dataclass(frozen=True)
class Injected:
    """A fault that the study's `chaos` put into a client's visit."""

    client: int
    fault: str


@dataclass(frozen=True)
class NoisySteps:
    """The noisy steps (privacy.dp) that a client took in a visit with Poisson batches of this mean size."""

    client: int
    batch_size: int
    steps: int


@dataclass(frozen=True, kw_only=True)
class RoundRow:
    """One round as the server saw it; `val_accuracy` is None where no visit reported one.

    `val_metric` is the study's metric where that is not accuracy. `rolled_back_to` says which global model took the
    place of one that no client could use ("" for none), `kept_best` with which one step 2 begins where the evaluations
    chose it (it is on the row of the last evaluation), `simulated_s` what the round takes on the study's fleet (None
    without one), `mask_outliers` whose masks lay far from all others (where the study asks: federate.mask_outliers),
    `injected` which faults were put into whose visits (where the study asks: chaos), had they an effect or not.
    `undone` says which round's model had collapsed, and why; what this round made of it is undone with it.
    `void` says that too few replies were usable for the round to count, so that everything stayed as it was; `absent`
    which clients could not be reached when it began, where the engine knows. `noisy` are the steps that each client
    told of where training is noisy (privacy.dp); of a client whose answer was not used they may be missing.
    """

    OPTIONAL: ClassVar[frozenset[str]] = frozenset(
        {
            "rolled_back_to",
            "undone",
            "kept_best",
            "simulated_s",
            "val_metric",
            "mask_outliers",
            "void",
            "absent",
            "injected",
            "noisy",
        }  # fmt: skip
    )

    round: int
    phase: str
    clients: list[int]
    val_accuracy: float | None = None
    up_bytes: int
    down_bytes: int
    failed: list[Failed] = field(default_factory=list)
    diverged: list[Diverged] = field(default_factory=list)
    rolled_back_to: str = ""
    undone: str = ""
    kept_best: str = ""
    simulated_s: float | None = None
    val_metric: float | None = None
    mask_outliers: list[FarMask] = field(default_factory=list)
    void: bool = False
    absent: list[int] = field(default_factory=list)
    injected: list[Injected] = field(default_factory=list)
    noisy: list[NoisySteps] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Work:
    """CPU time that a client spent: on a training at a density, an evaluation of so many examples, or a whole arm.

    `flops` of a training are counted dense, `alive_flops` by what is alive; no earlier version wrote them. An arm's
    `last_cpu_s` is that of its last training; what came before is its search.
    """

    OPTIONAL: ClassVar[frozenset[str]] = frozenset(
        {"density", "epochs", "flops", "alive_flops", "evaluated", "arm", "target_density", "last_cpu_s"}
    )

    cpu_s: float
    density: float | None = None
    epochs: float | None = None
    flops: float | None = None
    alive_flops: float | None = None
    evaluated: int | None = None
    arm: str | None = None
    target_density: float | None = None
    last_cpu_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class TimeRow:
    """What one client's visit took, on which worker; no `client`: the whole round, from its start to its commit.

    `simulated_s` is what the visit takes on the study's fleet.
    """

    OPTIONAL: ClassVar[frozenset[str]] = frozenset({"worker", "seconds", "device", "work", "simulated_s"})

    round: int
    phase: str
    client: int | None = None
    worker: str | None = None
    seconds: float | None = None
    device: str | None = None
    work: list[Work] = field(default_factory=list)
    simulated_s: float | None = None


@dataclass(frozen=True)
class Digests:
    """By what two runs are compared (digests.json): the global model's digest, and the tickets' by client."""

    theta_g: str
    tickets: dict[str, str]


@dataclass(frozen=True)
class MetricRow:
    """One client under one arm at one density, read once at the end.

    Accuracies are None where targets are real numbers, and all of validation where a client has no such part; the
    study's metrics beside accuracy and loss are in `val_metrics` and `test_metrics` by name. `diverged` says that the
    arm's training did, `chosen` that the client keeps this ticket, where each has a density of its own (finder.main:
    auto, capacity). Defaults are for reading what earlier versions wrote: a client must give every field that is not
    in OPTIONAL.
    """

    OPTIONAL: ClassVar[frozenset[str]] = frozenset({"diverged", "chosen", "val_metrics", "test_metrics"})

    client: Count
    unseen: bool
    arm: Name
    density: Share
    target_density: Target
    val_accuracy: Share | None
    test_accuracy: Share | None
    num_train: Count
    start: Label = ""
    epochs: Amount = 0.0
    search_epochs: Amount = 0.0
    train_flops: Amount = 0.0
    train_flops_effective: Amount = 0.0
    val_loss: Number | None = float("nan")
    test_loss: Number = float("nan")
    num_val: Count = 0
    num_test: Count = 0
    ticket: Label = ""
    layer_density: Annotated[dict[str, Any], Shares()] = field(default_factory=dict)
    diverged: bool = False
    chosen: bool = False
    val_metrics: Annotated[dict[str, Any], Numbers()] = field(default_factory=dict)
    test_metrics: Annotated[dict[str, Any], Numbers()] = field(default_factory=dict)

    def value(self, part: str, metric: str) -> float:
        """Return a metric's value on "val" or "test" data; NaN where the row does not say it."""
        return _value(self, part, metric)


@dataclass(frozen=True, kw_only=True)
class CurveRow:
    """One client under one model after a round of step 1: arm `global`, or `own`, which a method may have besides.

    `phase` and `round` are those of the round that made the model; the server writes them, whatever a client says.
    """

    OPTIONAL: ClassVar[frozenset[str]] = frozenset({"round", "phase", "diverged", "val_metrics", "test_metrics"})

    round: Count = 0
    phase: Label = ""
    client: Count
    unseen: bool
    arm: Name
    density: Share
    val_accuracy: Share | None
    test_accuracy: Share | None
    val_loss: Number | None
    test_loss: Number | None
    num_val: Count
    num_test: Count
    diverged: bool = False
    val_metrics: Annotated[dict[str, Any], Numbers()] = field(default_factory=dict)
    test_metrics: Annotated[dict[str, Any], Numbers()] = field(default_factory=dict)

    def value(self, part: str, metric: str) -> float:
        """Return a metric's value on "val" or "test" data; NaN where the row does not say it."""
        return _value(self, part, metric)


def _value(row: MetricRow | CurveRow, part: str, metric: str) -> float:
    found = getattr(row, f"{part}_{metric}") if metric in ("accuracy", "loss") else None
    found = getattr(row, f"{part}_metrics").get(metric) if found is None else found
    return float("nan") if found is None else float(found)


@dataclass(frozen=True)
class VisitRecord:
    """What a client says of one visit. A method may leave out all but the first, and add numbers of its own.

    `val_metric` is the study's metric where that is not accuracy.
    """

    OPTIONAL: ClassVar[frozenset[str]] = frozenset({"loss", "val_accuracy", "density", "val_metric"})

    num_examples: Annotated[int, Range(1, 2**53, "a whole number of at least 1")]
    loss: Number | None = None
    val_accuracy: Share | None = None
    density: Share | None = None
    val_metric: Number | None = None


def visit_record(record: Mapping[str, Any]) -> VisitRecord:
    """Return a visit's record, of which a method's own numbers are only checked; raise ValueError naming the field."""
    known = {spec.name for spec in fields(VisitRecord)}
    for name, value in record.items():
        if name not in known and not (Text(100)(name) and has_mean(value)):
            told = f"{reprlib.repr(name)}: {reprlib.repr(value)}"
            raise ValueError(f"a method's own metric must be a finite number under a printable name, got {told}")
        if name in known and value is None:
            raise ValueError(f"{name} must be a number, got None")
    return read(VisitRecord, {k: v for k, v in record.items() if k in known}, strict=True)


LOGS: dict[str, type] = {
    "ledger": LedgerRow, "rounds": RoundRow, "metrics": MetricRow, "times": TimeRow, "curve": CurveRow,
}  # fmt: skip


def parse(kind: type[T], row: Mapping[str, Any], *, place: str) -> T:
    """Return `row` as a value of `kind`; raise StudyError naming `place` and the field that is missing or wrong."""
    try:
        return read(kind, row, strict=False)
    except ValueError as error:
        raise StudyError(f"{place}: {error}") from None


def read_log(
    run: Path, kind: type[T], *, required: bool = False, forgive_last: bool = False
) -> tuple[tuple[T, ...], str]:
    """Return all rows of a kind in LOGS, and a note as `read_lines` has it; raise StudyError naming file and line."""
    path = run / next(f"{name}.jsonl" for name, rows in LOGS.items() if rows is kind)
    found, note = read_lines(path, required=required, forgive_last=forgive_last)
    return tuple(parse(kind, row, place=f"{path}:{i}") for i, row in enumerate(found, start=1)), note
