"""The client's side of the Flower engine: its own state on its own disk, and a step that cannot hang for ever."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedlth.engines import flower_counts, flower_versions
from fedlth.engines.flower_record import BODY, HEAD, Order, OtherVersion, Records, View, of_answer, to_order
from fedlth.engines.inprocess import attempt, one_line
from fedlth.errors import StudyError
from fedlth.experiment import device_ticket
from fedlth.experiment.experiment import open_experiment
from fedlth.federation.client_step import client_step
from fedlth.federation.jobs import Failure, Job, Reply
from fedlth.kernel import kernel
from fedlth.storage.client_state import ClientState
from fedlth.storage.store import Store
from fedlth.training.task import forget_tasks

Step = Callable[[Job], Reply]

PARTITION, STATE_DIR, DATA_DIR = "partition-id", "state-dir", "data-dir"
RUN_NAME, VERSION_NAME = re.compile(r"[0-9a-f]{16}"), re.compile(r"[a-z_]+-[0-9]+|")


@dataclass(frozen=True)
class Place:
    """Where a client lives: the partition it serves, and the folders its state may lie in.

    `state_dir` is the device's own (`--node-config 'state-dir="..."'`); `out` is the run's folder, which serves when
    client and server share a machine. `data_dir` is the folder of a device's own data (data.own).
    """

    partition: int
    state_dir: Path | None
    out: Path | None
    data_dir: Path | None = None

    @staticmethod
    def of(node_config: Mapping[str, Any], out: str) -> Place:
        """Read a node's config; raise StudyError where it does not say which partition the node serves."""
        partition, folder = node_config.get(PARTITION), node_config.get(STATE_DIR)
        if not isinstance(partition, int) or isinstance(partition, bool) or partition < 0:
            raise StudyError(f'node config: {PARTITION} must be a whole number: --node-config "{PARTITION}=0"')
        data = node_config.get(DATA_DIR)
        return Place(
            partition, Path(str(folder)) if folder else None, Path(out) if out else None,
            Path(str(data)) if data else None,
        )  # fmt: skip

    def store(self, run: str) -> Store:
        """Return the store of this run's state: versions of two runs have equal names, so each has its own folder."""
        if self.state_dir is not None:
            return Store(self.state_dir / run)
        if self.out is not None and (self.out / "config.yaml").exists():
            return Store(self.out / "devices")
        raise StudyError(
            f"node {self.partition}: the run folder is not on this machine, so the node needs a folder for its state: "
            f"""--node-config 'partition-id={self.partition} state-dir="/path"'"""
        )


def answer_roll_call(records: View, node_config: Mapping[str, Any]) -> Records:
    """Return the records of the answer to the roll call, with what else the server's log should say of this device."""
    said: Any = roll_call(records, node_config)
    answer: Records = {HEAD: {BODY: said}}
    if isinstance(said, int) and (remark := flower_versions.compared(records)[1]):
        answer[flower_versions.REMARK] = {BODY: remark}
    return answer


def roll_call(records: View, node_config: Mapping[str, Any]) -> int | str:
    """Answer the roll call: the partition that this node serves, or one line about why it cannot take part.

    The query names the server's versions and the study's compute backend, so that a device of others, or without its
    packages, is known before round 1; where it asks for the numbers of examples that live here alone, these are the
    answer.
    """
    try:
        place = Place.of(node_config, "")
        if lacks := flower_versions.compared(records)[0]:
            return f"{PARTITION} {place.partition}: has {lacks}"
        if question := records.get(flower_counts.COUNT, {}).get(BODY):
            flower_counts.settle(place.partition, place.data_dir)
            return _counts(place, str(question))
    except StudyError as error:
        return str(error)
    if records.get(HEAD, {}).get(BODY) == "sparse" and (lacks := kernel.available()):
        return f"{PARTITION} {place.partition}: compute: sparse, but here {lacks}"
    return place.partition


def _counts(place: Place, question: str) -> str:
    """Return this client's counts, or one line about why there are none, which says whose data these are."""
    try:
        return flower_counts.told(question)
    except StudyError as error:
        return f"{PARTITION} {place.partition}: {error}"


def serve(records: View, place: Place, *, step: Step = client_step) -> Records:
    """Answer one message. Whatever goes wrong in here is an answer too, except the death of the process."""
    answer: Reply | Failure
    flower_counts.settle(place.partition, place.data_dir)
    try:
        answer = _serve(to_order(records), place, step)
    except OtherVersion as error:  # said to the server, where somebody reads it
        round, client = (error.head.get(name) for name in ("round", "client"))
        named = [one if isinstance(one, int) else 0 for one in (round, client)]
        answer = Failure(round=named[0], client=named[1], kind="raised", reason=str(error))
    return of_answer(replace(answer, worker=f"pid {os.getpid()}"))


def _serve(order: Order, place: Place, step: Step) -> Reply | Failure:
    job = order.job
    try:
        _check(order, place)
        store = place.store(order.run)
        state = store.held(job.client, job.version)
        # Before the step, so that a step that comes late deletes nothing that a later one wrote; and never by an order
        # of no version, which may be the first one come twice.
        if state is not None:
            store.drop_others(job.client, job.version)
    except (ValueError, StudyError, OSError) as error:
        return Failure(round=job.round, client=job.client, kind="raised", reason=one_line(error))
    answer = bounded(step, replace(job, state=state), order.timeout_s)
    if isinstance(answer, Reply) and answer.state is not None:
        try:
            store.put(job.client, f"{job.phase}-{job.round}", answer.state)
            if place.state_dir is not None and step is client_step:  # it predicts with its own ticket, run or no run
                experiment, kept = open_experiment(job.study), ClientState.from_bytes(answer.state)
                device_ticket.keep(experiment, job.client, job.phase, kept, store.root, name=order.name)
        except OSError as error:
            return Failure(round=job.round, client=job.client, kind="raised", reason=one_line(error))
    return answer


def _check(order: Order, place: Place) -> None:
    """Refuse an order for another client, and names that would leave the state's folder."""
    job = order.job
    if job.client != place.partition:
        raise ValueError(f"a job for client {job.client} came to the node of partition {place.partition}")
    if not RUN_NAME.fullmatch(order.run) or not VERSION_NAME.fullmatch(job.version):
        raise ValueError("the names of the run and of the state's version must be plain")
    if not re.fullmatch(r"[a-z_]+", job.phase):
        raise ValueError("the name of the phase must be plain")


# Steps that ran past their time and cannot be stopped from inside Python; they end with their process.
HUNG: list[threading.Thread] = []


def end_if_hung() -> None:
    """End this process if a hung step still runs in it. Only for a worker that its engine replaces."""
    if any(thread.is_alive() for thread in HUNG):
        os._exit(1)


def bounded(step: Step, job: Job, timeout_s: float) -> Reply | Failure:
    """Run one step for at most `timeout_s`; one that takes longer is a Failure, and its thread is given up.

    Flower has no limit of its own: a step that hangs keeps its worker, and the simulation then never ends.
    """
    answers: list[Reply | Failure] = []

    def target() -> None:
        import torch

        torch.set_num_threads(1)  # a thread's own setting for BLAS; open_task sets it for the thread that built it
        try:
            answers.append(attempt(step, job))
        except BaseException as error:  # sys.exit in a step ends the step, not the node
            answers.append(Failure(round=job.round, client=job.client, kind="died", reason=one_line(error)))

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if answers:
        return answers[0]
    HUNG.append(thread)
    forget_tasks()  # the hung step holds this task's one module; the next step gets another
    return Failure(round=job.round, client=job.client, kind="hung", reason=f"no answer within {timeout_s:g} s")
