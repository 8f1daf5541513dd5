"""The facts of a run folder as one frozen value; everything else in report/ starts from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from fedlth.errors import StudyError
from fedlth.storage import ticket_file
from fedlth.storage.checkpoint import changed_logs
from fedlth.storage.header import Header, read_header
from fedlth.storage.records import EVALUATE, CurveRow, LedgerRow, MetricRow, RoundRow, TimeRow, read_log
from fedlth.storage.spent_privacy import SpentPrivacy, read_spent
from fedlth.study.yaml_text import parse

T = TypeVar("T")
Key = TypeVar("Key")


@dataclass(frozen=True)
class SavedTicket:
    """What a ticket file says of itself, without its tensors."""

    client: int
    path: Path
    density: float
    arm: str
    ticket: str


@dataclass(frozen=True)
class Facts:
    """One run, as its folder tells it. `notes` holds what a reader must know: unfinished, parts missing, hostile.

    Of hostile clients there are neither metrics nor tickets nor a curve, but their messages.

    `evaluation` are the ledger's rows of the evaluations between rounds, which `ledger` is without: they serve the
    curve alone, and no total holds them. `chosen` is the target density of each client's kept ticket, where every
    client has one of its own; `spent` is what noise in training left of the clients' privacy, None without any.
    """

    path: Path
    header: Header
    config: str
    ledger: tuple[LedgerRow, ...]
    rounds: tuple[RoundRow, ...]
    metrics: tuple[MetricRow, ...]
    times: tuple[TimeRow, ...]
    tickets: tuple[SavedTicket, ...]
    notes: tuple[str, ...]
    evaluation: tuple[LedgerRow, ...] = ()
    curve: tuple[CurveRow, ...] = ()
    chosen: Mapping[int, float] = field(default_factory=dict)
    spent: SpentPrivacy | None = None

    @cached_property
    def main_density(self) -> float | None:
        """The density that the study keeps (finder.main), None where it names no one number."""
        finder = (parse(self.config, str(self.path / "config.yaml")) or {}).get("finder") or {}
        main = finder.get("main")
        return float(main) if isinstance(main, int | float) else None


def _saved(path: Path) -> SavedTicket:
    try:
        meta = ticket_file.read(path, tensors=False)[1]
        digits = path.stem.removeprefix("client-")
        return SavedTicket(
            client=int(meta.get("client", digits)),
            path=path,
            density=float(meta["density"]),
            arm=meta.get("arm", "ticket"),
            ticket=meta.get("ticket", ""),
        )
    except (ValueError, KeyError) as error:
        raise StudyError(f"{path}: expected a ticket with client and density in its metadata, got {error!r}") from None


def read_run(path: Path) -> Facts:
    """Return the facts of one run folder; an unfinished run is read as far as it went, and `notes` says so.

    Raises StudyError naming the file where one is missing (of a finished run) or corrupt.
    """
    if not path.is_dir():
        raise StudyError(f"{path}: expected a run folder, got {'a file' if path.exists() else 'nothing there'}")
    header = read_header(path)
    notes: list[str] = (
        [] if header.finished else ["this run did not finish: what follows covers the part that it completed"]
    )

    def rows(kind: type[T], *, needed: bool) -> tuple[T, ...]:
        found, note = read_log(path, kind, required=needed and header.finished, forgive_last=not header.finished)
        if note and needed:
            notes.append(note)
        return found

    hostile = frozenset(header.hostile)
    if hostile:
        notes.append(
            f"attack {header.attack}: clients {', '.join(map(str, header.hostile))} were hostile; all results are "
            "of the others, bytes of all"
        )

    notes += changed_logs(path)
    config = path / "config.yaml"
    ledger = rows(LedgerRow, needed=True)
    metrics = tuple(row for row in rows(MetricRow, needed=True) if row.client not in hostile)
    return Facts(
        path=path,
        header=header,
        config=config.read_text(encoding="utf-8") if config.is_file() else "",
        ledger=tuple(row for row in ledger if row.phase != EVALUATE),
        # a method without rounds (local only) may leave no such file
        rounds=rows(RoundRow, needed=False),
        metrics=metrics,
        times=rows(TimeRow, needed=False),
        tickets=tuple(
            sorted(
                (one for one in map(_saved, (path / "tickets").glob("*.safetensors")) if one.client not in hostile),
                key=lambda saved: saved.client,
            )
        ),
        notes=tuple(notes),
        evaluation=tuple(row for row in ledger if row.phase == EVALUATE),
        curve=tuple(row for row in rows(CurveRow, needed=False) if row.client not in hostile),
        chosen={row.client: row.target_density for row in metrics if row.chosen},
        spent=read_spent(path),
    )


def grouped(pairs: Iterable[tuple[Key, T]]) -> dict[Key, list[T]]:
    """Return values by key, keys in the order in which they first come."""
    found: dict[Key, list[T]] = {}
    for key, value in pairs:
        found.setdefault(key, []).append(value)
    return found


def read_group(path: Path) -> tuple[Facts, ...]:
    """Return the runs of a folder, by seed: one for a run folder, all for a folder that holds seed-0/, seed-1/, ...

    Raises StudyError where there is none, where a seed is there twice, or where they are not one study and method.
    """
    if not path.is_dir() or (path / "header.json").exists():
        return one_cell((read_run(path),))
    folders = sorted(inner.parent for inner in path.glob("*/header.json"))
    if not folders and (path / "results.jsonl").exists():
        raise StudyError(
            f"{path}: is a run of `fedlth lottery`; the same command with out={path} writes its report anew"
        )
    if not folders:
        raise StudyError(f"{path}: expected a run folder or a folder of them (seed-0/, ...), got no header.json")
    group = tuple(sorted((read_run(folder) for folder in folders), key=lambda facts: facts.header.seed))
    seeds = [facts.header.seed for facts in group]
    if len(set(seeds)) < len(seeds):
        raise StudyError(f"{path}: expected one run a seed, got seeds {seeds}")
    one_study(group, place=str(path))
    return one_cell(group)


def one_cell(group: Sequence[Facts]) -> tuple[Facts, ...]:
    """Return the runs with one target density for every arm that has none of its own.

    A learnt mask, or one that grew with each client's visits, ends at a density of each client's own (its target is 1,
    its density is not). Where every client has one row of an arm, they are one cell: at the target that all were given,
    else at the mean density over clients and seeds.
    """
    met: dict[str, set[tuple[int, int]]] = {}
    targets: dict[str, list[float]] = {}
    for facts in group:
        for row in facts.metrics:
            met.setdefault(row.arm, set()).add((facts.header.seed, row.client))
            targets.setdefault(row.arm, []).append(row.density if row.target_density == 1 else row.target_density)
    free = {arm: _one_density(held) for arm, held in targets.items() if len(held) == len(met[arm])}

    def moved(row: MetricRow) -> MetricRow:
        return replace(row, target_density=free[row.arm]) if row.arm in free else row

    return tuple(replace(facts, metrics=tuple(map(moved, facts.metrics))) for facts in group)


def _one_density(held: Sequence[float]) -> float:
    """Return the density that all have, bit for bit, or their mean: the mean of six .2 is not .2."""
    return held[0] if len(set(held)) == 1 else sum(held) / len(held)


def one_study(group: Sequence[Facts], *, place: str) -> None:
    """Raise StudyError unless every run is of the same study, method and number of clients."""
    kinds = sorted({(f.header.study, f.header.method, f.header.num_clients) for f in group})
    if len(kinds) > 1:
        told = "; ".join(f"{study}, {method}, {clients} clients" for study, method, clients in kinds)
        raise StudyError(f"{place}: expected seeds of one study and method (for others use compare), got {told}")
