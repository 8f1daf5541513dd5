"""How a training goes, as parts: optimizer, schedule, budget, loss, pull, view, augmentation, each a frozen value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedlth.training.augment import Augment, Crop, Flip
from fedlth.training.budget import Budget
from fedlth.training.dp_sgd import DpSgd
from fedlth.training.loss import CrossEntropy, Loss, MaskedLm, MeanSquaredError
from fedlth.training.optimizer import Adam, AdamW, Optimizer, Sgd
from fedlth.training.pull import L1, NO_PULL, Proximal, Pull
from fedlth.training.rate_schedule import Constant, Cosine, Exponential, Linear, RateSchedule, Step
from fedlth.training.view import IDENTITY, View

PARTS: Mapping[str, Mapping[str, Any]] = {
    "optimizer": {"sgd": Sgd, "adam": Adam, "adamw": AdamW},
    "schedule": {"constant": Constant, "cosine": Cosine, "linear": Linear, "step": Step, "exponential": Exponential},
    "loss": {"cross_entropy": CrossEntropy, "mse": MeanSquaredError, "masked_lm": MaskedLm},
    "pull": {"proximal": Proximal, "l1": L1},
    "augment": {"crop": Crop, "flip": Flip},
}


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """How long, how fast and towards what a training goes.

    With `replay_lr` False the rate stays at the schedule's last value, which is what fine-tuning means.
    `first_step` and `last_step` cut the run: the steps between them, with the batches and rates that they have in it.
    `clip_norm` bounds the norm of the gradient (of loss and pull, over what may move). `dropout` is the rate of every
    dropout module, None for the model's own. `precision` "bf16": the forward pass in torch's autocast.
    `group_by_length`: batches of examples of about one length. `view` says what the network sees of the weights that
    are trained; it is a method's, no study names it. With `dp` steps are noisy, and batches Poisson samples.
    """

    budget: Budget
    batch_size: int
    lr: float
    optimizer: Optimizer = Sgd()
    schedule: RateSchedule = Constant()
    loss: Loss = CrossEntropy()
    clip_norm: float | None = None
    pull: Pull = NO_PULL
    view: View = IDENTITY
    augment: tuple[Augment, ...] = ()
    dropout: float | None = None
    precision: str = "float32"
    group_by_length: bool = False
    replay_lr: bool = True
    first_step: int = 0
    last_step: int | None = None
    dp: DpSgd | None = None

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate of step `step` of `steps`."""
        if not self.replay_lr:
            step, steps = max(1, steps - 1), max(2, steps)  # of one step too, the last is where the schedule ends
        return self.lr * self.schedule(step, steps)

    def end(self, steps: int) -> int:
        """Return the step before which it ends, of the `steps` of its whole run."""
        return steps if self.last_step is None else min(self.last_step, steps)

    def steps(self, size: int) -> int:
        """Return how many steps it takes on `size` examples."""
        return max(0, self.end(self.budget.total(size, self.batch_size)) - self.first_step)

    @property
    def pulls(self) -> bool:
        return self.pull != NO_PULL

    @property
    def views(self) -> bool:
        """Say whether the network sees anything else than the weights that are trained."""
        return self.view != IDENTITY
