"""Everything that a study's text decides before anything trains: data, splits, layout, theta_0. Built once a worker."""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from fedlth.data.capacity import names_of, tiers_of
from fedlth.data.dataset import Dataset
from fedlth.data.divided import opened
from fedlth.data.examples import ASKED, Examples, Inputs, shapes
from fedlth.data.factory import told
from fedlth.data.own import Here, here
from fedlth.data.split import Splits
from fedlth.data.tensors import inputs
from fedlth.errors import StudyError
from fedlth.kernel import kernel
from fedlth.kernel.table import LayerTable
from fedlth.models.call import call
from fedlth.models.initial import torch_stream
from fedlth.models.layout import Entry, Layout, Params
from fedlth.rng import stream
from fedlth.study import schema, sections
from fedlth.training.batches import batches
from fedlth.training.budget import Budget
from fedlth.training.client_tasks import OWN, TaskNames, own_model, own_study
from fedlth.training.evaluation import evaluate
from fedlth.training.flat_model import FlatModel
from fedlth.training.kept_layers import lists_below
from fedlth.training.loss import Loss, examined, misread, plain, spread
from fedlth.training.measured_table import measured_table
from fedlth.training.metrics import Judged, OfAll, counted, judged, rows
from fedlth.training.model_context import ModelContext
from fedlth.training.recipe import TrainingRecipe
from fedlth.training.request import drawn_request
from fedlth.training.study_recipe import loss_of, shown_by
from fedlth.training.train import train
from fedlth.training.tuned import tune

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
FEW = 4  # examples on which a network is tried


@dataclass(frozen=True)
class Task:
    """A study made concrete. `layout` is the whole model, `exchange` the part of it that crosses the wire.

    A parameter that nothing trains (requires_grad False) is theta_0's for good: both ends have it, so it is neither
    sent nor part of any state.
    `clients` are those that train it, `few` the positions of its first training examples, no client's own.
    Where clients have tasks of their own (`tasks` of the study), `own` holds those that differ from this one, by name,
    and `names` every client's: study, data and splits are theirs too, but for the number of classes and what the task
    changes; what crosses is equal for all.
    """

    study: schema.Study
    dataset: Dataset
    splits: Splits
    model: ModelContext
    exchange: Layout
    clients: tuple[int, ...]
    few: np.ndarray
    name: str = OWN
    names: tuple[str, ...] = ()
    own: Mapping[str, Task] = field(default_factory=dict)

    def of(self, client: int) -> Task:
        """Return the task of one client."""
        return self.own.get(self.names[client], self) if self.names else self

    @property
    def each(self) -> tuple[Task, ...]:
        """Every task that some client trains, once."""
        found = {id(task): task for task in (self, *self.own.values()) if task.clients}
        return tuple(found.values())

    @property
    def layout(self) -> Layout:
        return self.model.layout

    @property
    def theta_0(self) -> Params:
        return self.model.theta_0

    @cached_property
    def flat_model(self) -> FlatModel:
        """The one module of this process, bound to flat buffers."""
        found = self.table if self.study.compute == "sparse" else None
        module, tuned, measured = self.model.module().to(self.device), None, self.study.crossovers
        kept = lists_below(module, self.layout, measured, found) if isinstance(found, str) else None
        table, large = (found, kernel.large(found)) if isinstance(found, LayerTable) else (None, False)
        beside = found is not None and (large if measured is None else measured.torch == "tuned")
        if self.study.compute == "tuned" or beside:
            few = inputs(self.dataset, self.few[:3], train=True)
            tuned = tune(module, few.to(self.device).x)
        return FlatModel(module, self.layout, self.device, table, tuned, self.loss, kept)

    @cached_property
    def loss(self) -> Loss:
        """The loss that evaluations report; a training has its recipe's, which may be smoothed, say."""
        return plain(loss_of(self.study.train.loss, self.dataset.num_classes, self.dataset.targets))

    @cached_property
    def judged(self) -> Judged:
        """The metrics that this study is judged by."""
        return judged(self.study.metric, self.study.metrics, self.dataset.targets)

    @cached_property
    def table(self) -> LayerTable | str:
        """Return the network as the compute kernel sees it, or one line that says why the kernel cannot run it."""
        if self.device != "cpu":
            return f"the device is {self.device}"
        return measured_table(self.model.table, self.layout, self.study.crossovers)

    def capacity(self, client: int) -> sections.Tier:
        """Return what a client can carry (clients.capacity)."""
        return self._tiers[client]

    @cached_property
    def _tiers(self) -> tuple[sections.Tier, ...]:
        clients = self.study.clients
        return tiers_of(clients.capacity, clients.count, self.study.partition.get("seed", 0))

    @property
    def tier_names(self) -> list[str]:
        """The name of each client's tier; none where the study has no tiers."""
        clients = self.study.clients
        return names_of(clients.capacity, clients.count, self.study.partition.get("seed", 0))

    def probe(self) -> list[str]:
        """Run the model once on a few examples, in both modes; return a note for clients that cannot train it.

        The examples are the data set's first, no client's own. Raises StudyError where no client can train it.
        """
        few = examined(self.loss, inputs(self.dataset, self.few, train=True).batch(slice(None)))
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
                self._check_loss(outputs, few)
            for name, buffer in buffers.items():
                if dict(module.named_buffers()).get(name) is not buffer:
                    raise StudyError(
                        f"model: buffer {name} is replaced; write into it in place: self.{name}.copy_(...)"
                    )
        notes = self._try_metrics(outputs.detach(), few)
        _ = self.flat_model  # a backend that cannot run this model says so
        return notes + self._single_batches(few.batch(slice(1)).x)

    def _try_metrics(self, outputs: Tensor, few: Examples) -> list[str]:
        """Call the user's metrics once: else a whole federation goes by before step 2 says that one cannot be used."""
        notes = []
        for metric in self.judged.all:
            if isinstance(metric, OfAll):
                place = f"{'metric' if metric.name == self.study.metric else 'metrics'}: {metric.name}"
                try:
                    raised = metric.tried(*rows(outputs, few.y))
                except (TypeError, ValueError) as error:
                    raise StudyError(f"{place} must return one number: {told(error)}") from error
                if raised:
                    notes.append(f"{place} fails on {len(few)} examples, and so may clients: {raised}")
        return notes

    def _check_outputs(self, outputs: Tensor, few: Examples) -> None:
        got, name = tuple(outputs.shape), self.study.model.name
        if few.y.is_floating_point():
            wanted = tuple(few.y.shape)
            if got not in (wanted, (len(few), 1) if len(wanted) == 1 else wanted) or not outputs.is_floating_point():
                more = f" or {(len(few), 1)}" if len(wanted) == 1 else ""
                raise StudyError(f"model: {name} must return real numbers of shape {wanted}{more}, got {got}")
        elif got != (wanted := (*few.y.shape, self.dataset.num_classes)):
            if isinstance(few.x, dict) and ASKED in few.x and got == (int(counted(few.y).sum()), wanted[-1]):
                return
            raise StudyError(f"model: {name} must return logits of shape {wanted}, got {got}{misread(outputs, few.y)}")

    def _check_loss(self, outputs: Tensor, few: Examples) -> None:
        """Refuse a loss that cannot judge such targets; a loss may be the user's."""
        try:
            loss = self.loss(outputs, few.y)
            flat = self.loss(outputs.reshape(few.y.shape), few.y) if spread(outputs, few.y) else loss
            found = loss.numel() == 1 and loss.requires_grad and loss.is_floating_point()
        except Exception as error:  # the user's code may raise anything
            told_of = f"outputs {tuple(outputs.shape)} and targets {tuple(few.y.shape)} {few.y.dtype}"
            raise StudyError(f"train.loss: fails on {told_of}: {told(error)}") from error
        if not found:
            got = f"{tuple(loss.shape)} {loss.dtype}"
            raise StudyError(f"train.loss: must return one number with a gradient, got {got}")
        if not torch.isclose(loss, flat, equal_nan=True):  # (N, 1) and (N,) were broadcast to (N, N)
            raise StudyError(
                f"train.loss: must bring outputs {tuple(outputs.shape)} to the shape of targets {tuple(few.y.shape)}, "
                f"got {loss.item():g} where outputs of that shape have {flat.item():g}"
            )

    def _single_batches(self, x: Inputs) -> list[str]:
        """Return a note that names the clients with a batch of one example, where the model cannot train on one."""
        sizes = {"train.batch_size": self.study.train.batch_size}
        if self.study.personalise.batch_size is not None:
            sizes["personalise.batch_size"] = self.study.personalise.batch_size
        counts = {client: len(self.splits.clients[client].train) for client in self.clients}
        single = {
            place: [c for c, n in counts.items() if min(map(len, batches(n, size, stream(0, "probe")))) == 1]
            for place, size in sizes.items()
        }
        if not any(single.values()):
            return []
        try:
            with torch_stream(0):
                call(self.model.module().train(), x)
        except Exception as error:  # the user's forward may raise anything
            why = f"{self.study.model.name} cannot be trained on a batch of one example ({told(error)})"
            place, clients = max(single.items(), key=lambda one: len(one[1]))
            if len(clients) == len(counts):
                raise StudyError(f"{place}: must be larger, or clients must have more examples: {why}") from error
            shown = ", ".join(map(str, clients[:10])) + (", ..." if len(clients) > 10 else "")
            return [
                f"model: {why}; {len(clients)} of {len(counts)} clients have one training example and fail at every "
                f"visit: {shown}; give them more (partition.min_samples, clients.validation), or the model a norm that "
                "trains on one, such as GroupNorm"
            ]
        return []

    def warm(self) -> None:
        """Train and evaluate each once, on next to nothing: what is loaded or compiled, forked workers then share."""
        for task in self.each if self.study.compute == "sparse" else ():
            few = inputs(task.dataset, task.few[:2], train=True)
            recipe = TrainingRecipe(budget=Budget(epochs=1), batch_size=2, lr=task.study.train.lr, loss=task.loss)
            request = drawn_request(task.theta_0, few, recipe, order=stream(0, "warm"), torch_seed=0)
            train(task.flat_model, request)
            evaluate(task.flat_model, task.theta_0, few, task.judged.all)

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
        train = name != "test" or self.splits.own_test
        return inputs(self.dataset, getattr(self.splits.clients[client], name), train=train).to(self.device)

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

    @cached_property
    def home(self) -> Layout:
        """What can change and never crosses: personal tensors, and norms that stay local."""
        crosses = {e.name for e in self.exchange.entries}
        return self.layout.moving.select(lambda e: e.name not in crosses)

    def moving_part(self, whole: Params) -> Params:
        """Return what can change of whole params, in the moving layout: all that a state ever keeps."""
        return self.layout.moving.part_of(whole, self.layout)

    def whole(self, moving: Params) -> Params:
        """Return whole params: what can change from `moving`, the rest from theta_0."""
        return self.layout.moving.put_into(self.theta_0, self.layout, moving)


def _crosses(study: schema.Study, moving: Layout) -> Layout:
    """Return what is exchanged: neither personal tensors, nor norms as far as the buffer policy keeps them local.

    FedPer keeps a head (arXiv 1912.00818), FedBN the norms (arXiv 2102.07623).
    """
    personal = study.model.personal or ()
    for glob in personal:
        if not moving.matching([glob]):
            raise StudyError(f"model.personal: {glob!r} must match a tensor that is trained, got none")
    found = _exchanged(study, moving)
    if not found.num_floats:
        raise StudyError(f"model.personal: must leave something to share, got {list(personal)}")
    return found


def _exchanged(study: schema.Study, moving: Layout) -> Layout:
    policy, personal = study.model.buffers, {e.name for e in moving.matching(study.model.personal or ())}

    def stays(e: Entry) -> bool:
        local = policy == "local_all" or (policy == "local_statistics" and e.role == "buffer")
        return (e.norm and local) or e.name in personal

    found = moving.select(lambda e: not stays(e))
    return moving if len(found.entries) == len(moving.entries) else found


def open_task(science: str) -> Task:
    """Return the task of a study's canonical JSON; the last two are kept, since every job of a run names the same."""
    # Each time, whoever set it: bits hold at one thread count, and spinning threads are 5-20 x slower.
    torch.set_num_threads(1)
    return _task(science, here())


def forget_tasks() -> None:
    """Build worlds anew when they are next asked for."""
    _task.cache_clear()


@lru_cache(maxsize=2)
def _task(science: str, place: Here | None) -> Task:
    keep_pages()
    study = schema.build(json.loads(science))
    given = study.model_dump(mode="json", include={"data", "partition", "clients"})
    dataset, splits = opened(json.dumps(given, sort_keys=True), place)
    model = ModelContext(spec=study.model, dataset=dataset, seed=study.seed, shown=shown_by(study, dataset))
    exchange = _crosses(study, model.layout.moving)
    _check_names(model.layout)
    if study.model.theta_0 is not None and study.model.theta_0 != model.fixed:
        raise StudyError(
            f"model.theta_0: the study begins with the weights {study.model.theta_0} (what {study.model.name} brings, "
            f"and what nothing trains), got {model.fixed or 'a model without any'}: other files, or another version of "
            "the package that has them"
        )
    everyone, few = tuple(range(len(splits.clients))), np.arange(min(FEW, len(dataset.y_train)))
    task = Task(study, dataset, splits, model, exchange, everyone, few)
    return _with_tasks(task) if study.tasks else task


def _check_names(layout: Layout) -> None:
    taken = {f"{e.name}_mask" for e in layout.prunable} & {n for e in layout.entries for n in (e.name, *e.aliases)}
    if taken:
        raise StudyError(f"model: no tensor must be called {min(taken)}: a ticket's file has a mask of that name")


def _with_tasks(common: Task) -> Task:
    """Return the task with those of its clients that have another: tasks that are equal but for their name are one."""
    study, dataset, splits = common.study, common.dataset, common.splits
    if study.clients.label_noise is not None:
        raise StudyError("clients.label_noise: must be left out with tasks: a wrong label may be no class of its task")
    keys = TaskNames.of(study.tasks, dataset)
    names = keys.clients(splits)
    alike: dict[str, list[str]] = {}
    made: dict[str, tuple[schema.Study, Dataset]] = {}
    for name, spec in study.tasks.items():
        own, seen = own_study(study, spec), keys.seen(name, spec, dataset)
        if name in names and (own, seen) != (study, dataset):
            # What is cast holds one key's targets alone.
            cast = "" if seen.y_train is dataset.y_train else name
            text = f"{seen.num_classes} {cast} {own.science()}"
            alike.setdefault(text, []).append(name)
            made[text] = own, seen
    found: dict[str, Task] = {}
    for text, same in alike.items():
        (own, seen), place = made[text], f"tasks.{same[0]}"
        try:
            model = own_model(own, seen, common.model, place)
            _check_names(model.layout)
        except StudyError as error:
            if str(error).startswith(place):
                raise
            raise StudyError(f"{place}: {error}") from error
        clients = tuple(client for client, name in enumerate(names) if name in same)
        few = keys.first(frozenset(same), FEW)
        moving = model.layout.moving  # where all of it crosses, the exchange is this very object
        exchange = moving if _exchanged(own, moving) is moving else common.exchange
        found |= dict.fromkeys(same, Task(own, seen, splits, model, exchange, clients, few, same[0]))
    rest = tuple(client for client, name in enumerate(names) if name not in found)
    few = keys.first(frozenset(keys.names) - found.keys(), FEW)
    return replace(common, clients=rest, few=few, names=names, own=found)


def keep_pages() -> None:
    """Let the C library keep the pages of arrays that are freed: a client update makes and drops many models.

    By default each costs the kernel a fresh, cleared page (4 % of a round of the LEAF CNN at .05). Only glibc can.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)
