"""Flower's side of the Flower engine: messages, the two apps, the simulation. No other file of a run imports flwr."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

# Before the import, since Flower reads them once: no telemetry, no update check, no packages installed on the way.
for _name, _value in (
    ("FLWR_TELEMETRY_ENABLED", "0"),
    ("FLWR_DISABLE_UPDATE_CHECK", "1"),
    ("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "1"),
    ("RAY_USAGE_STATS_ENABLED", "0"),
    ("RAY_DEDUP_LOGS_SKIP_REGEX", r"ClientAppActor\.terminate"),  # Ray prints each worker's end as a failure
    ("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"),  # clients share the GPUs that the study's device names
    ("RAY_RAYLET_PID", str(os.getpid())),  # see ray_cluster.py
):
    os.environ.setdefault(_name, _value)

from flwr.app import ConfigRecord, Context, Message, RecordDict  # noqa: E402
from flwr.clientapp import ClientApp  # noqa: E402
from flwr.serverapp import Grid, ServerApp  # noqa: E402
from flwr.supercore.inflatable.inflatable_object import (  # noqa: E402
    get_all_nested_objects,
    no_object_id_recompute,
)
from httpx import HTTPError  # noqa: E402

from fedlth.data.own import Here, become  # noqa: E402
from fedlth.engines import flower_client  # noqa: E402
from fedlth.engines.flower_client import Step  # noqa: E402
from fedlth.engines.flower_counts import counted  # noqa: E402
from fedlth.engines.flower_engine import UNREADABLE, Back, FlowerEngine, Sent  # noqa: E402
from fedlth.engines.flower_keys import Identity, anybody, owners_in  # noqa: E402
from fedlth.engines.flower_link import crossing_s, no_link  # noqa: E402
from fedlth.engines.flower_nodes import DEVICES  # noqa: E402
from fedlth.engines.flower_record import View  # noqa: E402
from fedlth.engines.flower_session import FlowerRun, again, interruptible, run_of  # noqa: E402
from fedlth.engines.inprocess import one_line  # noqa: E402
from fedlth.errors import NothingUsable, StudyError  # noqa: E402
from fedlth.experiment.experiment import Experiment  # noqa: E402
from fedlth.federation.answer_bytes import most_at_once  # noqa: E402
from fedlth.federation.client_step import client_step  # noqa: E402
from fedlth.kernel import kernel  # noqa: E402
from fedlth.output import lines_to  # noqa: E402
from fedlth.study.schema import Study  # noqa: E402

WORKERS = 2
SIMULATED_WAIT_S = 10.0  # a simulation registers all its nodes at once, a moment after the ServerApp has started
SIMULATED_ANSWER_S = 300.0  # but none answers before Ray has started, which a busy machine takes minutes for, or fails
# Flower's actor pool puts a dead actor back, and every later job that meets it fails. Ray restarts it with these, which
# reach it because Flower hands client_resources on to `actor.options()`; `flwr run` has no such setting.
RESTARTS = {"max_restarts": -1, "max_task_retries": 1}


class GridTransport:
    """Messages over a Flower grid. Framed bytes are the sum of `deflate()` over a message and all objects in it.

    On a network, an object that the other end has already (a broadcast) is not sent again; each message counts it.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        # Only the simulation's grid names its interval; over HTTP each poll is a request.
        self.simulated = hasattr(grid, "pull_interval")
        self.poll_s = 0.1 if self.simulated else 1.0

    def online(self) -> Iterable[int]:
        return self._grid.get_node_ids()

    def send(self, records: View, *, node: int, kind: str) -> Sent:
        message = Message(_content(records), node, kind)
        size = _framed_bytes(message)
        self._grid.push_messages([message])
        return Sent(message.metadata.message_id, size)

    def collect(self, ids: Iterable[str]) -> list[Back]:
        # One by one: Flower unpacks all that it pulls or raises, and what was pulled is not given twice.
        return [back for id in ids for back in self._pulled(id)]

    def _pulled(self, id: str) -> list[Back]:
        # Flower 1.41 gives no size before it has pulled a message whole: a message's metadata has none, its tree of
        # objects only their ids. So what is too long is refused by who reads it (flower_record, wire), after the pull.
        try:
            return [_back(m) for m in self._grid.pull_messages([id])]
        except (OSError, HTTPError):  # of the link to the SuperLink, not of the message
            raise
        except Exception as error:
            return [Back(id, code=UNREADABLE, reason=f"unreadable answer: {one_line(error)}")]


def _back(reply: Message) -> Back:
    sent = reply.metadata.reply_to_message_id
    if reply.has_error():
        reason = " ".join(str(reply.error.reason).split())
        return Back(sent, code=reply.error.code, reason=reason)
    return Back(sent, framed_bytes=_framed_bytes(reply), records=_records(reply))


def _framed_bytes(message: Message) -> int:
    with no_object_id_recompute():  # or each object is serialised and hashed once for every object above it
        return sum(len(part.deflate()) for part in get_all_nested_objects(message).values())


def _content(records: View) -> RecordDict:
    return RecordDict({name: ConfigRecord(dict(record)) for name, record in records.items()})


def _records(message: Message) -> dict[str, dict[str, Any]]:
    """Return what a message holds. Records of other kinds have values of other types, which flower_record refuses."""
    return {name: dict(record) for name, record in message.content.items()}


def make_client_app(out: str = "", *, restarts: bool = False, step: Step = client_step) -> ClientApp:
    """Return the client's side; `out` is the run's folder where no run config names it.

    `restarts` says that a worker which ends is replaced: one that holds a hung step makes room for a fresh one.
    `step` is there for fault injection.
    """
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        answer = flower_client.answer_roll_call(_records(message), context.node_config)
        return Message(_content(answer), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if restarts:
            flower_client.end_if_hung()
        place = flower_client.Place.of(context.node_config, out or str(context.run_config.get("out", "")))
        return Message(_content(flower_client.serve(_records(message), place, step=step)), reply_to=message)

    return app


def make_server_app(app_dir: Path) -> ServerApp:
    """Return the server's side under `flwr run`, which reads the study from the run config."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        def tell(line: str) -> None:
            print(f"fedlth: {line}", flush=True)

        transport, wait_s = GridTransport(grid), float(str(context.run_config["wait-s"]))

        def count(study: Study) -> None:
            if transport.simulated:  # it reads the folders of all
                return
            objection = _identity(grid, context)
            pause = partial(time.sleep, transport.poll_s)
            become(Here(counts=counted(study, transport, wait_s=wait_s, pause=pause, objection=objection)))

        try:
            with lines_to(tell):
                run = run_of(context.run_config, app_dir, count)
            if run is None:
                tell(f"{context.run_config['out']}: this run has ended already")
                return
            # Said now, since whoever reads this hears nothing more from a SuperLink that has gone.
            tell(f"if the SuperLink ends before this run: {again(context.run_config)} continues")
            with lines_to(tell):
                _run(run, transport, threading.Event(), wait_s=wait_s, objection=_identity(grid, context))
        except StudyError as error:
            tell(f"error: {error}")
            raise
        except BaseException as error:  # Flower's for a run that has ended under us is one
            tell(f"error: {one_line(error)}; what was committed is kept: {again(context.run_config)} continues")
            raise
        tell(f"done: {run.out}; its report: fedlth report {run.out}")

    return app


def _identity(grid: Grid, context: Context) -> Callable[[int, int], str]:
    """Return what holds a node's word against its key, where the run config names a folder of the devices' keys."""
    folder = str(context.run_config.get("keys", ""))
    if not folder:
        return anybody
    return Identity(owners_in(Path(folder)), lambda: {node.node_id: node.public_key for node in grid.get_nodes()})


def _run(
    run: FlowerRun, transport: GridTransport, stop: threading.Event, *, wait_s: float,
    objection: Callable[[int, int], str] = anybody,
) -> None:  # fmt: skip
    if transport.simulated and run.experiment.study.compute == "sparse":
        kernel.warm()  # its workers are on this machine, and find what is compiled here; devices do not
    up, clients = most_at_once(run.experiment, 1)[0], run.experiment.study.clients.count
    engine = FlowerEngine(
        transport, study=run.experiment.study, out=run.out, stop=stop,
        wait_s=SIMULATED_WAIT_S if transport.simulated else wait_s, objection=objection,
        answer_s=SIMULATED_ANSWER_S if transport.simulated else None,
        link_s=no_link if transport.simulated else lambda down: crossing_s(down + up),
        remedy=f"flwr run ... --federation-config num-supernodes={clients}" if transport.simulated else DEVICES,
    )  # fmt: skip
    run.run(engine)


def run_under_flower(
    experiment: Experiment, out: Path, *, resume: bool = False, notes: Sequence[str] = (),
    step: Step = client_step,
) -> None:  # fmt: skip
    """Run an experiment in Flower's simulation on this machine, one SuperNode a client, two workers.

    What the run raises is raised here; Ctrl-C ends it after the client steps that are under way.
    """
    from flwr.simulation import run_simulation  # no device needs it, and it is a third of a client's start

    # Flower's workers have working folders of their own.
    run, stop, ended = FlowerRun(experiment, out.resolve(), resume, tuple(notes)), threading.Event(), threading.Event()
    raised: list[BaseException] = []
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            _run(run, GridTransport(grid), stop, wait_s=SIMULATED_WAIT_S)
        except BaseException as error:  # also KeyboardInterrupt, which Flower would lose in its thread
            raised.append(error)
        finally:
            ended.set()

    try:
        with _quiet(), interruptible(stop):
            run_simulation(
                server_app=app,
                client_app=make_client_app(str(run.out), restarts=True, step=step),
                num_supernodes=experiment.study.clients.count,
                backend_config={
                    "init_args": {
                        "address": "local",  # or it joins the cluster of RAY_ADDRESS, or one that has left its address
                        "num_cpus": WORKERS,
                        "include_dashboard": False,
                        "logging_level": logging.ERROR,
                        "log_to_driver": False,
                    },
                    "client_resources": {"num_cpus": 1, "num_gpus": 0.0, **RESTARTS},
                },
            )
    except Exception as error:
        stop.set()  # the simulation broke; its ServerApp, in a thread of its own, would wait for answers
        ended.wait(60)
        raise NothingUsable(f"flower: the simulation broke: {one_line(_first_cause(error))}") from error
    if raised:
        raise raised[0]


def _first_cause(error: BaseException) -> BaseException:
    return error if error.__cause__ is None else _first_cause(error.__cause__)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Flower's log off the user's screen (what goes wrong is raised or recorded), and its hands off PYTHONPATH."""
    log, path = logging.getLogger("flwr"), os.environ.get("PYTHONPATH")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)
        if path is None:
            os.environ.pop("PYTHONPATH", None)
        else:
            os.environ["PYTHONPATH"] = path
