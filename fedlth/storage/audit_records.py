"""What an audit has measured: a file for each client, read again after a stop, and the facts that a report averages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedlth.storage import store

AUDIT = "audit"  # the folder
FEW = 3  # a position that fewer clients keep tells of them, even in a sum
ALL, HIDDEN, OUTPUT, NO_AUXILIARY = "all bits", "hidden layers", "output layer", "no auxiliary data"
TENTH, SHUFFLED = "a tenth of the shadows", "shuffled labels (control)"
NONE, PRIVATE, COMMON, COARSE = "none", "private init (control)", "common mask", "coarse mask"


@dataclass(frozen=True)
class Guess:
    """One victim under one attack: how many of its classes are among the attacker's first `num_true` guesses."""

    defence: str
    attack: str
    victim: int
    hits: int
    num_true: int
    num_classes: int

    @property
    def share(self) -> float:
        return self.hits / self.num_true

    @property
    def chance(self) -> float:
        return self.num_true / self.num_classes


@dataclass(frozen=True)
class Price:
    """What a defence costs one victim: its ticket under the defended mask, and the bytes of that mask, coded.

    `epsilon` is that of a single bit, None where there is none. `test_accuracy` is None where the training diverged.
    """

    defence: str
    victim: int
    density: float
    mask_bytes: int
    test_accuracy: float | None
    epsilon: float | None = None


@dataclass(frozen=True)
class Match:
    """How like a victim's mask its own second search is, and how like the most similar other client's, as Jaccard.

    `among` counts the masks that it is compared with, its own included.
    """

    victim: int
    own: float
    best_other: float
    among: int


@dataclass(frozen=True, eq=False)
class Membership:
    """Losses of one victim's model on own training examples and on as many others of the same classes.

    `member` and `other` are (n,); the same examples under the global model are `member_global` and `other_global`.
    """

    model: str
    victim: int
    member: np.ndarray
    other: np.ndarray
    member_global: np.ndarray
    other_global: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """What the tickets of one round's clients cover together, and the bytes of one client's part of a secure sum.

    `density` is the mean of theirs, `union` the share of the weights that any keeps, `alone` the share of the union
    that one client alone keeps, `few` that fewer than FEW do. Bytes are those of integers, under one mask for all (of
    that density), for the union, and for all weights.
    """

    phase: str
    round: int
    clients: int
    density: float
    union: float
    alone: float
    few: float
    common_bytes: int
    union_bytes: int
    dense_bytes: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Audit:
    """All facts of an audit. `notes` say what was left out or differs, `applied` which defence the run itself has."""

    study: str
    method: str
    seed: int
    density: float
    num_shadows: int
    victims: tuple[int, ...]
    guesses: tuple[Guess, ...]
    prices: tuple[Price, ...]
    matches: tuple[Match, ...]
    members: tuple[Membership, ...]
    coverages: tuple[Coverage, ...] = ()
    applied: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Records:
    """The clients' files of a run's audit. A file counts where its key is the one asked for: equal keys, equal bits."""

    run: Path
    key: str

    def path(self, name: str) -> Path:
        return self.run / AUDIT / "clients" / f"{name}.safetensors"

    def get(self, name: str) -> dict[str, np.ndarray] | None:
        """Return a client's arrays; None where it has not been measured, or for another key, or its file is damaged."""
        path = self.path(name)
        if not path.is_file():
            return None
        try:
            arrays, meta = store.unpack(path.read_bytes())
        except ValueError:
            return None
        return arrays if meta.get("key") == self.key else None

    def put(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Write a client's arrays durably."""
        store.write_atomic(self.path(name), store.pack(arrays, {"key": self.key}))
