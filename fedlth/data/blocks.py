"""Which examples of a text are for training, validation and test where neighbours must not lie on both sides."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedlth.data.limits import check_count
from fedlth.errors import StudyError, wrong
from fedlth.study.parts import is_number

TRAIN, VALIDATION, TEST, LEFT_OUT = range(4)


@dataclass(frozen=True)
class Blocks:
    """A file cut into `blocks` stretches, each of training, validation and test, in this order and of these shares.

    gap: examples that are left out wherever two parts meet, from the less precious one (training, then validation): as
    long as the longest document, no document has neighbours in two parts. More stretches make the parts more alike.
    """

    test: float
    validation: float
    blocks: int = 1
    gap: int = 0

    def __post_init__(self) -> None:
        for name in ("test", "validation"):
            share = getattr(self, name)
            if not is_number(share) or not 0 <= share < 1:
                raise wrong(f"data.options.{name}_share", "in [0, 1)", share)
        if self.test + self.validation >= 1:
            raise wrong("data.options.test_share", "less than 1 with validation_share", self.test + self.validation)
        check_count("data.options.blocks", self.blocks)
        check_count("data.options.gap", self.gap, 0)

    def __call__(self, count: int, key: str, /) -> np.ndarray:
        """Return (count,) the part of each of a key's examples, in the order of the file."""
        parts = np.full(count, TRAIN)
        for stretch in np.array_split(np.arange(count), self.blocks):
            test, validation = (max(1, round(s * len(stretch))) if s else 0 for s in (self.test, self.validation))
            if len(stretch) < test + validation + 1:
                raise StudyError(
                    f"data.options.blocks: {key} must have examples for {self.blocks} stretches of each part, got "
                    f"{count}"
                )
            parts[stretch[len(stretch) - test - validation :]] = VALIDATION
            parts[stretch[len(stretch) - test :]] = TEST
        cut = parts.copy()
        for at in np.flatnonzero(parts[1:] != parts[:-1]) + 1 if self.gap else ():
            before, after = slice(max(0, at - self.gap), at), slice(at, at + self.gap)
            side = before if parts[at - 1] < parts[at] else after
            own = parts[side] == min(parts[at - 1], parts[at])
            cut[side] = np.where(own, LEFT_OUT, cut[side])
        for part, share in ((TRAIN, 1), (VALIDATION, self.validation), (TEST, self.test)):
            if share and not (cut == part).any():
                raise StudyError(f"data.options.gap: {key} must have an example left in each part, got {self.gap}")
        return cut
