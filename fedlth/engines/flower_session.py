"""What a Flower ServerApp does: read which study to run, and run it or go on with it. No flwr in here."""

from __future__ import annotations

import json
import shlex
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlth.engines.flower_engine import FlowerEngine
from fedlth.errors import StudyError
from fedlth.experiment.experiment import Experiment
from fedlth.experiment.resolve import resolve
from fedlth.federation import session
from fedlth.federation.rounds import missing
from fedlth.storage.run_folder import RunFolder
from fedlth.study import schema


@dataclass(frozen=True)
class FlowerRun:
    """An experiment, where it runs, whether it goes on with a run that is there, and the notes to begin with."""

    experiment: Experiment
    out: Path
    resume: bool
    notes: tuple[str, ...] = ()

    def run(self, engine: FlowerEngine) -> None:
        engine.ready()  # before anything is written
        if self.resume:
            session.resume(self.out, engine)
        else:
            session.start(self.experiment, self.notes, self.out, engine)


def run_of(run_config: Mapping[str, Any], app_dir: Path) -> FlowerRun | None:
    """Return what `flwr run --run-config` asks for; None where that run has ended and no client is to be visited again.

    `study` is a path in the app (Flower runs an installed copy) or an absolute one, `out` an absolute folder,
    `overrides` key=value words. A folder that holds an unfinished run of the same study is gone on with.
    Raises StudyError.
    """
    out = Path(str(run_config.get("out", "")))
    if not out.is_absolute():
        raise StudyError(
            f"""run config: out must be an absolute folder: --run-config 'out="/ABS/RUN"', got {str(out)!r}"""
        )
    path = app_dir / str(run_config.get("study", ""))
    study = schema.load(path, shlex.split(str(run_config.get("overrides", ""))))
    for key, given in (("seeds", study.seeds), ("tune.lr", study.tune.lr)):
        if given:
            raise StudyError(f"{path}: {key} must be empty under flwr run; `fedlth run ... engine=flower` has it")
    if not (out / "config.yaml").exists():
        experiment, notes = resolve(study)
        return FlowerRun(experiment, out, False, tuple(notes))
    there = Experiment.of(schema.load(out / "config.yaml"))
    if there.text != resolve(study)[0].text:
        raise StudyError(f"{out}: holds a run of another study; give another out")
    header = out / "header.json"
    if header.exists() and json.loads(header.read_bytes()).get("finished") and not missing(RunFolder(out)):
        return None
    return FlowerRun(there, out, resume=True)


@contextmanager
def interruptible(stop: threading.Event) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM set `stop`: Flower's simulation waits for its ServerApp, so only that may end a run."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for one, handler in before.items():
            signal.signal(one, handler)

    def ask(*_: object) -> None:
        stop.set()
        restore()  # a second Ctrl-C does what it did before

    for one in before:
        signal.signal(one, ask)
    try:
        yield
    finally:
        restore()
