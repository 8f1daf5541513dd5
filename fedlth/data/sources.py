"""The table of data sets by name, and `load`, which every study goes through."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from threading import Thread

from fedlth.data.characters import characters
from fedlth.data.cifar import cifar10, cifar100
from fedlth.data.dataset import Dataset, checked
from fedlth.data.embedded import fashion_slice
from fedlth.data.factory import accepted, is_factory, user_dataset
from fedlth.data.huggingface import huggingface
from fedlth.data.idx import fashion_mnist, mnist
from fedlth.data.leaf_json import leaf
from fedlth.data.speeches import shakespeare
from fedlth.data.text import text
from fedlth.errors import StudyError

SOURCES: dict[str, Callable[..., Dataset]] = {
    "fashion_slice": fashion_slice,
    "fashion_mnist": fashion_mnist,
    "mnist": mnist,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "characters": characters,
    "leaf": leaf,
    "shakespeare": shakespeare,
    "text": text,
}


BEGUN: dict[str, Future[Dataset]] = {}


def begin(name: str, *, root: str | None, options: Mapping[str, object]) -> None:
    """Start to read a built-in data set in a thread; `load` then takes what it has read, or its error."""
    if name not in SOURCES:
        return  # a user's module must not be imported beside others
    reading: Future[Dataset] = Future()
    BEGUN[_key(name, root, options)] = reading

    def read() -> None:
        try:
            dataset = _load(name, root, options)
            dataset.digest()  # every run asks for it; here its 0.04 s are beside an import
            reading.set_result(dataset)
        except BaseException as error:
            reading.set_exception(error)

    Thread(target=read, daemon=True).start()


def _key(name: str, root: str | None, options: Mapping[str, object]) -> str:
    return json.dumps([name, root, options], sort_keys=True, default=repr)


def load(name: str, *, root: str | None, options: Mapping[str, object]) -> Dataset:
    """Return the checked data set called `name`: one of SOURCES, `hf:<id>`, or a user's `package.module:callable`.

    root: folder to read from; None means the usual system places. options: the data set's own settings.
    Raises StudyError for an unknown name or option, a missing or damaged file, or data that break the contract.
    """
    begun = BEGUN.pop(_key(name, root, options), None)
    return begun.result() if begun else _load(name, root, options)


def _load(name: str, root: str | None, options: Mapping[str, object]) -> Dataset:
    if name in SOURCES:
        source = SOURCES[name]
        return checked(source(**accepted(source, "data", name, {"root": root}, options)))
    if name.startswith("hf:"):
        return checked(huggingface(**accepted(huggingface, "data", name, {"name": name, "root": root}, options)))  # type: ignore[arg-type]
    if is_factory(name):
        return checked(user_dataset(name, root, options))
    raise StudyError(
        f"data.name: must be one of {', '.join(SOURCES)}, hf:<id> or package.module:callable, got {name!r}"
    )
