"""A user's own callable, named `package.module:callable`: how it is found and called, and what it may return."""

from __future__ import annotations

import importlib
import inspect
import operator
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields
from typing import Any

import numpy as np

from fedlth.data.dataset import Dataset
from fedlth.data.ragged import IGNORED, as_rows, padded
from fedlth.errors import StudyError


def is_factory(name: str) -> bool:
    """Say whether a name has the form `package.module:callable`."""
    module, colon, attribute = name.partition(":")
    return bool(colon) and all(part.isidentifier() for part in (*module.split("."), *attribute.split(".")))


def told(error: BaseException) -> str:
    """Return an exception of someone else's code as one line, its kind first."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def load_factory(name: str) -> None:
    """Import the module of a `package.module:callable`, if `name` is one; its errors are those of the call."""
    if is_factory(name):
        with _working_directory_on_path(), suppress(StudyError):
            _find(name, "")


def call_factory(name: str, place: str, given: Mapping[str, object], options: Mapping[str, object]) -> Any:
    """Import `package.module:callable`, also from the working directory, and return what it returns.

    given: passed as far as the signature accepts. options: the user's own, so one that is not accepted is an error.
    Raises StudyError naming `place` for every failure, those inside the callable included.
    """
    with _working_directory_on_path():
        function = _find(name, place)
        arguments = accepted(function, place, name, given, options)
        try:
            return function(**arguments)
        except StudyError:
            raise
        except Exception as error:  # the user's code may raise anything; the user is told which callable it was
            raise StudyError(f"{place}: {name} raised {told(error)}") from error


def takes(name: str, argument: str) -> bool:
    """Say whether a `package.module:callable` has a parameter of this name, or takes any."""
    with _working_directory_on_path():
        function = _find(name, "data")
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # some builtins have no signature
        return True
    return argument in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def accepted(
    function: Callable[..., object], place: str, name: str, given: Mapping[str, object], options: Mapping[str, object]
) -> dict[str, object]:
    """Return the keyword arguments for `function`; raise StudyError at an option it has no parameter for."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return {**given, **options}
    by_name = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for option in options:
        if option in given:
            raise StudyError(f"{place}.options: {option} is set by fedlth itself and cannot be an option of {name}")
        if not takes_all and option not in by_name:
            allowed = ", ".join(sorted(by_name - set(given))) or "none"
            raise StudyError(f"{place}.options: {name} takes {allowed}, got {option!r}")
    arguments = {key: value for key, value in given.items() if takes_all or key in by_name} | dict(options)
    missing = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in arguments
    ]
    if missing:
        raise StudyError(f"{place}.options: {name} also needs {', '.join(missing)}")
    return arguments


def user_dataset(name: str, root: str | None, options: Mapping[str, object]) -> Dataset:
    """Return the data set of a user's factory, which gives a Dataset or a dict of its fields (name left out or not)."""
    made = call_factory(name, "data", {"root": root}, options)
    if isinstance(made, Dataset):
        made = {field.name: getattr(made, field.name) for field in fields(Dataset)}
    if not isinstance(made, Mapping):
        raise StudyError(f"data: {name} must return a Dataset or a dict of its fields, got {type(made).__name__}")
    known = [field.name for field in fields(Dataset)]
    unknown = [str(key) for key in made if key not in known]
    required = ("x_train", "y_train", "x_test", "y_test", "num_classes")
    missing = [key for key in required if key not in made and not (key == "num_classes" and _numbers(made))]
    if unknown or missing:
        raise StudyError(
            f"data: {name} must return the fields {', '.join(required)} and at most {', '.join(known)}, "
            f"got unknown {unknown} and missing {missing}"
        )
    plain: dict[str, Any] = {"name": name, **made}
    if not isinstance(plain["name"], str):
        raise StudyError(f"data: {name}: name must be text, got {type(plain['name']).__name__}")
    _arrange(plain, name)
    for field in ("key_train", "key_test", "val_train"):
        if plain.get(field) is not None:
            plain[field] = np.asarray(plain[field])
    for field in ("mean", "std"):
        try:
            plain[field] = tuple(float(value) for value in plain.get(field, ()))
        except (TypeError, ValueError) as error:
            raise StudyError(f"data: {name}: {field} must be a list of numbers, got {plain[field]!r}") from error
    count: Any = plain.get("num_classes")
    if not isinstance(count, bool):
        with suppress(TypeError):  # a data set says what is wrong with what is no whole number
            plain["num_classes"] = operator.index(count)
    y = plain["y_train"]
    if not plain.get("num_classes") and isinstance(y, np.ndarray) and y.dtype.kind == "f" and y.ndim in (1, 2):
        plain["num_classes"] = 1 if y.ndim == 1 else int(y.shape[1])
    return Dataset(**plain)


def _numbers(made: Mapping[str, Any]) -> bool:
    """Say whether targets are real numbers, whose outputs need not be counted by the user."""
    try:
        rows = as_rows(made.get("y_train"))
    except ValueError:  # no array, which is said later
        return False
    return _real(rows)


def _real(rows: np.ndarray | list[np.ndarray]) -> bool:
    return any(row.dtype.kind == "f" for row in (rows if isinstance(rows, list) else [rows]))


def _arrange(made: dict[str, Any], name: str) -> None:
    """Bring inputs and targets to arrays, ragged ones padded to one length in train and test, their lengths noted."""
    lengths: dict[str, dict[str, np.ndarray]] = {"train": {}, "test": {}}
    several = isinstance(made["x_train"], Mapping) and isinstance(made["x_test"], Mapping)
    fields = {"x", "y"}
    if several:
        made["x_train"], made["x_test"] = dict(made["x_train"]), dict(made["x_test"])
        fields = {"y"} | (made["x_train"].keys() & made["x_test"].keys())
    for field in sorted(fields):
        inside = several and field != "y"
        holders = {part: made[f"x_{part}"] if inside else made for part in lengths}
        keys = {part: field if inside else f"{field}_{part}" for part in lengths}
        try:
            rows = {part: as_rows(holders[part][keys[part]]) for part in lengths}
        except ValueError as error:
            place = f"x_train[{field!r}]" if inside else f"{field}_train or {field}_test"
            raise StudyError(f"data: {name}: {place} must be an array, got another value: {told(error)}") from error
        if any(isinstance(found, list) for found in rows.values()):
            if field == "y" and any(map(_real, rows.values())):
                part = next(part for part, found in rows.items() if isinstance(found, list))
                wanted = "(N,) or (N, k), as many for every example"
                raise StudyError(f"data: {name}: y_{part} of real numbers must be {wanted}, got ragged rows")
            if any(part.ndim < 2 for part in rows.values() if isinstance(part, np.ndarray) and len(part)):
                part, other = sorted(rows, key=lambda part: isinstance(rows[part], np.ndarray))
                place = f"x_{part}[{field!r}]" if inside else f"{field}_{part}"
                raise StudyError(f"data: {name}: {place} must be an array, as that of {other} is, got ragged rows")
            longest, fill = max(len(row) for part in rows.values() for row in part), IGNORED if field == "y" else 0
            full = {part: padded(found, longest, fill) for part, found in rows.items() if len(found)}
            like = next(iter(full.values()))  # of a part without examples, as a test split that nobody uses
            for part in rows:
                rows[part], lengths[part][field] = full.get(part, (like[0][:0], like[1][:0]))
        for part, found in rows.items():
            holders[part][keys[part]] = found.astype(np.int64) if field == "y" and found.dtype == np.uint8 else found  # type: ignore[union-attr]
    for part, own in lengths.items():
        if own:
            made[f"lengths_{part}"] = {**made.get(f"lengths_{part}", {}), **own}


def _find(name: str, place: str) -> Callable[..., object]:
    module_name, _, attribute = name.partition(":")
    try:
        found: object = importlib.import_module(module_name)
    except Exception as error:  # importing runs the user's code
        raise StudyError(f"{place}: {module_name} cannot be imported: {told(error)}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise StudyError(f"{place}: the module {module_name} has no {attribute}")
        found = getattr(found, part)
    if not callable(found):
        raise StudyError(f"{place}: {name} must be callable, got {type(found).__name__}")
    return found


@contextmanager
def _working_directory_on_path() -> Iterator[None]:
    """Let modules of the working directory be imported; the `fedlth` command, unlike `python -m`, does not see them."""
    here = os.getcwd()
    if here in sys.path or "" in sys.path:
        yield
        return
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
