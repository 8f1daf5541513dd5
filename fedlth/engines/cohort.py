"""Jobs in cohorts: consecutive ones, as many as the study says, do their client steps side by side."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice

from fedlth.federation.jobs import Again, Failure, Job, Reply

Call = Callable[[], Reply | Failure]


def peeked(jobs: Iterable[Job]) -> tuple[Job | None, Iterator[Job]]:
    """Return the first job, None where there is none, and all of them."""
    source = iter(jobs)
    first = next(source, None)
    return first, chain(() if first is None else (first,), source)


def cohorts(jobs: Iterable[Job]) -> Iterator[list[Job]]:
    """Draw jobs of one study in cohorts, which hang on nothing but the order of the jobs."""
    first, source = peeked(jobs)
    size = size_of(first) if first else 1
    while part := list(islice(source, size)):
        yield part


def answered(
    part: list[Job], run: Callable[[list[Job]], list[Reply | Failure]], again: Again
) -> Iterator[tuple[Job, Reply | Failure]]:
    """Run one part of the jobs; those that are to run again do so together, in the place of the first."""
    answers = run(part)
    asked = {i: job for i, a in enumerate(answers) if isinstance(a, Reply) and (job := again(part[i], a)) is not None}
    for i, answer in zip(asked, run(list(asked.values())) if asked else (), strict=True):
        part[i], answers[i] = asked[i], answer
    return zip(part, answers, strict=True)


def size_of(job: Job) -> int:
    """Return the cohort size of a job's study."""
    return int(json.loads(job.study)["cohort"])


def side_by_side(calls: Sequence[Call]) -> list[Reply | Failure]:
    """Do one cohort's client steps, each of which answers for itself; their time is shared out equally."""
    if len(calls) == 1:
        return [calls[0]()]
    from fedlth.training import cohort, lockstep

    began = time.perf_counter()
    answers = lockstep.side_by_side(calls, cohort.answer)
    share = (time.perf_counter() - began) / len(calls)
    return [replace(a, seconds=share) if isinstance(a, Reply) else a for a in answers]
