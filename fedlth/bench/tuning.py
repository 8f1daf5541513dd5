"""The learning rate of a method: tuned on validation data, by runs without the controls, which decide nothing."""

from __future__ import annotations

from pathlib import Path

from fedlth.experiment.experiment import Experiment
from fedlth.study.schema import Study
from fedlth.study.sections import Tune
from fedlth.tune import trial_of, tuned


def trial(study: Study, lr: float) -> Study:
    """Return what one rate is tried with."""
    return trial_of(judged_alone(study), lr)


def judged_alone(study: Study) -> Study:
    """Return the study with the one arm that its rates are judged by: no arm changes another arm's result."""
    arm = Experiment.of(study).kept_arm or "global"
    return study.model_copy(update={"personalise": study.personalise.model_copy(update={"arms": (arm,)})})


def chosen(study: Study, folder: Path) -> Study:
    """Return the study with its best rate, and nothing left to tune; trials are kept in `folder`/tune."""
    if not study.tune.lr:
        return study
    lr = tuned(judged_alone(study), folder).train.lr
    return study.model_copy(update={"train": study.train.model_copy(update={"lr": lr}), "tune": Tune()})
