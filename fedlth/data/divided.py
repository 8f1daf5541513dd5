"""From a study's sections on data, partition and clients to the data set and each client's part of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedlth.data.dataset import Dataset, pooled
from fedlth.data.label_noise import with_noise
from fedlth.data.own import Here, divided_apart
from fedlth.data.partition import PARTITIONS, Partition
from fedlth.data.partition_file import text_of
from fedlth.data.sources import load
from fedlth.data.split import Splits, split_clients
from fedlth.errors import StudyError
from fedlth.study.parts import make
from fedlth.study.schema import Study
from fedlth.study.sections import Clients, Data
from fedlth.study.validate import validated


def loaded(data: Data) -> Dataset:
    """Return the data set of a study, its two arrays joined where the study pools them."""
    dataset = load(data.name, root=data.root, options=data.options)
    return pooled(dataset) if data.pool else dataset


def divided(dataset: Dataset, partition: Mapping[str, Any], clients: Clients) -> tuple[Dataset, Splits]:
    """Return the data set as clients have it (wrong labels included), and each client's part of it."""
    seed = partition.get("seed", 0)
    made: Partition = make(
        PARTITIONS,
        {k: v for k, v in partition.items() if k != "seed"},
        "partition",
        has="__call__(labels, keys, num_clients, rng)",
    )
    splits = split_clients(
        dataset,
        made,
        num_clients=clients.count,
        validation=clients.validation,
        test_samples=clients.test_samples,
        unseen=clients.unseen,
        seed=seed,
        own_test=clients.test == "own",
        test_share=clients.test_share,
    )
    if clients.label_noise is None:
        return dataset, splits
    return with_noise(dataset, splits, clients.label_noise, seed)


@lru_cache(maxsize=2)
def opened(text: str, place: Here | None) -> tuple[Dataset, Splits]:
    """Return the data set and each client's part of it; kept apart: studies that differ elsewhere share it.

    text: JSON of the sections data, partition and clients. place: what this process has of data that live apart.
    """
    given = json.loads(text)
    data, clients = validated(Data, given["data"], "data"), validated(Clients, given["clients"], "clients")
    if data.own is not None:
        return divided_apart(data, clients, given["partition"].get("seed", 0), place)
    return divided(loaded(data), given["partition"], clients)


def write_division(study: Study, file: Path) -> Splits:
    """Write a study's division as a partition's file, read it again, and return it; raise StudyError where it exists.

    What is read must divide the data as the study does, bit by bit.
    """
    if file.exists():
        raise StudyError(f"{file}: exists already; a study may read it, so it is not overwritten")
    if study.data.own is not None:
        raise StudyError("data.own: the clients have their own data, there is no division to write")
    dataset = loaded(study.data)
    splits = divided(dataset, study.partition, study.clients)[1]
    text = text_of(
        [{"train": s.train, "val": s.val, "test": s.test} for s in splits.clients],
        unseen=sorted(splits.unseen),
        data_digest=dataset.digest(),
        own_test=splits.own_test,
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="ascii")
    again = {"name": "file", "path": str(file), "seed": study.partition.get("seed", 0)}
    if divided(dataset, again, study.clients)[1].digest != splits.digest:
        file.unlink()
        raise StudyError(f"{file}: must divide the data as the study does, got another division")
    return splits
