"""An audit: measure every victim and shadow that has no file yet, then run the attacks on what was found."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from threading import Thread

import numpy as np
import torch

from fedlth.engines.forked import usable_cpus
from fedlth.errors import StudyError, wrong
from fedlth.methods.client_update import THETA_G
from fedlth.methods.defence import Defence
from fedlth.privacy.defended import common_mask, defences
from fedlth.privacy.label_inference import all_guesses, masks_of, matches, treated
from fedlth.privacy.measure import AGAIN, Arrays, measured, shadows_of
from fedlth.privacy.secure_sum import coverages
from fedlth.privacy.subject import Subject, subject_of
from fedlth.rng import stream
from fedlth.storage.audit_records import COARSE, COMMON, NONE, PRIVATE, Audit, Membership, Price, Records
from fedlth.storage.run_folder import RunFolder
from fedlth.wire import payload
from fedlth.wire.payload import Content

log = logging.getLogger(__name__)

Names = Sequence[tuple[str, int]]  # (kind, number) of clients
LEAST_SHADOWS = 10


def audit(run: Path, *, num_shadows: int = 200, num_victims: int = 0, workers: int = 0) -> Audit:
    """Return what the tickets of a finished run disclose; clients that were measured before are read.

    `num_victims` 0 stands for all clients with a ticket, `workers` 0 for what the study says. The same call goes on
    after a stop, and more shadows are added to those that are there. Raises StudyError where a run cannot be audited.
    """
    if num_shadows < LEAST_SHADOWS:
        raise wrong("audit: --shadows", f"at least {LEAST_SHADOWS}", num_shadows)
    if num_victims < 0 or num_victims == 1:
        raise wrong("audit: --victims", "at least 2", num_victims)
    torch.set_num_threads(1)
    root = str(run.resolve())
    with RunFolder(run).locked(".audit.lock"):
        subject_of.cache_clear()  # the folder may hold another run than it did before
        shadows_of.cache_clear()
        subject = subject_of(root)
        victims = chosen(subject, num_victims)
        asked = [("victim", client) for client in victims] + [("shadow", i) for i in range(num_shadows)]
        files = _measured(run, subject, asked, partial(measured, root, num_shadows), _workers(subject, workers, asked))
    return replace(_judged(subject, victims, num_shadows, files), coverages=tuple(coverages(subject, RunFolder(run))))


def chosen(subject: Subject, count: int) -> tuple[int, ...]:
    """Return the victims: all clients with a ticket, or so many of them, drawn at random; more include fewer."""
    have = sorted(subject.states)
    if not count or count >= len(have):
        return tuple(have)
    order = stream(subject.header.seed, "audit/victims").permutation(len(have))
    return tuple(sorted(have[int(i)] for i in order[:count]))


def _workers(subject: Subject, asked: int, names: Names) -> int:
    """Return how many processes to use; on a GPU or where none can be forked, this one alone."""
    wanted = asked or subject.experiment.study.workers
    count = usable_cpus() if wanted == "auto" else int(wanted)
    if subject.task.device != "cpu":
        return 1
    return max(1, min(count, len(names)))


def _measured(
    run: Path, subject: Subject, names: Names, measure: Callable[[str, int], Arrays], workers: int
) -> dict[tuple[str, int], Arrays]:
    """Return every client's arrays, and write the file of each that is measured here."""
    records = Records(run, subject.key)
    found = {one: arrays for one in names if (arrays := records.get(_file(one))) is not None}
    left = [one for one in names if one not in found]
    log.info(f"audit of {run}: {len(names)} clients to measure, {len(found)} done")
    began, done = time.perf_counter(), len(found)
    if left:
        shadows_of(str(run.resolve()), sum(kind == "shadow" for kind, _ in names))  # before workers are forked
    with _map(workers) as run_all:
        for number, (one, arrays) in enumerate(zip(left, run_all(measure, left), strict=True), start=1):
            records.put(_file(one), arrays)
            found[one] = records.get(_file(one)) or arrays
            spent = time.perf_counter() - began
            rest = spent / number * (len(left) - number)
            log.info(f"[{done + number}/{len(names)}] {one[0]} {one[1]}; about {_told(rest)} left")
    return found


def _file(one: tuple[str, int]) -> str:
    return f"{one[0]}-{one[1]:04d}"


def _told(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _begin(parent: int) -> None:
    """Leave Ctrl-C to the parent, and end with it, however it ends."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(2)
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=watch, daemon=True).start()


Mapped = Callable[[Callable[[str, int], Arrays], Names], Iterator[Arrays]]


@contextmanager
def _map(workers: int) -> Iterator[Mapped]:
    """Give a map over clients, in order; who works changes nothing but times."""
    if workers == 1:
        yield lambda measure, names: (measure(*one) for one in names)
        return
    pool = ProcessPoolExecutor(workers, get_context("fork"), initializer=_begin, initargs=(os.getpid(),))

    def run_all(measure: Callable[[str, int], Arrays], names: Names) -> Iterator[Arrays]:
        futures: list[Future[Arrays]] = [pool.submit(measure, *one) for one in names]
        return (future.result() for future in futures)

    try:
        yield run_all
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _judged(
    subject: Subject, victims: Sequence[int], num_shadows: int, files: Mapping[tuple[str, int], Arrays]
) -> Audit:
    """Return the facts of an audit: what the attacks guess, and what each defence costs."""
    own = {client: files["victim", client] for client in victims}
    made = {i: files["shadow", i] for i in range(num_shadows)}
    layout, header, table = subject.task.layout, subject.header, defences(subject)
    common = common_mask(subject)
    plain = masks_of(own, NONE, layout.num_prunable)
    if len(plain.clients) < 2:
        raise StudyError("audit: must have tickets of two victims at least: the searches of all others diverged")
    told = all_guesses(
        made, own, table, layout=layout, common=common, seed=header.seed, num_classes=header.num_classes
    )  # fmt: skip
    return Audit(
        study=header.study, method=header.method, seed=header.seed, density=subject.density, num_shadows=num_shadows,
        victims=tuple(victims), guesses=tuple(told),
        prices=tuple(_prices(subject, own, table)),
        matches=tuple(matches(plain, masks_of(own, AGAIN, layout.num_prunable))), members=tuple(_members(own)),
        applied=subject.applied, notes=tuple(_notes(subject, own, made)),
    )  # fmt: skip


def _prices(subject: Subject, victims: Mapping[int, Arrays], table: Mapping[str, Defence]) -> Iterator[Price]:
    """Yield what each defence costs each victim; a mask is coded as the run sends it, beside the theta_g that came."""
    layout, codec, seed = subject.task.layout, subject.experiment.codec, subject.header.seed
    known = subject.inbox[THETA_G].reference if codec.refers else None
    plain = masks_of(victims, NONE, layout.num_prunable)
    for name in (NONE, *table, COARSE, COMMON, PRIVATE):
        masks = masks_of(victims, name, layout.num_prunable)
        if name in table:
            masks = treated(plain, table[name], name, seed, "victim")
        bits, epsilon = dict(zip(masks.clients, masks.bits, strict=True)), getattr(table.get(name), "epsilon", None)
        for client, arrays in victims.items():
            if f"price {name}" not in arrays:
                continue
            found, size = arrays[f"price {name}"], 0
            if name != COMMON:  # which everybody makes who has theta_g
                shared = None if name == PRIVATE else known
                mask = Content(bits[client], None, None)
                size = len(payload.encode("mask", layout, mask, codec=codec, reference=shared))
            accuracy = None if np.isnan(found[-1]) else float(found[-1])
            yield Price(name, client, float(found[0]), size, accuracy, epsilon)


def _members(victims: Mapping[int, Arrays]) -> Iterator[Membership]:
    for model in ("ticket", "dense twin"):
        for client, arrays in victims.items():
            if f"loss {model} member" in arrays:
                sides = [arrays[f"loss {name} {side}"] for name in (model, "global") for side in ("member", "other")]
                yield Membership(model, client, *sides)


def _notes(subject: Subject, victims: Mapping[int, Arrays], shadows: Mapping[int, Arrays]) -> Iterator[str]:
    """Yield what a reader must know of this run beside what is true of every audit."""
    lost = [c for c, arrays in victims.items() if f"mask {NONE}" not in arrays]
    if lost:
        yield f"The search of victims {', '.join(map(str, lost))} diverged; they are left out."
    missing = sum(f"mask {NONE}" not in arrays for arrays in shadows.values())
    if missing:
        yield f"The search of {missing} of {len(shadows)} shadow clients diverged; they are left out."
    if subject.task.model.brought:
        yield "The model brings its own weights, so there is no control with a private initialisation."
    if subject.experiment.study.refine.rounds:
        yield (
            "Membership is of the tickets after the rounds inside them, while their dense twins are those of step 2: "
            "the two have not had the same training."
        )
