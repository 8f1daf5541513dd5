"""From a study's `engine` to the transport that runs it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from fedlth.engines.flower_engine import AT_ONCE
from fedlth.engines.forked import Forked, usable_cpus
from fedlth.engines.inprocess import InProcess
from fedlth.engines.pool import AHEAD
from fedlth.errors import StudyError, require
from fedlth.experiment.experiment import Experiment
from fedlth.federation import session
from fedlth.federation.answer_bytes import said_at_start
from fedlth.federation.jobs import Engine
from fedlth.federation.update_norms import ENOUGH
from fedlth.study.schema import Study

log = logging.getLogger(__name__)


def check_engine(study: Study) -> None:
    """Raise MissingExtra where the study's engine needs packages that are not installed, StudyError for what it cannot.

    The limit of a round is one of wall-clock time: here it would make a result depend on how fast this machine is.
    """
    if study.federate.deadline_s is not None and study.engine != "flower":
        raise StudyError(
            f"federate.deadline_s: is for devices, which answer in time of their own (engine: flower); engine is "
            f"{study.engine}, and fleet.deadline_s simulates a deadline"
        )
    if study.engine in ("ray", "flower"):  # Flower's simulation runs on Ray
        require(f"engine: {study.engine}", "ray", extra="sim")


def drive(experiment: Experiment, out: Path, *, again: bool, notes: Sequence[str] = ()) -> None:
    """Run an experiment into `out`, or go on with the run there (`again`), on the engine that its study names."""
    study = experiment.study
    check_engine(study)
    if study.engine == "flower":
        from fedlth.engines.flower import run_under_flower

        run_under_flower(experiment, out, resume=again, notes=notes)
        return
    if study.engine == "ray":  # answers come from other machines
        log.info(f"note: {said_at_start(experiment, answers_at_once(study))}")
    engine = engine_of(study)
    if again:
        session.resume(out, engine)
    else:
        session.start(experiment, notes, out, engine)


def engine_of(study: Study) -> Engine:
    """Return the engine that a study names; in place of Flower, which has loops of its own, the in-process one."""
    if study.engine == "ray":
        from fedlth.engines.ray import RayEngine

        return RayEngine(study.ray, job_timeout_s=study.job_timeout_s, device=study.device)
    size = _workers(study)
    return InProcess() if size == 1 else Forked(size, job_timeout_s=study.job_timeout_s)


def answers_at_once(study: Study) -> int:
    """Return how many answers a study's engine reads before the first of them is joined.

    Cohorts come together, workers run ahead, and the first two updates of a phase wait for a third.
    """
    if study.engine == "flower":
        return AT_ONCE
    workers = study.ray.workers if study.engine == "ray" else _workers(study)
    ahead = 1 if study.engine == "inprocess" and workers == 1 else AHEAD * workers
    return ahead * int(study.cohort) + ENOUGH - 1


def _workers(study: Study) -> int:
    """Return how many processes the in-process engine uses."""
    # CUDA does not survive a fork, and only Linux forks a process that has used its libraries safely.
    if study.device != "cpu" or sys.platform != "linux":
        return 1
    return usable_cpus() if study.workers == "auto" else study.workers


def without_effect(study: Study) -> list[str]:
    """Return notes on options that the engine, as it runs on this machine, leaves without effect."""
    notes = []
    if study.federate.quorum is not None and study.engine != "flower":
        notes.append(f"federate.quorum: has no effect, on engine {study.engine} every client is there")
    if study.engine != "inprocess" or _workers(study) > 1:
        return notes
    why = "clients train in this process, whose own steps cannot be dropped"
    if study.job_timeout_s is not None:
        notes.append(f"job_timeout_s: has no effect, {why}")
    if study.workers not in ("auto", 1):
        notes.append(f"workers: has no effect, on {study.device} under {sys.platform} clients train in this process")
    return notes
