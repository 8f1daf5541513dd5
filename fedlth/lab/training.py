"""One laboratory training: masked SGD or Adam, watched on validation data every few iterations."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlth.kernel import kernel
from fedlth.lab.attack import attacked, evaluate_attacked
from fedlth.lab.recipe import Recipe
from fedlth.models.layout import Layout, Params
from fedlth.rng import stream, torch_seed
from fedlth.storage import store
from fedlth.training.train import evaluate, loss_of

if TYPE_CHECKING:
    from fedlth.lab.bench import Bench, Examples


@dataclass(frozen=True)
class Point:
    """What the validation data said after `iteration` iterations of the whole schedule."""

    iteration: int
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Run:
    """A training: where it ended, where its validation loss was lowest, the curve, test accuracy at both places.

    previous: the prunable weights at the evaluations before the last, oldest first, as many as were asked for.
    diverged: it went on to what are no numbers; all of this is of the evaluations before, or of its start.
    """

    final: Params
    best: Params
    curve: tuple[Point, ...]
    test: float
    test_final: float
    previous: tuple[np.ndarray, ...] = ()
    diverged: bool = False

    @property
    def early_stop(self) -> Point:
        """Return the point of least validation loss, the first of equals: Frankle & Carbin's early-stop iteration."""
        return min(self.curve, key=lambda p: p.loss)


def batches(size: int, recipe: Recipe, order: np.random.Generator) -> list[np.ndarray]:
    """Return the batches of iterations [first, end): every epoch is a shuffle, batches run on across epochs."""
    need = recipe.end * recipe.train.batch_size
    drawn = np.concatenate([order.permutation(size) for _ in range(-(-need // size))])[:need]
    return list(drawn.reshape(recipe.end, recipe.train.batch_size)[recipe.first :])


def train(
    bench: Bench,
    start: Params,
    mask: np.ndarray,
    recipe: Recipe,
    *,
    parts: Mapping[str, Examples],
    free: bool,
    window: int,
) -> Run:
    """Train and watch, as far as weights and loss are numbers; raises FloatingPointError where they never were."""
    begun = start if free else start.masked(mask)
    states = walk(bench, begun, mask, recipe, data=parts["train"], free=free) or [begun]
    curve: list[Point] = []
    for number, state in enumerate(states, 1):
        done = min(recipe.first + number * recipe.train.evaluate_every, recipe.end)
        accuracy, loss = _watched(bench, state, recipe, parts["validation"])
        if not (np.isfinite(state.floats).all() and math.isfinite(loss)):
            break
        curve.append(Point(done, loss, accuracy))
    diverged, states = len(curve) < len(states), states[: len(curve)]
    if not states:
        accuracy, loss = _watched(bench, begun, recipe, parts["validation"])
        if not math.isfinite(loss):
            raise FloatingPointError(f"training began with loss {loss}, learning rate {recipe.train.lr}")
        states, curve = [begun], [Point(recipe.first, loss, accuracy)]
    best = min(range(len(curve)), key=lambda i: curve[i].loss)
    tests = {i: evaluate(bench.fast, states[i], parts["test"])[0] for i in {best, len(states) - 1}}
    older = tuple(state.floats[: mask.size] for state in [begun, *states][-1 - window : -1]) if window else ()
    return Run(states[-1], states[best], tuple(curve), tests[best], tests[len(states) - 1], older, diverged)


def _watched(bench: Bench, state: Params, recipe: Recipe, data: Examples) -> tuple[float, float]:
    """Return (accuracy, loss) on validation data; a training on attacked images is watched on PGD's."""
    t = recipe.train
    if t.attack == "none":
        return evaluate(bench.fast, state, data)
    return evaluate_attacked(bench, state, data, kind="pgd", eps=t.attack_eps, steps=t.attack_steps)


def walk(bench: Bench, start: Params, mask: np.ndarray, recipe: Recipe, *, data: Examples, free: bool) -> list[Params]:
    """Train, and return the state at every evaluation; of no iterations, none."""
    if not recipe.steps:
        return []
    plan = batches(len(data[1]), recipe, stream(bench.seed, recipe.order))
    every, t = recipe.train.evaluate_every, recipe.train
    chunks = [plan[i : i + every] for i in range(0, len(plan), every)]
    plain = t.optimiser == "sgd" and not (t.dropout or t.attack != "none" or t.norm_l1)
    way = _in_kernel if plain and bench.fast.table is not None else _in_torch
    return way(bench, start, mask, recipe, chunks, data, free)


def _in_kernel(
    bench: Bench, start: Params, mask: np.ndarray, recipe: Recipe, chunks: list[list[np.ndarray]],
    data: Examples, free: bool,
) -> list[Params]:  # fmt: skip
    """Train in the compute kernel; return the state after each chunk."""
    table = bench.fast.table
    assert table is not None
    moves = None
    if free:
        moves = np.ones(table.num_params, np.float32)
        moves[: mask.size] = mask
    done = kernel.train_epochs(
        table, start.floats, data[0].numpy(), data[1].numpy(), chunks,
        rates=np.array([recipe.rate(step) for step in range(recipe.first, recipe.end)]),
        momentum=recipe.train.momentum, weight_decay=recipe.train.weight_decay,
        mask=None if free or mask.all() else mask, moves=moves, snapshots=tuple(range(1, len(chunks) + 1)),
    )  # fmt: skip
    return [Params(done.snapshots[i], start.ints.copy()) for i in range(1, len(chunks) + 1)]


class _Optimiser:
    """SGD with momentum, or Adam (Kingma & Ba, ICLR 2015, arXiv 1412.6980), over one flat vector."""

    def __init__(self, recipe: Recipe, size: int) -> None:
        self.train = recipe.train
        self.first, self.second, self.step = torch.zeros(size), torch.zeros(size), 0

    def direction(self, grad: Tensor) -> Tensor:
        if self.train.optimiser == "sgd":
            return self.first.mul_(self.train.momentum).add_(grad)
        self.step += 1
        self.first.mul_(0.9).add_(grad, alpha=0.1)
        self.second.mul_(0.999).addcmul_(grad, grad, value=0.001)
        scale = (self.second / (1 - 0.999**self.step)).sqrt_().add_(1e-8)
        return self.first / (1 - 0.9**self.step) / scale


def _in_torch(
    bench: Bench, start: Params, mask: np.ndarray, recipe: Recipe, chunks: list[list[np.ndarray]],
    data: Examples, free: bool,
) -> list[Params]:  # fmt: skip
    """Train in plain torch; return the state after each chunk."""
    bound, layout = bench.bound, bench.layout
    size, t = layout.num_prunable, recipe.train
    moves = torch.ones(layout.num_params)
    for e in layout.floats:
        if e.role == "param" and not e.trainable:
            moves[e.slice] = 0.0
    moves[:size] *= torch.from_numpy(mask.astype(np.float32))
    gammas = torch.zeros(layout.num_params)
    for place in scales(layout):
        gammas[place] = t.norm_l1
    weights, optimiser = bound.flat[: layout.num_params], _Optimiser(recipe, layout.num_params)
    bound.load(start)
    torch.manual_seed(torch_seed(bench.seed, f"dropout/{recipe.order}"))
    hooks = [m.register_forward_hook(_dropping(t.dropout)) for m in relus(bound.module)]
    states, step = [], recipe.first
    for chunk in chunks:
        for part in chunk:
            index = torch.from_numpy(part)
            x, y = data[0][index], data[1][index]
            if t.attack != "none":
                x = attacked(bench, x, y, t.attack, t.attack_eps, t.attack_steps)
            bound.module.train()
            bound.grad.zero_()
            loss_of(bound.module(x), y).backward()  # type: ignore[no-untyped-call]
            with torch.no_grad():
                grad = bound.grad
                if t.norm_l1:
                    grad.add_(gammas * weights.sign())
                if t.weight_decay:
                    grad.add_(weights, alpha=t.weight_decay)
                # Last on the direction: Adam's would be moved by its own past, momentum by weight decay.
                weights.sub_(optimiser.direction(grad.mul_(moves)).mul(moves), alpha=recipe.rate(step))
            step += 1
        states.append(bound.save())
    for hook in hooks:
        hook.remove()
    return states


def scales(layout: Layout) -> list[slice]:
    """Return where the scales of norm layers lie, which `train.norm_l1` draws to zero."""
    return [e.slice for e in layout.floats if e.norm and e.role == "param" and e.name.endswith("weight")]


def relus(module: nn.Module) -> list[nn.Module]:
    """Return the modules that `train.dropout` follows."""
    return [m for m in module.modules() if isinstance(m, nn.ReLU)]


class _dropping:
    """Dropout after a module, where the module itself has none. Srivastava et al., JMLR 2014."""

    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, module: nn.Module, _: object, output: Tensor) -> Tensor:
        return functional.dropout(output, self.share, module.training) if self.share else output


def packed(run: Run, mask: np.ndarray | None) -> bytes:
    """Serialise a run; of masked weights only those that are alive are kept."""

    def values(params: Params) -> np.ndarray:
        return params.floats if mask is None else np.delete(params.floats, np.flatnonzero(~mask))

    same = run.best.digest() == run.final.digest()
    arrays = {"final": values(run.final), "final_ints": run.final.ints}
    if not same:
        arrays |= {"best": values(run.best), "best_ints": run.best.ints}
    arrays |= {f"previous_{i:03}": old for i, old in enumerate(run.previous)}
    told = {"curve": [asdict(p) for p in run.curve], "test": run.test, "test_final": run.test_final}
    told |= {"diverged": True} if run.diverged else {}
    return store.pack(arrays, {"run": json.dumps(told)})


def unpacked(data: bytes, like: Params, mask: np.ndarray | None) -> Run:
    """Return the run that `packed` was given."""
    arrays, meta = store.unpack(data)
    told = json.loads(meta["run"])

    def params(which: str) -> Params:
        which = which if which in arrays else "final"
        floats = np.zeros_like(like.floats)
        keep = np.ones(floats.size, bool)
        if mask is not None:
            keep[: mask.size] = mask
        floats[keep] = arrays[which]
        return Params(floats, arrays[f"{which}_ints"])

    previous = tuple(arrays[name] for name in sorted(arrays) if name.startswith("previous_"))
    curve = tuple(Point(**p) for p in told["curve"])
    found = params("final"), params("best"), curve, told["test"], told["test_final"], previous
    return Run(*found, told.get("diverged", False))
