"""What the labels of texts are: classes by name or number, real numbers, or real numbers cut into classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedlth.errors import StudyError
from fedlth.study.parts import is_number

NOWHERE = -1  # the class of an example that is left out


@dataclass(frozen=True)
class Labels:
    """How a key's labels are read.

    labels: the classes' names, in order. thresholds: real numbers become classes, as many as there are thresholds below
    the number. without: classes (by name or number) whose examples are left out; the others are numbered anew.
    """

    labels: tuple[str, ...] | None = None
    thresholds: tuple[float, ...] | None = None
    without: tuple[str | int, ...] = ()

    def __post_init__(self) -> None:
        if self.labels is not None and self.thresholds is not None:
            raise StudyError("data.options.labels: must be left out with thresholds, whose classes are numbers")
        if self.labels is not None and len(set(self.labels)) < max(2, len(self.labels)):
            raise StudyError(f"data.options.labels: must be at least two different names, got {list(self.labels)}")
        cuts = self.thresholds
        if cuts is not None and (not cuts or not all(map(is_number, cuts)) or list(cuts) != sorted(set(cuts))):
            raise StudyError(f"data.options.thresholds: must be numbers in rising order, got {list(cuts)}")

    def kind(self, values: Sequence[Any]) -> str:
        """Say what such labels are: "names", "classes" (whole numbers) or "numbers" (real ones)."""
        if self.labels is not None:
            return "names"
        numbers = [_number(value) for value in values]
        if any(number is None for number in numbers):
            if self.thresholds is not None:
                wrong = next(value for value, number in zip(values, numbers, strict=True) if number is None)
                raise StudyError(f"data.options.thresholds: labels must be numbers, got {wrong!r}")
            return "names"
        if self.thresholds is not None or all(isinstance(n, int) and n >= 0 for n in numbers):
            return "classes"
        return "numbers"

    def classes(self, values: Sequence[Any], names: Sequence[str]) -> tuple[np.ndarray, int]:
        """Return each label's class, int64, NOWHERE where it is left out, and how many classes there are.

        names: those of labels that are names.
        """
        if self.thresholds is not None:
            found = np.searchsorted(self.thresholds, [float(_number(v) or 0) for v in values], side="left")
            count = len(self.thresholds) + 1
        elif self.kind(values) == "names":
            place = {name: i for i, name in enumerate(names)}
            strange = next((v for v in map(str, values) if v not in place), None)
            if strange is not None:
                raise StudyError(f"data.options.labels: must name every label, got {strange!r} in the data")
            found, count = np.array([place[str(value)] for value in values]), len(names)
        else:
            found = np.array([_number(value) for value in values])
            count = int(found.max()) + 1
        kept = np.arange(count)
        for one in self.without:
            label = names.index(one) if isinstance(one, str) and one in names else one
            if not isinstance(label, int) or isinstance(label, bool) or label not in kept:
                raise StudyError(f"data.options.without: must be classes of the data, got {one!r} of {count}")
            kept = kept[kept != label]
        anew = np.full(count, NOWHERE)
        anew[kept] = np.arange(len(kept))
        return anew[found].astype(np.int64), len(kept)


def real(values: Sequence[Any]) -> np.ndarray:
    """Return real numbers (N,) float32."""
    return np.array([_number(value) for value in values], np.float32)


def _number(value: Any) -> int | float | None:
    """Return a label as a number, a whole one where it is written so; None where it is none."""
    if isinstance(value, bool | int | float):
        return int(value) if isinstance(value, bool) else value
    for kind in (int, float):
        try:
            found: int | float = kind(value)
        except (TypeError, ValueError):
            continue
        return found if np.isfinite(found) else None
    return None
