"""The only file that knows Ray's API: connect, put, call, wait, get, kill."""

from __future__ import annotations

import logging
import math
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Read by ray when it is imported: no usage report, and a worker without a share of a GPU keeps its own environment.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# Ray takes a process whose parent is 1 (nohup, systemd, a container's init) for a worker that has lost its node, and
# ends it without a word at the first message that fails, as some do at a shutdown. Where named, it asks for this pid.
os.environ.setdefault("RAY_RAYLET_PID", str(os.getpid()))

import ray
from ray import exceptions
from ray._private.state import available_resources_per_node  # ray's own tools ask it too; there is no public one

from fedlth.engines.pool import Lost
from fedlth.errors import StudyError

CONNECT_S = 10.0
FETCH_S = 60.0
# Lines of Ray's that say who died, not why.
NAMING = re.compile("(class_name|actor_id|pid|name|namespace|ip): |The actor died unexpectedly before finishing this")
# One thread a worker, and no spinning: two workers on two cores are several times slower with either.
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@dataclass(frozen=True)
class Cluster:
    """A connection to Ray. `owned` says that it ends here; `alone`, that Ray was started here, for nobody else."""

    owned: bool
    alone: bool = False

    def nodes(self) -> list[dict[str, float]]:
        """Return each living node's resources, such as CPU and GPU."""
        nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
        return [dict(node["Resources"]) for node in nodes if node["Alive"]]

    def free(self) -> list[dict[str, float]]:
        """Return what nobody has taken now of each living node's resources, in the order of `nodes`."""
        now = available_resources_per_node()  # type: ignore[no-untyped-call]
        nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
        return [dict(now.get(node["NodeID"], {})) for node in nodes if node["Alive"]]

    def put(self, value: object) -> Any:
        """Store a value once for every worker; the answer goes into `call` in the value's place."""
        return ray.put(value)

    def spawn(self, kind: type, *, cpus: float, gpu: float, path: Sequence[str]) -> Any:
        """Ask for a new actor; it is there once its first call returns."""
        env = ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(path)}
        if not gpu:
            env["CUDA_VISIBLE_DEVICES"] = ""
        options = {"num_cpus": cpus, "num_gpus": gpu, "max_restarts": 0, "max_task_retries": 0}
        return ray.remote(kind).options(**options, runtime_env={"env_vars": env}).remote()

    def call(self, actor: Any, method: str, *args: object, **kwargs: object) -> Any:
        """Start a method; stored values among `args` arrive as themselves."""
        return getattr(actor, method).remote(*args, **kwargs)

    def wait(self, calls: Sequence[Any], *, timeout_s: float | None) -> list[Any]:
        """Return those that have ended, at least one unless the time runs out."""
        return list(ray.wait(list(calls), num_returns=1, timeout=timeout_s)[0])

    def get(self, call: Any) -> Any:
        """Return an ended call's value, or Lost."""
        try:
            return ray.get(call, timeout=FETCH_S)
        except exceptions.OutOfMemoryError as error:
            return Lost("memory", _line(error))
        except exceptions.RayTaskError as error:
            return Lost("raised", _line(error))
        except exceptions.RayError as error:
            return Lost("died", _line(error))

    def kill(self, actor: Any) -> None:
        ray.kill(actor, no_restart=True)

    def close(self) -> None:
        if self.owned:
            ray.shutdown()


def _line(error: BaseException) -> str:
    """Return what happened as one line; Ray's own text goes on for pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    if isinstance(error, exceptions.RayTaskError) or getattr(error, "actor_init_failed", False):
        said = lines[-1]  # of a traceback
    elif isinstance(error, exceptions.RayError):
        said = " ".join([line for line in lines if not NAMING.match(line)] or lines[:1])
    else:
        said = lines[0]
    return f"{type(error).__name__}: {said}"[:300]


def connect(address: str | None, *, cpus: float, gpus: int | None) -> Cluster:
    """Connect to the Ray at `address`, or start one here with `cpus` CPUs and `gpus` GPUs (None: those it finds).

    A Ray that this process already uses is used, and left running. Raises StudyError where there is none.
    """
    if ray.is_initialized():
        used = ray.get_runtime_context().gcs_address
        if address not in (None, "auto", used):
            raise StudyError(f"ray.address: this process uses the Ray at {used} already, got {address}")
        return Cluster(owned=False)
    where: dict[str, Any] = {"address": address}
    if address is None:
        # Not None: that would join whatever cluster RAY_ADDRESS names.
        where = {"address": "local", "num_cpus": max(1, math.ceil(cpus)), "num_gpus": gpus, "include_dashboard": False}
        # After a kill -9 of this process Ray's agents first try to tell its server, by default for a minute.
        os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "5")
    else:
        _reach(address)
    try:
        ray.init(**where, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # on a machine with too much to do Ray raises a bare one
        place = "ray: cannot start Ray here" if address is None else f"ray.address: cannot reach Ray at {address}"
        raise StudyError(f"{place}: {_line(error)}") from error
    return Cluster(owned=True, alone=address is None)


def _reach(address: str) -> None:
    """Raise StudyError unless something listens there; Ray itself would try for a minute, then end the process."""
    if address in ("auto", "local"):
        return
    if address.startswith("ray://"):  # a process outside the cluster: it is not told what is free on which node
        raise StudyError(
            f"ray.address: must be host:port of the cluster's head, from a machine of the cluster, or auto; Ray's "
            f"client for other machines cannot place workers, got {address}"
        )
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or not host:
        raise StudyError(f"ray.address: must be host:port or auto, got {address!r}")
    try:
        socket.create_connection((host, int(port)), CONNECT_S).close()
    except OSError as error:
        raise StudyError(f"ray.address: cannot reach Ray at {address}: {error}") from error
