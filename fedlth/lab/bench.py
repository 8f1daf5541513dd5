"""The bench of one seed: data, network, theta_0, and trainings that are done once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedlth.data.dataset import Dataset
from fedlth.data.examples import Examples
from fedlth.data.sources import load
from fedlth.data.tensors import inputs
from fedlth.errors import StudyError
from fedlth.kernel.tile_variable import misnamed
from fedlth.lab.study import Data, Lottery, build
from fedlth.lab.train_config import TrainConfig
from fedlth.lab.training import Run, packed, train, unpacked, walk
from fedlth.models.layout import Layout, Params
from fedlth.rng import stream, torch_seed
from fedlth.storage import store
from fedlth.training import statistics
from fedlth.training.batches import batches
from fedlth.training.evaluation import evaluate
from fedlth.training.flat_model import FlatModel
from fedlth.training.loss import Loss, plain
from fedlth.training.model_context import AsDrawn, ModelContext
from fedlth.training.study_recipe import loss_of


@dataclass(frozen=True, eq=False)
class Bench:
    """One seed of a lottery study. Tensors are (n, ...) float32 and (n,) int64, on the CPU.

    `parts` holds "train", "validation" and "test"; a probe puts its tasks beside them, as "client0/train" and so on.
    `diverged` names the trainings that did, done here or read back.
    """

    study: Lottery
    seed: int
    folder: Path | None
    dataset: Dataset
    parts: dict[str, Examples]
    diverged: list[str] = field(default_factory=list)
    _digests: dict[str, tuple[Tensor, bytes]] = field(default_factory=dict)

    @cached_property
    def model(self) -> ModelContext:
        spec = self.study.model
        init = GlorotNormal() if spec.init == "glorot_normal" else AsDrawn()
        return ModelContext(spec=spec, dataset=self.dataset, seed=self.seed, init=init)

    @property
    def layout(self) -> Layout:
        return self.model.layout

    @property
    def theta_0(self) -> Params:
        return self.model.theta_0

    def rng(self, what: str, number: int = 0) -> np.random.Generator:
        return stream(self.seed, what, number)

    @cached_property
    def flat_model(self) -> FlatModel:
        """The one module of this process in plain torch."""
        return FlatModel(self.model.module(), self.layout, "cpu", loss=self._loss)

    @cached_property
    def fast_model(self) -> FlatModel:
        """The same in the compute kernel where it can run the network."""
        if why := misnamed():
            raise StudyError(why)
        table = self.model.table
        return FlatModel(
            self.model.module(), self.layout, "cpu", None if isinstance(table, str) else table, loss=self._loss
        )

    @property
    def _loss(self) -> Loss:
        return plain(loss_of(self.study.train.loss, self.dataset.num_classes))

    @property
    def full(self) -> np.ndarray:
        return np.ones(self.layout.num_prunable, bool)

    def train_config(self, changes: dict[str, object] | None = None) -> TrainConfig:
        """Return the study's way to train, some keys of its train section changed."""
        return TrainConfig(train=self.study.train.model_validate({**self.study.train.model_dump(), **(changes or {})}))

    def accuracy(self, params: Params, part: str = "test") -> float:
        return evaluate(self.fast_model, params, self.parts[part]).accuracy

    def trained(
        self,
        start: Params,
        mask: np.ndarray,
        config: TrainConfig,
        *,
        free: bool = False,
        data: str = "",
        window: int = 0,
    ) -> Run:
        """Train from `start` under `mask`; a training that this run's folder holds already is read back.

        free: dead weights keep their start value, frozen, in place of zero. data: which task's parts to use.
        window: how many states before the last, one an evaluation, come with the result.
        The file's name is a digest of everything that decides the result, so nothing stale is ever read.
        """
        told = f"{self.seed}/{config.text()}/{free}/{data}/{window}"
        state = hashlib.blake2b(told.encode(), digest_size=16)
        state.update(start.floats.tobytes() + start.ints.tobytes() + np.packbits(mask).tobytes())
        if data:  # the whole data set is the study's own, and a folder holds one study
            state.update(self._told_apart(data))
        path = None if self.folder is None else self.folder / "trainings" / f"{state.hexdigest()}.safetensors"
        if path is not None and path.exists():
            try:
                return self._noted(unpacked(path.read_bytes(), start, None if free else mask), told)
            except ValueError as error:
                raise StudyError(f"{path}: damaged; delete it to train again: {error}") from error
        run = train(self, start, mask, config, parts=self.task(data), free=free, window=window)
        if path is not None:
            own = path.with_suffix(f".{os.getpid()}")  # two workers may come to the same training
            store.write_atomic(own, packed(run, None if free else mask))
            os.replace(own, path)
        return self._noted(run, told)

    def _noted(self, run: Run, told: str) -> Run:
        if run.diverged:
            self.diverged.append(told)
        return run

    def _told_apart(self, data: str) -> bytes:
        """Return a digest of a task's examples: two probes may call different ones client0."""
        examples = self.task(data)
        if examples["train"].y is not self._digests.get(data, (None, b""))[0]:
            state = hashlib.blake2b(digest_size=16)
            for part in examples.values():
                state.update(part.tensor.numpy().tobytes() + part.y.numpy().tobytes())
            self._digests[data] = examples["train"].y, state.digest()
        return self._digests[data][1]

    def states(self, start: Params, mask: np.ndarray, config: TrainConfig) -> list[Params]:
        """Train and return the start and the state at every evaluation; nothing is kept."""
        begun = start.masked(mask)
        return [begun, *walk(self, begun, mask, config, data=self.parts["train"], free=False)]

    def untrained(self, params: Params, mask: np.ndarray, *, data: str = "") -> Run:
        """Return the run of no iterations: the weights as they are, evaluated; norms have statistics of their data."""
        nothing, params = TrainConfig(train=self.study.train, last=0), self.normalised(params.masked(mask), data=data)
        return train(self, params, mask, nothing, parts=self.task(data), free=False, window=0)

    def normalised(self, params: Params, *, data: str = "", what: str = "a ticket that is never trained") -> Params:
        """Return params with the running statistics of norms as one pass over a task's training part has them.

        Raises StudyError at a norm whose statistics are not known how to take, for `what` has no others.
        """
        if layer := statistics.unknown(self.flat_model.module):
            raise StudyError(statistics.REFUSED.format(layer=layer, what=what))
        if not statistics.has_any(self.flat_model):
            return params
        part = self.task(data)["train"]
        drawn = batches(len(part), self.study.train.batch_size, self.rng("statistics"))
        return statistics.normalised(self.flat_model, params, part, drawn)

    def task(self, data: str) -> dict[str, Examples]:
        """Return the train, validation and test parts of a task; "" is the whole data set."""
        return {p: self.parts[f"{data}/{p}" if data else p] for p in ("train", "validation", "test")}

    def torch_seed(self, what: str) -> int:
        return torch_seed(self.seed, what)


def few(examples: Examples, count: int | None) -> Examples:
    """Return the first `count` examples (None: all), or where a class is missing among them so many evenly spaced ones.

    Data may be sorted by class, as a folder an image class is.
    """
    first = examples.batch(slice(count))
    if len(first) == len(examples) or len(np.unique(first.y)) == len(np.unique(examples.y)):
        return first
    return examples.batch(torch.arange(len(first)) * len(examples) // len(first))


@dataclass(frozen=True)
class GlorotNormal:
    """Weights from N(0, 2 / (fan_in + fan_out)), biases zero, norms as they are. Glorot & Bengio, AISTATS 2010."""

    def __call__(self, params: Params, layout: Layout, rng: np.random.Generator, /) -> Params:
        floats = params.floats.copy()
        for e in layout.floats:
            if e.norm or e.role == "buffer":
                continue
            if len(e.shape) < 2:
                floats[e.slice] = 0.0
                continue
            field = math.prod(e.shape[2:])
            std = math.sqrt(2.0 / ((e.shape[0] + e.shape[1]) * field))
            floats[e.slice] = rng.normal(0.0, std, e.size).astype(np.float32)
        return Params(floats, params.ints)


@lru_cache(maxsize=2)
def _loaded(data: str) -> tuple[Dataset, dict[str, Examples]]:
    """Load the data and cut it into train, validation and test parts, the same for every seed of the run."""
    spec = Data.model_validate_json(data)
    dataset = load(spec.name, root=spec.root, options=spec.options)
    if dataset.targets == "numbers":
        raise StudyError("data: must have classes in the laboratory, which judges by accuracy, got real-number targets")
    if isinstance(dataset.x_train, Mapping):
        raise StudyError(f"data: must be one array of inputs in the laboratory, got the fields {list(dataset.x_train)}")
    order = stream(spec.seed, "split").permutation(len(dataset.y_train))
    if len(order) <= spec.validation + (spec.train or 0) - (spec.train is not None):
        raise StudyError(
            f"data: train and validation must fit into {len(order)} examples, got {spec.train} and {spec.validation}"
        )
    if (spec.test or 0) > len(dataset.y_test):
        raise StudyError(f"data.test: must be at most the {len(dataset.y_test)} test examples, got {spec.test}")
    chosen = order[spec.validation :][: spec.train]
    tested = stream(spec.seed, "test").permutation(len(dataset.y_test))[: spec.test]
    return dataset, {
        "train": inputs(dataset, np.sort(chosen), train=True),
        "validation": inputs(dataset, np.sort(order[: spec.validation]), train=True),
        "test": inputs(dataset, np.sort(tested), train=False),
    }


@lru_cache(maxsize=4)
def open_bench(science: str, seed: int, folder: str | None) -> Bench:
    """Return the bench of one seed of a study's canonical JSON."""
    torch.set_num_threads(1)  # bit equality holds at one thread count
    study = build(json.loads(science))
    dataset, parts = _loaded(study.data.model_dump_json())
    return Bench(study, seed, None if folder is None else Path(folder), dataset, dict(parts))
