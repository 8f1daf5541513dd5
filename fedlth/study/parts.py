"""From a name in a study file to a part: the registered class, or the user's own `package.module:Name`."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from fedlth.errors import StudyError


def imported(path: str, where: str) -> Any:
    """Import the object that `package.module:name` names; the working directory counts as a source, as in python -m."""
    module_name, _, attribute = path.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # importing runs the user's code, which may raise anything
        raise StudyError(f"{where}: cannot import {path!r}: {_told(error)}") from error


def options_of(factory: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the options that a part takes."""
    return dict(_of_class(factory) if isinstance(factory, type) else inspect.signature(factory).parameters)


@lru_cache(maxsize=256)
def _of_class(part: type) -> Mapping[str, inspect.Parameter]:
    """Return a class's options, which every client of every round asks for."""
    return inspect.signature(part).parameters


def make(table: Mapping[str, Callable[..., Any]], spec: Mapping[str, Any], where: str, *, has: str = "") -> Any:
    """Build the part that `spec` ({name, **options}) asks for; raise StudyError naming the place.

    `has` is what the part must have, as people write it: "__call__(labels, keys)", "anchor".
    """
    name = spec.get("name") if isinstance(spec, Mapping) else None
    if not isinstance(name, str):
        raise StudyError(f"{where}.name: required, but missing; known: {', '.join(table)}; got {spec!r}")
    if ":" in name:
        factory = imported(name, where)
    elif name in table:
        factory = table[name]
    else:
        raise StudyError(f"{where}.name: must be one of {', '.join(table)} or package.module:Name, got {name!r}")
    try:
        known = options_of(factory)
    except (TypeError, ValueError) as error:  # no callable, or a builtin that does not say what it takes
        raise StudyError(f"{where}: {name} must be a class or a function with a signature, got {factory!r}") from error
    options = options_given(known, spec, where)
    try:
        part = factory(**options)
    except StudyError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise StudyError(f"{where}: {name} refuses its options: {_told(error)}") from error
    if has and not hasattr(part, has.partition("(")[0]):
        raise StudyError(f"{where}: {name} must give a part with {has}, got {type(part).__name__}")
    return part


def options_given(known: Mapping[str, inspect.Parameter], spec: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the options beside a part's name, which takes those of `known`; raise StudyError naming the place."""
    more, name = any(p.kind is p.VAR_KEYWORD for p in known.values()), spec["name"]
    known = {k: p for k, p in known.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in spec.items() if k != "name"}
    for key, value in options.items():
        if key in known:
            _check_type(value, known[key], f"{where}.{key}")
        elif not more:
            raise StudyError(f"{where}.{key}: {name} has no such option; it takes {', '.join(known) or 'no options'}")
    missing = [k for k, p in known.items() if p.default is inspect.Parameter.empty and k not in options]
    if missing:
        raise StudyError(f"{where}.{missing[0]}: required by {name}, but missing")
    return options


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _check_type(value: Any, parameter: inspect.Parameter, where: str) -> None:
    """Refuse text for a number and the like, by the annotation's plain name."""
    kinds: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}
    wanted = kinds.get(str(getattr(parameter.annotation, "__name__", parameter.annotation)))
    if wanted and (not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted)):
        raise StudyError(f"{where}: must be {parameter.annotation}, got {value!r}")


def is_number(value: object) -> bool:
    """Say whether a value is a number that a float holds; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
