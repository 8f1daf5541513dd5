"""The division that LEAF's scripts make of one file of users, sample by sample, so that its settings can be repeated.

Caldas, Duddu, Wu, Li, Konecny, McMahan, Smith, Talwalkar: LEAF, 2018, arXiv 1812.01097; its data/utils.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import ClassVar

import numpy as np

from fedlth.data.limits import check_count, check_share
from fedlth.data.parts import Parts
from fedlth.errors import StudyError, wrong


@dataclass(frozen=True)
class Leaf:
    """Sample users as LEAF does, and split each one's samples into training and test.

    kind: `niid`: users in random order until they have `fraction` of all samples, the last one cut off. `iid`: that
    fraction of all samples, dealt to `users` (a share of the users there are). `all`: every user, nothing sampled.
    min_samples: users with fewer are left out afterwards. train: share of a user's samples for training.
    sample_seed, split_seed: LEAF's --smplseed and --spltseed. Users are the data's keys, in the order of the data, as
    of one LEAF file: LEAF samples every file of a data set for itself.
    """

    sample_seed: int
    split_seed: int
    kind: str = "niid"
    fraction: float = 0.1
    users: float = 0.01
    min_samples: int = 0
    train: float = 0.9
    by_key: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.kind not in ("niid", "iid", "all"):
            raise wrong("partition.kind", "niid, iid or all", self.kind)
        for name in ("sample_seed", "split_seed", "min_samples"):
            check_count(f"partition.{name}", getattr(self, name), 0)
        for name in ("fraction", "users"):
            check_share(f"partition.{name}", getattr(self, name))
        if not 0 < self.train < 1:
            raise wrong("partition.train", "in (0, 1)", self.train)

    def __call__(
        self, labels: np.ndarray, keys: np.ndarray | None, num_clients: int, rng: np.random.Generator
    ) -> list[Parts]:
        if keys is None:
            raise StudyError("partition: leaf must have a data set with natural keys, got one without")
        _, first, owner = np.unique(keys, return_index=True, return_inverse=True)
        users = [np.flatnonzero(owner == user) for user in np.argsort(first)]
        if self.kind != "all":
            sample = self._niid if self.kind == "niid" else self._iid
            users = sample(users, Random(self.sample_seed))
        sampled = [own for own in users if len(own) >= self.min_samples]
        draws = Random(self.split_seed)
        found = [self._split(own, draws) for own in sampled if len(own) >= 2]
        if len(found) != num_clients:
            raise wrong("clients.count", f"{len(found)}, the users that LEAF's sampling leaves", num_clients)
        return found

    def _split(self, own: np.ndarray, draws: Random) -> Parts:
        num_train = 1 if len(own) == 2 else max(1, int(self.train * len(own)))
        chosen = np.zeros(len(own), bool)
        chosen[draws.sample(range(len(own)), num_train)] = True
        return Parts(np.sort(own[chosen]), None, np.sort(own[~chosen]))

    def _niid(self, users: list[np.ndarray], draws: Random) -> list[np.ndarray]:
        wanted = int(self.fraction * sum(map(len, users)))
        order = list(users)
        draws.shuffle(order)
        found: list[np.ndarray] = []
        for own in order:
            if wanted <= 0:
                break
            if len(own) > wanted:
                own = own[draws.sample(range(wanted), wanted)]
            found.append(own)
            wanted -= len(own)
        return found

    def _iid(self, users: list[np.ndarray], draws: Random) -> list[np.ndarray]:
        everything = np.concatenate(users)
        chosen = everything[draws.sample(range(len(everything)), int(self.fraction * len(everything)))]
        count = max(1, round(self.users * len(users)))
        small, larger = divmod(len(chosen), count)  # the last `larger` users have one sample more
        sizes = [small] * (count - larger) + [small + 1] * larger
        return np.split(chosen, np.cumsum(sizes)[:-1])
