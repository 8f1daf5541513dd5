"""`fedlth lottery`: every search, arm and probe of every seed, on some workers, resumable at each training."""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, cast

from fedlth import output
from fedlth.data.factory import told as said
from fedlth.errors import StudyError
from fedlth.lab import arms, study
from fedlth.lab.bench import Bench, open_bench
from fedlth.lab.controls import MASKS
from fedlth.lab.instability import MIXED, Instability
from fedlth.lab.probes import PROBES
from fedlth.lab.search import finder_of
from fedlth.lab.study import Lottery
from fedlth.lab.training import recipe_of, relus, scales
from fedlth.models.initial import refuse
from fedlth.storage import json_lines, store
from fedlth.storage.run_folder import RunFolder
from fedlth.study.parts import make
from fedlth.tickets.dead import DEADS
from fedlth.tickets.rewind import REWINDS, Rewind
from fedlth.training import statistics
from fedlth.training.trial_step import try_step

log = logging.getLogger(__name__)

STAGES = ("search", "arm", "probe")  # arms need the searches' trainings, probes may use both


@dataclass(frozen=True)
class Task:
    """One seed of one search, arm or probe: what a worker does at a time, and one file of rows."""

    stage: str
    name: str
    seed: int

    @property
    def file(self) -> str:
        return f"rows/{self.stage}-{self.name}-{self.seed}.jsonl"


def tasks(made: Lottery, stage: str) -> list[Task]:
    """Return a stage's tasks in the order of the result file."""
    sections: dict[str, Mapping[str, object]] = {"search": made.searches, "arm": made.arms, "probe": made.probes}
    return [Task(stage, name, seed) for name in sections[stage] for seed in made.seeds]


def check(made: Lottery) -> None:
    """Raise StudyError, naming the place, where a part, the data or the model of the study cannot be built."""
    bench = open_bench(made.science(), made.seeds[0], None)
    _ = bench.layout
    size, examples = made.train.batch_size, len(bench.parts["train"])
    if size > examples:
        raise StudyError(f"train.batch_size: must be at most the {examples} training examples, got {size}")
    for name, search in made.searches.items():
        train = {**made.train.model_dump(), **search.train}
        _check_rewind(bench, finder_of(search, f"searches.{name}").rewind, f"searches.{name}.rewind", train)
        _check_acts(train, made, f"searches.{name}")
    for name, arm in made.arms.items():
        make(MASKS, arm.mask, f"arms.{name}.mask", has="__call__(mask, layout, rng)")
        train = {**made.train.model_dump(), **made.searches[arm.of].train, **arm.train}
        if arm.start is None and finder_of(made.searches[arm.of], f"searches.{arm.of}").moves:
            raise StudyError(
                f"arms.{name}.start: must be named, since the mask of {arm.of} moves inside one training; init trains "
                "the last one from theta_0"
            )
        start = made.searches[arm.of].rewind if arm.start is None else arm.start
        _check_rewind(bench, make(REWINDS, start, f"arms.{name}.start", has="anchor"), f"arms.{name}.start", train)
        _check_acts(train, made, f"arms.{name}")
        if arm.dead is not None:
            make(DEADS, arm.dead, f"arms.{name}.dead", has="holds")
        _check_rounds(made, arm.of, arm.rounds, f"arms.{name}.rounds")
    for name, spec in made.probes.items():
        _check_names(made, make(PROBES, spec, f"probes.{name}"), f"probes.{name}")


def _check_rewind(bench: Bench, rewind: Rewind, place: str, train: Mapping[str, Any]) -> None:
    """Refuse weights that are not there: those of a server, of a step that a training does not reach, or new ones
    of a model that brings its own."""
    if rewind.anchor not in ("theta_0", "reinit", None):
        raise StudyError(f"{place}: the laboratory has no weights called {rewind.anchor!r}, got {rewind}")
    if rewind.anchor == "reinit":
        refuse(bench.model.brought, place)
    _check_step(int(getattr(rewind, "steps", 0)), place, train["iterations"])


def _check_step(step: int, place: str, iterations: int) -> None:
    if not 0 <= step < iterations:
        raise StudyError(f"{place}: must lie inside a training's {iterations} iterations, got {step}")


def _check_acts(train: Mapping[str, Any], made: Lottery, place: str) -> None:
    """Refuse an option that finds nothing in the network to act on."""
    bench = open_bench(made.science(), made.seeds[0], None)
    config, few = bench.train_config(dict(train)), bench.parts["train"].batch(slice(4))
    recipe = recipe_of(config, few.y, bench.dataset.num_classes)
    for step in (0, config.train.iterations - 1):
        try:
            rate = float(config.rate(step))
        except StudyError:
            raise
        except Exception as error:  # the user's code may raise anything
            raise StudyError(f"{place}.train.schedule: fails at iteration {step}: {said(error)}") from error
        if not math.isfinite(rate):
            raise StudyError(f"{place}.train.schedule: must give finite numbers, got {rate}")
    try_step(bench.flat_model, bench.theta_0, few, recipe, f"{place}.train")
    if train["dropout"] and not relus(bench.flat_model.module):
        raise StudyError(f"{place}.train.dropout: {made.model.name} has no module nn.ReLU to follow, so nothing drops")
    if train["norm_l1"] and not scales(bench.layout):
        raise StudyError(f"{place}.train.norm_l1: {made.model.name} has no norm layer with a scale")


def _check_rounds(made: Lottery, search: str, rounds: Sequence[int], place: str) -> None:
    """Refuse rounds that a search does not have: one that trains no dense network has no round 0."""
    first = 0 if finder_of(made.searches[search], f"searches.{search}").dense_first else 1
    last = len(made.searches[search].targets)
    for number in rounds:
        if not first <= number <= last:
            raise StudyError(f"{place}: must name rounds of {search} in [{first}, {last}], got {number}")


def _check_names(made: Lottery, probe: object, place: str) -> None:
    """Refuse a probe that names a search, a round, an arm or a step that the study does not have."""
    if not is_dataclass(probe):
        raise StudyError(f"{place}: must be a dataclass, whose fields are its options, got {type(probe).__name__}")
    if not callable(probe):
        raise StudyError(f"{place}: must be called with a bench, got {type(probe).__name__}, which cannot be called")
    told: dict[str, Any] = {f.name: getattr(probe, f.name) for f in fields(cast(Any, probe))}
    searches = [*told.get("searches", ()), *([told["search"]] if "search" in told else [])]
    for name in searches:
        if name not in made.searches:
            raise StudyError(f"{place}: must name one of the searches {', '.join(made.searches)}, got {name!r}")
        numbers = [*told.get("rounds", ()), *([told["round"]] if "round" in told else [])]
        _check_rounds(made, name, numbers, place)
    for name in told.get("arms", ()):
        if name not in made.arms or made.arms[name].of not in searches:
            raise StudyError(f"{place}: must name arms of {', '.join(searches)}, got {name!r}")
    if isinstance(probe, Instability):
        train = {**made.train.model_dump(), **made.searches[probe.search].train}
        if layer := statistics.unknown(open_bench(made.science(), made.seeds[0], None).flat_model.module):
            raise StudyError(f"{place}: {statistics.REFUSED.format(layer=layer, what=MIXED)}")
        for step in probe.steps:
            _check_step(step, f"{place}.steps", train["iterations"])


def run(made: Lottery, out: Path) -> Path:
    """Do all of a study that the folder does not hold yet; write results.jsonl; return the folder.

    Raises StudyError where the folder holds another study. The result depends on neither workers nor stops.
    """
    check(made)
    with RunFolder(out).locked():
        return _run(made, out)


def _run(made: Lottery, out: Path) -> Path:
    config_file = out / "config.yaml"
    if config_file.exists():
        there = study.load(config_file)
        if there.science() != made.science():
            wanted, got = (json.loads(one.science()) for one in (there, made))
            raise StudyError(f"{out}: holds another study ({', '.join(_differing(wanted, got))}); give another out=")
    else:
        store.write_atomic(config_file, study.dump(made).encode())
    for stage in STAGES:
        todo = [task for task in tasks(made, stage) if not (out / task.file).exists()]
        for task in _done(made, out, todo):
            log.info(f"{task.stage} {task.name}, seed {task.seed}: done")
    text = b"".join((out / task.file).read_bytes() for stage in STAGES for task in tasks(made, stage))
    store.write_atomic(out / "results.jsonl", text)
    return out


def _differing(one: Mapping[str, Any], other: Mapping[str, Any], place: str = "") -> Iterator[str]:
    """Yield the dotted names of what differs between two plain trees."""
    for key in dict.fromkeys((*one, *other)):
        a, b = one.get(key), other.get(key)
        if a != b and isinstance(a, dict) and isinstance(b, dict):
            yield from _differing(a, b, f"{place}{key}.")
        elif a != b:
            yield f"{place}{key}"


def _done(made: Lottery, out: Path, todo: list[Task]) -> Iterator[Task]:
    """Do tasks and yield each when it is done."""
    if made.workers == 1 or len(todo) < 2:
        for task in todo:
            do(made.science(), str(out), task)
            yield task
        return
    # Spawned, not forked: torch's and numba's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(made.workers, len(todo)), mp_context=context, initializer=output.log_lines) as pool:
        jobs = {pool.submit(do, made.science(), str(out), task): task for task in todo}
        try:
            for job in as_completed(jobs):
                job.result()
                yield jobs[job]
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():  # else leaving waits for the tasks that run
                child.terminate()
            if isinstance(error, BrokenProcessPool):
                raise StudyError(f"{out}: a worker was killed; the same command with out={out} continues") from error
            raise


def do(science: str, out: str, task: Task) -> None:
    """Do one task and write its rows."""
    try:
        _do(science, out, task)
    except FloatingPointError as error:
        raise StudyError(f"{task.stage} {task.name}, seed {task.seed}: {error}") from error


def _do(science: str, out: str, task: Task) -> None:
    bench = open_bench(science, task.seed, out)
    rows: list[dict[str, Any]] = []
    if task.stage == "probe":
        spec = bench.study.probes[task.name]
        probe = make(PROBES, spec, f"probes.{task.name}")
        before = len(bench.diverged)
        try:
            for row in probe(bench):
                rows.append({"kind": "probe", "probe": task.name, "seed": task.seed, **row})
        except (StudyError, ArithmeticError, MemoryError, OSError):
            raise
        except Exception as error:
            if ":" not in spec["name"]:
                raise
            raise StudyError(f"probes.{task.name}: {spec['name']} raised {said(error)}") from error
        if len(bench.diverged) > before:  # which of the rows they decided only the probe knows
            rows = [row | {"diverged": len(bench.diverged) - before} for row in rows]
            log.info(f"{task.name}, seed {task.seed}: {len(bench.diverged) - before} trainings diverged")
    else:
        walk = arms.searched if task.stage == "search" else arms.trained
        for row in walk(bench, task.name):
            rows.append(row)
            log.info(
                f"{task.name}, seed {task.seed}, round {row['round']}: density {row['kept'] / row['size']:.4f}, early "
                f"stop at {row['early_stop']}, validation accuracy {row['validation_accuracy']:.4f}"
                + (", diverged after it" if "diverged" in row else "")
            )
    store.write_atomic(Path(out) / task.file, json_lines.lines(rows))
