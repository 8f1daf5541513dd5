"""One client at work: its data, its streams, its training and evaluation, as a method's parts see them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
import torch

from fedlth import rng
from fedlth.data.examples import Examples
from fedlth.errors import StudyError
from fedlth.models.layout import Params
from fedlth.study.sections import Tier
from fedlth.tickets.evidence import Evidence, Lesson
from fedlth.training import evaluation, masked_training, mixture, statistics, supermask, train
from fedlth.training.batch_requests import cpu_seconds
from fedlth.training.batches import batches, steps_an_epoch
from fedlth.training.budget import Budget
from fedlth.training.loss import owned
from fedlth.training.loss_probe import LossProbe
from fedlth.training.masked_training import Masked, Masking
from fedlth.training.metrics import Metric, Scores, constant_outputs, guessed
from fedlth.training.recipe import TrainingRecipe
from fedlth.training.request import TrainingResult, drawn_request
from fedlth.training.study_recipe import recipes, round_factor
from fedlth.training.task import Task


@dataclass(frozen=True)
class Cost:
    """What trainings took: FLOPs, forward and backward, counted dense and by what is alive; steps; CPU seconds here.

    `epochs` are the steps as passes over the client's data, exactly.
    """

    flops: float = 0.0
    alive_flops: float = 0.0
    steps: int = 0
    epochs: Fraction = Fraction(0)
    cpu_s: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops, self.alive_flops + other.alive_flops, self.steps + other.steps,
            self.epochs + other.epochs, self.cpu_s + other.cpu_s,
        )  # fmt: skip


@dataclass(frozen=True)
class LocalClient:
    """A client in one round. `stage` names its random streams: equal stages draw equal batches: twins share order.

    `log` holds the cost of every training done here, one that diverged included; `work` is told to times.jsonl.
    `poison` is what a hostile client makes of its training examples, of so many classes. `rounds` is how many the
    phase has, which a schedule over the rounds asks. `noisy` holds (batch size, steps) of every training with noise,
    one that diverged included.
    """

    task: Task
    client: int
    round: int
    stage: str
    work: list[dict[str, Any]] = field(default_factory=list, compare=False)
    log: list[Cost] = field(default_factory=list, compare=False)
    noisy: list[tuple[int, int]] = field(default_factory=list, compare=False)
    poison: Callable[[Examples, int], Examples] | None = None
    rounds: int = 0

    @cached_property
    def _train_part(self) -> Examples:
        own = self.task.part(self.client, "train")
        return own if self.poison is None else self.poison(own, self.task.dataset.num_classes)

    @property
    def train_part(self) -> Examples:
        """The training examples as they are; StudyError where all that looks at them must be noisy."""
        self._refuse_without_noise("what is made of them here")
        return self._train_part

    @cached_property
    def val_part(self) -> Examples:
        return self.task.part(self.client, "val")

    @property
    def num_train(self) -> int:
        return len(self.task.splits.clients[self.client].train)

    @property
    def capacity(self) -> Tier:
        """What this client can carry (clients.capacity); a whole device where the study does not say."""
        return self.task.capacity(self.client)

    @cached_property
    def full(self) -> np.ndarray:
        """The dense mask, (num_prunable,) bool."""
        return np.ones(self.task.layout.num_prunable, bool)

    @cached_property
    def recipe(self) -> TrainingRecipe:
        """The local training of step 1 (and of the rounds inside the tickets), at this round's rate."""
        first, train = self._recipes[0], self.task.study.train
        if self.round < 1:  # of no round: step 2, or a forecast
            return first
        if train.round_schedule is not None and self.rounds < self.round:
            raise ValueError(f"{self.stage}: round {self.round} must be one of the phase's rounds, got {self.rounds}")
        factor = round_factor(train, self.round, self.rounds)
        return first if factor == 1 else replace(first, lr=first.lr * factor)

    @property
    def personal_recipe(self) -> TrainingRecipe:
        """A training of step 2: the same settings for every arm, whatever the round of step 1."""
        return self._recipes[1]

    @cached_property
    def _recipes(self) -> tuple[TrainingRecipe, TrainingRecipe]:
        num_classes = self.task.dataset.num_classes
        first, second = recipes(self.task.study, num_classes, self.task.dataset.targets)
        y = self._train_part.y
        return (
            replace(first, loss=owned(first.loss, y, num_classes)),
            replace(second, loss=owned(second.loss, y, num_classes)),
        )

    @property
    def steps_an_epoch(self) -> int:
        return self.steps_of(self.recipe)

    def steps_of(self, recipe: TrainingRecipe) -> int:
        """Return how many steps one pass over the client's data is."""
        return steps_an_epoch(self.num_train, recipe.batch_size)

    def rng(self, what: str) -> np.random.Generator:
        return rng.stream(self.task.study.seed, f"{self.stage}/{what}", self.round, self.client)

    def torch_seed(self, what: str) -> int:
        return rng.torch_seed(self.task.study.seed, f"{self.stage}/{what}", self.round, self.client)

    def train(
        self,
        start: Params,
        *,
        recipe: TrainingRecipe,
        active: np.ndarray | None = None,
        trainable: np.ndarray | None = None,
        snapshots: tuple[int, ...] = (),
        anchor: Params | None = None,
    ) -> TrainingResult:
        """Train on this client's data, and note what it cost; masks and anchor as in `TrainingRequest`."""
        # Of a piece of a run its own: else each piece would drop the same units.
        dropped = f"dropout from {recipe.first_step}" if recipe.first_step else "dropout"
        order, noise = "order", "noise"
        if recipe.dp is not None:  # of each training its own: the difference of two with one noise has none
            order, noise = (rng.secretly(f"{what} of noisy training {len(self.noisy)}") for what in (order, noise))
        request = drawn_request(
            start, self._train_part, recipe, order=self.rng(order), torch_seed=self.torch_seed(dropped),
            active=active, trainable=trainable, snapshots=snapshots, anchor=anchor,
            examples_seed=self.torch_seed("examples"), noise_seed=self.torch_seed(noise),
        )  # fmt: skip
        if recipe.dp is not None:
            self.noisy.append((recipe.batch_size, len(request.rates)))
        alive = self.full if active is None else active
        if active is None and trainable is not None:
            alive = trainable[: alive.size] | (start.floats[: alive.size] != 0)
        passes = tuple(recipe.view.used(alive, request))
        with self._counting(alive, len(request.rates), recipe.batch_size, passes, trainable=trainable):
            return train.train(self.task.flat_model, request)

    def train_mixed(
        self, start: Params, personal: Params, share: float, *, recipe: TrainingRecipe, active: np.ndarray, adapts: bool
    ) -> tuple[TrainingResult, Params, float]:
        """Train a shared model and, mixed with it, a personal one, in plain torch; see `mixture.train_mixed`."""
        self._refuse_without_noise("mixing two models")
        request = drawn_request(
            start, self._train_part, recipe, order=self.rng("order"), torch_seed=self.torch_seed("dropout"),
            active=active, examples_seed=self.torch_seed("examples"),
        )  # fmt: skip
        with self._counting(active, 2 * len(request.rates), recipe.batch_size, ((active, 2 * request.num_examples),)):
            found = mixture.train_mixed(self.task.flat_model, request, personal, share, adapts=adapts)
        if not all(np.isfinite(params.floats).all() for params in (found[0].params, found[1])):
            raise FloatingPointError(f"training diverged: loss {found[0].loss} at learning rate {recipe.lr}")
        return found

    def learn(
        self, frozen: Params, scores: np.ndarray, lesson: Lesson, *, batch_size: int | None = None
    ) -> tuple[np.ndarray, float]:
        """Train scores of masks over frozen weights, in step 1's batches unless told; see `supermask.learn`."""
        self._refuse_without_noise("learning a mask")
        data, batch_size = self._train_part, batch_size or self.recipe.batch_size
        with self._learning(lesson, batch_size):
            return supermask.learn(
                self.task.flat_model, frozen, scores, data=data, lesson=lesson, batch_size=batch_size,
                order=self.rng("order"), torch_seed=self.torch_seed("masks"),
            )  # fmt: skip

    def _learning(self, lesson: Lesson, batch_size: int) -> AbstractContextManager[object]:
        budget, size = Budget(epochs=lesson.epochs, steps=lesson.steps), self.num_train
        seen = ((lesson.alive, budget.examples(size, batch_size)),)
        return self._counting(lesson.alive, budget.total(size, batch_size), batch_size, seen, masks=True)

    def train_masking(
        self, start: Params, masking: Masking, extra: np.ndarray, *, recipe: TrainingRecipe, pace: float = 1.0
    ) -> Masked:
        """Train weights and what makes their mask together, and note what it cost; see `masked_training.train`."""
        self._refuse_without_noise("training weights with their mask")
        request = drawn_request(
            start, self._train_part, recipe, order=self.rng("order"), torch_seed=self.torch_seed("dropout"),
            examples_seed=self.torch_seed("examples"),
        )  # fmt: skip
        passes = ((self.full, request.num_examples),)
        with self._counting(self.full, len(request.rates), recipe.batch_size, passes, masks=True) as alive:
            done = masked_training.train(self.task.flat_model, request, masking, extra, pace=pace)
            alive.append(done.often)
        return done

    def _counting(
        self, alive: np.ndarray, steps: int, batch_size: int, passes: Sequence[tuple[np.ndarray, int]], *,
        masks: bool = False, trainable: np.ndarray | None = None,
    ) -> AbstractContextManager[list[np.ndarray]]:  # fmt: skip
        """Count a training; `passes` are what the network sees of its weights, and for how many examples.

        `masks` (it learns masks) and `trainable` as in `flops`.
        """

        def flops(found: np.ndarray) -> tuple[float, float]:
            used = passes if found is alive else [(found, sum(examples for _, examples in passes))]
            each = (self.flops(seen, examples, masks=masks, trainable=trainable) for seen, examples in used)
            dense, by_alive = map(sum, zip(*each, strict=True))
            return dense, by_alive

        return self._counted(alive, steps, batch_size, flops)

    @contextmanager
    def _counted(
        self, alive: np.ndarray, steps: int, batch_size: int, flops: Callable[[np.ndarray], tuple[float, float]]
    ) -> Iterator[list[np.ndarray]]:  # fmt: skip
        """Note what the training inside costs; the one place where trainings are counted.

        A training that finds out itself how often each weight is alive appends that share to what is yielded.
        """
        began, found = cpu_seconds(), [alive]
        try:
            yield found
        finally:
            alive = found[-1]
            cpu_s, epochs = cpu_seconds() - began, Fraction(steps, steps_an_epoch(self.num_train, batch_size))
            cost = Cost(*flops(alive), steps, epochs, cpu_s)
            amounts = {"flops": cost.flops, "alive_flops": cost.alive_flops, "cpu_s": cpu_s}
            self.work.append({"density": _share(alive), "epochs": plain_number(epochs), **amounts})
            self.log.append(cost)

    def _refuse_without_noise(self, what: str) -> None:
        """Raise StudyError where all that looks at training examples must be noisy, and this is not."""
        if self.task.study.privacy.dp is not None:
            raise StudyError(f"privacy.dp: {what} looks at training examples without noise")

    def gradients(self, at: Params, *, count: int = 0) -> Iterator[np.ndarray]:
        """Yield the gradient of the mean loss on each of `count` minibatches, (num_prunable,) float32; 0: of one pass.

        Of every weight, the pruned too, in evaluation mode and of the plain loss. A device does this work for its
        method, so that it is counted as a training of the prunable weights is: 3 forwards an example where all is
        trained. Of a model with zeros the gradient of the weights, a third of it, is dense all the same.
        """
        self._refuse_without_noise("a gradient")
        drawn = batches(self.num_train, self.recipe.batch_size, self.rng("gradients"))[: count or None]
        alive = at.floats[: self.full.size] != 0
        dense, sparse = self.flops(alive, sum(map(len, drawn)), masks=True)
        with self._counted(alive, len(drawn), self.recipe.batch_size, lambda _: (dense, (2 * sparse + dense) / 3)):
            for part in drawn:
                yield evaluation.gradient(self.task.flat_model, at, self._train_part.batch(torch.from_numpy(part)))

    def normalised(self, params: Params, mask: np.ndarray) -> Params:
        """Return params with the running statistics of norms as one pass over the client's data has them.

        Counted as what it is, one forward an example; nothing is done where no norm has such statistics.
        """
        model = self.task.flat_model
        if not statistics.has_any(model):
            return params
        self._refuse_without_noise("running statistics")
        drawn = batches(self.num_train, self.recipe.batch_size, self.rng("statistics"))
        dense, sparse = self._flops(self.task.model.flops, mask)
        scale = 3.0 * self.num_train
        with self._counted(
            mask, len(drawn), self.recipe.batch_size, lambda _: (dense * scale / 3, sparse * scale / 3)
        ):  # fmt: skip
            return statistics.normalised(model, params, self._train_part, drawn)

    def flops(
        self, alive: np.ndarray, examples: int, *, masks: bool = False, trainable: np.ndarray | None = None
    ) -> tuple[float, float]:
        """Return training FLOPs (dense, by what is alive) of so many examples: 3 forwards each, as is usual.

        What nothing trains counts less: `models.flops.training_flops`. `masks`: prunable weights have a gradient,
        whatever trains. `trainable` (num_params,) bool: tensors wholly outside have none; one that is inside in part
        counts as a whole, since the gradient of scattered weights is made dense.
        """
        model = self.task.model
        costs = model.gradient_flops if masks else model.training_flops
        if trainable is not None:
            costs = model.part_flops(trainable)
        # In thirds: of a network that trains as a whole these are the forward's whole numbers, and so are all sums.
        dense, alive_flops = self._flops({name: count / 3 for name, count in costs.items()}, alive)
        scale = 3.0 * examples
        return dense * scale, alive_flops * scale

    def _flops(self, costs: Mapping[str, float], alive: np.ndarray) -> tuple[float, float]:
        dense = float(costs[""])
        return dense, dense - sum(costs[e.name] * (1 - _share(alive[e.slice])) for e in self.task.layout.prunable)

    def val_score(self, params: Params) -> float:
        """Return the study's metric on validation data, more is better: all that a decision may look at.

        Raises StudyError where the client has no validation part.
        """
        if not len(self.val_part):
            raise StudyError("clients.validation: must be above 0 where something decides on validation data, got 0")
        judged = self.task.judged
        return judged.score(self.evaluate(params, self.val_part, (judged.main,)).metrics[judged.main.name])

    def visit_scores(self, params: Params) -> dict[str, float]:
        """Return what a visit tells of a model on validation data: its accuracy, and the study's metric if another.

        Nothing where the client has no validation part.
        """
        if not len(self.val_part):
            return {}
        judged = self.task.judged
        decisive = tuple(m for m in judged.all if m is judged.main or m.name == "accuracy")
        found = self.evaluate(params, self.val_part, decisive).metrics
        told = {"val_accuracy": found["accuracy"]} if judged.has_accuracy else {}
        return told if judged.main.name == "accuracy" else {**told, "val_metric": found[judged.main.name]}

    def evaluate(self, params: Params, part: Examples, metrics: tuple[Metric, ...] | None = None) -> Scores:
        """Return the mean loss and the metrics (all of the study's) on a part of the client's data.

        Where the loss is no number, metrics that are none either have what a constant guess reaches.
        """
        began, metrics = cpu_seconds(), metrics or self.task.judged.all
        found = evaluation.evaluate(self.task.flat_model, params, part, metrics)
        if missing := [m for m in metrics if m.name not in found.metrics]:
            found = replace(found, metrics={**found.metrics, **self.guess(part, missing).metrics})
        self.work.append({"evaluated": len(part), "cpu_s": cpu_seconds() - began})
        return found

    def guess(self, part: Examples, metrics: Sequence[Metric]) -> Scores:
        """Return what a model that diverged counts as: uniform among classes, the training mean of real numbers."""
        dataset, y = self.task.dataset, self._train_part.y
        mean = constant_outputs(y, self.task.loss) if dataset.targets == "numbers" else None
        return guessed(part, metrics, dataset.num_classes, mean, self.task.loss)

    def network(self, at: Params) -> LossProbe:
        """Return the network at `at` over the client's training data, as scores ask it; a mask it learns is counted."""
        return LossProbe(
            model=self.task.flat_model, params=at, data=self._train_part, layer_flops=lambda: self.task.model.flops,
            order=lambda: self.rng("mask order"), torch_seed=self.torch_seed("mask bits"),
            batch_size=self.recipe.batch_size,
            learning=lambda lesson: self._learning(lesson, self.recipe.batch_size), refuse=self._refuse_without_noise,
        )  # fmt: skip

    def evidence(self, *, start: Params, now: Params, mask: np.ndarray, density: float) -> Evidence:
        """Return what a score may look at after a training from `start` to `now`, to cut `mask` to `density`."""
        size = mask.size
        at_start = self.network(start)
        return Evidence(
            layout=self.task.layout,
            init=self.task.theta_0.floats[:size],
            start=start.floats[:size],
            now=now.floats[:size],
            mask=mask,
            gradient=at_start.gradient,
            rng=self.rng("score"),
            density=density,
            at_start=at_start,
            at_now=self.network(now),
        )

    def fresh_init(self, what: str) -> Params:
        """Draw another initialisation, from this client's own stream; see `ModelContext.fresh`."""
        return self.task.model.fresh(f"{self.stage}/{what}", self.round, self.client)


def plain_number(value: Fraction) -> float:
    """Return an int where the value is whole."""
    return int(value) if value.denominator == 1 else float(value)


def _share(mask: np.ndarray) -> float:
    """Return the share of ones, or the mean of shares."""
    return int(np.count_nonzero(mask)) / mask.size if mask.dtype == bool else float(mask.mean(dtype=np.float64))
