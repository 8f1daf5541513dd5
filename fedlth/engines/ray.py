"""The Ray engine: jobs go to worker processes, on one machine or a cluster. It must equal the in-process engine."""

from __future__ import annotations

import logging
import os
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from fedlth.engines.cohort import peeked, size_of
from fedlth.engines.pool import Limits, Pool
from fedlth.engines.ray_placement import count, in_use, room, share_of, shortage, taken
from fedlth.engines.worker import Worker
from fedlth.federation.jobs import Again, Answers, Enough, Job, never
from fedlth.study import sections

if TYPE_CHECKING:
    from fedlth.engines.ray_cluster import Cluster

log = logging.getLogger(__name__)

START_S = 300.0


class RayEngine:
    """Workers of a Ray cluster; connected at the first map, so that a study's mistakes are told before.

    `job_timeout_s` limits a job from the moment a worker has it; `start_timeout_s` limits a worker's start, the
    building of the study's task included. Raises StudyError for a placement that cannot be.
    """

    name = "ray"
    holds_state = False
    processes = True  # jobs run in processes of their own, which may end

    def __init__(
        self,
        ray: sections.Ray,
        *,
        job_timeout_s: float | None = None,
        device: str = "cpu",
        start_timeout_s: float = START_S,
    ) -> None:
        self.settings, self.limits = ray, Limits(start_timeout_s, job_timeout_s)
        self.share = share_of(ray, device=device, total_memory_mb=_smallest_gpu_mb)
        self._opened: tuple[Cluster, Pool] | None = None
        self._room = 0  # how many workers fitted when it was last looked at

    def map(self, jobs: Iterable[Job], /, *, again: Again = never) -> Answers:
        first, jobs = peeked(jobs)
        if first is None:
            return
        if self._opened is None:
            self._opened = self._open()
        else:
            self._use_what_joined(*self._opened)
        yield from self._opened[1].map(jobs, cohort=size_of(first), again=again)

    def present(self, *, until: Enough | None = None) -> None:
        return None  # all are: a client is where its job is done

    def late(self) -> tuple[()]:
        return ()

    def close(self) -> None:
        """End the workers, and Ray itself where it was started here."""
        if self._opened is not None:
            cluster, pool = self._opened
            self._opened = None
            try:
                pool.close()
            finally:
                cluster.close()

    def _use_what_joined(self, cluster: Cluster, pool: Pool) -> None:
        """Make room for workers on nodes that the cluster did not have; one that left has been noticed by its loss."""
        if cluster.alone:
            return
        before, self._room = self._room, room(self.share, cluster.nodes(), wanted=self.settings.workers)
        if self._room > before:
            log.info(f"note: ray: the cluster has grown: {self._room} workers fit, {before} before")
            pool.grow(self._room)

    def _open(self) -> tuple[Cluster, Pool]:
        from fedlth.engines.ray_cluster import connect

        settings, share = self.settings, self.share
        cluster = connect(settings.address, cpus=settings.workers * settings.num_cpus, gpus=settings.logical_gpus)
        try:
            nodes = cluster.nodes()
            size = self._room = count(share, nodes, wanted=settings.workers)
            said = [shortage(share, nodes, wanted=settings.workers)]
            if not cluster.alone:
                said.append(taken(share, nodes, cluster.free(), size=size, wait_s=self.limits.start_s))
            for line in filter(None, said):
                log.info(line)
        except BaseException:
            cluster.close()
            raise
        path = _own_path()
        given = {"path": path, "folder": os.getcwd(), "memory_mb": settings.memory_mb}
        limits = self.limits

        def spawn() -> object:
            return cluster.spawn(Worker, cpus=share.cpus, gpu=share.asked_gpu, path=path)

        def waits_for() -> str:
            return "" if cluster.alone else f"taken now: {in_use(cluster.nodes(), cluster.free())}"

        return cluster, Pool(cluster, size, name="ray", spawn=spawn, given=given, limits=limits, room=waits_for)


def _own_path() -> list[str]:
    """Return where this process finds modules, the working directory first, without Python's own folders.

    Those may lie elsewhere on another machine, where the driver's would come before them.
    """
    python = set(sysconfig.get_paths().values())
    return [os.getcwd(), *(p for p in sys.path if p not in python and Path(p).is_dir() and "lib-dynload" not in p)]


def _smallest_gpu_mb() -> int | None:
    import torch

    sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
    return min(sizes) // 2**20 if sizes else None
