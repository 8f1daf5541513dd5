"""One laboratory training: masked SGD or Adam, watched on validation data every few iterations."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlth.data.dataset import Dataset
from fedlth.data.examples import Examples
from fedlth.errors import wrong
from fedlth.lab.attack import attacked, evaluate_attacked
from fedlth.lab.train_config import TrainConfig, spec_of
from fedlth.models.call import call
from fedlth.models.layout import Layout, Params
from fedlth.models.seed import seed_torch
from fedlth.rng import stream, torch_seed
from fedlth.storage import store
from fedlth.training import kernel_backend
from fedlth.training.budget import Budget
from fedlth.training.evaluation import evaluate
from fedlth.training.flat_model import FlatModel
from fedlth.training.kernel_backend import lacks
from fedlth.training.loss import owned
from fedlth.training.pull import NO_PULL
from fedlth.training.recipe import TrainingRecipe
from fedlth.training.request import TrainingRequest
from fedlth.training.study_recipe import loss_of, part
from fedlth.training.torch_backend import descend


class Networks(Protocol):
    """What a training needs of its bench: one module in plain torch, one in the kernel where that can run it."""

    @property
    def seed(self) -> int: ...
    @property
    def dataset(self) -> Dataset: ...
    @property
    def flat_model(self) -> FlatModel: ...
    @property
    def fast_model(self) -> FlatModel: ...


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


def batches(size: int, config: TrainConfig, order: np.random.Generator) -> list[np.ndarray]:
    """Return the batches of iterations [first, end): every epoch is a shuffle, batches run on across epochs."""
    need = config.end * config.train.batch_size
    drawn = np.concatenate([order.permutation(size) for _ in range(-(-need // size))])[:need]
    return list(drawn.reshape(config.end, config.train.batch_size)[config.first :])


def train(
    bench: Networks,
    start: Params,
    mask: np.ndarray,
    config: TrainConfig,
    *,
    parts: Mapping[str, Examples],
    free: bool,
    window: int,
) -> Run:
    """Train and watch, as far as weights and loss are numbers; raises FloatingPointError where they never were."""
    begun = start if free else start.masked(mask)
    states = walk(bench, begun, mask, config, data=parts["train"], free=free) or [begun]
    curve: list[Point] = []
    for number, state in enumerate(states, 1):
        done = min(config.first + number * config.train.evaluate_every, config.end)
        accuracy, loss = _watched(bench, state, config, parts["validation"])
        if not (np.isfinite(state.floats).all() and math.isfinite(loss)):
            break
        curve.append(Point(done, loss, accuracy))
    diverged, states = len(curve) < len(states), states[: len(curve)]
    if not states:
        accuracy, loss = _watched(bench, begun, config, parts["validation"])
        if not math.isfinite(loss):
            raise FloatingPointError(f"training began with loss {loss}, learning rate {config.train.lr}")
        states, curve = [begun], [Point(config.first, loss, accuracy)]
    best = min(range(len(curve)), key=lambda i: curve[i].loss)
    tests = {i: evaluate(bench.fast_model, states[i], parts["test"]).accuracy for i in {best, len(states) - 1}}
    older = tuple(state.floats[: mask.size] for state in [begun, *states][-1 - window : -1]) if window else ()
    return Run(states[-1], states[best], tuple(curve), tests[best], tests[len(states) - 1], older, diverged)


def _watched(bench: Networks, state: Params, config: TrainConfig, data: Examples) -> tuple[float, float]:
    """Return (accuracy, loss) on validation data; a training on attacked images is watched on PGD's."""
    t = config.train
    if t.attack == "none":
        found = evaluate(bench.fast_model, state, data)
        return found.accuracy, found.loss
    return evaluate_attacked(
        bench.flat_model, bench.dataset, state, data, kind="pgd", eps=t.attack_eps, steps=t.attack_steps
    )


def walk(
    bench: Networks, start: Params, mask: np.ndarray, config: TrainConfig, *, data: Examples, free: bool
) -> list[Params]:
    """Train, and return the state at every evaluation; of no iterations, none."""
    if not config.steps:
        return []
    t, layout = config.train, bench.flat_model.layout
    steps = batches(len(data), config, stream(bench.seed, config.order))
    chunks = [steps[i : i + t.evaluate_every] for i in range(0, len(steps), t.evaluate_every)]
    request = TrainingRequest(
        start=start, data=data, batches=chunks,
        recipe=recipe_of(config, data.y, bench.dataset.num_classes),
        rates=[config.rate(step) for step in range(config.first, config.end)],
        torch_seed=torch_seed(bench.seed, f"dropout/{config.order}"), active=None if free or mask.all() else mask,
        trainable=layout.over_params(mask) if free else None, snapshots=tuple(range(1, len(chunks) + 1)),
        examples_seed=torch_seed(bench.seed, f"examples/{config.order}"),
    )  # fmt: skip
    special = t.dropout or t.attack != "none" or t.norm_l1
    if special or bench.fast_model.table is None or lacks(request.recipe):
        return _in_torch(bench, config, request)
    result = kernel_backend.train(bench.fast_model, request)
    return [Params(result.snapshots[i], result.params.ints) for i in request.snapshots]


def recipe_of(config: TrainConfig, y: Tensor, num_classes: int) -> TrainingRecipe:
    """Return a train section's parts; raise StudyError naming the place. The rates are the config's own."""
    t, optimiser = config.train, spec_of(config.train.optimiser)
    short = {"momentum": t.momentum, "weight_decay": t.weight_decay}
    if t.optimiser == "adam":  # which never had the momentum that a study's train section may give sgd
        del short["momentum"]
    for key, value in short.items():
        if not value:
            continue
        if key in optimiser or (key == "momentum" and optimiser["name"] != "sgd"):
            raise wrong(f"train.{key}", f"given once, in train.optimiser where that is {optimiser['name']}", value)
        optimiser = {**optimiser, key: value}
    loss = owned(loss_of(t.loss, num_classes), y, num_classes)
    return TrainingRecipe(
        budget=Budget(steps=config.train.iterations), batch_size=t.batch_size, lr=t.lr,
        optimizer=part("optimizer", optimiser, "train"), loss=loss, clip_norm=t.clip_norm,
        pull=NO_PULL if t.pull is None else part("pull", t.pull, "train"),
        augment=tuple(part("augment", one, "train") for one in t.augment), first_step=config.first,
    )  # fmt: skip


def _in_torch(bench: Networks, config: TrainConfig, request: TrainingRequest) -> list[Params]:
    """Train with what no backend has: dropout behind every relu, attacked images, scales of norms drawn to zero."""
    model, t, recipe = bench.flat_model, config.train, request.recipe
    layout, free = model.layout, request.free(model.layout)
    keep = None if free is None else torch.from_numpy(free)
    gammas = torch.zeros(layout.num_params)
    for place in scales(layout):
        gammas[place] = t.norm_l1
    weights, memory = model.flat[: layout.num_params], recipe.optimizer.memory(model.grad)
    model.load(request.start)
    anchor = weights.clone() if recipe.pulls else None
    seed_torch(request.torch_seed)
    states, step = [], 0
    with _dropout(model.module, t.dropout):
        for chunk in request.batches:
            for part in chunk:
                index = torch.from_numpy(part)
                shown = request.shown(step, request.data.batch(index))
                x, y = shown.tensor, shown.y
                if t.attack != "none":
                    x = attacked(model, bench.dataset, x, y, kind=t.attack, eps=t.attack_eps, steps=t.attack_steps)
                model.module.train()
                model.grad.zero_()
                recipe.loss(call(model.module, x), y).backward()  # type: ignore[no-untyped-call]
                with torch.no_grad():
                    if t.norm_l1:
                        model.grad.add_(gammas * weights.sign())
                    rate = request.rates[step]
                    descend(recipe, model.grad, weights, memory, step=step + 1, rate=rate, keep=keep, anchor=anchor)
                step += 1
            states.append(model.save())
    return states


def scales(layout: Layout) -> list[slice]:
    """Return where the scales of norm layers lie, which `train.norm_l1` draws to zero."""
    return [e.slice for e in layout.floats if e.norm and e.role == "param" and e.name.endswith("weight")]


def relus(module: nn.Module) -> list[nn.Module]:
    """Return the modules that `train.dropout` follows."""
    return [m for m in module.modules() if isinstance(m, nn.ReLU)]


@contextmanager
def _dropout(module: nn.Module, share: float) -> Iterator[None]:
    """Drop a share of every relu's output in training. Srivastava et al., JMLR 2014."""

    def drop(relu: nn.Module, _: object, output: Tensor) -> Tensor:
        return functional.dropout(output, share, relu.training)

    hooks = [relu.register_forward_hook(drop) for relu in relus(module)] if share else []
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


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
