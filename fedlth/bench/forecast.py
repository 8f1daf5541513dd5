"""What a bench will cost, before it starts: bytes, FLOPs and hours on this machine, method by method."""

from __future__ import annotations

import hashlib
import json
import logging
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

from fedlth.bench.matrix import Cell, Matrix
from fedlth.bench.process import spawn
from fedlth.bench.tuning import trial
from fedlth.engines.forked import usable_cpus
from fedlth.errors import StudyError
from fedlth.forecast import Foreseen, foreseen
from fedlth.report.tables import Table, aligned
from fedlth.report.units import NOTHING, scaled
from fedlth.study import schema

KEPT = "forecast.jsonl"

log = logging.getLogger(__name__)

Key = tuple[str, str]  # partition, method


@dataclass(frozen=True)
class Expected:
    """What one run of a method on a partition is expected to take, and one tuning trial; or why it cannot run."""

    run: Foreseen | None
    trial: Foreseen | None = None
    reason: str = ""


def expect(cells: Sequence[Cell], file: Path | None = None) -> dict[Key, Expected]:
    """Return the forecast of each cell's method and partition; a few steps of each are tried, in another process.

    `file` keeps one a line, named by its study: what stands there is not tried again, even after a stop in it.
    """
    firsts = {(cell.partition, cell.method): cell for cell in reversed(cells)}
    known, names = _kept(file), {key: _name(cell) for key, cell in firsts.items()}
    found = {key: known[name] for key, name in names.items() if name in known}
    if found:
        log.info(f"forecast {len(found)} of {len(firsts)}: from {file}")
    for partition in dict.fromkeys(cell.partition for cell in cells):
        left = [key for key in reversed(firsts) if key[0] == partition and key not in found]
        if not left:
            continue
        ours, theirs = Pipe(duplex=False)
        process = spawn(_foresee, [firsts[key] for key in left], theirs)
        theirs.close()
        try:
            for key in left:
                found[key] = ours.recv()
                _keep(file, names[key], found[key])
                log.info(f"forecast {len(found)} of {len(firsts)}: {partition}/{key[1]}")
        except EOFError:
            raise StudyError(f"the forecast of partition {partition} ended without an answer") from None
        except KeyboardInterrupt:
            process.kill()
            raise
        finally:
            process.join()
    return {key: found[key] for key in reversed(firsts)}


def _name(cell: Cell) -> str:
    """Return a digest of a cell's study but for its seed: one that has changed since is forecast anew."""
    same = cell.study.model_copy(update={"seed": 0})
    return hashlib.blake2b(schema.dump(same).encode(), digest_size=8).hexdigest()


def _kept(file: Path | None) -> dict[str, Expected]:
    """Return the forecasts in a file by their names; a line that a stop has cut is none."""
    found: dict[str, Expected] = {}
    for line in file.read_text().splitlines() if file is not None and file.exists() else ():
        with suppress(ValueError, TypeError, KeyError):
            row = json.loads(line)
            run, one = (Foreseen(**part) if (part := row[key]) else None for key in ("run", "trial"))
            found[row["study"]] = Expected(run, one)
    return found


def _keep(file: Path | None, name: str, one: Expected) -> None:
    if file is None or one.run is None:  # why it cannot run may be mended by then
        return
    row = {"study": name, "run": asdict(one.run), "trial": one.trial and asdict(one.trial)}
    with file.open("a", encoding="utf-8") as lines:
        lines.write(f"\n{json.dumps(row)}")  # the line before may be cut


def _foresee(cells: Sequence[Cell], pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the bench's own
    for cell in cells:
        rates = cell.study.tune.lr
        try:
            one = foreseen(trial(cell.study, rates[0])) if rates else None
            told = Expected(foreseen(cell.study), one)
        except StudyError as error:
            told = Expected(None, reason=str(error))
        pipe.send(told)


def expected_minutes(matrix: Matrix, cell: Cell, expected: Mapping[Key, Expected]) -> float:
    """Return the minutes on one core that a cell is expected to take, its tuning included."""
    one = expected.get((cell.partition, cell.method), Expected(None))
    if one.run is None:
        return 0.0
    tunes = one.trial and (matrix.tune.seeds == "all" or cell.seed == matrix.seeds[0])
    return one.run.minutes + (one.trial.minutes * len(cell.study.tune.lr) if tunes and one.trial else 0.0)


def told(matrix: Matrix, cells: Sequence[Cell], expected: Mapping[Key, Expected], *, done: int) -> str:
    """Return the forecast as text: one line a method and partition, and sums over the cells that are to run."""
    rows: list[tuple[str, ...]] = []
    reasons: dict[str, list[str]] = {}
    sums = [0.0, 0.0, 0.0, 0.0]
    for (partition, method), one in expected.items():
        ours = [cell for cell in cells if (cell.partition, cell.method) == (partition, method)]
        if one.run is None:
            reasons.setdefault(one.reason, []).append(f"{partition}/{method}")
            continue
        minutes = sum(expected_minutes(matrix, cell, expected) for cell in ours)
        tuned = (minutes - len(ours) * one.run.minutes) / one.trial.minutes if one.trial and one.trial.minutes else 0
        amounts = [
            len(ours) * getattr(one.run, key) + (tuned * getattr(one.trial, key) if one.trial else 0.0)
            for key in ("down_bytes", "up_bytes", "flops")
        ]
        sums = [a + b for a, b in zip(sums, [*amounts, minutes], strict=True)]
        cells_text = f"{len(ours)}{f' + {tuned:.0f} trials' if tuned else ''}"
        sizes = (scaled(amounts[0], "B"), scaled(amounts[1], "B"), scaled(amounts[2], "FLOP"))
        memory = scaled(1e6 * one.run.memory_mb, "B")
        rows.append((partition, method, cells_text, *sizes, f"{minutes:.1f} min", memory))
    cores = usable_cpus()
    lines = [f"note: {_names(names)} cannot run: {reason}" for reason, names in reasons.items()]
    head = f"bench {matrix.name}: {len(cells)} cells to run, {done} done already, {matrix.parallel} side by side"
    if not rows:
        return "\n".join([head, "", *lines, "nothing could be forecast"])
    total = ("all", "", str(len(cells)), *(scaled(x, u) for x, u in zip(sums, ("B", "B", "FLOP"), strict=False)))
    rows.append((*total, f"{sums[3]:.1f} min", NOTHING))
    header = ("partition", "method", "runs", "down", "up", "training", "on one core", "memory a worker")
    hours = sums[3] / 60
    last = (
        f"about {hours:.2f} hours of one core; if training fills all {cores} of this machine, {hours / cores:.2f} hours"
    )
    if reasons:
        last += f"; without the {sum(map(len, reasons.values()))} kinds of runs that could not be forecast"
    table = aligned(Table("", header, tuple(rows), left=2))
    return "\n".join([head, "", table, "", *lines, last])


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
