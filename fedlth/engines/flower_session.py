"""What a Flower ServerApp does: read which study to run, and run it or go on with it. No flwr in here."""

from __future__ import annotations

import json
import logging
import shlex
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlth.engines.flower_engine import AT_ONCE, FlowerEngine
from fedlth.errors import StudyError
from fedlth.experiment.experiment import Experiment
from fedlth.experiment.resolve import resolve
from fedlth.federation import session
from fedlth.federation.answer_bytes import said_at_start
from fedlth.federation.missing import missing
from fedlth.storage.run_folder import RunFolder
from fedlth.study import schema
from fedlth.study.schema import Study

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FlowerRun:
    """An experiment, where it runs, whether it goes on with a run that is there, and the notes to begin with."""

    experiment: Experiment
    out: Path
    resume: bool
    notes: tuple[str, ...] = ()

    def run(self, engine: FlowerEngine) -> None:
        engine.ready()  # before anything is written
        log.info(f"note: {said_at_start(self.experiment, AT_ONCE)}")
        if self.resume:
            session.resume(self.out, engine)
        else:
            session.start(self.experiment, self.notes, self.out, engine)


def run_of(
    run_config: Mapping[str, Any], app_dir: Path, count: Callable[[Study], None] = lambda _: None
) -> FlowerRun | None:
    """Return what `flwr run --run-config` asks for; None where that run has ended and no client is to be visited again.

    `study` is a path in the app (Flower runs an installed copy) or an absolute one, `out` an absolute folder,
    `overrides` key=value words. `count` asks the devices how many examples they have, where only they know (data.own).
    A folder that holds an unfinished run of the same study is gone on with.
    Raises StudyError.
    """
    out = Path(str(run_config.get("out", "")))
    if not out.is_absolute():
        raise StudyError(
            f"""run config: out must be an absolute folder: --run-config 'out="/ABS/RUN"', got {str(out)!r}"""
        )
    path = app_dir / str(run_config.get("study", ""))
    study = schema.load(path, shlex.split(str(run_config.get("overrides", ""))))
    refuse_several(study, str(path))
    if study.data.own is not None:
        count(study)
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


def again(run_config: Mapping[str, Any]) -> str:
    """Return the command that continues a run: of a federation of `fedlth deploy init` its run.sh, beside its keys."""
    out = str(run_config.get("out", ""))
    script = Path(str(run_config.get("keys", ""))).parent / "run.sh"
    if script.is_absolute() and script.is_file():
        return f"`{shlex.join([str(script), out])}`"
    return f"`flwr run` again with out={out}"


def refuse_several(study: schema.Study, place: str) -> None:
    """Raise StudyError where a study is more than one run."""
    for key, given in (("seeds", study.seeds), ("tune.lr", study.tune.lr)):
        if given:
            raise StudyError(f"{place}: {key} must be empty under flwr run; `fedlth run ... engine=flower` has it")


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
