"""A leaderboard's tables: for people as rows of text, and for programs as CSV whose columns carry their units."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedlth.bench.board import Board, Line
from fedlth.bench.contrasts import Contrast
from fedlth.bench.run import TRIALS
from fedlth.bench.spending import Spending, moved_bytes
from fedlth.errors import StudyError
from fedlth.report.facts import read_run
from fedlth.report.fleet import duration
from fedlth.report.known_arms import arm_of
from fedlth.report.measure import Shown
from fedlth.report.tables import Table
from fedlth.report.units import NOTHING, count, percent, scaled

OWN = "own result"
TO_WORST = "time to the worst method's last validation result"
FAR = 0.25  # of the density that was asked: how far from it a method may end without a note


def outcome_table(board: Board, partition: str) -> Table:
    """Return what came out on a partition: methods from best to worst, under each its controls."""
    shown, names = board.shown, list(board.references)
    if shown is None:
        return Table("", (), ())
    unit, points = shown.column, difference_unit(shown)
    header = (
        "method", "what", "density (share)", f"mean {unit}", f"95 % interval {unit}", f"{shown.tail} {unit}",
        f"worst decile {unit}", "hurt vs local %", f"unseen {unit}", *(f"less {name}, {points}" for name in names),
    )  # fmt: skip
    rows = []
    for line in board.lines[partition]:
        main, local = line.summary, line.alone
        rows.append((
            line.row if line.control else line.method, _what(line), main.density_text,
            shown.text(main.mean), shown.bounds(line.interval), shown.text(main.tail), shown.text(main.worst_decile),
            percent(local.hurt if local else None, digits=0), shown.text(main.unseen),
            *(_less(shown, line.against.get(name)) for name in names),
        ))  # fmt: skip
    return Table(f"{partition}: test {shown.label} over clients", header, tuple(rows), left=2)


def difference_unit(shown: Shown) -> str:
    return "points" if shown.measure.percent else shown.label


def _what(line: Line) -> str:
    """Say what a row is of, and in a few words what sets it apart."""
    if line.control and not line.row:
        told = f"{line.control}: the same mask" if line.same else line.control
        return f"{told} (seen clients)" if line.fewer else told
    label, seeds = arm_of(line.summary.choice.arm).label, line.summary.num_seeds
    label = f"{line.control}: {label}" if line.control else label
    return f"{label} ({seeds} of {seeds + line.missing} seeds)" if line.missing else label


def unequal(board: Board, partition: str) -> str:
    """Say who ends far from the density that was asked of it, a row that is a control from its method's; else ''."""
    found, apart = [], []
    for line in board.lines[partition]:
        if line.row:
            own = board.entries[partition][line.method]
            main = own.results.summary(own.choice)
            if main is not None and abs(line.summary.density - main.density) > FAR * main.density:
                apart.append(f"{line.row} {line.summary.density_text} ({line.method} {main.density_text})")
            continue
        asked = board.matrix.methods[line.method].get("density")
        reached = line.summary.density
        if line.control or not isinstance(asked, float | int) or abs(reached - asked) <= FAR * asked:
            continue
        found.append(f"{line.method} {line.summary.density_text} (asked {asked:g})")
    said = [
        f"Compared at unequal densities, since these end far from the density asked of them: {', '.join(found)}.",
        f"Controls that end at another density than their method: {', '.join(apart)}.",
    ]
    return " ".join(one for one, names in zip(said, (found, apart), strict=True) if names)


def _less(shown: Shown, found: Contrast | None) -> str:
    if found is None:
        return NOTHING
    clear = found.verdict.strip("()") in ("ahead", "behind")
    return f"{shown.difference(found.mean)}{('*' if found.tested else '(*)') if clear else ''}"


def tests_table(board: Board, partition: str) -> Table:
    """Return what is tested on a partition: methods against the references, then against their own controls."""
    shown = board.shown
    if shown is None:
        return Table("", (), ())
    unit = difference_unit(shown)
    header = (
        "method",
        "against",
        "its difference",
        f"mean, {unit}",
        f"95 % interval, {unit}",
        "seeds",
        "pairs",
        "p",
        "p (Holm)",
    )
    rows = []
    for line in board.lines[partition]:
        pairs = line.against.items() if not line.control else [(line.against_it, line.beaten)]
        for name, one in pairs:
            if one is not None:
                rows.append((
                    line.method, name, one.verdict, shown.difference(one.mean),
                    shown.bounds(one.interval, signed=True), str(one.num_seeds), str(one.num_pairs),
                    _p(one.p_value), _p(one.p_holm),
                ))  # fmt: skip
    return Table(f"{partition}: paired differences", header, tuple(rows), left=3)


def _p(value: float | None) -> str:
    return NOTHING if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def cost_table(board: Board, partition: str) -> Table:
    """Return what every method took on a partition, mean over seeds, in the order of the outcome."""
    timed, reached, shown = board.timed, board.reached[partition], board.shown
    to = TO_WORST if shown is None or reached.target is None else f"time to {shown.text(reached.target)}{shown.unit}"
    header = (
        "method", "bytes down", "bytes up", "bytes down, broadcast once", "bytes up, once", "bytes beside",
        "bits down per number and visit", "bits up per number and visit", "training FLOPs, dense",
        "FLOPs by what is alive", "epochs a client: rounds + own", *(("simulated time", to) if timed else ()),
    )  # fmt: skip
    rows = []
    for line in board.lines[partition]:
        if line.control and not line.row:
            continue
        cost = board.cost_of(partition, line)
        amounts = (cost.down_bytes, cost.up_bytes, cost.once_down_bytes, cost.once_up_bytes, cost.beside_bytes)
        bits = (NOTHING if one is None else f"{one:.2f}" for one in (cost.down_bits, cost.up_bits))
        epochs = f"{count(round(cost.round_epochs, 1))} + {count(round(cost.own_epochs, 1))}"
        first = None if line.row else reached.seconds.get(line.method)
        simulated = tuple(map(duration, (cost.simulated_s, first))) if timed else ()
        flops = scaled(cost.flops, ""), NOTHING if cost.alive_flops is None else scaled(cost.alive_flops, "")
        rows.append(
            (line.row or line.method, *(scaled(one, "B") for one in amounts), *bits, *flops, epochs, *simulated)
        )
    return Table(f"{partition}: what it cost, mean over seeds", header, tuple(rows))


def machine_table(board: Board) -> Table:
    """Return what every cell took on this machine, and how it stands: what no two calls repeat."""
    header = ("cell", "stands", "why", "wall seconds", "peak memory of a process, bytes")
    rows = [
        (name, one.status, one.reason or NOTHING, f"{one.seconds:.1f}" if one.seconds else NOTHING,
         scaled(1e6 * one.peak_memory_mb, "B") if one.peak_memory_mb else NOTHING)
        for name, one in board.outcomes.items()
    ]  # fmt: skip
    return Table("Every cell", header, tuple(rows), left=3)


def ranks_table(board: Board) -> Table:
    """Return the average ranks, best first; no rows where there is no ranking."""
    found = board.ranking
    header = ("method", "average rank")
    if found is None:
        return Table("", header, ())
    rows = tuple((name, f"{rank:.2f}") for name, rank in zip(found.names, found.ranks, strict=True))
    return Table(f"Average ranks over {len(found.blocks)} blocks (partition, seed); 1 is best", header, rows)


@dataclass(frozen=True)
class Tried:
    """One learning rate that was tried. score: on validation data, "diverged" in words; moved: its trial's bytes."""

    partition: str
    method: str
    seeds: str
    lr: str
    metric: str
    score: float | str
    chosen: bool
    moved: int | None


def tried(board: Board) -> tuple[Tried, ...]:
    """Return every rate of every method, in the matrix's order."""
    found = []
    for partition in board.matrix.partitions:
        for method in board.matrix.methods:
            shared = board.root / partition / method
            for folder in (shared, *(shared / str(seed) for seed in board.matrix.seeds)):
                file = folder / TRIALS / "chosen.json"
                if not file.is_file():
                    continue
                told = json.loads(file.read_bytes())
                key = next(key for key in told if key.startswith("val_"))
                seeds = "first" if folder == shared else folder.name
                for lr, score in told[key].items():
                    moved, metric = _moved(folder / TRIALS / f"lr-{lr}"), key.removeprefix("val_")
                    found.append(Tried(partition, method, seeds, lr, metric, score, lr == str(told["lr"]), moved))
    return tuple(found)


def tuning_table(rates: Sequence[Tried], shown: Shown | None) -> Table:
    """Return each rate's score on validation data, what was chosen, and what its trial moved, for people."""
    unit, rows = shown.column if shown else "", []
    for one in rates:
        score = one.score if isinstance(one.score, str) or shown is None else shown.text(one.score)
        chosen = "chosen" if one.chosen else ""
        rows.append((one.partition, one.method, one.seeds, one.lr, str(score), chosen, scaled(one.moved, "B")))
    header = ("partition", "method", "seed", "learning rate", f"validation {unit}", "chosen", "bytes of the trial")
    return Table("Tuning: the same number of rates for every method", header, tuple(rows), left=3)


def tuning_csv(rates: Sequence[Tried], shown: Shown | None) -> Table:
    """Return the same for programs: numbers alone, the score in the page's unit."""
    percent, rows = shown is not None and shown.measure.percent, []
    for one in rates:
        score = one.score if isinstance(one.score, str) else plain(one.score * (100.0 if percent else 1.0))
        moved = "" if one.moved is None else str(one.moved)
        rows.append((one.partition, one.method, one.seeds, one.lr, score, str(int(one.chosen)), moved))
    score = f"validation_{shown.slug if shown else 'metric'}{'_percent' if percent else ''}"
    return Table("", ("partition", "method", "seed", "lr", score, "chosen", "trial_bytes"), tuple(rows))


def _moved(folder: Path) -> int | None:
    try:
        return moved_bytes(read_run(folder)) if (folder / "header.json").is_file() else None
    except StudyError:
        return None


def whole_table(board: Board) -> Table:
    """Return all partitions' outcomes and costs in one table, for a paper."""
    rows: list[tuple[str, ...]] = []
    header: tuple[str, ...] = ("",)
    for partition in board.entries:
        outcome, cost = outcome_table(board, partition), cost_table(board, partition)
        spent = {row[0]: row[1:] for row in cost.rows}
        blank = tuple("" for _ in cost.header[1:])
        costs = cost.header[1:-1] + (TO_WORST,) if board.timed else cost.header[1:]  # each partition's is its own
        header = ("partition", *outcome.header, *costs)
        rows += [(partition, *row, *spent.get(row[0], blank)) for row in outcome.rows]
    return Table(f"{board.matrix.name}: leaderboard", header, tuple(rows), left=3)


def leaderboard_csv(board: Board) -> str:
    """Return one row a partition, method and control, every number plain; nothing in it depends on a clock."""
    shown = board.shown
    rows: list[dict[str, object]] = []
    for partition, lines in board.lines.items() if shown else ():
        for line in lines:
            rows.append(_record(board, partition, line))
    header = list(dict.fromkeys(key for row in rows for key in row))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header or ["partition", "method"])
    writer.writerows([[plain(row.get(key)) for key in header] for row in rows])
    return out.getvalue()


def plain(value: object) -> str:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return ""
    return f"{value:.8g}" if isinstance(value, float) else str(value)


def _record(board: Board, partition: str, line: Line) -> dict[str, object]:
    shown, main = board.shown, line.summary
    assert shown is not None
    unit = "percent" if shown.measure.percent else shown.slug
    times = shown.factor
    local = line.alone
    record: dict[str, object] = {
        "partition": partition,
        "method": line.method,
        "row": f"{line.control}: {line.row}" if line.row else line.control or OWN,
        "arm": main.choice.arm,
        "metric": shown.measure.name,
        "seeds": main.num_seeds,
        "clients": main.num_clients // max(1, main.num_seeds),
        "diverged_clients": main.diverged,
        "density_share": float(main.density),
        f"mean_{unit}": times * main.mean,
        f"mean_low_{unit}": times * line.interval.low,
        f"mean_high_{unit}": times * line.interval.high,
        f"{'p10' if shown.measure.higher_is_better else 'p90'}_{unit}": times * main.tail,
        f"worst_decile_{unit}": times * main.worst_decile,
        "hurt_vs_local_percent": None if local is None else 100 * local.hurt,
        f"unseen_{unit}": None if main.unseen is None else times * main.unseen,
    }
    points = "points" if shown.measure.percent else shown.slug
    for name in board.references:
        record |= _contrast(f"vs_{name}", points, times, line.against.get(name))
    record |= _contrast("own_less_control", points, times, line.beaten)
    record |= _cost(board.cost_of(partition, line), line)
    reached = board.reached[partition]
    if reached.target is not None and not line.control:
        record[f"time_to_{unit}"] = times * reached.target
        record["time_to_seconds"] = reached.seconds.get(line.method)
    return record


def _contrast(name: str, unit: str, times: float, found: Contrast | None) -> dict[str, object]:
    return {
        f"{name}_{unit}": None if found is None else times * found.mean,
        f"{name}_low_{unit}": None if found is None else times * found.interval.low,
        f"{name}_high_{unit}": None if found is None else times * found.interval.high,
        f"{name}_p": None if found is None else found.p_value,
        f"{name}_p_holm": None if found is None else found.p_holm,
    }


def _cost(cost: Spending, line: Line) -> dict[str, object]:
    """Return the costs of a method's own row; of a control in its runs only what it trains itself."""
    own = line.summary.epochs + line.summary.search_epochs
    if line.control and not line.row:
        return {"own_epochs": own}
    return {
        "down_bytes": cost.down_bytes,
        "up_bytes": cost.up_bytes,
        "total_bytes": cost.total_bytes,
        "down_once_bytes": cost.once_down_bytes,
        "up_once_bytes": cost.once_up_bytes,
        "beside_bytes": cost.beside_bytes,
        "down_bits_per_number_and_visit": cost.down_bits,
        "up_bits_per_number_and_visit": cost.up_bits,
        "training_flops": cost.flops,
        "alive_training_flops": cost.alive_flops,
        "round_epochs": cost.round_epochs,
        "own_epochs": own,
        "simulated_seconds": cost.simulated_s,
    }
