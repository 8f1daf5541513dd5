"""The Ray engine on real processes: equal to in-process, placed as asked, and not undone by a client's death."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty import Clocked
from ray_study import EQUAL, map_one, rows, run, study_of

from fedlth.engines.pool import Limits, Pool
from fedlth.engines.ray import RayEngine
from fedlth.engines.ray_cluster import connect
from fedlth.engines.ray_placement import Share, count
from fedlth.errors import StudyError
from fedlth.federation.jobs import Job, Reply

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
LOTTERY: dict[str, Any] = {"method": "lotteryfl", "federate": {"rounds": 3, "clients_per_round": 3}}


def test_a_ray_started_here_equals_in_process_and_ends_with_the_run(tmp_path: Path) -> None:
    import ray

    here = run(study_of(**TWO_STEP), tmp_path / "here")
    there = run(study_of(**TWO_STEP, engine="ray", ray={"workers": 2}), tmp_path / "ray-2")
    assert not ray.is_initialized()
    assert [f for f in EQUAL if (here / f).read_bytes() != (there / f).read_bytes()] == []
    workers = [row["worker"] for row in rows(there, "times") if row["client"] is not None]
    assert all(worker.startswith("ray:") for worker in workers)


def test_in_process_survives_a_client_that_raises(tmp_path: Path) -> None:
    out = run(study_of(fault="raise"), tmp_path / "run")
    assert [[(f["client"], f["kind"]) for f in step["failed"]] for step in rows(out, "rounds")] == [[(2, "raised")]] * 2


@pytest.mark.usefixtures("shared_ray")
class TestOnOneRay:
    @pytest.mark.parametrize("workers", [1, 2])
    @pytest.mark.parametrize("settings", [TWO_STEP, LOTTERY, PARTS], ids=["two_step", "lotteryfl", "parts"])
    def test_any_number_of_workers_equals_in_process(
        self, settings: dict[str, Any], workers: int, tmp_path: Path
    ) -> None:
        here = run(study_of(**settings), tmp_path / "here")
        there = run(study_of(**settings, engine="ray", ray={"workers": workers}), tmp_path / "there")
        assert [f for f in EQUAL if (here / f).read_bytes() != (there / f).read_bytes()] == []

    @pytest.mark.parametrize(
        ("fault", "kind", "limits"),
        [
            ("raise", "raised", {}),
            ("exit", "died", {}),
            ("segfault", "died", {}),
            ("hang", "hung", {"job_timeout_s": 5.0}),
            ("memory", "memory", {"memory_mb": MEMORY_MB}),
        ],
    )
    def test_a_faulty_client_costs_only_itself(
        self, fault: str, kind: str, limits: dict[str, Any], tmp_path: Path
    ) -> None:
        ray = {"workers": 2, **{k: v for k, v in limits.items() if k == "memory_mb"}}
        study = study_of(fault=fault, engine="ray", ray=ray, job_timeout_s=limits.get("job_timeout_s"))
        began = time.monotonic()
        out = run(study, tmp_path / "run")
        assert time.monotonic() - began < 120
        steps = rows(out, "rounds")
        assert [(s["phase"], [(f["client"], f["kind"]) for f in s["failed"]]) for s in steps] == [
            ("federate", [(2, kind)]),
            ("personalise", [(2, kind)]),
        ]
        ok = {row["sender"] for row in rows(out, "ledger") if row["receiver"] == "server" and row["status"] == "ok"}
        assert ok == {"client:0", "client:1", "client:3"}
        assert {row["client"] for row in rows(out, "metrics")} == {0, 1, 3}
        assert all(row["worker"] for row in rows(out, "times") if row["client"] is not None)

    def test_work_lost_with_its_worker_is_done_again_and_equals_in_process(self, tmp_path: Path) -> None:
        """Row 40: kill -9 of the worker's process."""
        marker = tmp_path / "killed"
        settings = {**TWO_STEP, "fault": "killed", "marker": str(marker), "finder": {"densities": [0.5]}}
        told: list[str] = []
        study = study_of(**settings, engine="ray", ray={"workers": 2})
        tiny.run(study, tmp_path / "there", engine=RayEngine(study.ray, tell=told.append), tell=lambda line: None)
        assert marker.exists() and len(told) == 1 and "done again: client 2" in told[0]
        assert "ActorDiedError: The actor is dead because its worker process has died" in told[0]
        here = run(study_of(**settings), tmp_path / "here")
        assert [f for f in EQUAL if (here / f).read_bytes() != (tmp_path / "there" / f).read_bytes()] == []

    def test_a_cluster_that_others_hold_is_said_at_once(self) -> None:
        """Rows 41 and 42: what is taken, and how many workers have a place at all."""
        import ray

        cluster = connect(None, cpus=0, gpus=None)
        holders = [cluster.spawn(Clocked, cpus=0, gpu=1.0, path=[*sys.path]) for _ in range(2)]
        ray.get([holder.start.remote("study") for holder in holders])
        told: list[str] = []
        study = study_of(engine="ray", ray={"workers": 80, "num_gpus": 0.5})
        try:
            with pytest.raises(StudyError, match="it took more than 3 s; taken now: 0 of 8 CPUs, 2 of 2 GPUs"):
                map_one(study, RayEngine(study.ray, start_timeout_s=3.0, tell=told.append))
        finally:
            for holder in holders:
                cluster.kill(holder)
        assert len(told) == 2 and "ray.workers: 4 work, got 80" in told[0]
        assert "no room for a worker now, the wait is at most 3 s" in told[1] and "2 of 2 GPUs" in told[1]

    def test_a_stopped_worker_is_hung_and_replaced(self, tmp_path: Path) -> None:
        """A process that no longer runs at all does not answer Ray's own request to end."""
        study = study_of(fault="stop", engine="ray", ray={"workers": 1}, job_timeout_s=5.0)
        out = run(study, tmp_path / "run")
        assert [(f["client"], f["kind"]) for f in rows(out, "rounds")[0]["failed"]] == [(2, "hung")]

    def test_the_gpu_of_each_client_is_recorded(self, tmp_path: Path) -> None:
        study = study_of(engine="ray", ray={"workers": 2, "num_gpus": 1.0, "logical_gpus": 2})
        out = run(study, tmp_path / "run")
        served = {row["client"]: row["worker"] for row in rows(out, "times") if row["client"] is not None}
        assert sorted(served) == [0, 1, 2, 3]
        assert {worker.split()[0].partition("@")[2] for worker in served.values()} <= {"gpu0", "gpu1"}

    @pytest.mark.parametrize(("fraction", "per_gpu"), [(0.25, 4), (0.4, 2), (0.5, 2), (1.0, 1)])
    def test_every_client_is_served_and_no_gpu_is_oversubscribed(self, fraction: float, per_gpu: int) -> None:
        cluster = connect(None, cpus=8, gpus=2)
        share = Share(0.5, fraction)
        size = count(share, cluster.nodes(), wanted=16)
        assert size == 2 * per_gpu
        pool = Pool(
            cluster,
            size,
            name="ray",
            spawn=lambda: cluster.spawn(Clocked, cpus=share.cpus, gpu=share.asked_gpu, path=[*sys.path]),
            given={},
            limits=Limits(100.0, 30.0),
        )
        jobs = [Job(study="", phase="federate", round=1, client=c, inbox=()) for c in range(20 * size)]
        try:
            answers = [answer for _, answer in pool.map(jobs)]
        finally:
            pool.close()
        assert [a.client for a in answers] == list(range(20 * size))
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
