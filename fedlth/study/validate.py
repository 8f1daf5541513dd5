"""A plain tree held against a section's schema: an unknown key or a wrong type is an error that names the place."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from fedlth.errors import StudyError

T = TypeVar("T", bound=BaseModel)
UNIONS, INPUT = (Union, UnionType), "input should be "


def _known(location: tuple[Any, ...], root: type[BaseModel]) -> list[str]:
    """Return the keys that are allowed where an unknown one was found."""
    node: Any = root
    for step in location[:-1]:
        if get_origin(node) is dict:  # a section whose keys are the user's names
            node = get_args(node)[1]
            continue
        if isinstance(step, int):  # of a list, whose items are alike
            continue
        field = node.model_fields.get(step) if hasattr(node, "model_fields") else None
        node = _section(field.annotation) if field else None
    return list(node.model_fields) if hasattr(node, "model_fields") else []


def _section(annotation: Any) -> Any:
    """Return the section in an annotation such as `Section | None` or `tuple[Section, ...]`, else the annotation."""
    if hasattr(annotation, "model_fields") or get_origin(annotation) is dict:
        return annotation
    inner = (_section(part) for part in get_args(annotation))
    return next((part for part in inner if hasattr(part, "model_fields")), annotation)


def _union_at(location: tuple[Any, ...], root: type[BaseModel]) -> int | None:
    """Return which step of a location is no key but pydantic's name for one of several types that a key may have."""
    node: Any = root
    for at, step in enumerate(location):
        types = [one for one in get_args(node) if one is not NoneType] if get_origin(node) in UNIONS else [node]
        if len(types) > 1:
            return at
        node = types[0]
        if get_origin(node) in (dict, tuple):
            node = get_args(node)[get_origin(node) is dict]
        elif hasattr(node, "model_fields") and step in node.model_fields:
            node = node.model_fields[step].annotation
        else:
            return None
    return None


def _wrong_at(errors: Sequence[Any], root: type[BaseModel]) -> tuple[tuple[Any, ...], str, Any]:
    """Return the place of the first error, what was wanted there, of a key of several types all of them, and the input.

    Where the input has the form of one of these types, that one counts alone: the fault lies deeper.
    """
    location = errors[0]["loc"]
    at = _union_at(location, root)
    if at is None:
        return location, _wanted(errors[0]["msg"]), errors[0]["input"]
    here = [e for e in errors if e["loc"][:at] == location[:at]]
    depth = max(len(e["loc"]) for e in here)
    deepest = [e for e in here if len(e["loc"]) == depth]
    first, *others = (_wanted(e["msg"]) for e in deepest)
    found, wanted = deepest[0], ", or ".join((first, *(one.removeprefix(INPUT) for one in others)))
    return (*found["loc"][:at], *found["loc"][at + 1 :]), wanted, found["input"]


def _wanted(message: str) -> str:
    """Return pydantic's message in the words of a YAML file."""
    text = message.removeprefix("Value error, ")
    text = re.sub(r"valid dictionary( or instance of \w+)?", "mapping", text).replace("valid tuple", "list")
    return text[:1].lower() + text[1:]


def _explain(error: ValidationError, where: str, root: type[BaseModel]) -> StudyError:
    errors = error.errors(include_url=False)
    first, (location, wanted, got) = errors[0], _wrong_at(errors, root)
    place = ".".join(str(p) for p in location)
    if first["type"] == "extra_forbidden":
        known = _known(first["loc"], root)
        close = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
        return StudyError(f"{where}: {place}: unknown key; {hint}")
    if first["type"] == "missing":
        return StudyError(f"{where}: {place}: required, but missing")
    return StudyError(f"{where}: {place}: {wanted}, got {got!r}")


def validated(kind: type[T], tree: Any, where: str) -> T:
    """Return the plain tree as a `kind`; raise StudyError with `where: place: what was wanted, got`."""
    if not isinstance(tree, dict):
        raise StudyError(f"{where}: must be a mapping of sections, got {type(tree).__name__}")
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise _explain(error, where, kind) from error
