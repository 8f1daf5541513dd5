"""A whole run: folder, header, loop, and what is left when it ends. The CLI and the Python API are both this."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fedlth.data.split import label_counts
from fedlth.errors import NothingUsable, StudyError
from fedlth.experiment import saved_ticket
from fedlth.experiment.experiment import Experiment
from fedlth.experiment.mask_defence import defence_of, told
from fedlth.federation.chaotic import chaotic
from fedlth.federation.downloads import broadcast
from fedlth.federation.jobs import Engine
from fedlth.federation.missing import last_waves, missing
from fedlth.federation.rounds import Federation
from fedlth.federation.spent import spent_by
from fedlth.kernel import kernel
from fedlth.storage import ticket_file
from fedlth.storage.client_state import ClientState
from fedlth.storage.header import Header, Layer, Measure, Phase, TaskFacts
from fedlth.storage.records import Digests, MetricRow, RoundRow
from fedlth.storage.run_folder import RunFolder
from fedlth.storage.spent_privacy import write_spent
from fedlth.storage.trackers import Tracking
from fedlth.study.schema import Study
from fedlth.training.task import Task

log = logging.getLogger(__name__)


def start(experiment: Experiment, notes: Sequence[str], out: Path, engine: Engine) -> RunFolder:
    """Run an experiment into a new folder; what could be wrong with it has been found before (experiment.resolve)."""
    for note in notes:
        log.info(f"note: {note}")
    _load_kernel(experiment, engine)
    folder = RunFolder(out)
    with folder.locked():
        folder.create(experiment.study)
        log.info(f"run folder: {out}")
        _write_header(folder, experiment, engine)
        return _go(experiment, folder, engine)


def resume(out: Path, engine: Engine) -> RunFolder:
    """Go on from the last commit of a run, then visit clients whose machine was lost in its last phase.

    A run that has ended without such clients stays as it is.
    """
    folder = RunFolder(out)
    experiment = Experiment.of(folder.study())
    study, task = experiment.study, experiment.task
    with folder.locked():
        header = folder.header()
        if header and header.finished and not missing(folder):
            engine.close()
            log.info(f"{out}: has ended already")
            return folder
        _load_kernel(experiment, engine)
        if not header:
            _write_header(folder, experiment, engine)
        elif (header.data_digest, header.partition_digest) != (task.dataset.digest(), task.splits.digest):
            raise StudyError(f"{out}: must continue with the data that it began with, got other data")
        elif header.num_exchanged != experiment.layout.num_floats:
            raise StudyError(
                f"{out}: must continue with the {header.num_exchanged} numbers that crossed, got "
                f"{experiment.layout.num_floats}: the model's code has changed, or the version"
            )
        elif header.cohort != study.cohort:
            raise StudyError(f"{out}: must continue with cohort {header.cohort}, got {study.cohort}")
        elif header.versions != versions():
            log.info("note: versions differ from those with which the run began; equal bits are not promised")
        if header and header.finished:  # no longer: a stop before its files are written anew is one to go on from
            folder.write(replace(header, finished=False))
        return _go(experiment, folder, engine, revisit=True)


def _load_kernel(experiment: Experiment, engine: Engine) -> None:
    """Load the compiled kernel before workers are made; clients that keep their own state train in no such worker."""
    if experiment.study.compute != "sparse" or engine.holds_state:
        return
    if any(not isinstance(task.table, str) for task in experiment.task.each):
        kernel.warm()


def _go(experiment: Experiment, folder: RunFolder, engine: Engine, *, revisit: bool = False) -> RunFolder:
    folder.recover(states=not engine.holds_state)
    engine = chaotic(engine, experiment)
    tracking = Tracking(folder.root, experiment.study)
    federation = Federation(experiment, folder, engine, tracking.committed)
    try:
        tracking.begin()
        try:
            federation.run()
            if revisit or engine.present() is not None:  # a device that was away may be back
                federation.revisit(resumed=revisit)
        finally:
            engine.close()
        _end(federation, tracking)
    finally:
        tracking.stop()
    _write_header(folder, experiment, engine, federation)
    if lost := missing(folder):
        who = f"{len(lost)} clients, whose machine was lost ({lost[:10]})"
        log.info(f"note: no result of {who}; {_resume(federation)} visits them again")
    return folder


def _resume(federation: Federation) -> str:
    return "the same `flwr run`" if federation.engine.holds_state else f"fedlth resume {federation.folder.root}"


def _end(federation: Federation, tracking: Tracking) -> None:
    """Write what a run ends with; raise NothingUsable where that is nothing."""
    folder = federation.folder
    if not federation.progress.lengths["metrics"]:
        raise NothingUsable(
            f"{folder.root}: no client finished step 2; the first failed with: {_first_failure(folder)}; "
            f"what was committed is kept, and {_resume(federation)} visits them again"
        )
    tracking.end(_finish(federation))


def _first_failure(folder: RunFolder) -> str:
    """Return why the first client of the last wave failed, not of a round that may have gone on without it."""
    waves = reversed(last_waves(folder))
    return next((f.reason for row in waves for f in row.failed), "no reason is recorded")


def _finish(federation: Federation) -> Digests:
    """Write the tickets as plain safetensors, and the digests by which two runs are compared; return these."""
    digests: dict[str, str] = {}
    away, frozen = list[int](), dict[str, dict[str, str]]()
    experiment, folder = federation.experiment, federation.folder
    study = experiment.study
    states = folder.devices if federation.engine.holds_state else folder.clients
    for client in range(study.clients.count):
        version = federation.progress.versions.get(str(client), "")
        # A client that failed in the last phase still has the ticket of step 2.
        arm = "refined" if version.startswith("refined-") else experiment.kept_arm
        if arm is None or not version:
            continue
        if not states.has(client, version):
            away.append(client)
            continue
        state, task = ClientState.from_bytes(states.get(client, version)), experiment.task_of(client)
        if "ticket" not in state.masks:
            continue
        meta = saved_ticket.origin(experiment, client, arm) | saved_ticket.inputs(task)
        params, mask = saved_ticket.kept_ticket(task, state)
        meta |= saved_ticket.mask_bytes(task, mask)
        if task.name not in frozen:
            frozen[task.name] = saved_ticket.frozen(task)
        digests[str(client)] = ticket_file.save(
            folder.root / "tickets", study.tickets, task.layout, params, mask, meta, frozen=frozen[task.name]
        )
    if made := _with_tickets(experiment, folder, away):
        log.info(f"note: {len(made)} tickets stay with their clients; only their masks' names are here")
    found = Digests(federation.theta.digest(), digests)
    folder.write(found)
    if (spent := spent_by(experiment, folder.rows(RoundRow))) is not None:
        write_spent(folder.root, spent)
    return found


def _with_tickets(experiment: Experiment, folder: RunFolder, clients: Sequence[int]) -> set[int]:
    """Return those of the clients who said that they have a ticket: a client's last state may be of a round."""
    if not clients:
        return set()
    arms = {experiment.kept_arm, experiment.product_arm}
    return {row.client for row in folder.rows(MetricRow) if row.arm in arms and not row.diverged} & set(clients)


def _write_header(folder: RunFolder, experiment: Experiment, engine: Engine, ended: Federation | None = None) -> None:
    """Write what is true of the whole run; once it has `ended`, a dense download is that of its last global model."""
    study, task, method = experiment.study, experiment.task, experiment.method
    theta = ended.theta if ended and experiment.shares_weights else task.shared_part(task.theta_0)
    start = experiment.known_start if ended and experiment.shares_weights else None
    dense = broadcast("values", "", theta, task.exchange, experiment.codec.down, start=start)
    known, theta_0 = experiment.known_start, task.shared_part(task.theta_0)
    first = known and broadcast("values", "", theta_0, task.exchange, experiment.codec.down, start=known)
    header = Header(
        study=study.study,
        method=method.name,
        paper=method.paper,
        seed=study.seed,
        engine=engine.name,
        compute=study.compute,
        cohort=int(study.cohort),
        versions=versions(),
        commit=_commit(),
        partition_digest=task.splits.digest,
        data_digest=task.dataset.digest(),
        num_clients=study.clients.count,
        unseen=sorted(task.splits.unseen),
        test=study.clients.test,
        label_noise=_noise(study),
        noisy=list(task.splits.noisy),
        num_classes=task.dataset.num_classes,
        client_labels=[
            [] if task.splits.apart else label_counts(task.of(c).dataset, s) for c, s in enumerate(task.splits.clients)
        ],
        client_tiers=task.tier_names,
        layers=_layers(task),
        num_parameters=task.layout.num_params,
        num_prunable=task.layout.num_prunable,
        num_exchanged=experiment.layout.num_floats,
        num_shared=task.exchange.num_floats,
        dense_payload_bytes=len(dense.payload),
        dense_first_bytes=len(first.payload) if first else None,
        dense_raw_bytes=4 * task.exchange.num_floats + 8 * task.exchange.num_ints,
        flops_forward_per_example=task.model.flops[""],
        random_starts=list(experiment.random_starts) if "random" in experiment.arms else [],
        phases=[
            Phase(
                name=p.name,
                rounds=p.rounds,
                step=1 if p.evaluates or p in experiment.federated_phases else 2,
                joins=p.join is not None and p.changes_state,
            )  # fmt: skip
            for p in experiment.phases
        ],
        attack="" if study.attack is None else _told(study.attack),
        defence=told(defence_of(study)),
        hostile=sorted(experiment.population.hostile),
        joiners={str(client): round for client, round in sorted(experiment.population.arrivals.items())},
        tasks=_tasks(task),
        metrics=_measures(task.each[0]),
        finished=ended is not None,
    )
    folder.write(header)


def _measures(task: Task) -> list[Measure]:
    """Return what a task is judged by, and its other metrics."""
    metrics = dict.fromkeys((task.judged.main, *task.judged.all))
    return [Measure(m.name, m.higher_is_better, m.percent) for m in metrics]


def _layers(task: Task) -> list[Layer]:
    return [
        Layer(e.name, list(e.shape), e.size, e.prunable, task.model.flops.get(e.name, 0), not e.trainable)
        for e in task.layout.floats
        if e.role == "param"
    ]


def _tasks(common: Task) -> list[TaskFacts]:
    """Return the tasks that clients have, by natural key; none where the study names none."""
    found = []
    for name in sorted(set(common.names)):
        clients = [client for client, of in enumerate(common.names) if of == name]
        task = common.of(clients[0])
        found.append(
            TaskFacts(
                name=name,
                clients=clients,
                metrics=_measures(task),
                num_classes=task.dataset.num_classes,
                layers=_layers(task),
                flops_forward_per_example=task.model.flops[""],
            )  # fmt: skip
        )
    return found


def _told(spec: Mapping[str, Any]) -> str:
    """Return a part as people write it."""
    options = ", ".join(f"{key} {value}" for key, value in spec.items() if key != "name")
    return f"{spec['name']} ({options})" if options else str(spec["name"])


def _noise(study: Study) -> str:
    noise = study.clients.label_noise
    if noise is None:
        return ""
    return f"{noise.rate:g} of the labels, {'the next class' if noise.kind == 'pair' else 'any other class'}"


@cache
def versions() -> dict[str, str]:
    """Return the versions that can change a bit of the result, and the vector instructions that torch takes."""
    vectors = torch.backends.cpu.get_cpu_capability()
    found = {"python": platform.python_version(), "machine": f"{platform.machine()} {vectors}"}
    for name in ("fedlth", "torch", "numpy", "numba", "ray", "flwr"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


@cache
def _commit() -> str | None:
    """Return the git commit of the code, as it was when first asked for; None outside a checkout."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
