"""Masked local training and evaluation of one client, over one flat parameter vector."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlth.errors import StudyError
from fedlth.kernel import kernel
from fedlth.kernel.table import LayerTable
from fedlth.models.layout import Entry, Layout, Params
from fedlth.training import batch_requests
from fedlth.training.tuned import Tuned

EVALUATION_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long and how fast: SGD with momentum; `schedule` is constant or cosine (down to 1 % of `lr`).

    With `replay_lr` False the rate stays at the schedule's last value, which is what fine-tuning means.
    `first_step` and `last_step` cut the run: the steps between them, with the batches and rates that they have in it.
    """

    epochs: int
    batch_size: int
    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    schedule: str = "constant"
    replay_lr: bool = True
    first_step: int = 0
    last_step: int | None = None

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate of step `step` of `steps`."""
        if self.schedule == "constant":
            return self.lr
        part = step / max(1, steps - 1) if self.replay_lr else 1.0
        return self.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * part)))


@dataclass(frozen=True)
class Trained:
    """Where a training ended; `snapshots` holds the weights after the epochs that were asked for."""

    params: Params
    loss: float
    snapshots: dict[int, np.ndarray] = field(default_factory=dict)


class Bound:
    """A module whose parameters and float buffers are views into one flat tensor, so that a step is five calls.

    With a `table`, training and evaluation run in the compute kernel instead; with `tuned` they take its forwards of
    the module and its memory format. All are equal up to float32 rounding. Of one Bound, the kernel's training and
    evaluation may run in many threads at once; whatever needs the module holds `lock`.
    """

    def __init__(
        self,
        module: nn.Module,
        layout: Layout,
        device: str,
        table: LayerTable | None = None,
        tuned: Tuned | None = None,
    ) -> None:
        self.table = table
        self.module = module.to(device)
        self.forward = tuned or Tuned(self.module, self.module, False, "as written")
        self.lock = threading.RLock()
        self.layout = layout
        self.device = device
        self.flat = torch.zeros(layout.num_floats, device=device)
        self.grad = torch.zeros(layout.num_params, device=device)
        named: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
        named.update(module.named_buffers(remove_duplicate=False))
        self.ints = [(e, named[e.name]) for e in layout.ints]
        self.buffers = {e.name: named[e.name] for e in layout.entries if e.role == "buffer"}
        for e in layout.floats:
            tensor = named[e.name]
            tensor.data = self._view(self.flat, e)
            if e.trainable:
                tensor.grad = self._view(self.grad, e)
        moves = np.zeros(layout.num_params, np.float32)
        for e in layout.floats:
            if e.trainable:
                moves[e.slice] = 1.0
        # Weight decay must not reach a frozen part: its gradient is zero, its decay would not be.
        self.moves = None if moves.all() else torch.from_numpy(moves).to(device)

    def _moved(self, e: Entry) -> bool:
        return self.forward.channels_last and e.role == "param" and len(e.shape) == 4

    def _view(self, flat: Tensor, e: Entry) -> Tensor:
        """Return an entry of a flat tensor in the module's memory format, as the entry's shape."""
        if not self._moved(e):
            return flat[e.slice].view(e.shape)
        outputs, inputs, height, width = e.shape
        return flat[e.slice].view(outputs, height, width, inputs).permute(0, 3, 1, 2)

    def arranged(self, values: np.ndarray) -> Tensor:
        """Return a prefix of the flat vector, given in the layout's order, in the order of the module's memory."""
        out = torch.from_numpy(values)
        if any(map(self._moved, self.layout.floats)):
            given, out = out, out.clone()
            for e in self.layout.floats:
                if self._moved(e) and e.slice.stop <= len(out):
                    self._view(out, e).copy_(given[e.slice].view(e.shape))
        return out.to(self.device)

    def in_order(self, values: Tensor) -> np.ndarray:
        """Return a copy of a prefix of a flat tensor in the layout's order: the inverse of `arranged`."""
        out: np.ndarray = values.cpu().numpy().copy()
        for e in self.layout.floats:
            if self._moved(e) and e.slice.stop <= len(out):
                out[e.slice] = self._view(values, e).cpu().numpy().reshape(-1)
        return out

    def load(self, params: Params) -> None:
        self.flat.copy_(self.arranged(params.floats))
        for e, tensor in self.ints:
            tensor.copy_(torch.from_numpy(params.ints[e.slice].reshape(e.shape)))

    def save(self) -> Params:
        for name, tensor in self.buffers.items():
            if self.module.get_buffer(name) is not tensor:
                raise RuntimeError(f"model: buffer {name} was replaced; write into it in place: self.{name}.copy_(...)")
        ints = np.zeros(self.layout.num_ints, np.int64)
        for e, tensor in self.ints:
            ints[e.slice] = tensor.detach().cpu().reshape(-1).numpy()
        return Params(self.in_order(self.flat), ints)


def batches(size: int, batch_size: int, order: np.random.Generator) -> list[np.ndarray]:
    """Shuffle `size` examples into batches; a last batch of one joins the one before (BatchNorm cannot train on it)."""
    shuffled = order.permutation(size)
    cuts = list(range(batch_size, size, batch_size))
    if cuts and size - cuts[-1] == 1:
        cuts.pop()
    return np.split(shuffled, cuts)


def cut(epochs: list[list[np.ndarray]], first_step: int, last_step: int | None) -> list[list[np.ndarray]]:
    """Return the batches of the steps first_step, ..., last_step - 1 of a run, by epoch; epochs left empty go."""
    kept, step = [], 0
    for parts in epochs:
        stop = len(parts) if last_step is None else max(0, last_step - step)
        kept.append(parts[max(0, first_step - step) : stop])
        step += len(parts)
    return [parts for parts in kept if parts]


def loss_of(logits: Tensor, y: Tensor) -> Tensor:
    """Return mean cross-entropy; logits (N, C) with y (N,), or (N, T, C) with y (N, T)."""
    return functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), y.reshape(-1))


def train(
    bound: Bound,
    start: Params,
    *,
    data: tuple[Tensor, Tensor],
    plan: Plan,
    order: np.random.Generator,
    torch_seed: int,
    mask: np.ndarray | None = None,
    update: np.ndarray | None = None,
    snapshots: tuple[int, ...] = (),
) -> Trained:
    """Train from `start` and return new Params.

    `mask` (num_prunable,) bool: weights outside are zero from the first forward on, after every step, and carry no
    momentum. `update` (num_prunable,) or (num_params,) bool: parameters that it covers and leaves out keep their value.
    `order` draws the batches; `torch_seed` seeds torch's own generator (dropout). Loss is the mean over the last epoch.
    A loss or a weight that is not finite at the end raises FloatingPointError.
    """
    x, y = data
    epochs = [batches(len(y), plan.batch_size, order) for _ in range(plan.epochs)]
    steps = sum(map(len, epochs))
    if plan.first_step or plan.last_step is not None:
        epochs = cut(epochs, plan.first_step, plan.last_step)
        if not epochs:
            raise StudyError(f"finder.rewind.step: must lie inside a training's {steps} steps, got {plan.first_step}")
    rates = [plan.rate(step, steps) for step in range(plan.first_step, min(plan.last_step or steps, steps))]
    if bound.table is not None and kernel.suits(bound.table, mask):
        return _checked(_in_kernel(bound.table, start, data, plan, epochs, rates, mask, update, snapshots), plan)
    done = batch_requests.trained(bound, start, data, plan, epochs, rates, mask, update, snapshots)
    if done is not None:
        return _checked(Trained(Params(done.floats, start.ints.copy()), done.loss, done.snapshots), plan)
    with bound.lock:
        torch.manual_seed(torch_seed)
        return _checked(_in_torch(bound, start, data, plan, epochs, rates, mask, update, snapshots), plan)


def _checked(trained: Trained, plan: Plan) -> Trained:
    if not (math.isfinite(trained.loss) and np.isfinite(trained.params.floats).all()):
        raise FloatingPointError(f"training diverged: loss {trained.loss} at learning rate {plan.lr}")
    return trained


def _in_torch(
    bound: Bound, start: Params, data: tuple[Tensor, Tensor], plan: Plan, epochs: list[list[np.ndarray]],
    rates: list[float], mask: np.ndarray | None, update: np.ndarray | None, snapshots: tuple[int, ...],
) -> Trained:  # fmt: skip
    """Do what `train` says in torch, five calls a step."""
    x, y = bound.forward.images(data[0]), data[1]
    layout, size = bound.layout, bound.layout.num_prunable
    weights, grad = bound.flat[: layout.num_params], bound.grad
    alive = None if mask is None or mask.all() else bound.arranged(mask.astype(np.float32))
    moves = bound.moves
    if update is not None:
        moves = torch.ones(layout.num_params, device=bound.device) if moves is None else moves.clone()
        moves[: update.size] *= bound.arranged(update.astype(np.float32))
    bound.load(start)
    if alive is not None:
        weights[:size].mul_(alive)
    momentum = torch.zeros_like(grad) if plan.momentum else None
    step, loss_sum, kept = 0, 0.0, {}
    bound.module.train()
    for epoch, parts in enumerate(epochs, 1):
        loss_sum = 0.0
        for part in parts:
            index = torch.from_numpy(part).to(bound.device)
            grad.zero_()
            loss = loss_of(bound.forward.train(x[index]), y[index])
            loss.backward()  # type: ignore[no-untyped-call]
            loss_sum += float(loss.detach()) * len(part)
            with torch.no_grad():
                if plan.weight_decay:
                    grad.add_(weights, alpha=plan.weight_decay)
                if moves is not None:
                    grad.mul_(moves)
                if alive is not None:
                    grad[:size].mul_(alive)
                direction = grad if momentum is None else momentum.mul_(plan.momentum).add_(grad)
                weights.add_(direction, alpha=-rates[step])
            step += 1
        if epoch in snapshots:
            kept[epoch] = bound.in_order(bound.flat)
    return Trained(bound.save(), loss_sum / sum(map(len, epochs[-1])), kept)


def _in_kernel(
    table: LayerTable, start: Params, data: tuple[Tensor, Tensor], plan: Plan, epochs: list[list[np.ndarray]],
    rates: list[float], mask: np.ndarray | None, update: np.ndarray | None, snapshots: tuple[int, ...],
) -> Trained:  # fmt: skip
    """Do what `train` says in the compute kernel."""
    moves = None
    if update is not None:
        moves = np.ones(table.num_params, np.float32)
        moves[: update.size] = update
    done = kernel.train_epochs(
        table, start.floats, data[0].numpy(), data[1].numpy(), epochs,
        rates=np.array(rates), momentum=plan.momentum,
        weight_decay=plan.weight_decay, mask=mask, moves=moves, snapshots=snapshots,
    )  # fmt: skip
    return Trained(Params(done.floats, start.ints.copy()), done.loss, done.snapshots)


def evaluate(bound: Bound, params: Params, data: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Return (accuracy, mean loss) of `params` on data; (0, 0) where there is none."""
    x, y = data
    if not len(y):
        return 0.0, 0.0
    if bound.table is not None and kernel.suits(bound.table, params.floats):
        logits = torch.from_numpy(kernel.predict(bound.table, params.floats, x.numpy()))
        return float((logits.argmax(-1) == y).double().mean()), float(loss_of(logits, y))
    if (found := batch_requests.evaluated(bound, params, data)) is not None:
        return found
    with bound.lock, torch.inference_mode():
        bound.load(params)
        bound.module.eval()
        x, right, loss_sum = bound.forward.images(x), 0, 0.0
        for at in range(0, len(y), EVALUATION_BATCH):
            logits, target = bound.forward.evaluate(x[at : at + EVALUATION_BATCH]), y[at : at + EVALUATION_BATCH]
            right += int((logits.argmax(-1) == target).sum())
            loss_sum += float(loss_of(logits, target)) * len(target)
    return right / y.numel(), loss_sum / len(y)


def gradient(bound: Bound, params: Params, data: tuple[Tensor, Tensor]) -> np.ndarray:
    """Return (num_prunable,) float32: the gradient of the mean loss over all of `data`, in evaluation mode."""
    x, y = bound.forward.images(data[0]), data[1]
    with bound.lock:
        bound.load(params)
        bound.module.eval()
        bound.grad.zero_()
        for at in range(0, len(y), EVALUATION_BATCH):
            target = y[at : at + EVALUATION_BATCH]
            logits = bound.forward.evaluate(x[at : at + EVALUATION_BATCH])
            loss = loss_of(logits, target) * (len(target) / len(y))
            loss.backward()  # type: ignore[no-untyped-call]
        return bound.in_order(bound.grad[: bound.layout.num_prunable])
