"""How long, how fast and on what a laboratory training goes: the value that names a training."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from fedlth.lab.study import Train
from fedlth.training.rate_schedule import Cosine
from fedlth.training.study_recipe import part

LATER = ("clip_norm", "loss", "pull", "augment")


def spec_of(given: str | dict[str, Any]) -> dict[str, Any]:
    """Return a part of a train section with its options."""
    return {"name": given} if isinstance(given, str) else given


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A train section, and where in it this training begins and ends.

    `first` and `last` are iterations of the whole schedule: a training that was rewound to step k begins at k, with
    the rate and the batches of step k. `order` names the stream of batches; two copies differ in nothing else.
    """

    train: Train
    first: int = 0
    last: int | None = None
    order: str = "order"
    constant_lr: bool = False

    @property
    def end(self) -> int:
        return self.train.iterations if self.last is None else self.last

    @property
    def steps(self) -> int:
        return self.end - self.first

    def rate(self, step: int) -> float:
        """Return the learning rate of iteration `step` of the whole schedule."""
        t = self.train
        if self.constant_lr:  # fine-tuning: the schedule's last rate
            step = t.iterations - 1
        lr = t.lr
        if step < t.warmup:
            return t.warmup_lr + (lr - t.warmup_lr) * (step + 1) / t.warmup
        if t.schedule == "cosine":
            lr *= Cosine()(step, t.iterations)
        elif t.schedule != "constant":
            lr *= part("schedule", spec_of(t.schedule), "train")(step, t.iterations)
        return lr * 0.1 ** sum(step >= share * t.iterations for share in t.milestones)

    def text(self) -> str:
        """Return canonical JSON: what a training's digest is taken over.

        Keys that came later are left out at their defaults: a folder's trainings keep the names that they have.
        """
        train, unchanged = self.train.model_dump(mode="json"), Train().model_dump(mode="json")
        for key in LATER:
            if train[key] == unchanged[key]:
                del train[key]
        return json.dumps({**asdict(self), "train": train}, sort_keys=True)
