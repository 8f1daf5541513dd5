"""The in-process engine: one cohort after the other, in this process. What every other engine must equal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from fedlth.engines.cohort import answered, cohorts, side_by_side
from fedlth.federation.client_step import client_step
from fedlth.federation.jobs import Again, Answers, Enough, Failure, Job, Reply, never


def one_line(error: BaseException) -> str:
    """Return an error as one line of at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def attempt(step: Callable[[Job], Reply], job: Job) -> Reply | Failure:
    """Run one job; what it raises becomes a Failure, so that it costs only itself."""
    try:
        return step(job)
    except MemoryError as error:
        return Failure(round=job.round, client=job.client, kind="memory", reason=one_line(error))
    except (Exception, SystemExit) as error:  # a user's model that calls sys.exit() costs only this job
        full = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)  # torch's: GPU, CPU
        kind = "memory" if full else "raised"
        return Failure(round=job.round, client=job.client, kind=kind, reason=one_line(error))


@dataclass(frozen=True)
class InProcess:
    """Run jobs here, in order."""

    name: str = "inprocess"
    holds_state: bool = False

    def map(self, jobs: Iterable[Job], /, *, again: Again = never) -> Answers:
        for part in cohorts(jobs):
            yield from answered(part, _together, again)

    def present(self, *, until: Enough | None = None) -> None:
        return None  # all are: a client is where its job is done

    def late(self) -> tuple[()]:
        return ()

    def close(self) -> None:
        pass


def _together(jobs: Sequence[Job]) -> list[Reply | Failure]:
    return side_by_side([partial(attempt, client_step, job) for job in jobs])
