"""Tasks by natural key: which task each client's examples are of, and what a task makes of study, data and network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from fedlth.data.dataset import Dataset
from fedlth.data.split import Splits
from fedlth.errors import StudyError
from fedlth.models.layout import Entry, Layout, Params
from fedlth.study.schema import Study
from fedlth.study.sections import TaskSpec
from fedlth.training.model_context import ModelContext
from fedlth.training.study_recipe import shown_by

OWN = ""  # the name of the study's own task, for keys without an entry
SHOWN = 10  # keys in an error


@dataclass(frozen=True, eq=False)
class TaskNames:
    """Which task each example of the train (N,) and of the test split is of, as positions in `names`."""

    names: tuple[str, ...]
    train: np.ndarray
    test: np.ndarray

    @staticmethod
    def of(tasks: Mapping[str, TaskSpec], dataset: Dataset) -> TaskNames:
        """Read the data's natural keys; raise StudyError where there are none, or a task's is not among them."""
        tested = len(dataset.y_test) > 0  # a pooled data set has no test split
        if dataset.key_train is None or (dataset.key_test is None and tested):
            part = "train" if dataset.key_train is None else "test"
            raise StudyError(f"tasks: must have natural keys in the data, got none of the {part} examples (key_{part})")
        names, codes = (OWN, *sorted(tasks)), list[np.ndarray]()
        for keys in (dataset.key_train, dataset.key_test if tested else None):
            if keys is None:
                codes.append(np.zeros(0, np.int64))
                continue
            known, places = np.unique(keys, return_inverse=True)
            texts = [str(key) for key in known]
            missing = sorted(tasks.keys() - set(texts))
            if missing:
                shown = ", ".join(texts[:SHOWN]) + (", ..." if len(texts) > SHOWN else "")
                part = "test" if codes else "train"
                raise StudyError(f"tasks.{missing[0]}: must be a natural key of the {part} examples, got keys {shown}")
            codes.append(np.array([names.index(t) if t in tasks else 0 for t in texts])[places])
        return TaskNames(names, *codes)

    def clients(self, splits: Splits) -> tuple[str, ...]:
        """Return the name of each client's task; raise StudyError at a client with examples of two."""
        found, held_out = [], self.train if splits.own_test else self.test
        for client, split in enumerate(splits.clients):
            met = np.unique(np.concatenate((self.train[split.train], self.train[split.val], held_out[split.test])))
            if len(met) > 1:
                told = " and of ".join(self.names[i] or "a key without an entry" for i in met)
                raise StudyError(
                    f"tasks: client {client} must have examples of one task, got some of {told}; partition natural "
                    "gives each client one key"
                )
            found.append(self.names[met[0]])
        return tuple(found)

    def seen(self, name: str, spec: TaskSpec, dataset: Dataset) -> Dataset:
        """Return the data set as a task's clients see it: its own kind of targets, and its own number of classes.

        Where the kind is another than the data's, the targets of all other keys are 0: no client of the task has them.
        Raises StudyError at what is no class of the task.
        """
        place, code = f"tasks.{name}", self.names.index(name)
        own = (dataset.y_train[self.train == code], dataset.y_test[self.test == code])
        kind = "numbers" if dataset.targets == "numbers" else "classes"
        if (spec.targets or kind) != kind:
            if dataset.y_train.ndim != 1:
                raise StudyError(f"{place}.targets: must be left out where an example has several, got {spec.targets}")
            if spec.targets == "classes":
                _check_whole(place, own)
            dtype = np.int64 if spec.targets == "classes" else np.float32
            dataset = replace(
                dataset,
                y_train=np.where(self.train == code, dataset.y_train, 0).astype(dtype),
                y_test=np.where(self.test == code, dataset.y_test, 0).astype(dtype),
            )
        if dataset.targets == "numbers":
            outputs = 1 if dataset.y_train.ndim == 1 else int(dataset.y_train.shape[1])
            if spec.num_classes not in (None, outputs):
                hint = "" if spec.targets else "; targets: classes for a key whose numbers are classes"
                raise StudyError(
                    f"{place}.num_classes: must be the number of outputs of real-number targets, "
                    f"{outputs}, got {spec.num_classes}{hint}"
                )
            return as_seen(dataset, outputs)
        largest = max((int(y.max()) for y in own if y.size), default=0)
        if spec.num_classes is not None and largest >= spec.num_classes:
            raise StudyError(
                f"{place}.num_classes: labels of key {name} must lie in [0, {spec.num_classes}), got {largest}"
            )
        return as_seen(dataset, spec.num_classes or largest + 1)

    def first(self, names: frozenset[str], count: int) -> np.ndarray:
        """Return the positions of the first train examples of these tasks."""
        return np.flatnonzero(np.isin(self.train, [i for i, name in enumerate(self.names) if name in names]))[:count]


def _check_whole(place: str, own: tuple[np.ndarray, ...]) -> None:
    for y in own:
        wrong = y[(y < 0) | (y != np.floor(y))]
        if wrong.size:
            raise StudyError(f"{place}.targets: classes must be whole numbers of at least 0, got {wrong[0]:g}")


def own_study(study: Study, spec: TaskSpec) -> Study:
    """Return the study as a task's clients have it."""
    changed: dict[str, object] = {
        "model": study.model.model_copy(update={"options": {**study.model.options, **spec.options}})
    }
    if spec.loss is not None:
        changed["train"] = study.train.model_copy(update={"loss": spec.loss})
        changed["personalise"] = study.personalise.model_copy(update={"loss": None})
    given = {"metric": spec.metric, "metrics": spec.metrics}
    return study.model_copy(update={**changed, **{key: value for key, value in given.items() if value is not None}})


@dataclass(frozen=True, eq=False)
class Shared:
    """What is not personal of a task's network: the tensors of the study's own, and in theta_0 their values too.

    Frozen tensors and norms that stay local are among them: what crosses means the same only on the same ground.
    """

    common: ModelContext
    personal: tuple[str, ...]
    place: str

    def __call__(self, params: Params, layout: Layout) -> Params:
        """Return a task's own draw, what is shared from the study's; raise StudyError at a tensor that differs."""
        ours = self._shared(self.common.layout)
        known, found = ({e.name: e for e in part.entries} for part in (ours, self._shared(layout)))
        for name in sorted(known.keys() | found.keys()):
            wanted, got = (_told(entries.get(name)) for entries in (known, found))
            if wanted != got:
                raise StudyError(
                    f"{self.place}: tensor {name} must be that of the study's own network, {wanted}, or be in "
                    f"model.personal; got {got}"
                )
        return ours.put_into(params, layout, ours.part_of(self.common.theta_0, self.common.layout))

    def _shared(self, layout: Layout) -> Layout:
        personal = {e.name for e in layout.matching(self.personal)}
        return layout.select(lambda e: e.name not in personal)


def _told(e: Entry | None) -> str:
    if e is None:
        return "no such tensor"
    kinds = (("prunable", e.prunable), ("frozen", e.role == "param" and not e.trainable), ("norm", e.norm))
    more = [e.role, *(kind for kind, is_one in kinds if is_one), *(["whole numbers"] if e.is_int else [])]
    return f"{list(e.shape)} ({', '.join(more)})"


def own_model(study: Study, dataset: Dataset, common: ModelContext, place: str) -> ModelContext:
    """Return a task's network: drawn from the stream of theta_0, as the study's own; shared tensors are its."""
    shared = Shared(common, study.model.personal or (), place)
    shown = shown_by(study, dataset)
    return ModelContext(spec=study.model, dataset=dataset, seed=study.seed, share=shared, shown=shown)


def as_seen(dataset: Dataset, num_classes: int) -> Dataset:
    """Return the data set as a task sees it: the same arrays, its own number of classes."""
    return dataset if num_classes == dataset.num_classes else replace(dataset, num_classes=num_classes)
