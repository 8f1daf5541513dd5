"""What a training makes small: one frozen value a loss, over the model's outputs and the labels.

A loss may have more than its call: `examples`, each example's own loss (cohorts need it); `posed(data, generator)`,
what the model is asked in place of the examples, drawn anew at each step; `plain`, the loss that an evaluation reports;
`own(y, num_classes)`, the loss of a client whose training labels are y.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedlth.data.examples import ASKED, Examples
from fedlth.rng import stream

IGNORED = -100  # a label that no loss counts, as in torch


class Loss(Protocol):
    def __call__(self, outputs: Tensor, y: Tensor, /) -> Tensor:
        """Return the mean loss, a scalar."""
        ...


@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """Mean cross-entropy; logits (N, C) with y (N,), or (N, T, C) with y (N, T). Labels of -100 do not count.

    Evaluations report it without `label_smoothing`. `classes: own`: a client trains the outputs of the classes that
    its training examples have, as if all others were minus infinity; at evaluation every class competes.
    """

    label_smoothing: float = 0.0
    classes: str = "all"

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        if self.classes not in ("all", "own"):
            raise ValueError(f"classes must be all or own, got {self.classes!r}")

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), y.reshape(-1), label_smoothing=self.label_smoothing
        )

    def examples(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return (N,): each example's own loss, its mean over the positions that count."""
        each = functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), y.reshape(-1), label_smoothing=self.label_smoothing, reduction="none"
        ).reshape(len(y), -1)
        return each.sum(1) / (y != IGNORED).reshape(len(y), -1).sum(1).clamp(min=1)

    def plain(self) -> CrossEntropy:
        return CrossEntropy()

    def own(self, y: Tensor, num_classes: int) -> Loss:
        if self.classes == "all":
            return self
        found = tuple(int(label) for label in np.unique(y.cpu().numpy()) if label != IGNORED)
        smoothed = CrossEntropy(label_smoothing=self.label_smoothing)
        return smoothed if len(found) == num_classes else Restricted(smoothed, found)


cross_entropy = CrossEntropy()


@dataclass(frozen=True)
class Restricted:
    """A loss over the outputs of some classes alone; a label outside does not count."""

    inner: CrossEntropy
    classes: tuple[int, ...]

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        return self.inner(*self._restricted(logits, y))

    def examples(self, logits: Tensor, y: Tensor) -> Tensor:
        return self.inner.examples(*self._restricted(logits, y))

    def _restricted(self, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        kept = torch.tensor(self.classes, device=logits.device)
        place = torch.full((logits.shape[-1],), IGNORED, device=logits.device)
        place[kept] = torch.arange(len(kept), device=logits.device)
        return logits[..., kept], torch.where(y == IGNORED, y, place[y.clamp(min=0)])


def restricts(loss: object) -> bool:
    """Say whether a loss trains a client's own classes alone."""
    return isinstance(loss, Restricted) or (isinstance(loss, CrossEntropy) and loss.classes == "own")


@dataclass(frozen=True)
class MeanSquaredError:
    """Mean squared error; outputs and y (N,) or (N, k), or outputs (N, 1) with y (N,)."""

    def __call__(self, outputs: Tensor, y: Tensor) -> Tensor:
        return functional.mse_loss(_shaped(outputs, y), y.to(outputs.dtype))

    def examples(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return (N,): each example's own loss, its mean over what is predicted."""
        return (_shaped(outputs, y) - y).square().reshape(len(y), -1).mean(1)


def spread(outputs: Tensor, y: Tensor) -> bool:
    """Say whether real numbers (N,) and their outputs (N, 1) would be broadcast against each other."""
    return y.is_floating_point() and tuple(outputs.shape) == (*y.shape, 1)


def misread(outputs: Tensor, y: Tensor) -> str:
    """Say what whole numbers (N, T), a class a position, may have been meant for; "" where outputs have positions."""
    if y.dim() != 2 or outputs.dim() != 2:
        return ""
    said = f"; y of whole numbers (N, {y.shape[1]}) is a class a position: "
    if y.shape[1] == 1:
        return f"{said}give (N,) for a class an example"
    return f"{said}give floats for several labels an example, with torch.nn.functional:binary_cross_entropy_with_logits"


def _shaped(outputs: Tensor, y: Tensor) -> Tensor:
    if outputs.shape != y.shape and tuple(outputs.shape) != (*y.shape, 1):
        raise ValueError(f"mse: outputs {tuple(outputs.shape)} do not fit targets {tuple(y.shape)}")
    return outputs.reshape(y.shape)


@dataclass(frozen=True, kw_only=True)
class MaskedLm:
    """Cross-entropy at positions that are hidden in the input. Devlin et al. (BERT), NAACL 2019, arXiv 1810.04805.

    Of tokens (N, T), the inputs or those called `tokens` among several, a share `rate` is asked for, at least one an
    example, never one of `special`: of those `hidden` become `mask_token`, `swapped` a random token, the others stay.
    Labels of the data set are not used. Among several inputs the network is told which positions are asked for
    (ASKED), and may return the logits of these alone, (positions, C).
    """

    num_classes: int
    mask_token: int
    rate: float = 0.15
    hidden: float = 0.8
    swapped: float = 0.1
    special: tuple[int, ...] = ()
    tokens: str = "input_ids"

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise ValueError(f"rate must be in (0, 1), got {self.rate}")
        if self.hidden < 0 or self.swapped < 0 or self.hidden + self.swapped > 1:
            raise ValueError(
                f"hidden and swapped must be shares that sum to 1 at most, got {self.hidden}, {self.swapped}"
            )
        if not 0 <= self.mask_token < self.num_classes:
            raise ValueError(f"mask_token must be one of the {self.num_classes} tokens, got {self.mask_token}")
        if not isinstance(self.special, tuple) or not all(isinstance(token, int) for token in self.special):
            raise ValueError(f"special must be a list of tokens, got {self.special!r}")

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        # The mean of nothing is no number: a batch of `special` tokens alone asks for none, and moves nothing.
        if not bool((y != IGNORED).any()):
            return 0.0 * logits.sum()
        return cross_entropy(logits, y if logits.dim() > y.dim() else y[y != IGNORED])

    def examples(self, logits: Tensor, y: Tensor) -> Tensor:
        if logits.dim() == y.dim():  # of the positions asked for alone
            there = y != IGNORED
            whole = logits.new_zeros((*y.shape, logits.shape[-1]))
            whole[there] = logits
            logits = whole
        return cross_entropy.examples(logits, y)

    def posed(self, data: Examples, generator: np.random.Generator, /) -> Examples:
        """Return the tokens with some hidden, and as labels (N, T) what they were, IGNORED elsewhere.

        What pads a row is never asked for: beyond its length, or where an `attention_mask` is 0.
        """
        given = data.x[self.tokens] if isinstance(data.x, dict) and self.tokens in data.x else data.tensor
        if given.dim() != 2 or given.is_floating_point():
            raise ValueError(f"masked_lm needs tokens (N, T), got {tuple(given.shape)} {given.dtype}")
        tokens = given.cpu().numpy()
        shape, free = tokens.shape, np.isin(tokens, self.special)
        name = self.tokens if isinstance(data.x, dict) else "x"
        if name in data.lengths:
            free |= np.arange(shape[1]) >= data.lengths[name].cpu().numpy()[:, None]
        if isinstance(data.x, dict) and "attention_mask" in data.x:
            free |= data.x["attention_mask"].cpu().numpy() == 0
        draw = np.where(free, 1.0, generator.random(shape))
        asked = (draw < self.rate) | ((draw == draw.min(1, keepdims=True)) & (draw < 1))
        kind, other = generator.random(shape), generator.integers(0, self.num_classes, shape)
        shown = np.where(asked & (kind < self.hidden), self.mask_token, tokens)
        shown = np.where(asked & (kind >= self.hidden) & (kind < self.hidden + self.swapped), other, shown)
        x = torch.from_numpy(shown).to(given)
        labels = torch.from_numpy(np.where(asked, tokens, IGNORED)).to(given.device, torch.int64)
        ragged = dict.fromkeys(("y", ASKED), data.lengths[name]) if name in data.lengths else {}
        if not isinstance(data.x, dict):
            return Examples(x, labels, {**data.lengths, **{n: own for n, own in ragged.items() if n == "y"}})
        shown_x = {**data.x, self.tokens: x, ASKED: (labels != IGNORED).to(torch.int64)}
        return Examples(shown_x, labels, {**data.lengths, **ragged})


@dataclass(frozen=True)
class OfBatch:
    """Your own plain function of (outputs, y): the mean loss of a batch. Real numbers and outputs are of one shape.

    `options` are what the function is given beside them, by name.
    """

    function: Callable[..., Tensor]
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(self, outputs: Tensor, y: Tensor) -> Tensor:
        # torch would broadcast outputs (N, 1) and targets (N,) to (N, N), and the model would learn next to nothing.
        return self.function(outputs.reshape(y.shape) if spread(outputs, y) else outputs, y, **dict(self.options))


def takes_logits(loss: Loss, y: Tensor) -> bool:
    """Say whether a loss of real numbers y (N,) or (N, k) in [0, 1] wants them to be the sigmoid of the outputs.

    It is asked, since it may be any function: for a target of 1 an output far above then costs less than 1 does, and
    for 0 one far below less than 0.
    """
    if not bool(((y >= 0) & (y <= 1)).all()):
        return False
    ones = torch.ones_like(y[:2], device="cpu")
    zeros = torch.zeros_like(ones)
    try:
        return bool(loss(10 * ones, ones) < loss(ones, ones)) and bool(loss(-10 * ones, zeros) < loss(zeros, zeros))
    except Exception:  # a loss of probabilities refuses such outputs, and the user's code may raise anything
        return False


def plain(loss: Any) -> Loss:
    """Return the loss that an evaluation reports."""
    found: Loss = loss.plain() if hasattr(loss, "plain") else loss
    return found


def owned(loss: Any, y: Tensor, num_classes: int) -> Loss:
    """Return the loss of a training whose labels are y."""
    found: Loss = loss.own(y, num_classes) if hasattr(loss, "own") else loss
    return found


def examined(loss: Any, data: Examples) -> Examples:
    """Return what an evaluation asks: the same of equal data every time."""
    if not hasattr(loss, "posed"):
        return data
    posed: Examples = loss.posed(data, stream(0, "evaluation examples"))
    return posed
