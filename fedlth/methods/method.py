"""A federated method as a value: its phases, what crosses in each, how the server joins, what it is compared with."""

from __future__ import annotations

import types
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np

from fedlth.errors import StudyError
from fedlth.methods.aggregate import Aggregate
from fedlth.methods.client_update import ClientUpdate, MaskedUpdate
from fedlth.storage.server_state import ServerState
from fedlth.training.task import Task

Down = Literal["broadcast", "slice", "nothing"]


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
        return sorted(seen[int(i)] for i in rng.choice(len(seen), size=self.count, replace=False))


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
    look at what came; none has another state afterwards, and what crosses counts as evaluation.
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

    @property
    def in_waves(self) -> bool:
        """Say whether every client reports rows, the unseen too; their random streams then carry no round."""
        return isinstance(self.who, (Waves, Everyone))


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
    own `package.module:arm`. `space` says what the global state is: "weights", or "scores" of frozen weights.
    `personal` are glob patterns of tensors that stay with the client (FedPer's head), `prunable` those that masks are
    over, where not only weights are, and `buffers` what becomes of norms' statistics (model.buffers): each is what the
    study has where it says nothing. `first_mask` what a client keeps
    of the model before it has chosen for itself, `reads_capacity` whether any part asks for clients.capacity. `rewind`
    names the finder's rewind where the study names none.
    """

    name: str
    paper: str
    summary: str
    phases: tuple[Phase, ...]
    arms: tuple[str, ...]
    space: Literal["weights", "scores"] = "weights"
    personal: tuple[str, ...] = ()
    prunable: tuple[str, ...] | None = None
    buffers: Literal["aggregate", "local_statistics", "local_all"] | None = None
    first_mask: FirstMask = field(default_factory=Dense)
    reads_capacity: bool = False
    rewind: str | None = None

    @property
    def own(self) -> ClientUpdate:
        """The update that has the method's personal model."""
        return self.phases[-1].update if self.phases else MaskedUpdate()

    @property
    def slices(self) -> bool:
        """Say whether clients are sent their own part of the model: both ends then keep what a client shares."""
        return any(phase.down == "slice" for phase in self.phases)


def check_frozen(method: FederatedMethod) -> None:
    """Raise StudyError where a part of a method is no frozen value: what it kept in itself would be lost on resume."""
    parts = [("first_mask", method.first_mask)]
    parts += [
        (f"{p.name}.{part}", getattr(p, part)) for p in method.phases for part in ("update", "join", "who", "cut")
    ]
    for name, value in parts:
        loose = _loose(value, name)
        if loose:
            raise StudyError(
                f"method: {method.name} must be made of frozen dataclasses whose fields are immutable, got {loose}; "
                "what a rule remembers belongs in the memory of the server's state, what a client does into its state"
            )


def _loose(value: Any, place: str) -> str:
    """Name the first part of a value that can change, "" where there is none."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, Enum, type, types.FunctionType)):
        return ""
    if isinstance(value, (tuple, frozenset)):
        return next((found for i, v in enumerate(value) if (found := _loose(v, f"{place}[{i}]"))), "")
    kind: Any = type(value)
    if not is_dataclass(value) or not kind.__dataclass_params__.frozen:
        return f"{place}: {kind.__name__}"
    names = [f.name for f in fields(value)]
    kept = [n for n in getattr(value, "__dict__", ()) if not isinstance(getattr(kind, n, None), cached_property)]
    extra = next((n for n in kept if n not in names), None)
    if extra is not None:
        return f"{place}.{extra}, which is no field"
    return next((found for n in names if (found := _loose(getattr(value, n), f"{place}.{n}"))), "")
