"""YAML to a frozen, validated tree: an unknown key or a wrong type is an error that names the place."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError, model_validator

from fedlth.errors import StudyError
from fedlth.study import capacity_file
from fedlth.study.yaml_text import parse


def _spec(value: Any) -> Any:
    """Let `name` stand for `{name: name}`."""
    return {"name": value} if isinstance(value, str) else value


def as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _texts(value: Any) -> Any:
    """Let a key that YAML reads as a whole number stand for its text."""
    if not isinstance(value, dict):
        return value
    return {str(k) if isinstance(k, int) and not isinstance(k, bool) else k: v for k, v in value.items()}


def _count_or_share(value: Any) -> Any:
    """Accept a whole number of at least 1, or a number with a point in (0, 1]: 1 is one client, 1.0 is all."""
    if isinstance(value, bool) or not (
        (isinstance(value, int) and value >= 1) or (isinstance(value, float) and 0 < value <= 1)
    ):
        raise ValueError("must be a whole number of at least 1, or a share in (0, 1] with a point (1.0 is all)")
    return value


def _specs(value: Any) -> Any:
    """Let one part stand for a list of one, and names for parts."""
    listed = [value] if isinstance(value, (str, dict)) else value
    return tuple(map(_spec, listed)) if isinstance(listed, (list, tuple)) else listed


Spec = Annotated[dict[str, Any], BeforeValidator(_spec)]
Specs = Annotated[tuple[dict[str, Any], ...], BeforeValidator(_specs)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
CountOrShare = Annotated[int | float, PlainValidator(_count_or_share)]
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
    pool: bool = False


class Tier(Node):
    """What some clients can carry: those named, or a share of them all.

    `density`, `width` and `speed` are relative to the fleet's reference device; a link not given is the fleet's.
    """

    clients: Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(as_tuple)] | None = None
    share: Fraction | None = None
    name: str = ""
    density: Fraction = 1.0
    width: Fraction = 1.0
    speed: Positive = 1.0
    memory_mb: Positive | None = None
    down_bytes_s: Positive | None = None
    up_bytes_s: Positive | None = None
    latency_s: NotNegative | None = None


class LabelNoise(Node):
    """Which share of a client's training and validation labels is wrong, and of which share of the clients."""

    rate: Fraction
    share: Fraction = 1.0
    kind: Literal["uniform", "pair"] = "uniform"


class Clients(Node):
    """How many clients, how each one's examples are split, and what each can carry.

    `capacity` may be given as a file of one row a client; what it says then stands here as tiers.
    """

    @model_validator(mode="before")
    @classmethod
    def _read_file(cls, given: Any) -> Any:
        return _with_tiers(given) if isinstance(given, dict) else given

    count: Count
    capacity: Annotated[tuple[Tier, ...], BeforeValidator(as_tuple)] = ()
    unseen: Annotated[float, Field(ge=0, lt=1)] = 0.0
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.2
    test: Literal["split", "own"] = "split"
    test_samples: Count = 100
    test_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    label_noise: LabelNoise | None = None


class Model(Node):
    """Which network (and with what other options it is drawn anew), what is prunable, what stays with a client."""

    name: str = "lenet5"
    options: dict[str, Any] = {}
    reinit_options: dict[str, Any] = {}
    prunable: Names | None = None
    personal: Names | None = None
    buffers: Literal["aggregate", "local_statistics", "local_all"] = "aggregate"


Momentum = Annotated[float, Field(ge=0, lt=1)]
Precision = Literal["float32", "bf16"]


class Timed(Node):
    """A section that says how long a training is, in epochs or in steps."""

    epochs: Count | None = None
    steps: Count | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_of_two(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        if given.get("steps") is not None:
            if given.get("epochs") is not None:
                raise ValueError("must have epochs or steps, not both")
            return {**given, "epochs": None}  # the default epochs are then moot
        if "epochs" in given and given["epochs"] is None:
            raise ValueError("must have epochs or steps")
        return given


class Train(Timed):
    """A client's training recipe; `momentum` and `weight_decay` are the short form of sgd's options."""

    epochs: Count | None = 1
    batch_size: Count = 32
    lr: Positive = 0.05
    momentum: Momentum = 0.0
    weight_decay: NotNegative = 0.0
    optimizer: Spec = {"name": "sgd"}
    schedule: Spec = {"name": "constant"}
    round_decay: Positive = 1.0
    clip_norm: Positive | None = None
    loss: Spec | None = None
    pull: Spec | None = None
    augment: Specs = ()
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    precision: Precision = "float32"


class Federate(Node):
    """Step 1: rounds over sampled clients."""

    rounds: Annotated[int, Field(ge=0)] = 10
    clients_per_round: CountOrShare = 5


class Personalise(Timed):
    """Step 2: every client's own training, train's where a key is not given; `clients_per_wave` commit at once."""

    epochs: Count | None = 2
    batch_size: Count | None = None
    lr: Positive | None = None
    momentum: Momentum | None = None
    weight_decay: NotNegative | None = None
    optimizer: Spec | None = None
    schedule: Spec = {"name": "constant"}
    clip_norm: Positive | None = None
    loss: Spec | None = None
    pull: Spec | None = None
    augment: Specs | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    precision: Precision | None = None
    arms: Names | None = None
    clients_per_wave: Count = 10


class Finder(Node):
    """How a ticket is found: parts that compose, down to exact densities; `main` says which of them is kept."""

    score: Spec = {"name": "magnitude"}
    schedule: Spec = {"name": "iterative"}
    scope: Spec = {"name": "layerwise"}
    rewind: Spec = {"name": "global"}
    granularity: Spec = {"name": "element"}
    dead: Spec = {"name": "zero"}
    gate: Spec = {"name": "always"}
    stop: Spec = {"name": "target"}
    densities: Floats = (0.2,)
    main: Literal["auto", "capacity"] | float | None = None


class Evaluate(Node):
    """A curve: all clients evaluate the global model every `every` rounds of step 1; with which one step 2 begins."""

    every: Annotated[int, Field(ge=0)] = 0
    keep: Literal["last", "best"] = "last"


class Refine(Node):
    """Further federated rounds inside the tickets."""

    rounds: Annotated[int, Field(ge=0)] = 0
    clients_per_round: CountOrShare = 5


class TaskSpec(Node):
    """What clients of one natural key train; what is not given is the study's."""

    num_classes: Count | None = None
    options: dict[str, Any] = {}
    loss: Spec | None = None
    metric: str | None = None
    metrics: Names | None = None


class Fleet(Node):
    """Simulated time on stated devices and links; a client's tier (clients.capacity) may say other links and speeds."""

    flops_s: Positive
    flops: Literal["dense", "alive"] = "dense"
    down_bytes_s: Positive
    up_bytes_s: Positive
    latency_s: NotNegative = 0.0
    straggle: NotNegative = 0.0
    deadline_s: Positive | None = None
    drop: Annotated[float, Field(ge=0, lt=1)] = 0.0


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
    fleet: Fleet | None = None
    tune: Tune = Tune()
    wire: Literal["raw", "lossless", "bf16", "f16", "step", "sign"] = "lossless"
    compute: Literal["auto", "reference", "tuned", "sparse"] = "reference"
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
        return json.dumps(self.model_dump(mode="json", exclude=outside), sort_keys=True)

    def given(self, place: str) -> bool:
        """Say whether the user wrote this section, or `section.key`: never true of a default."""
        section, _, key = place.partition(".")
        node = getattr(self, section)
        return section in self.model_fields_set and (not key or (node is not None and key in node.model_fields_set))


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
        if isinstance(step, int):  # of a list, whose items are alike
            continue
        field = node.model_fields.get(step) if hasattr(node, "model_fields") else None
        node = _section(field.annotation) if field else None
    return list(node.model_fields) if hasattr(node, "model_fields") else []


def _section(annotation: Any) -> Any:
    """Return the section in an annotation such as `Section | None` or `tuple[Section, ...]`, else the annotation."""
    if hasattr(annotation, "model_fields") or get_origin(annotation) is dict:
        return annotation
    inner = (_section(part) for part in get_args(annotation))
    return next((part for part in inner if hasattr(part, "model_fields")), annotation)


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
    message = first["msg"].removeprefix("Value error, ")
    wanted = message[:1].lower() + message[1:]
    return StudyError(f"{where}: {place}: {wanted}, got {first['input']!r}")


def validated(kind: type[T], tree: Any, where: str) -> T:
    """Return the plain tree as a `kind`; raise StudyError with `where: place: what was wanted, got`."""
    if not isinstance(tree, dict):
        raise StudyError(f"{where}: must be a mapping of sections, got {type(tree).__name__}")
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise _explain(error, where, kind) from error


def _with_tiers(given: dict[str, Any]) -> dict[str, Any]:
    """Return the section `clients` with the file that `capacity` names read into tiers: equal rows are one tier.

    Raises StudyError naming file, line and column.
    """
    capacity, count = given.get("capacity"), given.get("count")
    if isinstance(capacity, dict) and capacity.keys() == {"file"}:
        capacity = capacity["file"]
    if not isinstance(capacity, str):
        return given
    found: dict[Tier, list[int]] = {}
    for place, client, row in capacity_file.rows(capacity):
        if isinstance(count, int) and client >= count:
            raise StudyError(f"{place}: client: must be below clients.count = {count}, got {client}")
        found.setdefault(validated(Tier, row, place), []).append(client)
    tiers = []
    for number, (tier, clients) in enumerate(found.items()):
        named = {"name": tier.name or f"tier {number}", "clients": tuple(clients)}
        tiers.append({**tier.model_dump(exclude_unset=True), **named})
    return {**given, "capacity": tuple(tiers)}


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
    if study.finder.main not in (None, "auto", "capacity", *densities):
        raise StudyError(
            f"{where}: finder.main: must be one of finder.densities, auto or capacity, got {study.finder.main}"
        )
    if study.data.pool and study.clients.test != "own":
        raise StudyError(f"{where}: data.pool: needs clients.test: own, since the test split is then the clients' too")
    if len(set(study.seeds)) != len(study.seeds):
        raise StudyError(f"{where}: seeds: each must be given once, got {list(study.seeds)}")
    check_optimizer(study.train, f"{where}: train")
    for place, spec in (("method", study.method), ("partition", study.partition)):
        if not isinstance(spec.get("name"), str):
            raise StudyError(f"{where}: {place}.name: required, but missing")
    seed = study.partition.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise StudyError(f"{where}: partition.seed: must be an integer of at least 0, got {seed!r}")


def check_optimizer(train: Train, place: str) -> None:
    """Refuse the short form of sgd's options beside another optimizer, or beside the same option."""
    for key in ("momentum", "weight_decay"):
        value = getattr(train, key)
        if value and train.optimizer.get("name") != "sgd":
            raise StudyError(
                f"{place}.{key}: is an option of sgd; give {train.optimizer.get('name')} its own under {place}."
                f"optimizer, got {value}"
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
        _override(tree, assignment)
    return tree


def dump(study: Study, *, given_only: bool = False) -> str:
    """Return the study as YAML; loading it gives an equal study. `given_only` leaves out what is a default."""
    return yaml.safe_dump(study.model_dump(mode="json", exclude_unset=given_only), sort_keys=False)
