"""A Ray of several nodes: equal to in-process, a node that dies costs its own jobs only, no fraction is added up.

The nodes are Ray's own test cluster: processes of this machine, each with resources, a scheduler and its own store.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ray_study import EQUAL, engine_of, map_one, rows, run, study_of

from fedlth.errors import StudyError
from fedlth.output import lines_to
from tests import tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.timeout(280),
    # Ray's own: it forgets its daemons and what it opened for them when it is shut down.
    pytest.mark.filterwarnings(r"ignore:subprocess \d+ is still running:ResourceWarning"),
    pytest.mark.filterwarnings(r"ignore:unclosed file <_io\.\w+ name='/dev/null':ResourceWarning"),
]

MORE: dict[str, Any] = {
    "method": "two_step",
    "federate": {"rounds": 2, "clients_per_round": 4},
    "finder": {"densities": [0.5]},
    "personalise": {"epochs": 1, "clients_per_wave": 4},
}


@contextmanager
def nodes(*resources: dict[str, Any]) -> Iterator[Any]:
    """Start a cluster whose head has no place for workers, and a node with each of these resources."""
    from ray.cluster_utils import Cluster

    cluster: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for one in resources:
            cluster.add_node(**one)
        yield cluster
    finally:
        cluster.shutdown()
        gc.collect()


def served(out: Path) -> set[str]:
    """Return the places that trained clients."""
    return {row["worker"].split()[0] for row in rows(out, "times") if row["client"] is not None}


def unequal(here: Path, there: Path) -> list[str]:
    return [name for name in EQUAL if (here / name).read_bytes() != (there / name).read_bytes()]


def once(true: Callable[[], object], then: Callable[[], None]) -> threading.Thread:
    """Do something as soon as it is true, at most two minutes from now."""

    def wait() -> None:
        for _ in range(1200):
            if true():
                return then()
            time.sleep(0.1)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_three_nodes_equal_in_process_and_one_that_dies_in_mid_round_costs_its_own_jobs(tmp_path: Path) -> None:
    here = run(study_of(**MORE), tmp_path / "here")
    marker, told = tmp_path / "held", list[str]()
    with nodes({"num_cpus": 1}, {"num_cpus": 1}, {"num_cpus": 1}) as cluster:
        ray = {"address": cluster.address, "workers": 3}

        def kill_its_node() -> None:
            raylet = int(marker.read_text())
            (held,) = [n for n in cluster.worker_nodes if raylet in pids_of(n)]
            cluster.remove_node(held, allow_graceful=False)

        whole = run(study_of(**MORE, engine="ray", ray=ray), tmp_path / "whole")
        assert unequal(here, whole) == [] and served(whole) == {"ray:0", "ray:1", "ray:2"}
        made = study_of(**MORE, fault="held", marker=str(marker), engine="ray", ray=ray)
        killer = once(marker.exists, kill_its_node)
        with lines_to(told.append):
            out = run(made, tmp_path / "killed")
        killer.join()
        assert len(cluster.worker_nodes) == 2
    again = [line for line in told if "was lost" in line]
    assert again and all("done again: client" in line for line in again), told
    marker.touch()
    faulty = run(study_of(**MORE, fault="held", marker=str(marker)), tmp_path / "faulty")
    assert unequal(faulty, out) == []


def test_a_node_that_joins_is_used_from_the_next_round_on(tmp_path: Path) -> None:
    here, out, told = run(study_of(**MORE), tmp_path / "here"), tmp_path / "out", list[str]()
    with nodes({"num_cpus": 1}) as cluster:
        made = study_of(**MORE, engine="ray", ray={"address": cluster.address, "workers": 3})
        engine = engine_of(made)

        def join(line: str) -> None:
            told.append(line)
            if "] federate 1:" in line:
                cluster.add_node(num_cpus=1)
            if "] federate 2:" in line:  # whose jobs may all be done before the new worker has started
                assert engine._opened is not None
                ray, pool = engine._opened
                assert ray.wait([pool.places[1].call], timeout_s=200)

        with lines_to(join):
            tiny.run(made, out, engine=engine)
    assert "note: ray: the cluster has grown: 2 workers fit, 1 before" in told, told
    assert served(out) == {"ray:0", "ray:1"} and unequal(here, out) == []


def pids_of(node: Any) -> set[int]:
    return {info.process.pid for infos in node.all_processes.values() for info in infos}


def test_a_fraction_is_of_one_node_and_what_fits_none_is_refused_with_the_arithmetic() -> None:
    with nodes({"num_cpus": 2, "num_gpus": 1}, {"num_cpus": 1, "num_gpus": 1}) as cluster:

        def ask(**more: float) -> list[str]:
            told: list[str] = []
            with lines_to(told.append):
                map_one(study_of(engine="ray", ray={"address": cluster.address, "workers": 9, **more}))
            return told

        began = time.monotonic()
        with pytest.raises(StudyError, match="a worker takes 3 CPUs and 0 of a GPU, the nodes have: .*2 CPUs and 1"):
            ask(num_cpus=3)  # together they have three
        assert time.monotonic() - began < 60, "it hung"
        (told,) = [line for line in ask(num_cpus=0.5, num_gpus=0.6) if "ray.workers" in line]
        assert "2 work, got 9: a worker takes 0.5 CPUs and 0.6 of a GPU" in told
