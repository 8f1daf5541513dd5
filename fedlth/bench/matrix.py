"""A bench's YAML: methods x partitions x seeds over one base study, and the cells that they make."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from fedlth.bench.controls import with_controls
from fedlth.bench.length import whole_length
from fedlth.errors import StudyError, wrong
from fedlth.experiment import effects
from fedlth.experiment.resolve import read
from fedlth.study import schema
from fedlth.study.sections import Count, Names, Node, Positive, as_tuple
from fedlth.study.validate import validated
from fedlth.study.yaml_text import parse

LOCAL = "local"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
# Of the base study, what the matrix decides instead.
DECIDED = ("study", "method", "seed", "seeds", "tune", "out")
# Of a cell's study, what changes none of its numbers: it may differ from call to call.
FREE = ("study", "out", "seeds", "engine", "workers", "ray", "job_timeout_s", "trackers", "tickets")
SECTIONS, CONTROL_OF = "sections", "control_of"  # of a method's options, the bench's own


class Tuning(Node):
    """The tuning budget, the same for every method: learning rates to try, and with which seeds."""

    lr: Annotated[tuple[Positive, ...], BeforeValidator(as_tuple)] = ()
    rounds: Count = 5
    seeds: Literal["first", "all"] = "first"


class File(Node):
    """What a bench's file may hold."""

    bench: str
    study: dict[str, Any] | str
    methods: dict[str, dict[str, Any] | None]
    partitions: dict[str, dict[str, Any]]
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(as_tuple)]
    tune: Tuning = Tuning()
    parallel: Count = 1
    against: Names = ("fedavg", LOCAL)


@dataclass(frozen=True)
class Cell:
    """One run of the matrix; `study` is as planned, before a learning rate is chosen."""

    partition: str
    method: str
    seed: int
    study: schema.Study

    @property
    def name(self) -> str:
        return f"{self.partition}/{self.method}/{self.seed}"

    def folder(self, root: Path) -> Path:
        return root / self.partition / self.method / str(self.seed)


@dataclass(frozen=True)
class Matrix:
    """A bench: its cells in the order of partitions, methods, seeds. `base` is the study below all of them.

    `against` are the methods, of those that are there, which all others are held against. `control_of` says of rows
    that are the random control of another, row -> row: they run like any other, and are not ranked.
    """

    name: str
    base: Mapping[str, Any]
    methods: Mapping[str, Mapping[str, Any]]
    partitions: Mapping[str, Mapping[str, Any]]
    seeds: tuple[int, ...]
    tune: Tuning
    parallel: int
    against: tuple[str, ...]

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        return tuple(
            Cell(partition, method, seed, self._study(partition, method, seed))
            for partition in self.partitions
            for method in self.methods
            for seed in self.seeds
        )

    @cached_property
    def firsts(self) -> tuple[Cell, ...]:
        """The first seed's cell of every method and partition."""
        return tuple(cell for cell in self.cells if cell.seed == self.seeds[0])

    @cached_property
    def control_of(self) -> dict[str, str]:
        return {label: options[CONTROL_OF] for label, options in self.methods.items() if CONTROL_OF in options}

    @cached_property
    def ranked(self) -> tuple[str, ...]:
        """The rows that are compared: those that are no control of another."""
        return tuple(label for label in self.methods if label not in self.control_of)

    @cached_property
    def idle(self) -> dict[str, tuple[str, ...]]:
        """What keeps methods from doing what they are for: why -> the partitions and methods, as they are written."""
        found: dict[str, tuple[str, ...]] = {}
        for cell in self.firsts:
            for why in effects.idle_method(read(cell.study)[0]):
                found[why] = (*found.get(why, ()), f"{cell.partition}/{cell.method}")
        return found

    def label_of(self, name: str) -> str | None:
        """Return the ranked row of this name, else the first whose method has it; None where there is neither."""
        if name in self.ranked:
            return name
        return next((label for label in self.ranked if self.methods[label].get("name") == name), None)

    def _study(self, partition: str, method: str, seed: int) -> schema.Study:
        options = dict(self.methods[method])
        sections = options.pop(SECTIONS, {})
        options.pop(CONTROL_OF, None)
        tree = merged(merged(self.base, self.partitions[partition]), sections)
        tree |= {"study": self.name, "method": {"name": method, **options}, "seed": seed}
        if self.tune.lr:
            tree["tune"] = {"rounds": self.tune.rounds, "lr": list(self.tune.lr), **sections.get("tune", {})}
        where = f"bench {self.name}: {partition}/{method}"
        study = schema.build(tree, where)
        if tree["method"]["name"] == LOCAL and not sections.keys() & {"personalise", "finder"}:
            study = schema.build({**tree, **whole_length(study, tree)}, where)
        return with_controls(study)

    def text(self) -> str:
        """Return the bench as canonical JSON, as its folder keeps it; `parallel` decides nothing."""
        told = {
            "bench": self.name, "study": self.base, "methods": self.methods, "partitions": self.partitions,
            "seeds": self.seeds, "tune": self.tune.model_dump(mode="json"), "against": self.against,
        }  # fmt: skip
        return json.dumps(told, indent=1)


def load(path: Path, overrides: Sequence[str] = ()) -> Matrix:
    """Read a bench's file; `key=value` overrides keys of its base study. Raises StudyError naming the place."""
    file, where = validated(File, schema.read_tree(path), str(path)), str(path)
    given = schema.read_tree(path.parent / file.study) if isinstance(file.study, str) else copy.deepcopy(file.study)
    for assignment in overrides:
        schema.override(given, assignment)
    if dead := [assignment for assignment in overrides if assignment.partition("=")[0] in DECIDED]:
        raise StudyError(f"{where}: override {dead[0]!r}: is decided by the bench, not by its study")
    matrix = Matrix(
        name=file.bench,
        base={key: value for key, value in given.items() if key not in DECIDED},
        methods={**{name: options or {} for name, options in file.methods.items()}, **_local(file, where)},
        partitions=file.partitions,
        seeds=file.seeds,
        tune=file.tune,
        parallel=file.parallel,
        against=file.against,
    )
    _check(matrix, where)
    for name in file.against if "against" in file.model_fields_set else ():
        if matrix.label_of(name) is None:
            raise wrong(f"{where}: against", f"names of {', '.join(matrix.ranked)}, or of their methods", name)
    return matrix


def stored(text: str) -> Matrix:
    """Return the matrix that `Matrix.text` told."""
    tree = parse(text, "bench.json")
    tune = Tuning(**{**tree["tune"], "lr": tuple(tree["tune"]["lr"])})
    seeds, against = tuple(tree["seeds"]), tuple(tree["against"])
    return Matrix(tree["bench"], tree["study"], tree["methods"], tree["partitions"], seeds, tune, 1, against)


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sections of `base` with those of `over`: key by key, but a part that has a name replaces the other."""
    found = dict(copy.deepcopy(base))
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(found.get(key), Mapping) and "name" not in value
        found[key] = merged(found[key], value) if both else copy.deepcopy(value)
    return found


def differences(planned: schema.Study, now: schema.Study) -> list[str]:
    """Return what differs between two plans of a cell, `key: before -> now`; what changes no number is left out."""
    before, after = (flat(one.model_dump(mode="json", exclude=set(FREE))) for one in (planned, now))
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return [f"{key}: {json.dumps(before.get(key))} -> {json.dumps(after.get(key))}" for key in keys]


def flat(tree: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """Return a tree's leaves by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        inner = isinstance(value, Mapping) and value
        found |= flat(value, f"{place}{key}.") if inner else {f"{place}{key}": value}
    return found


def _local(file: File, where: str) -> dict[str, dict[str, Any]]:
    """Return the baseline that no table is without, where the file forgets it."""
    taken = (file.methods.get(LOCAL) or {}).get("name", LOCAL)
    if taken != LOCAL:
        raise wrong(f"{where}: methods.{LOCAL}.name", f"{LOCAL}: that row is every client alone", taken)
    named = {(options or {}).get("name", label) for label, options in file.methods.items()}
    return {} if LOCAL in named else {LOCAL: {}}


def _check(matrix: Matrix, where: str) -> None:
    for kind in ("methods", "partitions"):
        if not getattr(matrix, kind):
            raise wrong(f"{where}: {kind}", "at least one", {})
    for name in (matrix.name, *matrix.methods, *matrix.partitions):
        if not NAME.fullmatch(name):
            raise wrong(f"{where}: a name", "letters, digits, _ . - (it is a folder's)", name)
    if not matrix.seeds or len(set(matrix.seeds)) < len(matrix.seeds):
        raise wrong(f"{where}: seeds", "at least one, each given once", list(matrix.seeds))
    for place, sections in _sections(matrix):
        if not isinstance(sections, Mapping):
            raise wrong(f"{where}: {place}", "a mapping of sections of a study", sections)
        if dead := sorted(sections.keys() & {*DECIDED} - {"tune"}):
            raise StudyError(f"{where}: {place}.{dead[0]}: is decided by the bench")
    _check_controls(matrix, where)
    for cell in matrix.firsts:
        read(cell.study)
        tune = cell.study.tune
        budget, theirs = (len(matrix.tune.lr), matrix.tune.rounds), (len(tune.lr), tune.rounds)
        if (matrix.tune.lr or tune.lr) and budget != theirs:
            raise StudyError(
                f"{where}: methods.{cell.method}.{SECTIONS}.tune: must try as many rates for as many rounds as every "
                f"method, {budget[0]} for {budget[1]}, got {theirs[0]} for {theirs[1]}"
            )


def _check_controls(matrix: Matrix, where: str) -> None:
    """Refuse a row that cannot be the control of the row that it names."""
    for label, of in matrix.control_of.items():
        place = f"{where}: methods.{label}.{CONTROL_OF}"
        others = [name for name in matrix.ranked if name != label]
        if of not in others:
            raise wrong(place, f"another row that is no control itself, one of {', '.join(others)}", of)
        ours, theirs = ({"name": row, **matrix.methods[row]} for row in (label, of))
        ours.pop(CONTROL_OF)
        if ours["name"] != theirs["name"]:
            raise wrong(place, f"a row of the same method, {ours['name']}", f"{of}, which is {theirs['name']}")
        if ours == theirs:
            raise StudyError(f"{place}: must differ from {of} in an option (as `score: random`), got none that does")


def _sections(matrix: Matrix) -> list[tuple[str, Any]]:
    methods = [(f"methods.{name}.{SECTIONS}", options.get(SECTIONS, {})) for name, options in matrix.methods.items()]
    return [*((f"partitions.{name}", sections) for name, sections in matrix.partitions.items()), *methods]
