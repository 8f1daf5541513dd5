"""Data that live with each client alone (`data.own`): what the server, a device and a simulation have of them.

A device reads one folder, its own. The server has numbers of examples, and blank examples of the shape that the study
states, on which a network can be tried. A simulation reads every client's folder; its results are the federation's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import numpy as np

from fedlth.data.dataset import Dataset
from fedlth.data.partition import Own
from fedlth.data.parts import Parts
from fedlth.data.ragged import IGNORED, Fields, named
from fedlth.data.sources import load
from fedlth.data.split import (
    ClientSplit,
    Splits,
    drawn_unseen,
    held_apart,
    positions_of_classes,
    split_client,
    split_clients,
)
from fedlth.errors import StudyError
from fedlth.rng import stream
from fedlth.study.sections import Clients, Data, OwnData

BLANK = 4  # examples of zeros, which stand for those that the server does not have
CLIENT = "{client}"  # in data.root: where a simulation finds a client's folder
PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class Here:
    """What this process has of data that live apart: one client's folder, or, as the server, every client's counts.

    counts: of each client its numbers of training, validation and test examples.
    """

    client: int = -1
    folder: str = ""
    counts: tuple[tuple[int, int, int], ...] = ()


_places: list[Here] = []  # of this process; empty in a simulation


def here() -> Here | None:
    """Return what this process has; None in a simulation, which has all."""
    return _places[-1] if _places else None


def become(place: Here | None) -> None:
    """Say what this process has from now on."""
    _places[:] = [] if place is None else [place]


@contextmanager
def as_server(counts: Sequence[tuple[int, int, int]]) -> Iterator[None]:
    """Let this process be a server with these counts for a while."""
    before = here()
    become(Here(counts=tuple(counts)))
    try:
        yield
    finally:
        become(before)


def divided_apart(data: Data, clients: Clients, seed: int, place: Here | None) -> tuple[Dataset, Splits]:
    """Return what `place` has of the data, and each client's part of it; raise StudyError naming what does not fit.

    Where not all examples are here, the parts of all but a device's own client are empty or, on the server, as long as
    they are and without a meaning as positions.
    """
    assert data.own is not None
    if place is None:
        return _simulated(data, clients, seed)
    if place.counts:
        return _blank(data.own, data.name), _counted(place.counts, clients, seed)
    return _on_device(data, clients, seed, place)


def counts_of(splits: Splits, client: int) -> tuple[int, int, int]:
    """Return a client's numbers of training, validation and test examples: all that its server is told."""
    own = splits.clients[client]
    return len(own.train), len(own.val), len(own.test)


def _simulated(data: Data, clients: Clients, seed: int) -> tuple[Dataset, Splits]:
    if data.root is None or CLIENT not in data.root:
        raise StudyError(
            f"data.root: must say where each client's folder is in a simulation, with {CLIENT} for its number, got "
            f"{data.root!r}; on a device its node config does (data-dir)"
        )
    found = [_read(data, data.root.replace(CLIENT, str(c)), c) for c in range(clients.count)]
    dataset = _joined(found)
    splits = split_clients(
        dataset, Own(), num_clients=clients.count, validation=clients.validation, test_samples=clients.test_samples,
        unseen=clients.unseen, seed=seed, own_test=clients.test == "own", test_share=clients.test_share,
    )  # fmt: skip
    return dataset, splits


def _on_device(data: Data, clients: Clients, seed: int, place: Here) -> tuple[Dataset, Splits]:
    if place.client >= clients.count:
        raise StudyError(f"node config: partition-id must be below clients.count = {clients.count}, got {place.client}")
    dataset, nothing = _read(data, place.folder, place.client), np.zeros(0, np.int64)
    part, partition = Parts(np.arange(len(dataset.y_train))), Own()
    if dataset.val_train is not None and clients.validation > 0:
        part = held_apart(part, dataset.val_train)
    own = split_client(
        dataset, positions_of_classes(dataset), partition, part, place.client, validation=clients.validation,
        test_samples=clients.test_samples, seed=seed, own_test=clients.test == "own", test_share=clients.test_share,
    )  # fmt: skip
    others = ClientSplit(nothing, nothing, nothing)
    every = tuple(own if client == place.client else others for client in range(clients.count))
    return dataset, _apart(every, clients, seed, "")


def _counted(counts: Sequence[tuple[int, int, int]], clients: Clients, seed: int) -> Splits:
    if len(counts) != clients.count:
        raise StudyError(f"data.own: must have the counts of {clients.count} clients, got {len(counts)}")
    every = tuple(ClientSplit(*(np.zeros(n, np.int64) for n in own)) for own in counts)
    return _apart(every, clients, seed, json.dumps([list(own) for own in counts]))


def _apart(every: tuple[ClientSplit, ...], clients: Clients, seed: int, said: str) -> Splits:
    unseen = drawn_unseen(Own(), clients.count, clients.unseen, stream(seed, "unseen"))
    digest = sha256(json.dumps([clients.count, sorted(unseen), clients.test, said]).encode()).hexdigest()
    return Splits(every, unseen, digest, clients.test == "own", apart=True)


def _read(data: Data, folder: str, client: int) -> Dataset:
    """Return one client's data set, all of it the client's by key, padded to what the study states."""
    assert data.own is not None
    try:
        dataset = load(data.name, root=folder, options=data.options)
    except StudyError as error:
        raise StudyError(f"data of client {client}: {error}") from error
    _check(dataset, data.own, f"data of client {client}")
    dataset = _padded(dataset, data.own)
    keys = {part: np.full(len(getattr(dataset, f"y_{part}")), client) for part in ("train", "test")}
    return replace(dataset, name=data.name, key_train=keys["train"], key_test=keys["test"])


def _shapes(own: OwnData) -> dict[str, tuple[int, ...]]:
    return dict(own.input_shape) if isinstance(own.input_shape, Mapping) else {"x": own.input_shape}


def _dtypes(own: OwnData) -> dict[str, str]:
    if isinstance(own.input_dtype, Mapping):
        return dict(own.input_dtype)
    return dict.fromkeys(_shapes(own), own.input_dtype)


def _check(dataset: Dataset, own: OwnData, place: str) -> None:
    """Hold a client's data set against what the study states of everyone's."""
    shapes, dtypes, x = _shapes(own), _dtypes(own), named(dataset.x_train)
    if isinstance(own.input_shape, Mapping) != isinstance(dataset.x_train, Mapping) or x.keys() != shapes.keys():
        raise StudyError(f"{place}: must have the inputs of data.own.input_shape, {_list(shapes)}, got {_list(x)}")
    for name, array in x.items():
        ragged, wanted = name in dataset.lengths_train, shapes[name]
        fits = array.shape[1:] == wanted or (
            ragged and array.shape[2:] == wanted[1:] and array.shape[1] <= wanted[0]
        )  # fmt: skip
        if not fits or array.dtype != dtypes[name]:
            raise StudyError(
                f"{place}: {name} must be {dtypes[name]} of data.own.input_shape {list(wanted)}"
                f"{' at most' if ragged else ''}, got {array.dtype} {list(array.shape[1:])}"
            )
    if dataset.targets != own.targets:
        raise StudyError(f"{place}: must have the targets of data.own.targets, {own.targets}, got {dataset.targets}")
    if dataset.num_classes > own.num_classes or (own.targets == "numbers" and dataset.num_classes != own.num_classes):
        raise StudyError(
            f"{place}: must have the classes or outputs of data.own.num_classes, {own.num_classes}, got "
            f"{dataset.num_classes}"
        )
    behind, wanted = dataset.y_train.shape[1:], own.target_shape
    if behind != wanted and not ("y" in dataset.lengths_train and behind <= wanted):
        raise StudyError(f"{place}: targets must be of data.own.target_shape {list(wanted)}, got {list(behind)}")


def _list(names: Mapping[str, Any]) -> str:
    return ", ".join(sorted(names))


def _padded(dataset: Dataset, own: OwnData) -> Dataset:
    """Return ragged fields as long as the study states, whatever this client's longest row is."""
    more: dict[str, Any] = {"num_classes": own.num_classes}
    for part in ("train", "test"):
        lengths = getattr(dataset, f"lengths_{part}")
        x = {
            name: _longer(array, _shapes(own)[name][0], 0) if name in lengths else array
            for name, array in named(getattr(dataset, f"x_{part}")).items()
        }
        more[f"x_{part}"] = _fields(dataset.x_train, x)
        y = getattr(dataset, f"y_{part}")
        more[f"y_{part}"] = _longer(y, own.target_shape[0], IGNORED) if "y" in lengths else y
    return replace(dataset, **more)


def _longer(array: np.ndarray, length: int, fill: int) -> np.ndarray:
    behind = [(0, 0)] * array.ndim
    behind[1] = (0, length - array.shape[1])
    return np.pad(array, behind, constant_values=fill)


def _fields(like: Fields, found: dict[str, np.ndarray]) -> Fields:
    return found if isinstance(like, Mapping) else found["x"]


def _joined(found: Sequence[Dataset]) -> Dataset:
    """Return the clients' data sets as one, one client's examples behind another's."""
    first = found[0]
    for client, other in enumerate(found):
        for what in ("mean", "std"):
            if getattr(other, what) != getattr(first, what):
                raise StudyError(
                    f"data of client {client}: {what} must be every client's, got {getattr(other, what)} and "
                    f"{getattr(first, what)}"
                )
        if other.lengths_train.keys() != first.lengths_train.keys():
            raise StudyError(f"data of client {client}: must have the ragged fields of every client")
    more: dict[str, Any] = {}
    for part in ("train", "test"):
        x = [named(getattr(one, f"x_{part}")) for one in found]
        more[f"x_{part}"] = _fields(first.x_train, {name: np.concatenate([one[name] for one in x]) for name in x[0]})
        for field in ("y", "key"):
            more[f"{field}_{part}"] = np.concatenate([getattr(one, f"{field}_{part}") for one in found])
        lengths = [getattr(one, f"lengths_{part}") for one in found]
        more[f"lengths_{part}"] = {name: np.concatenate([one[name] for one in lengths]) for name in lengths[0]}
    if any(one.val_train is not None for one in found):
        none = [np.zeros(len(one.y_train), bool) if one.val_train is None else one.val_train for one in found]
        more["val_train"] = np.concatenate(none)
    return replace(first, notes=tuple(dict.fromkeys(n for one in found for n in one.notes)), **more)


def _blank(own: OwnData, name: str) -> Dataset:
    """Return examples of zeros as the study describes them."""
    dtypes = _dtypes(own)
    x = {field: np.zeros((BLANK, *shape), dtypes[field]) for field, shape in _shapes(own).items()}
    y = np.zeros((BLANK, *own.target_shape), np.float32 if own.targets == "numbers" else np.int64)
    fields: Fields = x if isinstance(own.input_shape, Mapping) else x["x"]
    none: Fields = {field: array[:0] for field, array in x.items()}
    empty = none if isinstance(fields, Mapping) else named(none)["x"]
    return Dataset(name=name, x_train=fields, y_train=y, x_test=empty, y_test=y[:0], num_classes=own.num_classes)
