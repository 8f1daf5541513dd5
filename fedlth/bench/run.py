"""A bench as one resumable whole: finished cells skip themselves, others run or go on, a failed one costs itself."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from fedlth.bench.matrix import Cell, Matrix
from fedlth.bench.outcome import FAILED, LOG, Outcome, changed, finished, plan
from fedlth.bench.process import begin, ended
from fedlth.bench.tuning import chosen
from fedlth.engines.choose import drive
from fedlth.engines.forked import usable_cpus
from fedlth.errors import StudyError
from fedlth.experiment.experiment import Experiment
from fedlth.experiment.resolve import resolve
from fedlth.storage.run_folder import RunFolder
from fedlth.storage.store import write_atomic

log = logging.getLogger(__name__)

MATRIX, LOCK, TRIALS = "bench.json", ".bench.lock", "tune"
TOLD_S = 30.0  # between two lines on cells that are at work


@dataclass(frozen=True)
class Piece:
    """Work for one process: a cell's run, or the tuning that all seeds of a method share. `after` must have ended."""

    name: str
    folder: Path
    minutes: float
    work: Callable[[], None]
    after: str = ""


def refuse_changed(matrix: Matrix, root: Path) -> None:
    """Raise StudyError where a cell in the folder was planned otherwise than the bench now says."""
    for cell in matrix.cells:
        if found := changed(cell, root):
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise StudyError(
                f"{cell.folder(root)}: was begun with another study: {'; '.join(found[:3])}{more}; give another --out, "
                "or remove the folder"
            )


def run(matrix: Matrix, cells: Sequence[Cell], root: Path, minutes: Mapping[str, float]) -> None:
    """Run every cell that has not ended, `matrix.parallel` at a time; `minutes` are what each is expected to take.

    Raises KeyboardInterrupt where it is stopped: each cell then ends at its last commit, and the same call continues.
    """
    root.mkdir(parents=True, exist_ok=True)
    with RunFolder(root).locked(LOCK):
        write_atomic(root / MATRIX, matrix.text().encode())
        waiting = _pieces(matrix, [cell for cell in cells if not finished(cell.folder(root))], root, minutes)
        _Crew(matrix.parallel, total=len(cells)).work(waiting, done=len(cells) - _cells(waiting))


def _cells(pieces: Sequence[Piece]) -> int:
    return sum(piece.folder.name != TRIALS for piece in pieces)


def _pieces(matrix: Matrix, cells: Sequence[Cell], root: Path, minutes: Mapping[str, float]) -> list[Piece]:
    """Return the work that is left, tuning before the cells that wait for it."""
    pieces: list[Piece] = []
    begun: set[str] = set()
    workers = max(1, usable_cpus() // matrix.parallel) if matrix.parallel > 1 else None
    for cell in cells:
        plan(cell, root)
        after, folder = "", cell.folder(root)
        shared = folder.parent if cell.study.tune.lr and matrix.tune.seeds == "first" else None
        if shared and not (folder / "config.yaml").exists():
            after = f"{cell.partition}/{cell.method}/{TRIALS}"
            if after not in begun:
                begun.add(after)
                first = next(one for one in matrix.firsts if one.folder(root).parent == shared)
                work = partial(_tune, first, shared, workers)
                pieces.append(Piece(after, shared / TRIALS, 0.0, work))
        work = partial(_run, cell, folder, shared, workers)
        pieces.append(Piece(cell.name, folder, minutes.get(cell.name, 0.0), work, after))
    return pieces


def _given(cell: Cell, workers: int | None) -> Cell:
    """Return the cell with its share of this machine's cores, where its study leaves their number open."""
    if workers is None or cell.study.workers != "auto":
        return cell
    return Cell(cell.partition, cell.method, cell.seed, cell.study.model_copy(update={"workers": workers}))


def _tune(first: Cell, shared: Path, workers: int | None) -> None:
    chosen(_given(first, workers).study, shared)


def _run(cell: Cell, folder: Path, shared: Path | None, workers: int | None) -> None:
    """Run a cell, or go on with it; `shared` is where all seeds' learning rate was chosen."""
    if (folder / "config.yaml").exists():
        drive(Experiment.of(RunFolder(folder).study()), folder, again=True)
        return
    # In a shared folder every candidate has been scored: nothing is tried again.
    experiment, notes = resolve(chosen(_given(cell, workers).study, shared or folder))
    drive(experiment, folder, again=False, notes=notes)


class _Crew:
    """The processes at work. A piece starts when one is free and what it waits for has ended."""

    def __init__(self, size: int, *, total: int) -> None:
        self.size, self.total = size, total
        self.busy: dict[int, tuple[Piece, BaseProcess]] = {}

    def work(self, waiting: list[Piece], *, done: int) -> None:
        began, todo, spent = time.monotonic(), sum(piece.minutes for piece in waiting), 0.0
        failed: dict[str, Outcome] = {}
        last = time.monotonic()
        try:
            while waiting or self.busy:
                self._start(waiting, failed)
                ready = wait([process.sentinel for _, process in self.busy.values()], timeout=TOLD_S)
                for sentinel in [one for one in self.busy if one in ready]:
                    piece, process = self.busy.pop(sentinel)
                    outcome = ended(process, piece.folder)
                    if outcome.status == FAILED:
                        failed[piece.name] = outcome
                    done += piece.folder.name != TRIALS
                    spent += piece.minutes
                    self._tell(piece, outcome, done, _left(time.monotonic() - began, spent, todo))
                if time.monotonic() - last > TOLD_S:
                    last = time.monotonic()
                    self._busy_lines(done, _left(last - began, spent, todo))
        except KeyboardInterrupt:
            self._stop()
            raise

    def _start(self, waiting: list[Piece], failed: Mapping[str, Outcome]) -> None:
        open_names = {piece.name for piece in waiting} | {piece.name for piece, _ in self.busy.values()}
        for piece in list(waiting):
            if len(self.busy) >= self.size:
                return
            if piece.after in open_names:
                continue
            waiting.remove(piece)
            cause = failed.get(piece.after)
            process = begin(partial(_fail, cause.reason) if cause else piece.work, piece.folder)
            self.busy[process.sentinel] = piece, process

    def _tell(self, piece: Piece, outcome: Outcome, done: int, left: str) -> None:
        how = f"{outcome.status}{f': {outcome.reason}' if outcome.reason else ''}"
        what = f"cell {done} of {self.total}" if piece.folder.name != TRIALS else "tuning"
        log.info(f"{what}: {piece.name} {how} ({outcome.seconds:.1f} s){left}")

    def _busy_lines(self, done: int, left: str) -> None:
        for piece, _ in self.busy.values():
            log.info(f"{done} of {self.total} cells done{left}; {piece.name}: {_last_line(piece.folder / LOG)}")

    def _stop(self) -> None:
        """Interrupt every process once and wait until each has let go of its run."""
        for _, process in self.busy.values():
            if process.pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGINT)
        for piece, process in self.busy.values():
            with suppress(KeyboardInterrupt):
                process.join()
                log.info(f"{piece.name}: stopped at its last commit")


def _fail(reason: str) -> None:
    raise StudyError(reason)


def _left(seconds: float, spent: float, todo: float) -> str:
    """Say how long the rest takes, if it goes on as so far."""
    if not spent or spent >= todo:
        return ""
    left = seconds * (todo - spent) / spent
    return f"; about {left / 60:.0f} min left" if left >= 90 else f"; about {left:.0f} s left"


def _last_line(file: Path) -> str:
    with suppress(OSError):
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        return lines[-1] if lines else "has begun"
    return "has begun"
