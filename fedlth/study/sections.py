"""The sections of a study file, each a frozen value: what may be written in it, and what it is when it is not."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator

from fedlth.errors import StudyError
from fedlth.study import capacity_file
from fedlth.study.validate import validated


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


def _listed(value: Any) -> Any:
    """Let one section stand for a list of one."""
    return as_tuple([value] if isinstance(value, dict) else value)


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
Shape = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(as_tuple)]
Dtype = Literal["uint8", "float32", "int64"]


class Node(BaseModel):
    """A section of a study file: frozen, strict, and no key that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=(), allow_inf_nan=False)


class OwnData(Node):
    """What is known of data that stay with the clients: every client is held to it, and the server knows nothing else.

    Shapes are those of one example; inputs may have names. A ragged field has that of the longest row of all.
    """

    input_shape: Shape | dict[str, Shape]
    input_dtype: Dtype | dict[str, Dtype] = "float32"
    num_classes: Count
    targets: Literal["classes", "positions", "numbers"] = "classes"
    target_shape: Shape = ()


class Data(Node):
    """Which data set: a name of `fedlth list datasets`, `hf:ID`, or your own `package.module:callable`.

    `own`: every client has a folder of its own, which nobody else reads.
    """

    name: str = "fashion_slice"
    root: str | None = None
    options: dict[str, Any] = {}
    pool: bool = False
    own: OwnData | None = None


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


class Joiners(Node):
    """Late joiners: a share of the clients that rounds may sample, which are there from a round of step 1 on."""

    share: Fraction
    round: Annotated[int, Field(ge=2)]


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
    joiners: Annotated[tuple[Joiners, ...], BeforeValidator(_listed)] = ()
    newcomer: Spec | None = None


class Model(Node):
    """Which network (and with what other options it is drawn anew), what is prunable, what stays with a client.

    `theta_0` names the weights that the network brings, and those that nothing trains.
    """

    name: str = "lenet5"
    options: dict[str, Any] = {}
    reinit_options: dict[str, Any] = {}
    prunable: Names | None = None
    personal: Names | None = None
    buffers: Literal["aggregate", "local_statistics", "local_all"] = "aggregate"
    theta_0: str | None = None


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
    round_schedule: Spec | None = None
    clip_norm: Positive | None = None
    loss: Spec | None = None
    pull: Spec | None = None
    augment: Specs = ()
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    precision: Precision = "float32"
    group_by_length: bool = False


class Federate(Node):
    """Step 1: rounds over sampled clients; `join` takes the place of the method's own mean.

    Of the rounds and of those inside the tickets: `min_clients` usable replies make one count. On devices `quorum`
    clients must be there to begin, and rounds are drawn among those that are; `deadline_s` closes a round. `roll_back`:
    what must be left of a model's lead over guessing, 0 for never to look.
    """

    rounds: Annotated[int, Field(ge=0)] = 10
    clients_per_round: CountOrShare = 5
    min_clients: Count = 1
    roll_back: Annotated[float, Field(ge=0, lt=1)] = 0.1
    quorum: CountOrShare | None = None
    deadline_s: Positive | None = None
    join: Spec | None = None
    mask_outliers: bool = False


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
    group_by_length: bool | None = None
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
    """What clients of one natural key train; what is not given is the study's, `targets` what the data hold."""

    targets: Literal["classes", "numbers"] | None = None
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


Rate = Annotated[float, Field(ge=0, le=1)]


class Faults(Node):
    """The rate of each fault, among all visits that `chaos` names. A new one goes last: the draws of others stay."""

    drop: Rate = 0.0
    delay: Rate = 0.0
    duplicate: Rate = 0.0
    corrupt: Rate = 0.0
    nan: Rate = 0.0
    wrong_shape: Rate = 0.0
    lie_about_counts: Rate = 0.0
    huge: Rate = 0.0
    kill: Rate = 0.0
    disk_full: Rate = 0.0
    stale: Rate = 0.0

    @model_validator(mode="before")
    @classmethod
    def _no_clocks(cls, given: Any) -> Any:
        if isinstance(given, dict) and "clock_skew" in given:
            raise ValueError(
                "has no clock_skew: nothing here compares the clocks of two machines, so that a wrong one has no effect"
            )
        return given

    @model_validator(mode="after")
    def _one_a_visit(self) -> Faults:
        if sum(rate for _, rate in self) > 1 + 1e-9:
            raise ValueError("must sum up to at most 1, since a visit meets one fault at most")
        return self


class Chaos(Node):
    """Faults that are injected on purpose: at what rates, and in which rounds, clients and phases (None: in all)."""

    seed: Annotated[int, Field(ge=0)] = 0
    faults: Faults
    rounds: Annotated[tuple[Count, ...], BeforeValidator(as_tuple), Field(min_length=1)] | None = None
    clients: (
        Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(as_tuple), Field(min_length=1)] | None
    ) = None
    phases: Annotated[tuple[str, ...], BeforeValidator(as_tuple), Field(min_length=1)] | None = None


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
