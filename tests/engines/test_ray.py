"""The Ray engine on real processes: equal to in-process, placed as asked, and not undone by a client's death."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty import Clocked
from ray_study import EQUAL, map_one, rows, run, study_of

from fedlth.engines import pool
from fedlth.engines.pool import Limits, Pool
from fedlth.engines.ray import RayEngine
from fedlth.engines.ray_cluster import connect
from fedlth.engines.ray_placement import Share, count
from fedlth.errors import StudyError
from fedlth.federation.jobs import Job, Reply
from fedlth.output import lines_to
from tests import everything, tiny
from tests.text.sentences import IN_ROUNDS, bert_tickets

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(280),
    # Ray's own: it forgets its daemons and what it opened for them when it is shut down.
    pytest.mark.filterwarnings(r"ignore:subprocess \d+ is still running:ResourceWarning"),
    pytest.mark.filterwarnings(r"ignore:unclosed file <_io\.\w+ name='/dev/null':ResourceWarning"),
]

MEMORY_MB = 400


@pytest.fixture(autouse=True)
def rays_own_warnings_come_here() -> Iterator[None]:
    """Let what Ray forgot be found while the filters above hold."""
    yield
    gc.collect()


@pytest.fixture(scope="class")
def shared_ray() -> Iterator[None]:
    """One Ray for the tests that do not test its start: an engine uses what runs, and leaves it running."""
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    ray.init(address="local", num_cpus=8, num_gpus=2, include_dashboard=False, log_to_driver=False)
    yield
    assert ray.is_initialized()
    ray.shutdown()
    gc.collect()


class Open:
    """An engine that a run's end does not close: its workers serve one study after another, as jobs name theirs."""

    name, holds_state = "ray", False

    def __init__(self, engine: RayEngine) -> None:
        self.map, self.really_close = engine.map, engine.close
        self.present, self.late = engine.present, engine.late

    def close(self) -> None:
        pass


@pytest.fixture(scope="class")
def two_workers(shared_ray: None) -> Iterator[Open]:
    engine = Open(RayEngine(study_of(engine="ray", ray={"workers": 2}).ray))
    yield engine
    engine.really_close()


STUDIES = {
    **{name: lambda name=name: tiny.of_method(name) for name in tiny.METHODS},
    "a recipe of every part": lambda: tiny.study(**tiny.RECIPE),
    "everything": everything.study,
    "the best of a curve": lambda: tiny.study(train={"lr": 0.8}, evaluate={"every": 1, "keep": "best"}),
}

TWO_STEP: dict[str, Any] = {
    "method": "two_step",
    "federate": {"rounds": 2, "clients_per_round": 2},
    "finder": {"densities": [0.5, 0.2]},
    "personalise": {"epochs": 1, "clients_per_wave": 3},
    "refine": {"rounds": 1, "clients_per_round": 3},
}
PARTS: dict[str, Any] = {
    "method": "two_step",
    "federate": {"rounds": 1, "clients_per_round": 2},
    "finder": {
        "score": {"name": "shuffled", "of": "fisher"}, "schedule": {"name": "constant", "rounds": 2},
        "scope": {"name": "global", "floor": 1}, "rewind": {"name": "noise", "sigmas": 0.5}, "dead": "init",
        "densities": [0.5, 0.2],
    },
    "personalise": {"arms": ["ticket", "random"]},
}  # fmt: skip
FAULTS = {"raise": "raised", "exit": "died", "segfault": "died", "hang": "hung", "stop": "hung", "memory": "memory"}


def test_a_ray_started_here_equals_in_process_records_each_clients_gpu_and_ends_with_the_run(tmp_path: Path) -> None:
    """With cohorts, too: its workers train the same ones."""
    import ray

    with_gpus = {"workers": 2, "num_gpus": 1.0, "logical_gpus": 2}
    made = tiny.of_method("lotteryfl", federate={"clients_per_round": 3}, cohort=2, engine="ray", ray=with_gpus)
    run(made, tmp_path / "there")
    assert not ray.is_initialized()
    tiny.run(made, tmp_path / "here")
    assert tiny.facts(tmp_path / "there") == tiny.facts(tmp_path / "here")
    served = {row["client"]: row["worker"] for row in rows(tmp_path / "there", "times") if row["client"] is not None}
    assert sorted(served) == [0, 1, 2, 3] and all(worker.startswith("ray:") for worker in served.values())
    assert {worker.split()[0].partition("@")[2] for worker in served.values()} <= {"gpu0", "gpu1"}


@pytest.mark.usefixtures("shared_ray")
class TestOnOneRay:
    @pytest.mark.parametrize("name", [*tiny.each_method(), *(name for name in STUDIES if name not in tiny.METHODS)])
    def test_every_method_equals_in_process(self, name: str, two_workers: Open, tmp_path: Path) -> None:
        tiny.run(STUDIES[name](), tmp_path / "there", engine=two_workers)
        tiny.run(STUDIES[name](), tmp_path / "here")
        assert tiny.facts(tmp_path / "there") == tiny.facts(tmp_path / "here")

    def test_tickets_of_a_transformer_equal_in_process(self, two_workers: Open, tmp_path: Path) -> None:
        pytest.importorskip("transformers")
        made = bert_tickets(tmp_path, **IN_ROUNDS)
        tiny.run(made, tmp_path / "there", engine=two_workers)
        tiny.run(made, tmp_path / "here")
        assert tiny.facts(tmp_path / "there") == tiny.facts(tmp_path / "here")

    def test_parts_of_every_kind_equal_in_process(self, two_workers: Open, tmp_path: Path) -> None:
        here, there = run(study_of(**PARTS), tmp_path / "here"), tmp_path / "there"
        tiny.run(study_of(**PARTS), there, engine=two_workers)
        assert [f for f in EQUAL if (here / f).read_bytes() != (there / f).read_bytes()] == []
        served = [row for row in rows(there, "times") if row["client"] is not None]
        assert {row["client"] for row in served} == {0, 1, 2, 3} and all(row["worker"] for row in served)

    def test_faulty_clients_cost_only_themselves(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A stopped process runs no more and does not answer Ray's own request to end.

        Each that ends a worker is met once, in the rounds: to start a worker anew takes seconds.
        """
        monkeypatch.setattr(pool, "TRIES", 1)  # tests/engines/test_pool.py counts them
        count = 2 + len(FAULTS)
        study = study_of(
            fault=" ".join(FAULTS), once=str(tmp_path / "met"), clients={"count": count, "test_samples": 8},
            engine="ray", ray={"workers": 2, "memory_mb": MEMORY_MB}, job_timeout_s=5.0,
            federate={"rounds": 1, "clients_per_round": count}, personalise={"clients_per_wave": count},
        )  # fmt: skip
        out = run(study, tmp_path / "run")
        assert [(s["phase"], [(f["client"], f["kind"]) for f in s["failed"]]) for s in rows(out, "rounds")] == [
            ("federate", list(enumerate(FAULTS.values(), 2))), ("personalise", [(2, "raised")])
        ]  # fmt: skip
        answered = [row for row in rows(out, "ledger") if row["receiver"] == "server" and row["status"] == "ok"]
        assert {row["sender"] for row in answered if row["phase"] == "federate"} == {"client:0", "client:1"}
        whole = {client for client in range(count) if client != 2}
        assert {row["sender"] for row in answered if row["phase"] != "federate"} == {f"client:{c}" for c in whole}
        assert {row["client"] for row in rows(out, "metrics")} == whole
        assert all(row["worker"] for row in rows(out, "times") if row["client"] is not None)

    @pytest.mark.long
    def test_work_lost_with_its_worker_is_done_again_and_equals_in_process(self, tmp_path: Path) -> None:
        """Row 40: kill -9 of the worker's process."""
        marker = tmp_path / "killed"
        settings = {**TWO_STEP, "fault": "killed", "marker": str(marker), "finder": {"densities": [0.5]}}
        told: list[str] = []
        study = study_of(**settings, engine="ray", ray={"workers": 1})
        tiny.run(study, tmp_path / "there", engine=RayEngine(study.ray), tell=told.append)
        again = [line for line in told if "was lost" in line]
        assert marker.exists() and len(again) == 1 and "done again: client 2" in again[0]
        assert "ActorDiedError: The actor is dead because its worker process has died" in again[0]
        here = run(study_of(**settings), tmp_path / "here")
        assert [f for f in EQUAL if (here / f).read_bytes() != (tmp_path / "there" / f).read_bytes()] == []

    @pytest.mark.long
    def test_a_cluster_that_others_hold_is_said_at_once(self) -> None:
        """Rows 41 and 42: what is taken, and how many workers have a place at all."""
        import ray

        cluster = connect(None, cpus=0, gpus=None)
        holders = [cluster.spawn(Clocked, cpus=0, gpu=1.0, path=[*sys.path]) for _ in range(2)]
        ray.get([holder.start.remote("study") for holder in holders])
        told: list[str] = []
        study = study_of(engine="ray", ray={"workers": 80, "num_gpus": 0.5})
        try:
            refused = pytest.raises(StudyError, match="it took more than 3 s; taken now: [02] of 8 CPUs, 2 of 2 GPUs")
            with refused, lines_to(told.append):
                map_one(study, RayEngine(study.ray, start_timeout_s=3.0))
        finally:
            for holder in holders:
                cluster.kill(holder)
        assert len(told) == 2 and "ray.workers: 4 work, got 80" in told[0]
        assert "no room for a worker now, the wait is at most 3 s" in told[1] and "2 of 2 GPUs" in told[1]

    def test_every_client_is_served_and_no_gpu_is_oversubscribed(self) -> None:
        """Whole workers a GPU: five times 0.4 are two GPUs, and still only four fit."""
        fraction, per_gpu = 0.4, 2
        cluster = connect(None, cpus=8, gpus=2)
        share = Share(0.5, fraction)
        size = count(share, cluster.nodes(), wanted=16)
        assert size == 2 * per_gpu
        workers = Pool(
            cluster,
            size,
            name="ray",
            spawn=lambda: cluster.spawn(Clocked, cpus=share.cpus, gpu=share.asked_gpu, path=[*sys.path]),
            given={},
            limits=Limits(100.0, 30.0),
        )
        jobs = [Job(study="", phase="federate", round=1, client=c, inbox=()) for c in range(10 * size)]
        try:
            answers = [answer for _, answer in workers.map(jobs)]
        finally:
            workers.close()
        assert [a.client for a in answers] == list(range(10 * size))
        spans: dict[str, list[tuple[float, int]]] = {"gpu0": [], "gpu1": []}
        for answer in answers:
            assert isinstance(answer, Reply)
            began = float(answer.device)
            gpu = answer.worker.split()[0].partition("@")[2]
            spans[gpu] += [(began, 1), (began + answer.seconds, -1)]
        for changes in spans.values():
            assert changes
            now = [n for _, n in sorted(changes)]
            assert max(sum(now[: i + 1]) for i in range(len(now))) <= per_gpu

    def test_no_room_is_said_and_nothing_hangs(self) -> None:
        with pytest.raises(StudyError, match="ray: a worker takes 64 CPUs"):
            map_one(study_of(engine="ray", ray={"num_cpus": 64.0}))

    def test_a_start_that_takes_too_long_is_said(self) -> None:
        study = study_of(engine="ray", ray={"workers": 1})
        engine = RayEngine(study.ray, start_timeout_s=0.01)
        with pytest.raises(StudyError, match="no worker could be started: it took more than 0.01 s"):
            map_one(study, engine)

    def test_another_ray_than_the_one_in_use_is_refused(self) -> None:
        with pytest.raises(StudyError, match="ray.address: this process uses the Ray at .*, got 127.0.0.1:9"):
            map_one(study_of(engine="ray", ray={"address": "127.0.0.1:9"}))
