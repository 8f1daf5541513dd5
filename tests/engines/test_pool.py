"""The pool's scheduling, on a seam where time and death are played: no Ray, no process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from fedlth.engines import pool as pools
from fedlth.engines.pool import AHEAD, STARTS, TRIES, Limits, Lost, Pool
from fedlth.engines.worker import Born, Parcel
from fedlth.errors import StudyError
from fedlth.federation.jobs import Answers, Failure, Job, Message, Reply
from fedlth.output import lines_to

Act = Callable[[Job], Any]
HANGS = object()


class Played:
    """A Ray that answers a call by `act`, at once or never."""

    def __init__(self, act: Act, *, born: Callable[[int], Any] = lambda n: Born(n, "host", "")) -> None:
        self.act, self.born = act, born
        self.calls: dict[int, Any] = {}
        self.put_values: list[Any] = []
        self.actors, self.killed, self.begun = 0, list[int](), list[int]()
        self.cohorts: list[list[int]] = []

    def spawn(self) -> int:
        self.actors += 1
        return self.actors

    def put(self, value: object) -> Any:
        self.put_values.append(value)
        return value

    def call(self, actor: Any, method: str, *args: Any, **kwargs: object) -> Any:
        call = len(self.calls)
        if method == "start":
            self.calls[call] = self.born(actor)
        else:
            parcels, study, *payloads = args
            assert all(isinstance(parcel, Parcel) for parcel in parcels)
            assert actor not in self.killed
            self.begun += [parcel.job.client for parcel in parcels]
            self.cohorts.append([parcel.job.client for parcel in parcels])
            answers = [self.act(parcel.whole(study, payloads)) for parcel in parcels]
            lost = [a for a in answers if a is HANGS or isinstance(a, Lost)]
            self.calls[call] = lost[0] if lost else answers
        return call

    def wait(self, calls: Sequence[Any], *, timeout_s: float | None) -> list[Any]:
        ended = [c for c in calls if self.calls[c] is not HANGS]
        if not ended:
            assert timeout_s is not None, "it would wait for ever"
            time.sleep(timeout_s)
        return ended[-1:]  # the last first, so that answers come out of order

    def get(self, call: Any) -> Any:
        return self.calls[call]

    def kill(self, actor: Any) -> None:
        self.killed.append(actor)


def jobs_of(count: int) -> list[Job]:
    shared, own = Message("values", "theta_g", b"theta", broadcast=True), Message("values", "own", b"own")
    return [Job(study="study", phase="federate", round=1, client=c, inbox=(own, shared)) for c in range(count)]


def all_of(pairs: Answers) -> list[Reply | Failure]:
    return [found for _, found in pairs]


def answer(job: Job) -> Reply:
    assert job.study == "study" and [m.payload for m in job.inbox] == [b"own", b"theta"]
    return Reply(round=job.round, client=job.client, outbox=())


def pool_of(played: Played, size: int = 2, job_s: float | None = 0.05, start_s: float = 0.05) -> Pool:
    return Pool(played, size, name="ray", spawn=played.spawn, given={}, limits=Limits(start_s, job_s))


def only(client: int, value: Any) -> Act:
    return lambda job: value if job.client == client else answer(job)


def test_answers_stand_in_job_order_and_name_their_worker() -> None:
    played = Played(answer)
    answers = all_of(pool_of(played).map(jobs_of(7)))
    assert [a.client for a in answers] == list(range(7)) and all(isinstance(a, Reply) for a in answers)
    assert {a.worker for a in answers} <= {"ray:0 machine 0:1", "ray:1 machine 0:2"}
    assert played.actors == 2 and not played.killed


def test_machines_are_told_apart_and_not_named() -> None:
    pool = pool_of(Played(answer, born=lambda n: Born(n, "secret.lan", "")))
    assert all("machine 0" in a.worker and "secret" not in a.worker for a in all_of(pool.map(jobs_of(3))))
    assert [pool.machine(host) for host in ("other.lan", "secret.lan")] == ["machine 1", "machine 0"]


def test_a_broadcast_is_stored_once_a_map() -> None:
    played = Played(answer)
    all_of(pool_of(played).map(jobs_of(7)))
    assert sorted(map(str, played.put_values)) == ["b'theta'", "study"]


def test_a_worker_that_died_idle_costs_no_client() -> None:
    played = Played(answer)
    pool, gone = pool_of(played, size=1), set[int]()
    assert all(isinstance(a, Reply) for a in all_of(pool.map(jobs_of(2))))
    gone.add(played.actors)
    real = played.call
    played.call = lambda actor, *args, **more: None if actor in gone else real(actor, *args, **more)  # type: ignore[method-assign]
    answers = all_of(pool.map(jobs_of(3)))
    assert [a.client for a in answers] == [0, 1, 2] and all(isinstance(a, Reply) for a in answers)
    assert played.actors == 2 and played.killed == [1]


def test_a_worker_that_is_refused_or_ends_at_once_is_tried_again_and_told() -> None:
    played = Played(answer)
    spawn, tries = played.spawn, iter([BlockingIOError(11, "no room"), None])

    def sometimes() -> int:
        if (error := next(tries, None)) is not None:
            raise error
        return spawn()

    pool = Pool(played, 1, name="fork", spawn=sometimes, given={}, limits=Limits(0.05, 0.05))
    with pytest.raises(StudyError, match="no worker could be started: .*no room"):
        all_of(pool.map(jobs_of(1)))  # nobody else is at work, so nothing would ever try again
    played.call = lambda *args, **more: None  # type: ignore[method-assign]
    with pytest.raises(StudyError, match="no worker could be started: its process ended at once"):
        all_of(pool_of(played).map(jobs_of(1)))


def test_no_more_workers_than_jobs() -> None:
    played = Played(answer)
    all_of(pool_of(played, size=4).map(jobs_of(1)))
    assert played.actors == 1


@pytest.mark.parametrize(
    ("value", "kind", "tries"),
    [
        (HANGS, "hung", 1),
        (Lost("raised", "x"), "raised", 1),
        (Lost("died", "x"), "died", TRIES),
        (Lost("memory", "x"), "memory", TRIES),
    ],
)
def test_a_job_that_ends_every_worker_costs_only_itself(value: Any, kind: str, tries: int) -> None:
    played = Played(only(2, value))
    answers = all_of(pool_of(played).map(jobs_of(6)))
    assert [a.kind for a in answers if isinstance(a, Failure)] == [kind]
    assert isinstance(answers[2], Failure) and answers[2].client == 2 and answers[2].worker.startswith("ray:")
    assert answers[2].reason.endswith(f"({TRIES} tries)") == (tries > 1)
    assert len(played.killed) == tries and sorted(played.begun) == sorted([*range(6), *[2] * (tries - 1)])


@pytest.mark.parametrize("kind", ["died", "memory"])
@pytest.mark.parametrize("losses", range(1, TRIES))
def test_work_lost_with_its_machine_is_done_again(losses: int, kind: str) -> None:
    """Row 40: a node that goes away costs no client anything."""

    def act(job: Job) -> Any:
        if job.client in (2, 5) and seen.count(job.client) < losses:
            seen.append(job.client)
            return Lost(kind, "its node has died")
        return answer(job)

    seen: list[int] = []
    told: list[str] = []
    played = Played(act)
    pool = pool_of(played)
    with lines_to(told.append):
        assert [a.client for a in all_of(pool.map(jobs_of(7))) if isinstance(a, Reply)] == list(range(7))
    assert len(told) == 2 * losses and f"({kind}: its node has died); done again: client " in told[0]


def test_a_cohort_lost_with_its_machine_is_done_again_whole() -> None:
    """Row 40: its size decides the last bits of its result."""
    lost: list[int] = []

    def act(job: Job) -> Any:
        if job.client == 4 and not lost:
            lost.append(4)
            return Lost("died", "x")
        return answer(job)

    played = Played(act)
    assert all(isinstance(a, Reply) for a in all_of(pool_of(played).map(jobs_of(7), cohort=3)))
    assert sorted(played.cohorts) == [[0, 1, 2], [3, 4, 5], [3, 4, 5], [6]]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_cohorts_are_the_same_for_any_number_of_workers(size: int) -> None:
    played = Played(answer)
    answers = all_of(pool_of(played, size=size).map(jobs_of(7), cohort=3))
    assert [a.client for a in answers] == list(range(7))
    assert sorted(played.cohorts) == [[0, 1, 2], [3, 4, 5], [6]] and played.actors <= 3
    assert sorted(map(str, played.put_values)) == ["b'theta'", "study"]


@pytest.mark.parametrize(("value", "kind"), [(HANGS, "hung"), (Lost("died", "x"), "died")])
def test_who_kills_a_cohort_is_found_by_letting_each_go_alone(value: Any, kind: str) -> None:
    played = Played(only(4, value))
    answers = all_of(pool_of(played).map(jobs_of(7), cohort=3))
    assert [(a.client, a.kind) for a in answers if isinstance(a, Failure)] == [(4, kind)]
    tries = TRIES if kind == "died" else 1
    assert sorted(played.cohorts) == [[0, 1, 2], [3], *[[3, 4, 5]] * tries, [4], [5], [6]]
    assert len(played.killed) == tries + 1


def test_a_broadcast_at_another_place_of_the_inbox_is_the_same_payload() -> None:
    jobs = jobs_of(2)
    jobs[1] = replace(jobs[1], inbox=tuple(reversed(jobs[1].inbox)))
    seen: list[list[bytes]] = []

    def act(job: Job) -> Any:
        seen.append([m.payload for m in job.inbox])
        return Reply(round=job.round, client=job.client, outbox=())

    all_of(pool_of(Played(act)).map(jobs, cohort=2))
    assert seen == [[b"own", b"theta"], [b"theta", b"own"]]


def test_every_client_lost_still_ends() -> None:
    played = Played(lambda job: HANGS)
    answers = all_of(pool_of(played).map(jobs_of(5)))
    assert [a.kind for a in answers if isinstance(a, Failure)] == ["hung"] * 5


@pytest.mark.parametrize(("kind", "killed"), [("memory", 1), ("raised", 0)])
def test_a_worker_goes_on_after_an_error_but_not_after_a_refused_allocation(kind: str, killed: int) -> None:
    failure = Failure(round=1, client=1, kind=kind, reason="r")
    played = Played(only(1, failure))
    answers = all_of(pool_of(played).map(jobs_of(4)))
    assert isinstance(answers[1], Failure) and answers[1].kind == kind
    assert len(played.killed) == killed


@pytest.mark.parametrize(("born", "starts"), [(HANGS, 1), (Lost("died", "no such module"), STARTS)])
def test_workers_that_never_start_end_the_run(born: Any, starts: int) -> None:
    played = Played(answer, born=lambda n: born)
    with pytest.raises(StudyError, match="no worker could be started: (it took more than 0.05 s|no such module)"):
        all_of(pool_of(played).map(jobs_of(3)))
    assert played.actors == len(played.killed) == 2 * starts


def test_a_wait_for_room_is_told_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 41: all GPUs of the cluster are another job's."""
    monkeypatch.setattr(pools, "TOLD_EVERY_S", 0.05)
    told: list[str] = []
    played = Played(answer, born=lambda n: HANGS)
    pool = pool_of(played, start_s=0.28)
    pool.room = lambda: "taken now: 2 of 2 GPUs"
    refused = pytest.raises(StudyError, match="it took more than 0.28 s; taken now: 2 of 2 GPUs")
    with refused, lines_to(told.append):
        all_of(pool.map(jobs_of(3)))
    assert 2 <= len(told) <= 5
    assert all(line.startswith("ray: no worker yet after ") and line.endswith("2 of 2 GPUs") for line in told)


def test_one_place_that_cannot_start_leaves_the_work_to_the_other() -> None:
    played = Played(answer, born=lambda n: Born(n, "host", "0") if n == 1 else Lost("died", "x"))
    answers = all_of(pool_of(played).map(jobs_of(6)))
    assert all(isinstance(a, Reply) and a.worker == "ray:0@gpu0 machine 0:1" for a in answers)


def test_machines_that_join_are_used_and_what_was_given_up_is_tried_again() -> None:
    more = False
    pool = pool_of(Played(answer, born=lambda n: Born(n, "host", "") if more or n == 1 else Lost("died", "x")))

    def at_work() -> list[int]:
        all_of(pool.map(jobs_of(9)))
        return [place.number for place in pool.places if place.actor is not None]

    assert at_work() == at_work() == [0]
    more = True
    assert at_work() == [0], "it was given up"
    pool.grow(4)
    assert at_work() == [0, 1, 2, 3]
    pool.grow(1)
    assert len(pool.places) == 4, "those that are there stay"


def test_after_an_interrupt_no_old_answer_is_taken_for_a_new_one() -> None:
    def act(job: Job) -> Any:
        if not interrupted and job.client == 1:
            interrupted.append(True)
            raise KeyboardInterrupt
        return HANGS if len(interrupted) < 1 else answer(job)

    interrupted: list[bool] = []
    played = Played(act)
    pool = pool_of(played, job_s=5.0)
    with pytest.raises(KeyboardInterrupt):
        all_of(pool.map(jobs_of(3)))
    assert played.killed
    assert [a.client for a in all_of(pool.map(jobs_of(3))) if isinstance(a, Reply)] == [0, 1, 2]


def test_closing_ends_every_worker() -> None:
    played = Played(answer)
    pool = pool_of(played)
    all_of(pool.map(jobs_of(5)))
    pool.close()
    assert sorted(played.killed) == [1, 2]


def test_jobs_are_drawn_a_few_ahead_of_the_answers() -> None:
    def draw() -> Iterator[Job]:
        for job in jobs_of(200):
            drawn.append(job.client)
            yield job

    drawn: list[int] = []
    answers = pool_of(Played(answer)).map(draw())
    for given, (job, _) in enumerate(answers):
        assert job.client == given and len(drawn) <= given + 2 * AHEAD + 1
    assert drawn == list(range(200))


def test_one_slow_job_does_not_let_answers_pile_up() -> None:
    played = Played(only(0, HANGS))
    pairs = pool_of(played).map(iter(jobs_of(200)))
    _, first = next(pairs)
    assert isinstance(first, Failure) and first.kind == "hung"
    assert len(played.begun) <= 2 * AHEAD
    assert [a.client for _, a in pairs] == list(range(1, 200))


def test_who_is_asked_again_answers_in_the_place_of_the_first() -> None:
    def again(job: Job, reply: Reply) -> Job | None:
        return replace(job, version="again") if job.client in (1, 2, 5) and not job.version else None

    played = Played(lambda job: replace(answer(job), device=job.version))
    pairs = list(pool_of(played).map(jobs_of(7), cohort=3, again=again))
    assert [a.device for _, a in pairs if isinstance(a, Reply)] == ["", "again", "again", "", "", "again", ""]
    assert [job.version for job, _ in pairs] == ["", "again", "again", "", "", "again", ""]
    assert sorted(played.cohorts) == [[0, 1, 2], [1, 2], [3, 4, 5], [5], [6]], "those of one cohort together"


def test_a_reader_that_stops_leaves_no_answer_behind() -> None:
    pool = pool_of(Played(answer))
    pairs = pool.map(jobs_of(9))
    assert next(pairs)[1].client == 0
    pairs.close()
    assert [a.client for a in all_of(pool.map(jobs_of(4)))] == [0, 1, 2, 3]
