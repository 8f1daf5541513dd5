"""fedlth resume for a run on devices: the run.sh of its federation continues it."""

from __future__ import annotations

import logging
import subprocess

from fedlth.deploy.settings import FILE
from fedlth.engines.flower_engine import RUN_NAME
from fedlth.errors import StudyError
from fedlth.federation.missing import missing
from fedlth.storage.run_folder import RunFolder

log = logging.getLogger(__name__)


def by_flower(folder: RunFolder) -> bool:
    """Say whether a run was begun by `flwr run`, which alone reaches its clients; engine: flower starts its own."""
    return (folder.root / RUN_NAME).exists() and folder.study().engine != "flower"


def resume(folder: RunFolder) -> None:
    """Continue a run on devices to its end, by the run.sh beside it, whose exit code says nothing of the run's end.

    Raises StudyError where no federation's folder holds the run, and where the run has not ended then.
    """
    out = folder.root.resolve()
    if _ended(folder) and not missing(folder):
        log.info(f"{folder.root}: has ended already")
        return
    if not (out.parent / FILE).is_file():
        raise StudyError(
            f"{folder.root}: its clients are reached by `flwr run` alone: DIR/run.sh {out} continues it, DIR being the "
            f"folder of `fedlth deploy init`; or the same `flwr run` with this out"
        )
    done = subprocess.run([out.parent / "run.sh", out], check=False)
    if done.returncode or not _ended(folder):
        raise StudyError(
            f"{folder.root}: the run has not ended; what was committed is kept, and the same command continues"
        )


def _ended(folder: RunFolder) -> bool:
    header = folder.header()
    return header is not None and header.finished
