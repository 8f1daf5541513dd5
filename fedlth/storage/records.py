"""What clients report, declared once: a visit's numbers and the rows of step 2, for client, server and report.

Field types say what a value may be: `read` holds every record against them, wherever it comes from.
"""

from __future__ import annotations

import math
import reprlib
import sys
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from typing import Annotated, Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

from fedlth.study.parts import is_number

T = TypeVar("T")


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


Share = Annotated[float, Range(0, 1, "a number in [0, 1]")]
Target = Annotated[float, Range(math.ulp(0.0), 1, "a number in (0, 1]")]
Count = Annotated[int, Range(0, 2**53, "a whole number of at least 0")]
Amount = Annotated[float, Range(0, 1e30, "a number in [0, 1e30]")]
Number = Annotated[float, Range(-sys.float_info.max, sys.float_info.max, "a finite number")]
Name = Annotated[str, Text(100)]
Label = Annotated[str, Text(100, empty=True)]


@dataclass(frozen=True)
class MetricRow:
    """One client under one arm at one density, read once at the end.

    `diverged` says that the arm's training did. Defaults are for reading what earlier versions wrote: a client must
    give every field that is not in OPTIONAL.
    """

    OPTIONAL: ClassVar[frozenset[str]] = frozenset({"diverged"})

    client: Count
    unseen: bool
    arm: Name
    density: Share
    target_density: Target
    val_accuracy: Share
    test_accuracy: Share
    num_train: Count
    start: Label = ""
    epochs: Amount = 0.0
    search_epochs: Amount = 0.0
    train_flops: Amount = 0.0
    train_flops_effective: Amount = 0.0
    val_loss: Number = float("nan")
    test_loss: Number = float("nan")
    num_val: Count = 0
    num_test: Count = 0
    ticket: Label = ""
    layer_density: Annotated[dict[str, Any], Shares()] = field(default_factory=dict)
    diverged: bool = False

    def record(self) -> dict[str, Any]:
        """Return the row as a client sends it; an optional field only where it says something."""
        return {k: v for k, v in vars(self).items() if k not in self.OPTIONAL or v}


@dataclass(frozen=True)
class VisitRecord:
    """What a client says of one visit. A method may leave out all but the first, and add numbers of its own."""

    OPTIONAL: ClassVar[frozenset[str]] = frozenset({"loss", "val_accuracy", "density"})

    num_examples: Annotated[int, Range(1, 2**53, "a whole number of at least 1")]
    loss: Number | None = None
    val_accuracy: Share | None = None
    density: Share | None = None


def visit_record(record: Mapping[str, Any]) -> VisitRecord:
    """Return a visit's record, of which a method's own numbers are only checked; raise ValueError naming the field."""
    known = {spec.name for spec in fields(VisitRecord)}
    for name, value in record.items():
        if name not in known and not (Text(100)(name) and is_number(value)):
            told = f"{reprlib.repr(name)}: {reprlib.repr(value)}"
            raise ValueError(f"a method's own metric must be a finite number under a printable name, got {told}")
        if name in known and value is None:
            raise ValueError(f"{name} must be a number, got None")
    return read(VisitRecord, {k: v for k, v in record.items() if k in known}, strict=True)


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
                raise ValueError(f"{spec.name} is wanted, got only {given if record else 'nothing'}")
            continue
        value = record[spec.name]
        if not spec.accepts(value):
            raise ValueError(f"{spec.name} must be {spec.words}, got {reprlib.repr(value)}")
        found[spec.name] = value
    if strict and len(found) < len(record):
        unknown = next(name for name in record if name not in found)
        raise ValueError(f"{reprlib.repr(unknown)} is not a field of {kind.__name__}")
    return kind(**found)


@dataclass(frozen=True)
class _Spec:
    name: str
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
        return (*types, type(None)), checks, f"{words} | None"
    plain = get_origin(hint) or hint
    return ((int, float) if plain is float else (plain,)), (), getattr(hint, "__name__", str(hint))
