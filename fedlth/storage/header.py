"""What is true of a whole run (header.json): its phases, its networks, and what it is judged by."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from fedlth.errors import wrong
from fedlth.storage.json_lines import read_object
from fedlth.storage.records import parse

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase of a run: its rounds or waves, which of the two steps it belongs to, and whether updates are joined."""

    name: str
    rounds: int = 0
    step: int
    joins: bool


# What runs whose header does not name their phases went through; how many rounds each had it does not say either.
UNNAMED = (
    Phase(name="federate", step=1, joins=True),
    Phase(name="personalise", step=2, joins=False),
    Phase(name="refine", step=2, joins=True),
    Phase(name="refined", step=2, joins=False),
)


@dataclass(frozen=True)
class Layer:
    """One tensor of the model: its size, whether it may be pruned, its dense forward's cost, whether it is frozen."""

    name: str
    shape: list[int]
    size: int
    prunable: bool
    flops_per_example: float = 0.0
    frozen: bool = False


@dataclass(frozen=True)
class Measure:
    """A metric as a report shows it: which direction is better, and whether it is a percentage."""

    name: str
    higher_is_better: bool
    percent: bool


ACCURACY = Measure("accuracy", higher_is_better=True, percent=True)


@dataclass(frozen=True, kw_only=True)
class TaskFacts:
    """A task that some clients have: its natural key ("" for the study's own), its metrics, and its network.

    The first of `metrics` is what it is judged by.
    """

    name: str
    clients: list[int]
    metrics: list[Measure]
    num_classes: int
    layers: list[Layer] = field(default_factory=list)
    flops_forward_per_example: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Header:
    """What is true of a whole run (header.json). `phases` are in order, `client_tiers` names of clients.capacity.

    The first of `metrics` is the study's.
    `tasks`: where clients have tasks of their own; `num_classes`, `layers` and their sums are then of the study's own
    network, of which each client has what is shared.
    `test` says whence test parts are: the data set's split, or each client's own examples. `label_noise` says in words
    what is wrong with the labels of the clients `noisy`; "" for nothing. `attack` says in words what the clients
    `hostile` do, `defence` what clients do to their masks before these leave, `joiners` from which round of step 1 on a
    late joiner is there. `num_exchanged` counts the numbers of the global state, `num_shared` those of the model that
    no client has alone (None: an earlier version did not say): they differ where thresholds or scores take the place
    of weights. `dense_payload_bytes` is a dense download of the last global model, `dense_first_bytes` one of theta_0,
    where both ends have that (None: where they have not).
    """

    OPTIONAL: ClassVar[frozenset[str]] = frozenset(
        {
            "phases",
            "metrics",
            "tasks",
            "client_tiers",
            "test",
            "label_noise",
            "noisy",
            "attack",
            "defence",
            "hostile",
            "joiners",
            "num_shared",
            "dense_first_bytes",
        }
    )

    format: int = FORMAT
    study: str
    method: str
    paper: str = ""
    seed: int
    engine: str
    compute: str = ""
    cohort: int = 1
    versions: dict[str, Any] = field(default_factory=dict)
    commit: str | None = None
    partition_digest: str
    data_digest: str
    num_clients: int
    unseen: list[int] = field(default_factory=list)
    test: str = "split"
    label_noise: str = ""
    noisy: list[int] = field(default_factory=list)
    attack: str = ""
    defence: str = ""
    hostile: list[int] = field(default_factory=list)
    joiners: dict[str, Any] = field(default_factory=dict)
    num_classes: int
    client_labels: list[list[int]] = field(default_factory=list)
    client_tiers: list[str] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=lambda: list(UNNAMED))
    num_parameters: int = 0
    num_prunable: int = 0
    num_exchanged: int = 0
    num_shared: int | None = None
    dense_payload_bytes: int
    dense_first_bytes: int | None = None
    dense_raw_bytes: int = 0
    flops_forward_per_example: float = 0.0
    random_starts: list[str] = field(default_factory=list)
    tasks: list[TaskFacts] = field(default_factory=list)
    metrics: list[Measure] = field(default_factory=lambda: [ACCURACY])
    finished: bool

    def joining(self, step: int | None = None) -> frozenset[str]:
        """Return the names of the phases (of one step) whose visits send an update of the global model back."""
        return frozenset(p.name for p in self.phases if p.joins and step in (None, p.step))

    @property
    def judged(self) -> tuple[Measure, ...]:
        """What clients are judged by: one metric, or one a task where they differ; such numbers have no common mean."""
        return tuple(dict.fromkeys(task.metrics[0] for task in self.tasks)) or (self.metrics[0],)

    def judges(self, client: int) -> Measure:
        """Return what one client is judged by."""
        return next((task.metrics[0] for task in self.tasks if client in task.clients), self.metrics[0])

    @property
    def shared_layers(self) -> list[Layer]:
        """The layers that the networks of all clients have, in one shape."""
        others = [{layer.name: layer.shape for layer in task.layers} for task in self.tasks]
        return [layer for layer in self.layers if all(shapes.get(layer.name) == layer.shape for shapes in others)]

    def network(self, client: int) -> tuple[list[Layer], float]:
        """Return the layers of a client's network, and its dense forward FLOPs an example."""
        found = next((task for task in self.tasks if client in task.clients), None)
        if found is None:
            return self.layers, self.flops_forward_per_example
        return found.layers, found.flops_forward_per_example


def read_header(run: Path) -> Header:
    """Return a run's header; raise StudyError where it is missing, corrupt or of another format."""
    path = run / "header.json"
    raw = read_object(path)
    if raw.get("format") != FORMAT:
        raise wrong(f"{path}: format", f"{FORMAT}", raw.get("format"))
    return parse(Header, raw, place=str(path))
