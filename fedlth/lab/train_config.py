"""How long, how fast and on what a laboratory training goes: the value that names a training."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from fedlth.lab.study import Train
from fedlth.training.recipe import Cosine


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
            lr *= Cosine()(step / max(1, t.iterations - 1))
        return lr * 0.1 ** sum(step >= share * t.iterations for share in t.milestones)

    def text(self) -> str:
        """Return canonical JSON: what a training's digest is taken over."""
        return json.dumps({**asdict(self), "train": self.train.model_dump(mode="json")}, sort_keys=True)
