"""Everything that a study's text decides before anything trains: data, splits, layout, theta_0. Built once a worker."""

from __future__ import annotations

import ctypes
import json
import sys
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from fedlth.data.capacity import tiers_of
from fedlth.data.dataset import Dataset
from fedlth.data.examples import Examples, Inputs, shapes
from fedlth.data.factory import told
from fedlth.data.partition import PARTITIONS
from fedlth.data.sources import load
from fedlth.data.split import Splits, split_clients
from fedlth.data.tensors import inputs
from fedlth.errors import StudyError
from fedlth.kernel import kernel
from fedlth.kernel.table import LayerTable
from fedlth.models.call import call
from fedlth.models.initial import torch_stream
from fedlth.models.layout import Entry, Layout, Params
from fedlth.rng import stream
from fedlth.study import schema
from fedlth.study.parts import make
from fedlth.training.batches import batches
from fedlth.training.evaluation import evaluate
from fedlth.training.flat_model import FlatModel
from fedlth.training.loss import Loss, MeanSquaredError, cross_entropy
from fedlth.training.metrics import Judged, judged
from fedlth.training.model_context import ModelContext
from fedlth.training.recipe import Epochs, TrainingRecipe
from fedlth.training.request import drawn_request
from fedlth.training.train import train
from fedlth.training.tuned import tune

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt(3)


@dataclass(frozen=True)
class Task:
    """A study made concrete. `layout` is the whole model, `exchange` the part of it that crosses the wire.

    A parameter that nothing trains (requires_grad False) is theta_0's for good: both ends have it, so it is neither
    sent nor part of any state.
    """

    study: schema.Study
    dataset: Dataset
    splits: Splits
    model: ModelContext
    exchange: Layout

    @property
    def layout(self) -> Layout:
        return self.model.layout

    @property
    def theta_0(self) -> Params:
        return self.model.theta_0

    @cached_property
    def flat_model(self) -> FlatModel:
        """The one module of this process, bound to flat buffers."""
        table = self.table if self.study.compute == "sparse" else None
        if isinstance(table, str):
            raise StudyError(f"compute: must be tuned or reference for this study, the kernel cannot run it: {table}")
        module, tuned = self.model.module().to(self.device), None
        if self.study.compute == "tuned" or (table is not None and kernel.large(table)):
            few = inputs(self.dataset, np.arange(min(3, len(self.dataset.y_train))), train=True)
            tuned = tune(module, few.to(self.device).x)
        return FlatModel(module, self.layout, self.device, table, tuned, self.loss)

    @property
    def loss(self) -> Loss:
        return MeanSquaredError() if self.dataset.targets == "numbers" else cross_entropy

    @cached_property
    def judged(self) -> Judged:
        """The metrics that this study is judged by."""
        return judged(self.study.metric, self.study.metrics, self.dataset.targets)

    @cached_property
    def table(self) -> LayerTable | str:
        """Return the network as the compute kernel sees it, or one line that says why the kernel cannot run it."""
        return self.model.table if self.device == "cpu" else f"the device is {self.device}"

    def capacity(self, client: int) -> schema.Tier:
        """Return what a client can carry (clients.capacity)."""
        return self._tiers[client]

    @cached_property
    def _tiers(self) -> tuple[schema.Tier, ...]:
        clients = self.study.clients
        return tiers_of(clients.capacity, clients.count, self.study.partition.get("seed", 0))

    def probe(self) -> list[str]:
        """Run the model once on a few examples, in both modes; return a note for clients that cannot train it.

        The examples are the data set's first, no client's own. Raises StudyError where no client can train it.
        """
        few = inputs(self.dataset, np.arange(min(4, len(self.dataset.y_train))), train=True).batch(slice(None))
        with torch_stream(0):
            module = self.model.module()
            buffers = dict(module.named_buffers())
            for mode in (False, True):
                try:
                    outputs = call(module.train(mode), few.x)
                except Exception as error:
                    raise StudyError(
                        f"model: {self.study.model.name} fails on a batch {shapes(few.x)}: {told(error)}"
                    ) from error
                self._check_outputs(outputs, few)
            for name, buffer in buffers.items():
                if dict(module.named_buffers()).get(name) is not buffer:
                    raise StudyError(
                        f"model: buffer {name} is replaced; write into it in place: self.{name}.copy_(...)"
                    )
        _ = self.judged  # a metric that cannot judge these targets says so
        _ = self.flat_model  # a backend that cannot run this model says so
        return self._single_batches(few.batch(slice(1)).x)

    def _check_outputs(self, outputs: Tensor, few: Examples) -> None:
        got, name = tuple(outputs.shape), self.study.model.name
        if self.dataset.targets == "numbers":
            wanted = tuple(few.y.shape)
            if got not in (wanted, (len(few), 1) if len(wanted) == 1 else wanted) or not outputs.is_floating_point():
                more = f" or {(len(few), 1)}" if len(wanted) == 1 else ""
                raise StudyError(f"model: {name} must return real numbers of shape {wanted}{more}, got {got}")
        elif got != (wanted := (*few.y.shape, self.dataset.num_classes)):
            raise StudyError(f"model: {name} must return logits of shape {wanted}, got {got}")

    def _single_batches(self, x: Inputs) -> list[str]:
        """Return a note that names the clients with a batch of one example, where the model cannot train on one."""
        size = self.study.train.batch_size
        shortest = [min(map(len, batches(len(c.train), size, stream(0, "probe")))) for c in self.splits.clients]
        single = [client for client, count in enumerate(shortest) if count == 1]
        if not single:
            return []
        try:
            with torch_stream(0):
                call(self.model.module().train(), x)
        except Exception as error:  # the user's forward may raise anything
            why = f"{self.study.model.name} cannot be trained on a batch of one example ({told(error)})"
            if len(single) == len(shortest):
                raise StudyError(
                    f"train.batch_size: must be larger, or clients must have more examples: {why}"
                ) from error
            shown = ", ".join(map(str, single[:10])) + (", ..." if len(single) > 10 else "")
            return [f"model: {why}; {len(single)} of {len(shortest)} clients have one and fail: {shown}"]
        return []

    def warm(self) -> None:
        """Train and evaluate once, on next to nothing: what is loaded or compiled for it, forked workers then share."""
        if self.study.compute == "sparse":
            few = inputs(self.dataset, np.arange(min(2, len(self.dataset.y_train))), train=True)
            recipe = TrainingRecipe(budget=Epochs(1), batch_size=2, lr=self.study.train.lr)
            request = drawn_request(self.theta_0, few, recipe, order=stream(0, "warm"), torch_seed=0)
            train(self.flat_model, request)
            evaluate(self.flat_model, self.theta_0, few, self.judged.all)

    @property
    def device(self) -> str:
        wanted = self.study.device
        if wanted == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        if wanted != "cpu" and not (wanted.partition(":")[0] == "cuda" and torch.cuda.is_available()):
            raise StudyError(f"device: must be auto, cpu, or cuda where torch can use one, got {wanted!r}")
        return wanted

    def part(self, client: int, name: str) -> Examples:
        """Return the examples of a client's "train", "val" or "test" part, on the device."""
        return inputs(self.dataset, getattr(self.splits.clients[client], name), train=name != "test").to(self.device)

    def merge(self, received: Params, own: Params) -> Params:
        """Return whole params: the exchanged part from `received`, the rest (local norms, frozen parts) from `own`."""
        return self.exchange.put_into(own, self.layout, received)

    def shared_part(self, whole: Params) -> Params:
        """Return the exchanged part of whole params, in the exchange layout."""
        return self.exchange.part_of(whole, self.layout)

    def shared_mask(self, active: np.ndarray) -> np.ndarray:
        """Return what crosses of a mask (or any one number a weight) over the whole model, in the exchange layout."""
        return self.exchange.mask_of(active, self.layout)

    def whole_mask(self, shared: np.ndarray, own: np.ndarray) -> np.ndarray:
        """Return a mask over the whole model: the exchanged part from `shared`, personal tensors from `own`."""
        return self.exchange.mask_into(own, self.layout, shared)

    def moving_part(self, whole: Params) -> Params:
        """Return what can change of whole params, in the moving layout: what a state keeps."""
        return self.layout.moving.part_of(whole, self.layout)

    def whole(self, moving: Params) -> Params:
        """Return whole params: what can change from `moving`, the rest from theta_0."""
        return self.layout.moving.put_into(self.theta_0, self.layout, moving)


def _crosses(study: schema.Study, moving: Layout) -> Layout:
    """Return what is exchanged: neither personal tensors, nor norms as far as the buffer policy keeps them local.

    FedPer keeps a head (arXiv 1912.00818), FedBN the norms (arXiv 2102.07623).
    """
    policy, personal = study.model.buffers, study.model.personal or ()

    def stays(e: Entry) -> bool:
        local = policy == "local_all" or (policy == "local_statistics" and e.role == "buffer")
        return (e.norm and local) or any(fnmatchcase(name, glob) for name in (e.name, *e.aliases) for glob in personal)

    for glob in personal:
        if not any(fnmatchcase(name, glob) for e in moving.entries for name in (e.name, *e.aliases)):
            raise StudyError(f"model.personal: {glob!r} must match a tensor that is trained, got none")
    found = moving.select(lambda e: not stays(e))
    if not found.num_floats:
        raise StudyError(f"model.personal: must leave something to share, got {list(personal)}")
    return moving if len(found.entries) == len(moving.entries) else found


@lru_cache(maxsize=2)
def _divided(text: str) -> tuple[Dataset, Splits]:
    """Return the data set and each client's part of it; cached apart: studies that differ elsewhere share it."""
    given = json.loads(text)
    data, clients, partition = given["data"], given["clients"], given["partition"]
    dataset = load(data["name"], root=data["root"], options=data["options"])
    splits = split_clients(
        dataset,
        make(
            PARTITIONS,
            {k: v for k, v in partition.items() if k != "seed"},
            "partition",
            has="__call__(labels, keys, num_clients, rng)",
        ),  # fmt: skip
        num_clients=clients["count"],
        validation=clients["validation"],
        test_samples=clients["test_samples"],
        unseen=clients["unseen"],
        seed=partition.get("seed", 0),
    )
    return dataset, splits


def open_task(science: str) -> Task:
    """Return the task of a study's canonical JSON; the last two are kept, since every job of a run names the same."""
    # Each time, whoever set it in between: bits hold at one thread count, and spinning threads are 5-20 x slower.
    torch.set_num_threads(1)
    return _task(science)


def forget_tasks() -> None:
    """Build worlds anew when they are next asked for."""
    _task.cache_clear()


@lru_cache(maxsize=2)
def _task(science: str) -> Task:
    _keep_pages()
    study = schema.build(json.loads(science))
    given = study.model_dump(mode="json", include={"data", "partition", "clients"})
    dataset, splits = _divided(json.dumps(given, sort_keys=True))
    model = ModelContext(spec=study.model, dataset=dataset, seed=study.seed)
    layout = model.layout
    exchange = _crosses(study, layout.moving)
    taken = {f"{e.name}_mask" for e in layout.prunable} & {n for e in layout.entries for n in (e.name, *e.aliases)}
    if taken:
        raise StudyError(f"model: no tensor must be called {min(taken)}: a ticket's file has a mask of that name")
    return Task(study, dataset, splits, model, exchange)


def _keep_pages() -> None:
    """Let the C library keep the pages of arrays that are freed: a client update makes and drops many models.

    By default each costs the kernel a fresh, cleared page (4 % of the CPU time of a round of the LEAF CNN at density
    0.05). Only glibc has the setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)
