"""Jobs in cohorts: consecutive ones, as many as the study says, do their client steps side by side."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from fedlth.jobs import Failure, Job, Reply

Call = Callable[[], Reply | Failure]


def size_of(jobs: Sequence[Job]) -> int:
    """Return the cohort size of a map's jobs; they are of one study."""
    return int(json.loads(jobs[0].study)["cohort"]) if jobs else 1


def cohorts(count: int, size: int) -> list[tuple[int, ...]]:
    """Return positions 0 to `count` in tuples of `size`: they hang on nothing but the order of the jobs."""
    return [tuple(range(at, min(at + size, count))) for at in range(0, count, size)]


def side_by_side(calls: Sequence[Call]) -> list[Reply | Failure]:
    """Do one cohort's client steps, each of which answers for itself; their time is shared out equally."""
    if len(calls) == 1:
        return [calls[0]()]
    from fedlth.compute import cohort, cohort_turns

    began = time.perf_counter()
    answers = cohort_turns.side_by_side(calls, cohort.answer)
    share = (time.perf_counter() - began) / len(calls)
    return [replace(a, seconds=share) if isinstance(a, Reply) else a for a in answers]
