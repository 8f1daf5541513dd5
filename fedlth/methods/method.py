"""A federated method as a value: its phases, what crosses in each, how the server joins, what it is compared with."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np

from fedlth.errors import StudyError
from fedlth.methods.aggregate import Aggregate
from fedlth.methods.client_update import VALUES, ClientUpdate, MaskedUpdate
from fedlth.methods.space import Space, Weights
from fedlth.methods.topology import Topology
from fedlth.storage.server_state import ServerState
from fedlth.training.task import Task


class Known(Protocol):
    """The mask that a round's upload is coded against, known to both ends: a pure function of what both have."""

    def __call__(
        self, rng: np.random.Generator, mask: np.ndarray | None, floats: np.ndarray | None, /
    ) -> np.ndarray | None:
        """Return (num_prunable,) bool, None for none; `mask` (None: all) and `floats` are the decoded download's.

        rng: the client's own stream of this round, equal at both ends.
        """
        ...


@dataclass(frozen=True)
class Received:
    """The mask of the download."""

    def __call__(
        self, rng: np.random.Generator, mask: np.ndarray | None, floats: np.ndarray | None, /
    ) -> np.ndarray | None:
        return mask


Down = Literal["broadcast", "slice", "nothing"]
KNOWN = "known mask"  # the stream that a phase's Known is given


class Who(Protocol):
    """Which clients take part in a round: `seen` are those of the federation, `everyone` the unseen too, sorted."""

    def __call__(
        self, round: int, /, *, seen: Sequence[int], everyone: Sequence[int], rng: np.random.Generator
    ) -> list[int]: ...


@dataclass(frozen=True)
class Sampled:
    """`count` clients drawn anew each round, without replacement; 0: the study's federate.clients_per_round."""

    count: int = 0

    def __call__(
        self, round: int, /, *, seen: Sequence[int], everyone: Sequence[int], rng: np.random.Generator
    ) -> list[int]:
        count = min(self.count, len(seen))  # of late joiners some are not there yet
        return sorted(seen[int(i)] for i in rng.choice(len(seen), size=count, replace=False))


@dataclass(frozen=True)
class Seen:
    """Every client of the federation, each round."""

    def __call__(
        self, round: int, /, *, seen: Sequence[int], everyone: Sequence[int], rng: np.random.Generator
    ) -> list[int]:
        return list(seen)


@dataclass(frozen=True)
class Waves:
    """Every client once, the unseen too, `size` of them a round: which wave a client falls into changes nothing."""

    size: int

    def __call__(
        self, round: int, /, *, seen: Sequence[int], everyone: Sequence[int], rng: np.random.Generator
    ) -> list[int]:
        return list(everyone[(round - 1) * self.size : round * self.size])


@dataclass(frozen=True)
class Everyone:
    """Every client, the unseen too, each round."""

    def __call__(
        self, round: int, /, *, seen: Sequence[int], everyone: Sequence[int], rng: np.random.Generator
    ) -> list[int]:
        return list(everyone)


@dataclass(frozen=True)
class Newcomers:
    """Those that no round has seen."""

    def __call__(
        self, round: int, /, *, seen: Sequence[int], everyone: Sequence[int], rng: np.random.Generator
    ) -> list[int]:
        return sorted(set(everyone) - set(seen))


class Hand(Protocol):
    """Which mask each newcomer is handed, of those that the server knows of other clients. A frozen value."""

    def __call__(
        self, newcomers: Sequence[int], known: Mapping[int, np.ndarray], memory: Mapping[str, np.ndarray], /
    ) -> dict[int, np.ndarray]:
        """Return masks (num_prunable,) bool by newcomer; one that is left out gets the whole model.

        `memory` is the server's: what clients have said of themselves.
        """
        ...


class Cut(Protocol):
    """What the server cuts out of the global state for a client, anew in each round."""

    def __call__(self, task: Task, state: ServerState, client: int, /) -> np.ndarray:
        """Return (exchange.num_prunable,) bool; a pure function of its arguments."""
        ...


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Rounds that are alike.

    `name` is in the ledger, and names the random streams. `down` is what a client is sent: the global state as one
    payload for all ("broadcast"), what its own shared mask holds of it ("slice"), or "nothing". `update` is what a
    client does with it. `own_mask` says that an update may hold other weights than were sent down (a client that
    prunes, or selects); one that does is otherwise refused. `remembers` says that those weights are what the client is
    sent from then on; without, each round sends it its first mask again. `cut` names the weights of a slice in place of
    what the client shares: the server chooses them, and sends their bits along. `join` makes the next server state of
    what came up; None: nothing is joined. `rounds` 0 stands for the study's federate.rounds. `evaluates`: clients only
    look at what came, and what crosses counts as evaluation. `changes_state` False: no client has another state
    afterwards. `hand` picks the masks of those that have none of their own. `also` names vectors of the server's
    memory, (num_floats,) float32 of what is exchanged, that go down beside a broadcast state, each as a payload of its
    own: of all that everyone keeps. One that the memory does not have yet is not sent. `must_count`: the run ends where
    none of its rounds has counted, since what follows would be another method.

    With a `topology` clients send to one another, and `down` is "nothing": an inbox holds, under each sender's name,
    what it last published, or what both ends know of one that has not yet (theta_0 under its first mask, no bytes).
    `join` then makes of all that was published the model that reports call global; nobody is sent it to go on from.
    """

    name: str
    update: ClientUpdate
    join: Aggregate | None = None
    who: Who = field(default_factory=Sampled)
    rounds: int = 0
    down: Down = "broadcast"
    own_mask: bool = False
    remembers: bool = True
    cut: Cut | None = None
    evaluates: bool = False
    changes_state: bool = True
    hand: Hand | None = None
    known: Known = field(default_factory=Received)
    also: tuple[str, ...] = ()
    topology: Topology | None = None
    must_count: bool = False

    @property
    def in_waves(self) -> bool:
        """Say whether clients report rows, the unseen too; their random streams then carry no round."""
        return isinstance(self.who, (Waves, Everyone, Newcomers)) and self.join is None


class FirstMask(Protocol):
    """The mask that a client starts with. Both ends know it, so that it costs no bytes."""

    def __call__(self, task: Task, client: int, /) -> np.ndarray:
        """Return (num_prunable,) bool; a pure function of its arguments."""
        ...


@dataclass(frozen=True)
class Dense:
    """Every weight."""

    def __call__(self, task: Task, client: int, /) -> np.ndarray:
        return np.ones(task.layout.num_prunable, bool)


@dataclass(frozen=True, kw_only=True)
class FederatedMethod:
    """A method.

    `phases` come before step 2; without any, every client stands alone. The last of them has the method's own personal
    model (arms `own`, `own_tuned`). `arms` are the models that step 2 evaluates: names of `fedlth list arms`, or your
    own `package.module:arm`. `space` is what the global state is: Weights, Scores, Thresholds.
    `personal` are glob patterns of tensors that stay with the client ("@head": the last layer, FedPer's), `prunable`
    those that masks are over, where not only weights are, `buffers` the model's policy for norms (FedBN's keeps them
    with the client): each is what the study has where it says nothing; `needs_norms` refuses a model without any.
    `first_mask` is what a client keeps of the model before it has chosen for itself, `start_mask` everyone's mask
    before the first round, the same for any client (both ends know it, too), `reads_capacity` whether any part asks for
    clients.capacity. `rewind` names the finder's rewind where the study names none.
    """

    name: str
    paper: str
    summary: str
    phases: tuple[Phase, ...]
    arms: tuple[str, ...]
    space: Space = field(default_factory=Weights)
    personal: tuple[str, ...] = ()
    prunable: tuple[str, ...] | None = None
    buffers: Literal["aggregate", "local_statistics", "local_all"] | None = None
    needs_norms: bool = False
    first_mask: FirstMask = field(default_factory=Dense)
    start_mask: FirstMask = field(default_factory=Dense)
    reads_capacity: bool = False
    rewind: str | None = None

    @property
    def own(self) -> ClientUpdate:
        """The update that has the method's personal model."""
        return self.phases[-1].update if self.phases else MaskedUpdate()

    @property
    def masks_all(self) -> bool:
        """Say whether everyone may come to share one mask."""
        return self.start_mask != Dense() or any(getattr(phase.join, "masks", False) for phase in self.phases)

    @property
    def slices(self) -> bool:
        """Say whether clients are sent their own part of the model: both ends then keep what a client shares."""
        return any(phase.down == "slice" for phase in self.phases)

    @property
    def own_masks(self) -> bool:
        """Say whether a client has a mask of its own among weights, whatever is sent down."""
        return self.slices or (self.space.kind == "values" and any(phase.own_mask for phase in self.phases))

    @property
    def has_whole(self) -> bool:
        """Say whether the global state is a whole model of weights: one that could be pruned by its own magnitudes.

        It is not where clients have weights that the server does not (`PersonalUpdate.weights`).
        """
        return self.space.kind == "values" and not hasattr(self.own, "weights")

    @property
    def topology(self) -> Topology | None:
        """Who sends to whom in the end; None where a server averages."""
        return self.phases[-1].topology if self.phases else None


def sending_checks(phase: Phase, space: Space, between: bool) -> list[tuple[str, Any, bool, str]]:
    """Return what must hold of how a phase sends; `between` says that in the one before clients had no server."""
    place, topology, update = phase.name, phase.topology, phase.update
    if topology is None:
        down = (f"{place}.down", phase.down, phase.down in ("broadcast", "slice"), "broadcast or slice")
        return [down, (f"{place}.topology", None, not between, "there: after such a phase no server has a model")]
    sends = getattr(update, "sends", None)
    return [
        (f"{place}.down", phase.down, phase.down == "nothing", "nothing where clients send to one another"),
        (f"{place}.topology", topology, callable(topology), "callable as (client, others, rng)"),
        (f"{place}.topology", topology, space.kind == "values", "None where the global state is no weights"),
        (f"{place}.update", update, sends == VALUES, f"one that sends {VALUES}: what neighbours are relayed"),
    ]


def check_frozen(method: FederatedMethod) -> None:
    """Raise StudyError where a part of a method is no frozen value: what it kept in itself would be lost on resume."""
    parts: list[tuple[str, Any]] = [(name, getattr(method, name)) for name in ("first_mask", "start_mask", "space")]
    parts += [
        (f"{p.name}.{part}", getattr(p, part))
        for p in method.phases
        for part in ("update", "join", "who", "known", "topology", "cut")
    ]
    for name, value in parts:
        loose = loose_part(value, name)
        if loose:
            raise StudyError(
                f"method: {method.name} must be made of frozen dataclasses whose fields are immutable, got {loose}; "
                "what a rule remembers belongs in the memory of the server's state, what a client does into its state"
            )


def loose_part(value: Any, place: str) -> str:
    """Name the first part of a value that can change, "" where there is none."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, Enum, type, types.FunctionType)):
        return ""
    if isinstance(value, (tuple, frozenset)):
        return next((found for i, v in enumerate(value) if (found := loose_part(v, f"{place}[{i}]"))), "")
    kind: Any = type(value)
    if not is_dataclass(value) or not kind.__dataclass_params__.frozen:
        return f"{place}: {kind.__name__}"
    names = [f.name for f in fields(value)]
    kept = [n for n in getattr(value, "__dict__", ()) if not isinstance(getattr(kind, n, None), cached_property)]
    extra = next((n for n in kept if n not in names), None)
    if extra is not None:
        return f"{place}.{extra}, which is no field"
    return next((found for n in names if (found := loose_part(getattr(value, n), f"{place}.{n}"))), "")
