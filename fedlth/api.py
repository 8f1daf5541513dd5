"""The Python API: what the command line does, in a few lines of your own code."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from fedlth.deploy import resume as on_devices
from fedlth.engines.choose import check_engine, drive, engine_of, without_effect
from fedlth.engines.flower_engine import RUN_NAME
from fedlth.errors import StudyError
from fedlth.experiment.experiment import Experiment
from fedlth.experiment.other_ticket import OtherTicket, other_ticket
from fedlth.experiment.resolve import resolve
from fedlth.experiment.saved_ticket import load_ticket
from fedlth.export.export import export_ticket
from fedlth.export.small_network import load_small
from fedlth.federation.session import versions
from fedlth.federation.transfer import cells
from fedlth.privacy import audit as privacy
from fedlth.storage.audit_records import Audit
from fedlth.storage.header import read_header
from fedlth.storage.run_folder import RunFolder
from fedlth.storage.store import write_atomic
from fedlth.storage.transfer_cells import Cell
from fedlth.study.schema import Study, dump, load
from fedlth.tune import tuned

log = logging.getLogger(__name__)

__all__ = [
    "Study", "audit", "check", "export_ticket", "load", "load_small", "load_ticket", "resume", "run", "transfer",
]  # fmt: skip

ASKED = "asked.yaml"
WHOLE = ".study.lock"


def run(study: Study) -> Path:
    """Run a study and return its folder; with `seeds`, a folder that holds one run a seed.

    Raises StudyError, before anything is written, where the study cannot be run.
    """
    if study.out:
        _refuse_second(Path(study.out))  # before the data are read
    check_engine(study)
    try:
        ready = resolve(study)
        study, notes = _decided(study, ready[0]), [*ready[1], *without_effect(ready[0].study)]
    except KeyboardInterrupt:
        log.info("stopped before anything was written")
        raise
    out = Path(study.out) if study.out else free_folder(Path("runs"), study.study)
    with _held(out):
        _refuse_second(out)
        for note in notes:
            log.info(f"note: {note}")
        if study.seeds or study.tune.lr:
            # These are more than one run: what was asked for is kept, so that a resume knows what has not begun yet.
            # Only that: a default that is written down would come back as a wish.
            write_atomic(out / ASKED, dump(study, given_only=True).encode())
        _all(study, out, notes, None if study.seeds or study.tune.lr else ready[0])
    return out


def resume(run: Path | str) -> Path:
    """Go on with what was stopped: one run, or the seeds and trials of a study, begun or not.

    A run on devices is continued by its federation's run.sh. Raises StudyError where that cannot be found.
    """
    out = Path(run)
    if not _begun(out):
        raise StudyError(f"{out}: no run here (config.yaml is missing)")
    if on_devices.by_flower(RunFolder(out)):
        on_devices.resume(RunFolder(out))
        return out
    with _held(out):
        if not (out / ASKED).exists():
            _all(RunFolder(out).study(), out, [])
            return out
        study = load(out / ASKED)
        notes: list[str] = []
        if not all((folder / "config.yaml").exists() for _, folder in _runs(study, out)):
            ready = resolve(study)
            study, notes = _decided(study, ready[0]), [*ready[1], *without_effect(ready[0].study)]
            _check_others(ready[0], out)
        _all(study, out, notes)
    return out


def check(study: Study) -> None:
    """Raise StudyError where the study cannot be run; build its data and model to know."""
    check_engine(study)
    resolve(study)


def transfer(
    run: Path | str, masks: Mapping[str, str], *, workers: int | None = None, clients: Sequence[int] = ()
) -> list[tuple[Cell, ...]]:
    """Return the transfer matrix of a finished run, or one for each of its seeds; what is missing of it is trained.

    `masks` name tickets of other runs, as RUN or RUN:CLIENT. The same call goes on after a stop. `workers` and the
    engine are the run's where nothing else is said. Raises StudyError where the run has no such matrix.
    """
    root, found = Path(run), []
    folders = [root] if (root / "header.json").exists() else [f.parent for f in root.glob("*/header.json")]
    for folder in map(RunFolder, sorted(folders, key=lambda one: read_header(one).seed)):
        study = folder.study()
        others = {name: _other(place, study.seed) for name, place in masks.items()}
        engine = engine_of(study if workers is None else study.model_copy(update={"workers": workers}))
        try:
            found.append(cells(folder, engine, others, clients))
        except KeyboardInterrupt:
            log.info("stopped; what was trained is kept, and the same command goes on")
            raise
        finally:
            engine.close()
    if not found:
        raise StudyError(f"{root}: no run here (header.json is missing)")
    return found


def audit(run: Path | str, *, shadows: int = 200, victims: int = 0, workers: int | None = None) -> Audit:
    """Return what the tickets of a finished run disclose; what is missing of it is measured.

    `victims` 0 stands for all clients with a ticket. The same call goes on after a stop. `workers` are the run's where
    nothing else is said. Raises StudyError where a run cannot be audited.
    """
    root = Path(run)
    if not (root / "header.json").exists():
        seeds = sorted(found.parent.name for found in root.glob("*/header.json"))
        more = f"it holds one run a seed, of which each is audited alone: {', '.join(seeds)}" if seeds else "no run"
        raise StudyError(f"{root}: expected a run's folder, got {more}")
    try:
        return privacy.audit(root, num_shadows=shadows, num_victims=victims, workers=workers or 0)
    except KeyboardInterrupt:
        log.info("stopped; what was measured is kept, and the same command goes on")
        raise


def _other(place: str, seed: int) -> OtherTicket:
    run, colon, client = place.rpartition(":")
    named = colon and client.isdecimal() and not Path(place).exists()
    return other_ticket(Path(run), int(client), seed) if named else other_ticket(Path(place), None, seed)


def _decided(study: Study, ready: Experiment) -> Study:
    """Return the study as written, with what depends on this machine decided, once for all its runs."""
    chosen = {key: getattr(ready.study, key) for key in ("compute", "crossovers", "cohort", "device")}
    return study.model_copy(update={k: v for k, v in chosen.items() if v != getattr(study, k)})


def _check_others(ready: Experiment, out: Path) -> None:
    """Refuse to begin a run on other data than the study's runs before it; say where versions are others."""
    task = ready.task
    ours = (task.dataset.digest(), task.splits.digest)
    headers = [h for pattern in ("*", "tune/*", "*/tune/*") for h in sorted(out.glob(f"{pattern}/header.json"))]
    others = {file: read_header(file.parent) for file in headers}
    for file, header in others.items():
        if (header.data_digest, header.partition_digest) != ours:
            raise StudyError(f"{file.parent}: must continue with the data that it began with, got other data")
    if any(header.versions != versions() for header in others.values()):
        log.info("note: versions differ from those with which the study's runs began; equal bits are not promised")


def _runs(study: Study, out: Path) -> list[tuple[Study, Path]]:
    """Return a study's runs, one a seed, each with its folder."""
    if not study.seeds:
        return [(study, out)]
    return [(study.model_copy(update={"seed": seed, "seeds": ()}), out / f"seed-{seed}") for seed in study.seeds]


def _all(study: Study, out: Path, notes: Sequence[str], ready: Experiment | None = None) -> None:
    """Run what has not ended; `notes` have been printed already, `ready` is the experiment of a single run."""
    for one, folder in _runs(study, out):
        if (folder / "config.yaml").exists():
            drive(Experiment.of(RunFolder(folder).study()), folder, again=True)
        else:
            experiment, more = (ready, []) if ready else resolve(tuned(one, folder))
            drive(experiment, folder, again=False, notes=[note for note in more if note not in notes])


def _begun(out: Path) -> bool:
    return (out / "config.yaml").exists() or (out / ASKED).exists()


def _refuse_second(out: Path) -> None:
    if _begun(out):
        raise StudyError(f"{out}: holds a run already; `fedlth resume {out}`, or give another out=")


@contextmanager
def _held(out: Path) -> Iterator[None]:
    """Keep other processes out of the whole folder; say how to go on where a stop or the disk ends the work."""
    fresh = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    with RunFolder(out).locked(WHOLE):
        try:
            yield
        except BaseException as error:
            begun = _begun(out)
            if isinstance(error, KeyboardInterrupt):
                log.info(f"stopped; to go on: fedlth resume {out}" if begun else "stopped before anything was written")
            elif isinstance(error, OSError):
                kept = f"what was committed is kept: fedlth resume {out}"
                error.add_note(kept if begun else f"the run in {out} has not begun, and nothing of it is kept")
            if fresh and not begun:
                _leave(out)
            raise


def _leave(out: Path) -> None:
    """Give back a folder in which nothing has begun."""
    with suppress(OSError):
        for name in (WHOLE, ".lock", RUN_NAME, "config.yaml.part", f"{ASKED}.part"):
            (out / name).unlink(missing_ok=True)
        out.rmdir()


def free_folder(parent: Path, name: str) -> Path:
    """Make and return a folder that did not exist: who makes it has it, and nothing is ever overwritten."""
    number = 1
    while True:
        folder = parent / f"{name}-{number}"
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
            return folder
        except OSError as error:
            if not folder.exists():
                raise StudyError(f"{folder}: must be a folder that can be written to, got {error.strerror}") from error
            number += 1
