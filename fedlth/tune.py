"""Learning rates chosen on validation data before the run, with the same budget for every method."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

from fedlth.engines.choose import drive
from fedlth.errors import NothingUsable, StudyError
from fedlth.experiment.experiment import Experiment
from fedlth.experiment.resolve import resolve
from fedlth.storage.records import MetricRow, read_log
from fedlth.storage.run_folder import RunFolder
from fedlth.storage.store import write_atomic
from fedlth.study.schema import Study
from fedlth.study.sections import Tune
from fedlth.training.metrics import Metric

log = logging.getLogger(__name__)

DIVERGED = "diverged"


def tuned(study: Study, out: Path) -> Study:
    """Return the study with the best of `tune.lr` as `train.lr`; without candidates, the study itself.

    Each candidate runs `tune.rounds` rounds and all that comes after in its own folder under `out`/tune, where it can
    be resumed and read. The mean over clients of the study's metric on validation data, of the model that would be kept
    at the density that would be kept, decides; a client without one counts as 0, or as the worst of the
    others where that is worse, and ties go to the first. A candidate that diverges for
    any client has lost; chosen.json says so. Raises StudyError where all have.
    """
    if not study.tune.lr:
        return study
    file, judged = out / "tune" / "chosen.json", Experiment.of(study).judged
    metric = judged.main
    scores: dict[str, float | str] = {}
    if file.exists():
        scores = next(found for key, found in json.loads(file.read_bytes()).items() if key.startswith("val_"))
    for lr in study.tune.lr:
        if str(lr) not in scores:
            scores[str(lr)] = _score(trial_of(study, lr), out / "tune" / f"lr-{lr}")
            write_atomic(file, json.dumps({"lr": None, f"val_{metric.name}": scores}).encode())
        score = scores[str(lr)]
        told = score if isinstance(score, str) else _shown(score, metric)
        log.info(f"tune: lr {lr}: {told}")
    found = {lr: score for lr in study.tune.lr if not isinstance(score := scores[str(lr)], str)}
    if not found:
        raise StudyError(f"{out / 'tune'}: every rate of tune.lr diverged, got {list(study.tune.lr)}; try lower ones")
    best = max(found, key=lambda lr: judged.score(found[lr]))
    log.info(f"tune: lr {best} chosen")
    text = json.dumps({"lr": best, f"val_{metric.name}": scores}).encode()
    if file.read_bytes() != text:  # a bench's cells share one choice, and read it side by side
        write_atomic(file, text)
    return study.model_copy(update={"train": study.train.model_copy(update={"lr": best}), "tune": Tune()})


def _shown(score: float, metric: Metric) -> str:
    value = f"{100 * score:.2f} %" if metric.percent else f"{score:.4g}"
    return f"validation {metric.name.rpartition(':')[2].replace('_', ' ')} {value}"


def trial_of(study: Study, lr: float) -> Study:
    """Return the study at one rate and `tune.rounds` rounds."""
    rounds = min(study.tune.rounds, study.federate.rounds)
    return study.model_copy(
        update={
            "train": study.train.model_copy(update={"lr": lr}),
            "federate": study.federate.model_copy(update={"rounds": rounds}),
            "tune": Tune(),
            "trackers": (),
        }
    )


def _score(trial: Study, where: Path) -> float | str:
    """Run a candidate, or go on with it, and return the metric of what it keeps on validation data, or DIVERGED."""
    try:
        again = (where / "config.yaml").exists()
        experiment = Experiment.of(RunFolder(where).study()) if again else resolve(trial)[0]
        drive(experiment, where, again=again)
    except NothingUsable as error:
        log.info(f"tune: lr {trial.train.lr}: {error}")
        return DIVERGED
    arm = experiment.product_arm or "global"
    kept: dict[int, MetricRow] = {}
    for row in (r for r in read_log(where, MetricRow)[0] if r.arm == arm):
        if row.client not in kept or experiment.is_kept(row):
            kept[row.client] = row
    if not kept or any(row.diverged for row in kept.values()):
        return DIVERGED
    metric = experiment.judged.main
    values = [row.value("val", metric.name) for row in kept.values()]
    absent = min(0.0, *values) if metric.higher_is_better else max(values)
    return math.fsum([*values, absent * (trial.clients.count - len(values))]) / trial.clients.count
