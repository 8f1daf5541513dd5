"""The choice among tiles of several heights, made as compiled code of one branch a height."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fedlth.kernel.jit import inlined


def fitting(bodies: Sequence[tuple[int, Callable[..., None]]]) -> Callable[..., int]:
    """Return a compiled function (left, *given) that runs the first body of at most `left` channels, and says how many.

    bodies: (channels, compiled function), the most first and one channel last.
    """
    (height, body), *rest = bodies
    if not rest:

        @inlined
        def last(left: int, *given: Any) -> int:
            body(*given)
            return height

        return last
    later = fitting(rest)

    @inlined
    def one(left: int, *given: Any) -> int:
        if left >= height:
            body(*given)
            return height
        return later(left, *given)

    return one
