"""A plain tree held against a section's schema: an unknown key or a wrong type is an error that names the place."""

from __future__ import annotations

import difflib
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from fedlth.errors import StudyError

T = TypeVar("T", bound=BaseModel)


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


def _explain(error: ValidationError, where: str, root: type[BaseModel]) -> StudyError:
    first = error.errors(include_url=False)[0]
    place = ".".join(str(p) for p in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _known(first["loc"], root)
        close = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
        return StudyError(f"{where}: {place}: unknown key; {hint}")
    if first["type"] == "missing":
        return StudyError(f"{where}: {place}: required, but missing")
    message = first["msg"].removeprefix("Value error, ")
    wanted = message[:1].lower() + message[1:]
    return StudyError(f"{where}: {place}: {wanted}, got {first['input']!r}")


def validated(kind: type[T], tree: Any, where: str) -> T:
    """Return the plain tree as a `kind`; raise StudyError with `where: place: what was wanted, got`."""
    if not isinstance(tree, dict):
        raise StudyError(f"{where}: must be a mapping of sections, got {type(tree).__name__}")
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise _explain(error, where, kind) from error
