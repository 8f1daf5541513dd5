"""Flower's side of the standing process: what flower-superexec does, without a start of Python for each message.

Flower's own way to have processes outside of a SuperNode is `--isolation process`: whoever holds the secret asks the
SuperNode's Runtime API for tasks, and answers each with the token that comes with it (flwr 1.41, run_superexec.py).
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.auth import load_superexec_auth_secret
from flwr.supercore.constant import TASK_TYPE_TO_COMMAND, TaskType
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import run_clientapp

import fedlth.engines.flower_app  # noqa: F401  what every message needs
from fedlth.engines.standing import LoadedFiles, Standing, alive, freeze, patient
from fedlth.errors import StudyError

log = logging.getLogger(__name__)

WAITING = "FEDLTH_WAITING_MESSAGE"  # how a message's token reaches the process that is begun anew for it
POLL_S = 1.0  # flower-superexec's own


def serve_messages(address: str, supernode: int, secret: Path) -> None:
    """Answer the messages of a SuperNode at `address` (host:port) until its process, `supernode`, has ended.

    `secret` is the file that the SuperNode was given as --superexec-auth-secret-file. When a file that is imported
    here has changed, this process begins anew, in its place. Raises where this Flower is not the one that is known.
    """
    if not sys.platform.startswith("linux"):
        raise StudyError("deploy serve: only Linux tells of other processes and of threads what must be known here")
    inspect.signature(run_clientapp).bind(**_asked(address, "", supernode))  # another Flower's: now, not in each child
    client = RuntimeHttpClient.from_server_address(
        address, True, None,
        [
            RuntimeVersionHttpInterceptor(component_name="SuperExec"),
            SuperExecAuthHttpInterceptor(
                master_secret=load_superexec_auth_secret(str(secret)) or b"",
                protected_methods={"/flwr.proto.Runtime/AcquireTask"},
            ),
        ],
    )  # fmt: skip
    request = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])

    def token() -> str | None:
        answer = client.AcquireTask(request)
        return str(answer.token) if answer.HasField("task") and answer.token else None

    standing = Standing(
        acquire=patient(token),
        serve=lambda token: run_clientapp(**_asked(address, token, supernode)),
        fresh=lambda token: [
            TASK_TYPE_TO_COMMAND[TaskType.CLIENT_APP], "--runtime-api-address", address, "--token", token, "--insecure",
            "--parent-pid", str(supernode),
        ],
        loaded=LoadedFiles.here(),
    )  # fmt: skip
    freeze()
    log.info(f"standing: one process for the messages of SuperNode {supernode} at {address}")
    if waiting := os.environ.pop(WAITING, ""):
        standing.answer(waiting)
    while alive(supernode):
        if waiting := standing.turn():
            log.info("standing: begins anew")
            os.environ[WAITING] = waiting
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
        time.sleep(POLL_S)
    log.info("standing: its SuperNode has ended")


def _asked(address: str, token: str, supernode: int) -> dict[str, Any]:
    # The child ends with its SuperNode, as it would under flower-superexec. Its Runtime API is on this machine alone.
    return {
        "runtime_api_address": address, "token": token, "insecure": True, "certificates": None,
        "parent_pid": supernode, "runtime_dependency_install": False,
    }  # fmt: skip
