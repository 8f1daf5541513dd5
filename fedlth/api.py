"""The Python API: what the command line does, in a few lines of your own code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fedlth.config import Study, dump, load
from fedlth.engines.choose import check_engine, drive
from fedlth.errors import StudyError
from fedlth.methods.resolve import resolve
from fedlth.runfolder import RunFolder
from fedlth.store import write_atomic
from fedlth.tickets_file import load_ticket
from fedlth.tune import tuned
from fedlth.world import open_world

__all__ = ["Study", "check", "load", "load_ticket", "resume", "run"]

ASKED = "asked.yaml"

Tell = Callable[[str], None]


def _quiet(line: str) -> None:
    pass


def run(study: Study, *, tell: Tell = _quiet) -> Path:
    """Run a study and return its folder; with `seeds`, a folder that holds one run a seed.

    Raises StudyError, before anything is written, where the study cannot be run.
    """
    out = Path(study.out) if study.out else free_folder(Path("runs"), study.study)
    if (out / "config.yaml").exists() or (out / ASKED).exists():
        raise StudyError(f"{out}: holds a run already; `fedlth resume {out}`, or give another out=")
    if study.seeds or study.tune.lr:
        # These are more than one run: what was asked for is kept, so that a resume knows what has not begun yet.
        check(study)
        write_atomic(out / ASKED, dump(study).encode())
    _all(study, out, tell)
    return out


def resume(run: Path | str, *, tell: Tell = _quiet) -> Path:
    """Go on with what was stopped: one run, or the seeds and trials of a study, begun or not."""
    out = Path(run)
    asked = out / ASKED
    _all(load(asked) if asked.exists() else RunFolder(out).study(), out, tell)
    return out


def check(study: Study) -> None:
    """Raise StudyError where the study cannot be run; build its data and model to know."""
    check_engine(study)
    open_world(resolve(study)[0].science()).probe()


def _all(study: Study, out: Path, tell: Tell) -> None:
    for seed in study.seeds or (study.seed,):
        one = study.model_copy(update={"seed": seed, "seeds": ()})
        _one(one, out / f"seed-{seed}" if study.seeds else out, tell)


def _one(study: Study, out: Path, tell: Tell) -> None:
    begun = (out / "config.yaml").exists()
    try:
        drive(RunFolder(out).study() if begun else tuned(study, out, tell), out, tell, again=begun)
    except KeyboardInterrupt:
        whole = out.parent if (out.parent / ASKED).exists() else out
        begun = (whole / ASKED).exists() or (whole / "config.yaml").exists()
        tell(f"stopped; to go on: fedlth resume {whole}" if begun else "stopped before anything was written")
        raise


def free_folder(parent: Path, name: str) -> Path:
    """Return a folder that does not exist yet: nothing is ever overwritten."""
    number = 1
    while (parent / f"{name}-{number}").exists():
        number += 1
    return parent / f"{name}-{number}"
