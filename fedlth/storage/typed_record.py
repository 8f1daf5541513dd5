"""Typed records: what a field of a dataclass may be, and reading and writing records that hold to it."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from fedlth.study.parts import is_number

T = TypeVar("T")
LARGEST = 1e39  # more than float32 holds, which losses come in; sums and squares of such numbers are finite


def has_mean(value: Any) -> bool:
    """Say whether a value is a number of which a million have a finite sum, as the largest float64s have not."""
    return is_number(value) and abs(value) <= LARGEST


@dataclass(frozen=True)
class Range:
    """A number from `low` to `high`, both included; `words` say so."""

    low: float
    high: float
    words: str

    def __call__(self, value: Any) -> bool:
        return bool(self.low <= value <= self.high)  # NaN compares as neither


@dataclass(frozen=True)
class Text:
    """Printable text of at most `longest` characters, at least one unless `empty`."""

    longest: int
    empty: bool = False

    @property
    def words(self) -> str:
        return f"printable text of {0 if self.empty else 1} to {self.longest} characters"

    def __call__(self, value: Any) -> bool:
        return value.isprintable() and (0 if self.empty else 1) <= len(value) <= self.longest


@dataclass(frozen=True)
class Shares:
    """A mapping of names to shares in [0, 1]."""

    words: str = "a mapping of names to shares in [0, 1]"

    def __call__(self, value: Any) -> bool:
        return all(isinstance(k, str) and is_number(v) and 0 <= v <= 1 for k, v in value.items())


@dataclass(frozen=True)
class Numbers:
    """A mapping of printable names to numbers that have a mean."""

    words: str = "a mapping of printable names to finite numbers"

    def __call__(self, value: Any) -> bool:
        return all(isinstance(k, str) and Text(100)(k) and has_mean(v) for k, v in value.items())


Share = Annotated[float, Range(0, 1, "a number in [0, 1]")]
Target = Annotated[float, Range(math.ulp(0.0), 1, "a number in (0, 1]")]
Count = Annotated[int, Range(0, 2**53, "a whole number of at least 0")]
Amount = Annotated[float, Range(0, 1e30, "a number in [0, 1e30]")]
Number = Annotated[float, Range(-LARGEST, LARGEST, "a finite number")]
Name = Annotated[str, Text(100)]
Label = Annotated[str, Text(100, empty=True)]


def read(kind: type[T], record: Mapping[str, Any], *, strict: bool) -> T:
    """Return `record` as a value of `kind`; raise ValueError that names the first field that is wrong.

    `strict`: every field that is not in the kind's OPTIONAL must be there, and no other. Otherwise defaults stand in,
    and unknown fields are left out (a newer writer may have added some).
    """
    made: Any = kind  # a class is hashable, whatever mypy thinks of a type variable
    optional: frozenset[str] = getattr(kind, "OPTIONAL", frozenset())
    found: dict[str, Any] = {}
    for spec in _specs(made):
        if spec.name not in record:
            if (spec.name not in optional) if strict else spec.required:
                given = reprlib.repr(sorted(map(str, record)))
                raise ValueError(f"{spec.name} is required, got only {given if record else 'nothing'}")
            continue
        value = record[spec.name]
        if not spec.accepts(value):
            raise ValueError(f"{spec.name} must be {spec.words}, got {reprlib.repr(value)}")
        found[spec.name] = value if spec.item is None else _items(spec.item, value, spec.name, strict)
    if strict and len(found) < len(record):
        unknown = next(name for name in record if name not in found)
        raise ValueError(f"{reprlib.repr(unknown)} is not a field of {kind.__name__}")
    return kind(**found)


def _items(kind: Any, values: list[Any], name: str, strict: bool) -> list[Any]:
    found = []
    for i, value in enumerate(values):
        if not isinstance(value, dict):
            raise ValueError(f"{name}[{i}] must be a record, got {reprlib.repr(value)}")
        try:
            found.append(read(kind, value, strict=strict))
        except ValueError as error:
            raise ValueError(f"{name}[{i}]: {error}") from None
    return found


def as_record(value: Any) -> dict[str, Any]:
    """Return a record as its file has it, its optional fields where they say something: json's `default`."""
    optional: frozenset[str] = getattr(value, "OPTIONAL", frozenset())
    silent = {s.name for s in fields(value) if s.name in optional and getattr(value, s.name) == _default(s)}
    return {k: v for k, v in vars(value).items() if k not in silent}


def _default(spec: Field[Any]) -> Any:
    return spec.default if spec.default_factory is MISSING else spec.default_factory()


@dataclass(frozen=True)
class _Spec:
    """One field; `item` is the kind of record that a list of records holds."""

    name: str
    item: Any
    types: tuple[type, ...]
    checks: tuple[Any, ...]
    words: str
    required: bool

    def accepts(self, value: Any) -> bool:
        # bool is an int to Python, and true is not a count
        if not isinstance(value, self.types) or (isinstance(value, bool) and bool not in self.types):
            return False
        return value is None or all(check(value) for check in self.checks)


@cache
def _specs(kind: Any) -> tuple[_Spec, ...]:
    hints = get_type_hints(kind, include_extras=True)
    return tuple(
        _Spec(
            spec.name,
            next((a for a in get_args(hints[spec.name]) if isinstance(a, type) and is_dataclass(a)), None),
            *_accepted(hints[spec.name]),
            required=spec.default is MISSING and spec.default_factory is MISSING,
        )
        for spec in fields(kind)
    )


def _accepted(hint: Any) -> tuple[tuple[type, ...], tuple[Any, ...], str]:
    """Return the types that a field takes, the checks that its value must pass, and both in words."""
    if get_origin(hint) is Annotated:
        plain, check = get_args(hint)
        return _accepted(plain)[0], (check,), check.words
    if type(None) in get_args(hint):  # X | None
        types, checks, words = _accepted(next(a for a in get_args(hint) if a is not type(None)))
        return (*types, type(None)), checks, f"{words} or None"
    plain = get_origin(hint) or hint
    return ((int, float) if plain is float else (plain,)), (), getattr(hint, "__name__", str(hint))
