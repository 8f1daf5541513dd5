"""YAML to a frozen, validated tree: an unknown key or a wrong type is an error that names the place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from fedlth.errors import StudyError
from fedlth.study.compute_section import Crossovers
from fedlth.study.privacy_section import Privacy
from fedlth.study.sections import (
    Chaos,
    Clients,
    Count,
    Data,
    Evaluate,
    Federate,
    Finder,
    Fleet,
    Model,
    Names,
    Node,
    Personalise,
    Positive,
    Ray,
    Refine,
    Spec,
    TaskSpec,
    Train,
    Tune,
    _spec,
    _texts,
    as_tuple,
)
from fedlth.study.validate import validated
from fedlth.study.yaml_text import parse, text_of


class Study(Node):
    """A whole study. `science()` is the part that decides its numbers."""

    study: str = "study"
    seed: Annotated[int, Field(ge=0)] = 0
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(as_tuple)] = ()
    method: Spec = {"name": "two_step"}
    data: Annotated[Data, BeforeValidator(_spec)] = Data()
    partition: Spec = {"name": "iid"}
    clients: Clients
    tasks: Annotated[dict[str, TaskSpec], BeforeValidator(_texts)] = {}
    model: Annotated[Model, BeforeValidator(_spec)] = Model()
    metric: str | None = None
    metrics: Names = ()
    train: Train = Train()
    federate: Federate = Federate()
    evaluate: Evaluate = Evaluate()
    finder: Finder = Finder()
    personalise: Personalise = Personalise()
    refine: Refine = Refine()
    attack: Spec | None = None
    privacy: Privacy = Privacy()
    fleet: Fleet | None = None
    chaos: Chaos | None = None
    tune: Tune = Tune()
    wire: Literal["raw", "lossless", "bf16", "f16", "step", "sign"] = "lossless"
    compute: Literal["auto", "reference", "tuned", "sparse"] = "reference"
    crossovers: Crossovers | None = None
    cohort: Literal["auto"] | Count = 1
    device: str = "cpu"
    engine: Literal["inprocess", "ray", "flower"] = "inprocess"
    workers: Literal["auto"] | Count = "auto"
    ray: Ray = Ray()
    job_timeout_s: Positive | None = None
    trackers: Annotated[tuple[Spec, ...], BeforeValidator(as_tuple)] = ()
    tickets: Literal["dense", "compact", "none"] = "dense"
    out: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _earlier(cls, tree: Any) -> Any:
        """Read `tensorboard: true`, as studies and run folders had it, as the tracker of that name."""
        if not isinstance(tree, dict) or "tensorboard" not in tree:
            return tree
        rest, wanted = {k: v for k, v in tree.items() if k != "tensorboard"}, tree["tensorboard"]
        if not isinstance(wanted, bool):
            return tree  # an unknown key, as any other
        given = rest.get("trackers", [])
        if wanted and isinstance(given, (list, tuple)) and "tensorboard" not in given:
            rest["trackers"] = [*given, "tensorboard"]
        return rest

    def science(self) -> str:
        """Return canonical JSON of everything that decides the numbers: what a worker is given.

        Engine, placement and folders are left out, so that equal studies are equal on every engine.
        """
        outside = {
            "engine",
            "workers",
            "ray",
            "out",
            "seeds",
            "job_timeout_s",
            "trackers",
            "tickets",
            "tune",
            "study",
        }
        if self.chaos is None:  # most studies have none: theirs stay the same text, and cross as the same bytes
            outside.add("chaos")
        if self.crossovers is None:
            outside.add("crossovers")
        told = self.model_dump(mode="json", exclude=outside)
        if self.privacy.dp is None:
            del told["privacy"]["dp"]
        return json.dumps(told, sort_keys=True)

    def given(self, place: str) -> bool:
        """Say whether the user wrote this section, or `section.key`: never true of a default."""
        section, _, key = place.partition(".")
        node = getattr(self, section)
        return section in self.model_fields_set and (not key or (node is not None and key in node.model_fields_set))


def override(tree: dict[str, Any], assignment: str) -> None:
    """Set one key of a plain tree by `key=value`, the key dotted; raise StudyError where there is no such place."""
    key, sep, text = assignment.partition("=")
    if not sep or not key:
        raise StudyError(f"override {assignment!r}: must be key=value, such as train.lr=0.1")
    *path, last = key.split(".")
    node = tree
    for step in path:
        child = node.get(step)
        if isinstance(child, str):
            child = {"name": child}
        if child is None:
            child = {}
        if not isinstance(child, dict):
            raise StudyError(f"override {assignment!r}: {step} is not a section")
        node[step] = child
        node = child
    try:
        node[last] = parse(text, f"override {assignment!r}")
    except StudyError as error:
        left_open = any(text.count(start) > text.count(end) for start, end in ("{}", "[]"))
        raise StudyError(f"{error}{'; a value with spaces needs quotes in a shell' if left_open else ''}") from error


def build(tree: Any, where: str = "study") -> Study:
    """Validate a plain tree; raise StudyError with `where: place: what was wanted, got`."""
    if isinstance(tree, dict) and tree.keys() & {"lottery", "searches", "probes"}:
        raise StudyError(f"{where}: is a study of the ticket laboratory; `fedlth lottery` runs and resumes it")
    if isinstance(tree, dict) and tree.keys() >= {"bench", "methods"}:
        raise StudyError(f"{where}: is a bench; `fedlth bench` runs and resumes it")
    study = validated(Study, tree, where)
    _cross_check(study, where)
    return study


def _cross_check(study: Study, where: str) -> None:
    """Refuse what no single field can see."""
    densities = study.finder.densities
    if not densities or any(not 0 < d <= 1 for d in densities):
        raise StudyError(f"{where}: finder.densities: each must be in (0, 1], got {list(densities)}")
    if sorted(densities, reverse=True) != list(densities) or len(set(densities)) != len(densities):
        raise StudyError(f"{where}: finder.densities: must fall from left to right, got {list(densities)}")
    if study.finder.main not in (None, "auto", "capacity", *densities):
        raise StudyError(
            f"{where}: finder.main: must be one of finder.densities, auto or capacity, got {study.finder.main}"
        )
    if study.data.pool and study.clients.test != "own":
        raise StudyError(f"{where}: data.pool: needs clients.test: own, since the test split is then the clients' too")
    _check_own(study, where)
    named = [*study.metrics, *([study.metric] if study.metric else [])]
    if len(set(named)) < len(named):
        raise StudyError(f"{where}: metrics: each must be given once, metric included, got {list(study.metrics)}")
    if len(set(study.seeds)) != len(study.seeds):
        raise StudyError(f"{where}: seeds: each must be given once, got {list(study.seeds)}")
    check_optimizer(study.train, f"{where}: train")
    for place, spec in (("method", study.method), ("partition", study.partition)):
        if not isinstance(spec.get("name"), str):
            raise StudyError(f"{where}: {place}.name: required, but missing")
    seed = study.partition.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise StudyError(f"{where}: partition.seed: must be an integer of at least 0, got {seed!r}")


def _check_own(study: Study, where: str) -> None:
    """Refuse what asks for examples of all clients in one place, where each has its own."""
    own, partition = study.data.own, study.partition.get("name") == "own"
    if partition != (own is not None):
        said = "must be own where data.own is given" if own else "own needs data.own, which says what the data are"
        raise StudyError(f"{where}: partition: {said}")
    noise = study.clients.label_noise is not None
    idle = {"data.pool": study.data.pool, "clients.label_noise": noise, "tasks": study.tasks}
    for key, given in idle.items():
        if own and given:
            raise StudyError(f"{where}: {key}: must not be given with data.own")
    if own and own.targets == "positions" and not own.target_shape:
        raise StudyError(f"{where}: data.own.target_shape: must be the number of positions, got []")


def check_optimizer(train: Train, place: str) -> None:
    """Refuse the short form of sgd's options beside another optimizer, or beside the same option."""
    for key in ("momentum", "weight_decay"):
        value = getattr(train, key)
        if value and train.optimizer.get("name") != "sgd":
            raise StudyError(
                f"{place}.{key}: is an option of sgd; give {train.optimizer.get('name')} its own beside its name, got "
                f"{value}"
            )
        if value and key in train.optimizer:
            raise StudyError(f"{place}.{key}: must be given once, got it in {place}.optimizer too")


def load(path: str | Path, overrides: list[str] | None = None) -> Study:
    """Read a study file, apply `key=value` overrides with dotted keys, validate."""
    return build(read_tree(path, overrides), str(path))


def read_tree(path: str | Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """Return a YAML file's sections as a plain tree, `key=value` overrides with dotted keys applied."""
    file = Path(path)
    if not file.is_file():
        raise StudyError(f"{file}: no such study file")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"{file}: cannot be read as UTF-8 text: {error}") from error
    tree = parse(text, str(file))
    if not isinstance(tree, dict):
        raise StudyError(f"{file}: must be a mapping of sections, got {type(tree).__name__}")
    for assignment in overrides or []:
        override(tree, assignment)
    return tree


def dump(study: Study, *, given_only: bool = False) -> str:
    """Return the study as YAML; loading it gives an equal study. `given_only` leaves out what is a default."""
    return text_of(study.model_dump(mode="json", exclude_unset=given_only))
