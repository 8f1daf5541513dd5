"""A leaderboard's tables: for people as rows of text, and for programs as CSV whose columns carry their units."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np

from fedlth.bench.board import Board, Entry, Line
from fedlth.bench.contrasts import Contrast
from fedlth.bench.run import TRIALS
from fedlth.bench.spending import moved_bytes
from fedlth.errors import StudyError
from fedlth.report.facts import read_run
from fedlth.report.fleet import duration
from fedlth.report.known_arms import arm_of
from fedlth.report.measure import Shown
from fedlth.report.tables import Table
from fedlth.report.units import NOTHING, count, percent, scaled

OWN = "own result"


def outcome_table(board: Board, partition: str) -> Table:
    """Return what came out on a partition: methods from best to worst, under each its controls."""
    shown, names = board.shown, list(board.references)
    if shown is None:
        return Table("", (), ())
    header = (
        "method", "what", "density", f"mean {shown.column}", "95 % interval", shown.tail, "worst decile",
        "hurt vs local %", f"unseen {shown.column}", *(f"less {name}" for name in names),
    )  # fmt: skip
    rows = []
    for line in board.lines[partition]:
        main, local = line.summary, line.against.get("local")
        rows.append((
            line.method if not line.control else "", line.control or arm_of(main.choice.arm).label, main.density_text,
            shown.text(main.mean), shown.bounds(main.interval), shown.text(main.tail), shown.text(main.worst_decile),
            percent(local.hurt if local else None, digits=0), shown.text(main.unseen),
            *(_less(shown, line.against.get(name)) for name in names),
        ))  # fmt: skip
    return Table(f"{partition}: test {shown.label} over clients", header, tuple(rows), left=2)


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
    unit = "points" if shown.measure.percent else shown.label
    header = (
        "method",
        "against",
        "its difference",
        f"mean, {unit}",
        "95 % interval",
        "seeds",
        "pairs",
        "p",
        "p (Holm)",
    )
    rows = []
    for line in board.lines[partition]:
        pairs = line.against.items() if not line.control else [(f"its {line.control}", line.beaten)]
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
    timed = any(e.cost.simulated_s is not None for e in board.entries[partition].values())
    header = (
        "method", "down", "up", "down, broadcast once", "up, once", "beside", "bits down", "bits up", "training FLOPs",
        "epochs: rounds + own", *(("simulated time",) if timed else ()),
    )  # fmt: skip
    rows = []
    for line in board.lines[partition]:
        if line.control:
            continue
        cost = board.entries[partition][line.method].cost
        amounts = (cost.down_bytes, cost.up_bytes, cost.once_down_bytes, cost.once_up_bytes, cost.beside_bytes)
        bits = (NOTHING if one is None else f"{one:.2f}" for one in (cost.down_bits, cost.up_bits))
        epochs = f"{count(round(cost.round_epochs, 1))} + {count(round(cost.own_epochs, 1))}"
        simulated = (duration(cost.simulated_s),) if timed else ()
        rows.append((line.method, *(scaled(one, "B") for one in amounts), *bits, scaled(cost.flops, ""), epochs,
                     *simulated))  # fmt: skip
    return Table(f"{partition}: what it cost, mean over seeds", header, tuple(rows))


def machine_table(board: Board) -> Table:
    """Return what every cell took on this machine, and how it stands: what no two calls repeat."""
    header = ("cell", "stands", "why", "seconds", "peak memory of a process")
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


def tuning_table(board: Board) -> Table:
    """Return the grid and the choice of every method: each rate's score on validation data, and what trials moved."""
    rows = []
    for partition in board.matrix.partitions:
        for method in board.matrix.methods:
            shared = board.root / partition / method
            for folder in (shared, *(shared / str(seed) for seed in board.matrix.seeds)):
                file = folder / TRIALS / "chosen.json"
                if file.is_file():
                    told = json.loads(file.read_bytes())
                    scores = next(found for key, found in told.items() if key.startswith("val_"))
                    grid = ", ".join(f"{lr}: {s if isinstance(s, str) else f'{s:.4f}'}" for lr, s in scores.items())
                    seeds = "first" if folder == shared else folder.name
                    rows.append((partition, method, seeds, grid, str(told["lr"] or NOTHING), _moved(folder / TRIALS)))
    header = ("partition", "method", "seed", "rate: score on validation data", "chosen", "bytes of the trials")
    return Table("Tuning: the same number of rates for every method", header, tuple(rows), left=4)


def _moved(folder: Path) -> str:
    runs = sorted(file.parent for file in folder.glob("*/header.json"))
    try:
        return scaled(float(sum(moved_bytes(read_run(run)) for run in runs)), "B")
    except StudyError:
        return NOTHING


def whole_table(board: Board) -> Table:
    """Return all partitions' outcomes and costs in one table, for a paper."""
    rows: list[tuple[str, ...]] = []
    header: tuple[str, ...] = ("",)
    for partition in board.entries:
        outcome, cost = outcome_table(board, partition), cost_table(board, partition)
        spent = {row[0]: row[1:] for row in cost.rows}
        blank = tuple("" for _ in cost.header[1:])
        header = ("partition", *outcome.header, *cost.header[1:])
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
    writer.writerows([[_plain(row.get(key)) for key in header] for row in rows])
    return out.getvalue()


def _plain(value: object) -> str:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return ""
    return f"{value:.8g}" if isinstance(value, float) else str(value)


def _record(board: Board, partition: str, line: Line) -> dict[str, object]:
    shown, main, entry = board.shown, line.summary, board.entries[partition][line.method]
    assert shown is not None
    unit = "percent" if shown.measure.percent else shown.slug
    times = shown.factor
    local = line.against.get("local")
    record: dict[str, object] = {
        "partition": partition,
        "method": line.method,
        "row": line.control or OWN,
        "arm": main.choice.arm,
        "metric": shown.measure.name,
        "seeds": main.num_seeds,
        "clients": main.num_clients // max(1, main.num_seeds),
        "diverged_clients": main.diverged,
        "density_share": float(main.density),
        f"mean_{unit}": times * main.mean,
        f"mean_low_{unit}": times * main.interval.low,
        f"mean_high_{unit}": times * main.interval.high,
        f"{'p10' if shown.measure.higher_is_better else 'p90'}_{unit}": times * main.tail,
        f"worst_decile_{unit}": times * main.worst_decile,
        "hurt_vs_local_percent": None if local is None else 100 * local.hurt,
        f"unseen_{unit}": None if main.unseen is None else times * main.unseen,
    }
    points = "points" if shown.measure.percent else shown.slug
    for name in board.references:
        record |= _contrast(f"vs_{name}", points, times, line.against.get(name))
    record |= _contrast("own_less_control", points, times, line.beaten)
    return record | _cost(entry, line)


def _contrast(name: str, unit: str, times: float, found: Contrast | None) -> dict[str, object]:
    return {
        f"{name}_{unit}": None if found is None else times * found.mean,
        f"{name}_low_{unit}": None if found is None else times * found.interval.low,
        f"{name}_high_{unit}": None if found is None else times * found.interval.high,
        f"{name}_p": None if found is None else found.p_value,
        f"{name}_p_holm": None if found is None else found.p_holm,
    }


def _cost(entry: Entry, line: Line) -> dict[str, object]:
    """Return the costs of a method's own row; of a control only what it trains itself."""
    cost = entry.cost
    own = line.summary.epochs + line.summary.search_epochs
    if line.control:
        return {"own_epochs": own}
    return {
        "down_bytes": cost.down_bytes,
        "up_bytes": cost.up_bytes,
        "total_bytes": cost.total_bytes,
        "down_once_bytes": cost.once_down_bytes,
        "up_once_bytes": cost.once_up_bytes,
        "beside_bytes": cost.beside_bytes,
        "down_bits_per_parameter_and_round": cost.down_bits,
        "up_bits_per_parameter_and_round": cost.up_bits,
        "training_flops": cost.flops,
        "round_epochs": cost.round_epochs,
        "own_epochs": own,
        "simulated_seconds": cost.simulated_s,
    }
