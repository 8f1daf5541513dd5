"""The Python API: what the command line does, in a few lines of your own code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fedlth.config import Study, load
from fedlth.engines.choose import drive
from fedlth.errors import StudyError
from fedlth.runfolder import RunFolder
from fedlth.tickets_file import load_ticket
from fedlth.tune import tuned

__all__ = ["Study", "load", "load_ticket", "resume", "run"]

Tell = Callable[[str], None]


def _quiet(line: str) -> None:
    pass


def run(study: Study, *, tell: Tell = _quiet) -> Path:
    """Run a study and return its folder; with `seeds`, a folder that holds one run a seed.

    Raises StudyError, before anything is written, where the study cannot be run.
    """
    out = Path(study.out) if study.out else _free(Path("runs"), study.study)
    tell(f"run folder: {out}")
    if not study.seeds:
        _one(study, out, tell)
        return out
    for seed in study.seeds:
        where = out / f"seed-{seed}"
        tell(f"seed {seed}: {where}")
        if (where / "config.yaml").exists():
            resume(where, tell=tell)
        else:
            _one(study.model_copy(update={"seed": seed, "seeds": ()}), where, tell)
    return out


def resume(run: Path | str, *, tell: Tell = _quiet) -> Path:
    """Go on with a run that was stopped; of a folder of seeds, with each of them."""
    out = Path(run)
    inside = [out] if (out / "config.yaml").exists() else sorted(p.parent for p in out.glob("*/config.yaml"))
    if not inside:
        raise StudyError(f"{out}: no run here (config.yaml is missing)")
    for folder in inside:
        _guarded(RunFolder(folder).study(), folder, tell, again=True)
    return out


def _one(study: Study, out: Path, tell: Tell) -> None:
    _guarded(tuned(study, out, tell), out, tell, again=False)


def _guarded(study: Study, out: Path, tell: Tell, *, again: bool) -> None:
    try:
        drive(study, out, tell, again=again)
    except KeyboardInterrupt:
        tell(f"stopped; to go on: fedlth resume {out}")
        raise


def _free(parent: Path, name: str) -> Path:
    """Return a folder that does not exist yet: nothing is ever overwritten."""
    number = 1
    while (parent / f"{name}-{number}").exists():
        number += 1
    return parent / f"{name}-{number}"
