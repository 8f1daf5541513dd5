"""Small networks of every usual kind, and recipes of every kind of part, each beside what torch calls the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as torch_lr

from fedlth.training.budget import Budget
from fedlth.training.loss import CrossEntropy
from fedlth.training.optimizer import Adam, AdamW, Optimizer, Sgd
from fedlth.training.pull import NO_PULL, Proximal
from fedlth.training.rate_schedule import Constant, Cosine, Exponential, Linear, RateSchedule, Step
from fedlth.training.recipe import TrainingRecipe

CLASSES, STEPS, TOKENS, LENGTH = 4, 12, 11, 6


class Conv(nn.Module):
    """No bias before the norm: its gradient would be rounding alone, which Adam makes as large as any."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3)
        self.group, self.head = nn.GroupNorm(1, 3), nn.Linear(3 * 36, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.group(torch.relu(self.norm(self.conv(x)))).flatten(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(TOKENS, 5), nn.LSTM(5, 7, batch_first=True)
        self.head = nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(x))[0][:, -1])


class Attention(nn.Module):
    """No biases: a key's has no gradient but rounding."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 12, dropout=dropout, batch_first=True, bias=False)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.embedding(x)).mean(1))


def images(size: int) -> tuple[Tensor, Tensor]:
    draw = np.random.default_rng(3)
    x = torch.from_numpy(draw.normal(size=(size, 1, 8, 8)).astype(np.float32))
    return x, torch.from_numpy(draw.integers(0, CLASSES, size))


def tokens(size: int) -> tuple[Tensor, Tensor]:
    draw = np.random.default_rng(4)
    x = torch.from_numpy(draw.integers(0, TOKENS, (size, LENGTH)))
    return x, torch.from_numpy(draw.integers(0, CLASSES, size))


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, Tensor]], tuple[str, ...]]] = {
    "conv": (Conv, images, ("conv.weight", "head.weight")),
    "recurrent": (Recurrent, tokens, ("lstm.weight_ih_l0", "lstm.weight_hh_l0", "head.weight")),
    "attention": (Attention, tokens, ("block.linear1.weight", "block.self_attn.in_proj_weight", "head.weight")),
}


@dataclass(frozen=True)
class Twin:
    """A recipe, and torch's optimizer and scheduler of the same."""

    recipe: TrainingRecipe
    optimizer: Callable[[Any], torch.optim.Optimizer]
    scheduler: Callable[[torch.optim.Optimizer], Any]


def schedules(lr: float) -> list[tuple[RateSchedule, Callable[[torch.optim.Optimizer], Any]]]:
    """Return every schedule over STEPS steps beside torch's."""
    warm = 3

    def up(o: Any, start: float) -> Any:
        return torch_lr.LinearLR(o, start_factor=start, total_iters=warm)

    return [
        (Constant(), lambda o: torch_lr.LambdaLR(o, lambda _: 1.0)),
        (Cosine(), lambda o: torch_lr.CosineAnnealingLR(o, STEPS - 1, eta_min=0.01 * lr)),
        (
            Cosine(final=0.1, warmup=0.25, final_at="after"),
            lambda o: torch_lr.SequentialLR(
                o, [up(o, 0.25), torch_lr.CosineAnnealingLR(o, STEPS - warm, eta_min=0.1 * lr)], [warm]
            ),
        ),
        (
            Linear(final=0.2, warmup=0.25),
            lambda o: torch_lr.SequentialLR(
                o, [up(o, 0.25), torch_lr.LinearLR(o, 1.0, 0.2, total_iters=STEPS - warm)], [warm]
            ),
        ),
        (
            Linear(warmup=0.25, start=0.0),
            lambda o: torch_lr.LambdaLR(o, lambda s: s / warm if s < warm else (STEPS - s) / (STEPS - warm)),
        ),
        (Linear(final_at="last", final=0.5), lambda o: torch_lr.LinearLR(o, 1.0, 0.5, total_iters=STEPS - 1)),
        (Step(milestones=(0.5, 0.75), gamma=0.3), lambda o: torch_lr.MultiStepLR(o, [STEPS // 2, 9], gamma=0.3)),
        (Step(milestones=(1 / 3, 2 / 3), gamma=0.5), lambda o: torch_lr.StepLR(o, STEPS // 3, gamma=0.5)),
        (Exponential(final=0.05), lambda o: torch_lr.ExponentialLR(o, 0.05 ** (1 / (STEPS - 1)))),
    ]


def optimizers(lr: float, draw: np.random.Generator) -> list[tuple[Optimizer, Callable[[Any], torch.optim.Optimizer]]]:
    decay, momentum = float(draw.choice([0.0, 0.01])), float(draw.choice([0.5, 0.9]))
    betas, eps = (float(draw.choice([0.8, 0.9])), float(draw.choice([0.95, 0.999]))), float(draw.choice([1e-8, 1e-3]))
    return [
        (Sgd(weight_decay=decay), lambda p: torch.optim.SGD(p, lr, weight_decay=decay)),
        (
            Sgd(momentum=momentum, weight_decay=decay),
            lambda p: torch.optim.SGD(p, lr, momentum=momentum, weight_decay=decay),
        ),
        (
            Sgd(momentum=momentum, weight_decay=decay, nesterov=True),
            lambda p: torch.optim.SGD(p, lr, momentum=momentum, weight_decay=decay, nesterov=True),
        ),
        (
            Adam(betas=betas, eps=eps, weight_decay=decay),
            lambda p: torch.optim.Adam(p, lr, betas=betas, eps=eps, weight_decay=decay),
        ),
        (
            AdamW(betas=betas, eps=eps, weight_decay=10 * decay),
            lambda p: torch.optim.AdamW(p, lr, betas=betas, eps=eps, weight_decay=10 * decay),
        ),
    ]


def drawn(seed: int) -> Twin:
    """Return a random recipe."""
    draw = np.random.default_rng(seed)
    lr = float(draw.choice([0.003, 0.02]))
    every, ways = optimizers(lr, draw), schedules(lr)
    optimizer, theirs = every[seed % len(every)]
    schedule, scheduler = ways[int(draw.integers(len(ways)))]
    recipe = TrainingRecipe(
        budget=Budget(steps=STEPS), batch_size=8, lr=lr, optimizer=optimizer, schedule=schedule,
        loss=CrossEntropy(label_smoothing=float(draw.choice([0.0, 0.1]))),
        clip_norm=[None, 0.05, 1.0][int(draw.integers(3))],
        pull=[NO_PULL, Proximal(mu=0.5)][int(draw.integers(2))],
    )  # fmt: skip
    return Twin(recipe, theirs, scheduler)
