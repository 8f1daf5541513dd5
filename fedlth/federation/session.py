"""A whole run: folder, header, loop, and what is left when it ends. The CLI and the Python API are both this."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fedlth.data.split import label_counts
from fedlth.errors import NothingUsable, StudyError
from fedlth.experiment import feasible, saved_ticket
from fedlth.experiment.resolve import arms_of, checked, kept_arm, random_starts, recipe_of, resolve
from fedlth.federation import rounds
from fedlth.federation.client_step import space
from fedlth.federation.jobs import Engine
from fedlth.federation.server import broadcast
from fedlth.kernel import kernel
from fedlth.storage import tensorboard, ticket_file
from fedlth.storage.client_state import ClientState
from fedlth.storage.records import Digests, Header, Layer, RoundRow
from fedlth.storage.run_folder import RunFolder
from fedlth.study.schema import Study
from fedlth.training import cohort_size
from fedlth.training.task import World, open_world
from fedlth.wire.codec import CODECS

Tell = Callable[[str], None]


def start(study: Study, out: Path, engine: Engine, tell: Tell) -> RunFolder:
    """Run a study into a new folder. Everything that can be wrong in the study is found before anything is written."""
    study, notes = prepared(study, engine.name)
    world = open_world(study.science())
    for note in notes:
        tell(f"note: {note}")
    if study.compute == "sparse":
        kernel.warm(tell)
    folder = RunFolder(out)
    with folder.locked():
        folder.create(study)
        tell(f"run folder: {out}")
        _write_header(folder, study, world, engine)
        return _go(folder, engine, tell)


def prepared(study: Study, engine: str) -> tuple[Study, list[str]]:
    """Return the study with everything decided that this machine decides, and notes on it; write nothing.

    Raises StudyError where the study cannot be run.
    """
    study, notes = resolve(study)
    if study.tensorboard:
        tensorboard.require()
    study, why = backend(study)
    world = open_world(study.science())
    notes += why + checked(world) + feasible.check(study, world)
    rounds.check_rule(world)
    if study.device == "auto" and engine == "inprocess":  # elsewhere each worker's machine decides
        study = study.model_copy(update={"device": world.device})
    study, why = together(study, engine)
    return study, notes + why


def backend(study: Study) -> tuple[Study, list[str]]:
    """Return the study with `compute: auto` decided, and a note that says what was decided and why."""
    if study.compute != "auto":
        return study, []
    table = open_world(study.science()).table
    if isinstance(table, str):
        return study.model_copy(update={"compute": "tuned"}), [
            f"compute: tuned, because the kernel cannot run: {table}"
        ]
    note = "compute: sparse, all layers run in the kernel"
    if kernel.large(table):
        note += "; what is dense is trained in torch, which is faster for maps of this size"
    return study.model_copy(update={"compute": "sparse"}), [note]


def together(study: Study, engine: str) -> tuple[Study, list[str]]:
    """Return the study with `cohort` decided as a number, and notes that say what was decided and why."""
    size, notes = cohort_size.decided(study, open_world(study.science()), engine=engine)
    recipe = recipe_of(study)
    if size > 1 and recipe.space == "scores":
        notes.append(f"cohort: method {recipe.name} trains scores one client at a time; other trainings go together")
    return study.model_copy(update={"cohort": size}), notes


def resume(out: Path, engine: Engine, tell: Tell) -> RunFolder:
    """Go on from the last commit of a run, then visit clients whose machine was lost in its last phase.

    A run that has ended without such clients stays as it is.
    """
    folder = RunFolder(out)
    study = folder.study()
    world = open_world(study.science())
    with folder.locked():
        header = folder.header()
        if header and header.finished and not rounds.missing(folder):
            engine.close()
            tell(f"{out}: has ended already")
            return folder
        if study.compute == "sparse":
            kernel.warm(tell)
        if not header:
            _write_header(folder, study, world, engine)
        elif (header.data_digest, header.partition_digest) != (world.dataset.digest(), world.splits.digest):
            raise StudyError(f"{out}: must go on with the data that it began with, got others")
        elif header.num_exchanged != space(world, recipe_of(study)).num_floats:
            raise StudyError(
                f"{out}: must go on with the {header.num_exchanged} numbers that crossed, got "
                f"{space(world, recipe_of(study)).num_floats}: the model's code has changed, or the version"
            )
        elif header.cohort != study.cohort:
            raise StudyError(f"{out}: must go on with cohort {header.cohort}, got {study.cohort}")
        elif header.versions != versions():
            tell("note: other versions than those the run began with; equal bits are not promised")
        if header and header.finished:  # no longer: a stop before its files are written anew is one to go on from
            folder.write(replace(header, finished=False))
        return _go(folder, engine, tell, revisit=True)


def _go(folder: RunFolder, engine: Engine, tell: Tell, *, revisit: bool = False) -> RunFolder:
    folder.recover()
    loop = rounds.open_loop(folder, engine, tell)
    try:
        loop.run()
        if revisit:
            loop.revisit()
    finally:
        engine.close()
    if not loop.progress.lengths["metrics"]:
        raise NothingUsable(
            f"{folder.root}: no client finished step 2; the first failed with: {_first_failure(folder)}"
        )
    _finish(folder, loop)
    if folder.study().tensorboard:
        tensorboard.write(folder.root)
    _write_header(folder, folder.study(), loop.world, engine, loop)
    if lost := rounds.missing(folder):
        how = "the same `flwr run`" if engine.holds_state else f"fedlth resume {folder.root}"
        tell(f"note: no result of {len(lost)} clients, whose machine was lost ({lost[:10]}); {how} visits them again")
    return folder


def _first_failure(folder: RunFolder) -> str:
    return next((f.reason for row in folder.rows(RoundRow) for f in row.failed), "no reason is recorded")


def _finish(folder: RunFolder, loop: rounds.Loop) -> None:
    """Write the tickets as plain safetensors, and the digests by which two runs are compared."""
    digests: dict[str, str] = {}
    away = 0
    study, world = folder.study(), loop.world  # the world knows only what decides numbers, not names
    states = folder.devices if loop.engine.holds_state else folder.clients
    for client in range(study.clients.count):
        version = loop.progress.versions.get(str(client), "")
        # A client that failed in the last phase still has the ticket of step 2.
        arm = "refined" if version.startswith("refined-") else kept_arm(study)
        if arm is None or not version:
            continue
        if not states.has(client, version):
            away += 1
            continue
        state = ClientState.from_bytes(states.get(client, version))
        if "ticket" not in state.masks:
            continue
        meta = {
            "study": study.study, "method": recipe_of(study).name, "seed": study.seed, "client": client, "arm": arm,
            **saved_ticket.inputs(world),
        }  # fmt: skip
        params, mask = saved_ticket.kept_ticket(world, state)
        place = folder.root / "tickets"
        digests[str(client)] = ticket_file.save(place, study.tickets, world.layout, params, mask, meta)
    if away:
        loop.tell(f"note: {away} tickets stay with their clients; only their masks' names are here")
    folder.write(Digests(loop.theta.digest(), digests))


def _write_header(
    folder: RunFolder, study: Study, world: World, engine: Engine, ended: rounds.Loop | None = None
) -> None:
    """Write what is true of the whole run; once it has `ended`, a dense download is that of its last global model."""
    recipe = recipe_of(study)
    layout = space(world, recipe)
    trained = ended is not None and recipe.federated and recipe.space == "weights"
    theta = ended.theta if ended and trained else world.shared_part(world.theta_0)
    dense = broadcast("values", "", theta, world.exchange, CODECS[study.wire])
    header = Header(
        study=study.study,
        method=recipe.name,
        paper=recipe.paper,
        seed=study.seed,
        engine=engine.name,
        compute=study.compute,
        cohort=int(study.cohort),
        versions=versions(),
        commit=_commit(),
        partition_digest=world.splits.digest,
        data_digest=world.dataset.digest(),
        num_clients=study.clients.count,
        unseen=sorted(world.splits.unseen),
        num_classes=world.dataset.num_classes,
        client_labels=[label_counts(world.dataset, s) for s in world.splits.clients],
        layers=[
            Layer(e.name, list(e.shape), e.size, e.prunable, world.flops.get(e.name, 0))
            for e in world.layout.floats
            if e.role == "param"
        ],
        num_parameters=world.layout.num_params,
        num_prunable=world.layout.num_prunable,
        num_exchanged=layout.num_floats,
        dense_payload_bytes=len(dense.payload),
        dense_raw_bytes=4 * world.exchange.num_floats + 8 * world.exchange.num_ints,
        flops_forward_per_example=world.flops[""],
        random_starts=list(random_starts(world)) if "random" in arms_of(study) else [],
        finished=ended is not None,
    )
    folder.write(header)


def versions() -> dict[str, str]:
    """Return the versions that can change a bit of the result."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in ("fedlth", "torch", "numpy", "ray", "flwr"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _commit() -> str | None:
    """Return the git commit of the code, None outside a checkout."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
