"""YAML to a frozen, validated tree: an unknown key or a wrong type is an error that names the place."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from fedlth.errors import StudyError
from fedlth.study.yaml_text import parse


def _spec(value: Any) -> Any:
    """Let `name` stand for `{name: name}`."""
    return {"name": value} if isinstance(value, str) else value


def as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Spec = Annotated[dict[str, Any], BeforeValidator(_spec)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Floats = Annotated[tuple[float, ...], BeforeValidator(as_tuple)]
Names = Annotated[tuple[str, ...], BeforeValidator(as_tuple)]


T = TypeVar("T", bound=BaseModel)


class Node(BaseModel):
    """A section of a study file: frozen, strict, and no key that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=(), allow_inf_nan=False)


class Data(Node):
    """Which data set: a name of `fedlth list datasets`, `hf:ID`, or your own `package.module:callable`."""

    name: str = "fashion_slice"
    root: str | None = None
    options: dict[str, Any] = {}


class Tier(Node):
    """What some clients can carry, as parts of a whole device's: those named, or a share of them all."""

    clients: Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(as_tuple)] | None = None
    share: Fraction | None = None
    density: Fraction = 1.0
    width: Fraction = 1.0
    speed: Positive = 1.0


class Clients(Node):
    """How many clients, how each one's examples are split, and what each can carry."""

    count: Count
    capacity: Annotated[tuple[Tier, ...], BeforeValidator(as_tuple)] = ()
    unseen: Annotated[float, Field(ge=0, lt=1)] = 0.0
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.2
    test_samples: Count = 100


class Model(Node):
    """Which network (and with what other options it is drawn anew), what is prunable, what stays with a client."""

    name: str = "lenet5"
    options: dict[str, Any] = {}
    reinit_options: dict[str, Any] = {}
    prunable: Names | None = None
    personal: Names | None = None
    buffers: Literal["aggregate", "local_statistics", "local_all"] = "aggregate"


class Train(Node):
    """Local SGD."""

    epochs: Count = 1
    batch_size: Count = 32
    lr: Positive = 0.05
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0


class Federate(Node):
    """Step 1: rounds over sampled clients."""

    rounds: Annotated[int, Field(ge=0)] = 10
    clients_per_round: Count = 5


class Personalise(Node):
    """Step 2: every client's own training; `clients_per_wave` of them are committed at once."""

    epochs: Count = 2
    lr: Positive | None = None
    schedule: Literal["constant", "cosine"] = "constant"
    arms: Names | None = None
    clients_per_wave: Count = 10


class Finder(Node):
    """How a ticket is found: parts that compose, down to exact densities; `main` is the one kept."""

    score: Spec = {"name": "magnitude"}
    schedule: Spec = {"name": "iterative"}
    scope: Spec = {"name": "layerwise"}
    rewind: Spec = {"name": "global"}
    granularity: Spec = {"name": "element"}
    dead: Spec = {"name": "zero"}
    gate: Spec = {"name": "always"}
    stop: Spec = {"name": "target"}
    densities: Floats = (0.2,)
    main: float | None = None


class Refine(Node):
    """Further federated rounds inside the tickets."""

    rounds: Annotated[int, Field(ge=0)] = 0
    clients_per_round: Count = 5


class Tune(Node):
    """Learning rates to try before the run; validation accuracy after `rounds` rounds chooses."""

    lr: Annotated[tuple[Positive, ...], BeforeValidator(as_tuple)] = ()
    rounds: Count = 5


class Ray(Node):
    """The Ray engine: workers, where they run, and what each may use."""

    address: str | None = None
    workers: Count = 2
    num_cpus: Annotated[float, Field(ge=0)] = 1.0
    num_gpus: Annotated[float, Field(ge=0)] = 0.0
    logical_gpus: Annotated[int, Field(ge=0)] | None = None
    gpu_memory_mb: Count | None = None
    gpu_total_memory_mb: Count | None = None
    memory_mb: Count | None = None


class Study(Node):
    """A whole study. `science()` is the part that decides its numbers."""

    study: str = "study"
    seed: Annotated[int, Field(ge=0)] = 0
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(as_tuple)] = ()
    method: Spec = {"name": "two_step"}
    data: Annotated[Data, BeforeValidator(_spec)] = Data()
    partition: Spec = {"name": "iid"}
    clients: Clients
    model: Annotated[Model, BeforeValidator(_spec)] = Model()
    metric: str | None = None
    metrics: Names = ()
    train: Train = Train()
    federate: Federate = Federate()
    finder: Finder = Finder()
    personalise: Personalise = Personalise()
    refine: Refine = Refine()
    tune: Tune = Tune()
    wire: Literal["raw", "lossless", "bf16", "f16", "step", "sign"] = "lossless"
    compute: Literal["auto", "reference", "tuned", "sparse"] = "reference"
    cohort: Literal["auto"] | Count = 1
    device: str = "cpu"
    engine: Literal["inprocess", "ray", "flower"] = "inprocess"
    workers: Literal["auto"] | Count = "auto"
    ray: Ray = Ray()
    job_timeout_s: Positive | None = None
    tensorboard: bool = False
    tickets: Literal["dense", "compact", "none"] = "dense"
    out: str | None = None

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
            "tensorboard",
            "tickets",
            "tune",
            "study",
        }
        return json.dumps(self.model_dump(mode="json", exclude=outside), sort_keys=True)

    def given(self, place: str) -> bool:
        """Say whether the user wrote this section, or `section.key`: never true of a default."""
        section, _, key = place.partition(".")
        return section in self.model_fields_set and (not key or key in getattr(self, section).model_fields_set)


def _override(tree: dict[str, Any], assignment: str) -> None:
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
    node[last] = parse(text, f"override {assignment!r}")


def _known(location: tuple[Any, ...], root: type[BaseModel]) -> list[str]:
    """Return the keys that are allowed where an unknown one was found."""
    node: Any = root
    for step in location[:-1]:
        if get_origin(node) is dict:  # a section whose keys are the user's names
            node = get_args(node)[1]
            continue
        field = node.model_fields.get(step) if hasattr(node, "model_fields") else None
        node = field.annotation if field else None
    return list(node.model_fields) if hasattr(node, "model_fields") else []


def _explain(error: ValidationError, where: str, root: type[BaseModel]) -> StudyError:
    first = error.errors(include_url=False)[0]
    place = ".".join(str(p) for p in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _known(first["loc"], root)
        close = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
        return StudyError(f"{where}: {place}: unknown key; {hint}")
    if first["type"] == "missing":
        return StudyError(f"{where}: {place}: required, but missing")
    wanted = first["msg"][:1].lower() + first["msg"][1:]
    return StudyError(f"{where}: {place}: {wanted}, got {first['input']!r}")


def validated(kind: type[T], tree: Any, where: str) -> T:
    """Return the plain tree as a `kind`; raise StudyError with `where: place: what was wanted, got`."""
    if not isinstance(tree, dict):
        raise StudyError(f"{where}: must be a mapping of sections, got {type(tree).__name__}")
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise _explain(error, where, kind) from error


def build(tree: Any, where: str = "study") -> Study:
    """Validate a plain tree; raise StudyError with `where: place: what was wanted, got`."""
    if isinstance(tree, dict) and tree.keys() & {"lottery", "searches", "probes"}:
        raise StudyError(f"{where}: is a study of the ticket laboratory; `fedlth lottery` runs and resumes it")
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
    if study.finder.main is not None and study.finder.main not in densities:
        raise StudyError(f"{where}: finder.main: must be one of finder.densities, got {study.finder.main}")
    named = [*study.metrics, *([study.metric] if study.metric else [])]
    if len(set(named)) < len(named):
        raise StudyError(f"{where}: metrics: each must be given once, metric included, got {list(study.metrics)}")
    if len(set(study.seeds)) != len(study.seeds):
        raise StudyError(f"{where}: seeds: each must be given once, got {list(study.seeds)}")
    for place, spec in (("method", study.method), ("partition", study.partition)):
        if not isinstance(spec.get("name"), str):
            raise StudyError(f"{where}: {place}.name: required, but missing")
    seed = study.partition.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise StudyError(f"{where}: partition.seed: must be an integer of at least 0, got {seed!r}")


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
        _override(tree, assignment)
    return tree


def dump(study: Study, *, given_only: bool = False) -> str:
    """Return the study as YAML; loading it gives an equal study. `given_only` leaves out what is a default."""
    return yaml.safe_dump(study.model_dump(mode="json", exclude_unset=given_only), sort_keys=False)
