"""The clients of a cohort trained and evaluated as one: each layer is one batched call over all of them.

Shapes: K clients, F floats of a model, P of them parameters, S steps, B examples of a batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap

from fedlth.data.examples import Examples, Inputs, joined
from fedlth.models.call import call_with
from fedlth.models.layout import Params
from fedlth.training.batch_requests import Evaluation, Training
from fedlth.training.loss import IGNORED
from fedlth.training.metrics import Metric, Scores, counted, num_counted, rows, scored
from fedlth.training.request import TrainingRequest, TrainingResult
from fedlth.training.torch_backend import clip

Q = TypeVar("Q", Training, Evaluation)

# Examples of one client in a forward pass of evaluation: no more than a usual training batch, which is known to fit.
EVALUATION_BATCH = 32


def answer(asked: Sequence[Training | Evaluation]) -> list[Any]:
    """Train and evaluate together what is asked at once; return what came of each, in order.

    That is a TrainingResult, Scores, or an exception.
    Where a batched call fails each client is tried alone, in the same way, so that a faulty one costs only itself.
    What memory refuses is refused to all: which of them would fit depends on the machine, and so would the bits.
    """
    answers: dict[int, Any] = {}
    for model in {id(one.model): one.model for one in asked}.values():  # clients of one task have one
        mine = [(i, one) for i, one in enumerate(asked) if one.model is model]
        evaluations = {i: one for i, one in mine if isinstance(one, Evaluation)}
        alike: dict[Any, dict[int, Training]] = {}
        for i, one in mine:
            if isinstance(one, Training):
                recipe = one.request.recipe
                alike.setdefault((recipe.optimizer, recipe.loss, recipe.pull, recipe.clip_norm), {})[i] = one
        for group in alike.values():
            answers.update(zip(group, _tried(train_together, list(group.values())), strict=True))
        answers.update(zip(evaluations, _tried(evaluate_together, list(evaluations.values())), strict=True))
    return [answers[i] for i in range(len(asked))]


def _tried(together: Callable[[Sequence[Q]], Sequence[Any]], asked: Sequence[Q]) -> Sequence[Any]:
    if not asked:
        return []
    began = time.thread_time()
    try:
        return together(asked)
    except Exception as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            return [MemoryError(f"cohort of {len(asked)}: {error}") for _ in asked]
        return [error] if len(asked) == 1 else [_tried(together, [one])[0] for one in asked]
    finally:
        _share(asked, time.thread_time() - began)


def _share(asked: Sequence[Training] | Sequence[Evaluation], cpu_s: float) -> None:
    """Share CPU seconds out by the examples that each client had in the work."""
    for one in asked:
        one.cpu_s[:] = [cpu_s * one.num_examples / sum(other.num_examples for other in asked)]


def train_together(asked: Sequence[Training]) -> list[TrainingResult]:
    """Train K clients, as `torch_backend.train` would each alone, up to float32 rounding.

    Their recipes have one optimizer, loss, pull and norm to clip to; rates, batches and masks are each client's own.
    Clients lie in the order of their step counts, so that those still at work are always the first rows, and nobody
    is trained beyond its end. A batch smaller than the largest of its step is filled up with examples of weight zero.
    """
    order = sorted(range(len(asked)), key=lambda k: -len(asked[k].request.rates))
    members = [asked[k] for k in order]
    requests = [m.request for m in members]
    stack = _Stack(members)
    free = _free(requests, stack)
    feed = _Feed(members, stack.device)
    recipe = requests[0].recipe
    anchors = _anchors(requests, stack) if recipe.pulls else None
    memory = recipe.optimizer.memory(stack.grad)
    losses = torch.zeros(feed.real.shape[:2], device=stack.device)
    snapshots: list[dict[int, np.ndarray]] = [{} for _ in members]
    count, state = 0, dict[str, Tensor]()
    stack.module.train()
    for step in range(feed.steps):
        if count != feed.counts[step]:
            count = feed.counts[step]
            state = stack.state(count, trained=True)
        weights, grad = stack.flat[:count, : stack.layout.num_params], stack.grad[:count]
        batch, weight = feed.batch(step)
        loss = vmap(partial(stack.loss, requests[0].recipe.loss))(state, batch.x, batch.y, weight)
        slopes = torch.autograd.grad(loss.sum(), [state[e.name] for e in stack.trained], materialize_grads=True)
        with torch.no_grad():
            for e, slope in zip(stack.trained, slopes, strict=True):
                grad[:, e.slice] = slope.reshape(count, -1)
            losses[step, :count] = loss
            may = None if free is None else free[:count].to(weights.dtype)
            if anchors is not None:
                recipe.pull(grad, weights, anchors[:count])
            if may is not None and (anchors is not None or recipe.clip_norm is not None):
                grad.mul_(may)
            if recipe.clip_norm is not None:
                clip(grad, recipe.clip_norm)
            rows = tuple(part[:count] for part in memory)
            direction = recipe.optimizer(grad, weights, rows, step + 1, may)
            weights.addcmul_(direction, feed.rates[step, :count, None], value=-1.0)
        for row, epoch in feed.ends.get(step, ()):
            snapshots[row][epoch] = stack.flat[row].cpu().numpy().copy()
    table, floats = losses.double().cpu().numpy(), stack.flat.cpu().numpy()
    asked_for = None if feed.asked_for is None else feed.asked_for.cpu().numpy()
    results = []
    for row, r in enumerate(requests):
        mean = _last_loss(r, table[:, row], None if asked_for is None else asked_for[:, row])
        results.append(TrainingResult(Params(floats[row].copy(), r.start.ints.copy()), mean, snapshots[row]))
    return [results[order.index(k)] for k in range(len(asked))]


def evaluate_together(asked: Sequence[Evaluation]) -> list[Scores]:
    """Return each client's scores, as `evaluation.evaluate` would alone, up to float32 rounding."""
    stack = _Stack(asked)
    state = stack.state(len(asked), trained=False)
    data, starts = _joined(asked)
    states: list[dict[Metric, Any]] = [dict.fromkeys(m.metrics) for m in asked]
    loss_sum = torch.zeros(len(asked), dtype=torch.float64, device=stack.device)
    stack.module.eval()
    for at in range(0, max(m.num_examples for m in asked), EVALUATION_BATCH):
        parts = [np.arange(at, min(at + EVALUATION_BATCH, m.num_examples)) for m in asked]
        index_KB, real_KB = _padded(parts, max(map(len, parts)))
        index = torch.from_numpy(index_KB + starts[:, None]).to(stack.device)
        real = torch.from_numpy(real_KB).to(stack.device)
        with torch.no_grad():
            part = data.batch(index)
            logits = vmap(stack.forward)(state, part.x)
            count = vmap(counted)(part.y) * real
            loss_sum += (vmap(stack.examined)(logits, part.y).double() * count).sum(1)
        for row, (filled, there) in enumerate(zip(states, parts, strict=True)):
            if len(there):
                told = rows(logits[row, : len(there)], part.y[row, : len(there)])
                filled.update({m: m.add(before, *told) for m, before in filled.items()})
    found = zip(asked, states, loss_sum.tolist(), strict=True)
    return [scored(filled, total / int(counted(m.data.y).sum())) for m, filled, total in found]


class _Stack:
    """K models as one: `flat` (K, F) and `grad` (K, P), a row a client."""

    def __init__(self, asked: Sequence[Training] | Sequence[Evaluation]) -> None:
        model = asked[0].model
        self.module, self.layout, self.device = model.module, model.layout, model.device
        self.examined: Any = getattr(model.loss, "examples", None)
        self.flat = torch.from_numpy(np.stack([m.params.floats for m in asked])).to(self.device)
        self.ints = torch.from_numpy(np.stack([m.params.ints for m in asked])).to(self.device)
        self.grad = torch.zeros(len(asked), self.layout.num_params, device=self.device)
        self.trained = [e for e in self.layout.floats if e.trainable]
        self.dtypes = {n: b.dtype for n, b in self.module.named_buffers()}

    def state(self, count: int, *, trained: bool) -> dict[str, Tensor]:
        """Return name -> (count, *shape): views of the first rows, leaves of a graph where they are trained."""
        out = {}
        for e in self.layout.entries:
            if e.is_int:
                out[e.name] = self.ints[:count, e.slice].view(count, *e.shape).to(self.dtypes[e.name])
                continue
            out[e.name] = self.flat[:count, e.slice].view(count, *e.shape)
            if trained and e.trainable:
                out[e.name] = out[e.name].detach().requires_grad_()
        return out

    def forward(self, state: dict[str, Tensor], x: Inputs) -> Tensor:
        return call_with(self.module, state, x)

    def loss(self, loss: Any, state: dict[str, Tensor], x: Inputs, y: Tensor, weight: Tensor) -> Tensor:
        """Return one client's weighted loss; x (B, ...), weight (B,) sums to one."""
        found: Tensor = (loss.examples(self.forward(state, x), y) * weight).sum()
        return found


class _Feed:
    """What each step is given: whose turn it is, which examples, what they weigh, and the learning rates."""

    def __init__(self, members: Sequence[Training], device: str) -> None:
        plans = [[part for epoch in m.request.batches for part in epoch] for m in members]
        self.steps = len(plans[0])
        self.counts = [sum(len(plan) > step for plan in plans) for step in range(self.steps)]
        self.widths = [max(len(plan[step]) for plan in plans[:n]) for step, n in enumerate(self.counts)]
        self.data, starts = _joined(members)
        self.requests = [m.request for m in members]
        self.plans, self.drawn = plans, any(r.draws_examples for r in self.requests)
        posed = hasattr(self.requests[0].recipe.loss, "posed")
        self.counted = posed or (not self.data.y.is_floating_point() and bool((self.data.y == IGNORED).any()))
        shape = (self.steps, len(members), max(self.widths))
        index_SKB, real_SKB = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
        rates_SK = np.zeros(shape[:2], np.float32)
        for step, count in enumerate(self.counts):
            parts = [plan[step] for plan in plans[:count]]
            index, real = _padded(parts, shape[2])
            index_SKB[step, :count] = index + starts[:count, None]
            real_SKB[step, :count] = real / np.array([len(part) for part in parts], np.float32)[:, None]
            rates_SK[step, :count] = [m.request.rates[step] for m in members[:count]]
        self.index, self.real = torch.from_numpy(index_SKB).to(device), torch.from_numpy(real_SKB).to(device)
        self.rates = torch.from_numpy(rates_SK).to(device)
        # (S, K): of how many targets each loss is the mean, where they are drawn anew at each step.
        self.asked_for = torch.zeros(shape[:2], dtype=torch.int64, device=device) if posed else None
        self.ends: dict[int, list[tuple[int, int]]] = {}
        for row, member in enumerate(members):
            lengths = np.cumsum([len(epoch) for epoch in member.request.batches])
            for epoch in set(member.request.snapshots) & set(range(1, len(lengths) + 1)):
                self.ends.setdefault(int(lengths[epoch - 1]) - 1, []).append((row, epoch))

    def batch(self, step: int) -> tuple[Examples, Tensor]:
        """Return examples (K, B, ...) and weights (K, B) of those at work."""
        count, width = self.counts[step], self.widths[step]
        index, weight = self.index[step, :count, :width], self.real[step, :count, :width]
        batch = self.data.batch(index)
        if self.drawn:
            batch = joined([self._shown(row, step, index[row]) for row in range(count)], torch.stack)
        if self.counted:  # a mean over the positions that count, as the loss of the whole batch is
            counts = (batch.y != IGNORED).reshape(count, width, -1).sum(2) * (weight > 0)
            if self.asked_for is not None:
                self.asked_for[step, :count] = counts.sum(1)
            weight = counts / counts.sum(1, keepdim=True).clamp(min=1)
        return batch, weight

    def _shown(self, row: int, step: int, index: Tensor) -> Examples:
        """Return what one client's step is shown, filled up with its first example."""
        size, places = len(self.plans[row][step]), torch.arange(len(index), device=index.device)
        shown = self.requests[row].shown(step, self.data.batch(index[:size]))
        return shown.batch(torch.where(places < size, places, 0))


def _joined(asked: Sequence[Training] | Sequence[Evaluation]) -> tuple[Examples, np.ndarray]:
    """Return the clients' examples one after the other, and where each client's begin, (K,)."""
    parts = [m.data for m in asked]
    return joined(parts), np.cumsum([0, *map(len, parts[:-1])])


def _padded(parts: Sequence[np.ndarray], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return indices (K, width), filled up with a part's first (0 where it is empty), and what is real, 1 or 0."""
    index, real = np.zeros((len(parts), width), np.int64), np.zeros((len(parts), width), np.float32)
    for row, part in enumerate(parts):
        if len(part):
            index[row], index[row, : len(part)], real[row, : len(part)] = part[0], part, 1.0
    return index, real


def _free(requests: Sequence[TrainingRequest], stack: _Stack) -> Tensor | None:
    """Zero the pruned weights; return (K, P) bool, what a step may change, or None where that is everything."""
    rows = [request.free(stack.layout) for request in requests]
    for row, request in enumerate(requests):
        if request.active is not None:
            stack.flat[row, : stack.layout.num_prunable] *= torch.from_numpy(request.active).to(stack.device)
    if all(row is None for row in rows):
        return None
    whole = np.ones(stack.layout.num_params, bool)
    return torch.from_numpy(np.stack([whole if row is None else row for row in rows])).to(stack.device)


def _anchors(requests: Sequence[TrainingRequest], stack: _Stack) -> Tensor:
    """Return (K, P): where each client's pull draws to."""
    size = stack.layout.num_params
    found = stack.flat[:, :size].clone()
    for row, request in enumerate(requests):
        if request.anchor is not None:
            found[row] = torch.from_numpy(request.anchor.floats[:size]).to(stack.device)
    return found


def _last_loss(request: TrainingRequest, losses: np.ndarray, asked_for: np.ndarray | None) -> float:
    """Return the mean loss over the last epoch's targets; `asked_for` (steps,) counts those that were drawn."""
    parts, end = request.batches[-1], len(request.rates)
    last = slice(end - len(parts), end)
    if asked_for is None:
        sizes = [num_counted(request.data.y[torch.from_numpy(part)]) for part in parts]
    else:
        sizes = asked_for[last].tolist()
    return float(np.dot(losses[last], sizes) / max(1, sum(sizes)))
