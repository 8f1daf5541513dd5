"""What a partition may say of one client beyond which examples it has: which are for validation, and which for test."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Parts:
    """Hold one client's positions, (n,) integers each; a part that is None is drawn as for any partition.

    train: in x_train; with `val` None those for validation too, and with `test` None the client's own test part.
    test: in x_train where `own_test`, else in x_test.
    """

    train: np.ndarray
    val: np.ndarray | None = None
    test: np.ndarray | None = None
    own_test: bool = True

    def as_int64(self) -> Parts:
        """Return the same with int64 positions."""
        train, val, test = (p if p is None else p.astype(np.int64) for p in (self.train, self.val, self.test))
        assert train is not None
        return Parts(train, val, test, self.own_test)
