"""A first ticket for clients that no round has seen (`clients.newcomer`): of the global model, or another client's.

After step 2 the server knows a mask of every client that took part. A newcomer says something of itself, is sent the
weights of theta_g that another's mask holds, and trains them as every arm trains: the arm `handed`. Beside it stand,
for the same clients, the ticket that each finds alone (`ticket`), the global model's own mask and a random one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from fedlth.data.ragged import IGNORED
from fedlth.errors import wrong
from fedlth.methods.aggregate import Contribution
from fedlth.methods.client_update import THETA_G, ClientUpdate, Inbox, Update, merged
from fedlth.methods.mask_outliers import jaccard_distance
from fedlth.methods.method import Everyone, Newcomers, Phase
from fedlth.models.layout import Layout
from fedlth.personalization.arms import trained
from fedlth.personalization.personalise import Personalise, row_of
from fedlth.storage.client_state import ClientState
from fedlth.storage.records import HANDED, INTRODUCE
from fedlth.storage.server_state import ServerState
from fedlth.storage.typed_record import as_record
from fedlth.tickets.finder import Finder
from fedlth.tickets.select import keep_top
from fedlth.training.budget import Budget
from fedlth.training.local_client import LocalClient
from fedlth.training.task import Task
from fedlth.wire.payload import Content

WHO, LABELS, SIGNATURE = "introduced", "labels", "signature"  # names of messages, and in the server's memory


class Newcomer(Protocol):
    """How newcomers get their first ticket; a frozen value.

    `others`: it is one of another client, whose kept masks then come up. A part that has others has `introduction`
    too, and picks masks as a `Hand` does.
    """

    @property
    def others(self) -> bool: ...


@dataclass(frozen=True)
class GlobalMask:
    """The largest weights of the global model: no bytes beyond its download, which the client prunes itself."""

    others: bool = False


@dataclass(frozen=True)
class LabelHistogram:
    """The ticket of the client with the nearest shares of labels; of `nearest` several, what most of them hold.

    Every client tells the server which share of its training examples each class is: the server then knows what its
    clients' data are of. The distance is half the sum of the differences.
    """

    nearest: int = 1
    others: bool = True

    def __post_init__(self) -> None:
        _check_nearest(self.nearest)

    def introduction(self, finder: Finder, density: float) -> Phase:
        return Phase(
            name=INTRODUCE, update=TellLabels(), join=Remember(LABELS), who=Everyone(), rounds=1, down="nothing",
            changes_state=False,
        )  # fmt: skip

    def __call__(
        self, newcomers: Sequence[int], known: Mapping[int, np.ndarray], memory: Mapping[str, np.ndarray], /
    ) -> dict[int, np.ndarray]:
        said = _said(memory, LABELS)
        told = [c for c in known if c in said]
        return {
            new: voted(known, {c: float(np.abs(said[c] - said[new]).sum()) / 2 for c in told}, self.nearest)
            for new in newcomers if new in said and told
        }  # fmt: skip


@dataclass(frozen=True)
class Similar:
    """The ticket nearest to the newcomer's own signature: the largest weights after `steps` of training theta_g.

    The signature is a mask of the tickets' density, which goes up; nearest in Jaccard distance. Of `nearest` several,
    what most of them hold.
    """

    steps: int = 10
    nearest: int = 1
    others: bool = True

    def __post_init__(self) -> None:
        _check_nearest(self.nearest)
        if self.steps < 1:
            raise wrong("clients.newcomer.steps", "at least 1", self.steps)

    def introduction(self, finder: Finder, density: float) -> Phase:
        return Phase(
            name=INTRODUCE, update=TellSignature(finder, density, self.steps), join=Remember(SIGNATURE),
            who=Newcomers(), rounds=1, own_mask=True, changes_state=False,
        )  # fmt: skip

    def __call__(
        self, newcomers: Sequence[int], known: Mapping[int, np.ndarray], memory: Mapping[str, np.ndarray], /
    ) -> dict[int, np.ndarray]:
        said = _said(memory, SIGNATURE)
        return {
            new: voted(known, {c: jaccard_distance(m, said[new].astype(bool)) for c, m in known.items()}, self.nearest)
            for new in newcomers if new in said and known
        }  # fmt: skip


NEWCOMERS: Mapping[str, Callable[..., Newcomer]] = {
    "global": GlobalMask,
    "label_histogram": LabelHistogram,
    "similar": Similar,
}


def _check_nearest(nearest: int) -> None:
    if nearest < 1:
        raise wrong("clients.newcomer.nearest", "at least 1", nearest)


def voted(known: Mapping[int, np.ndarray], distances: Mapping[int, float], nearest: int) -> np.ndarray:
    """Return the mask of the nearest client, or of several what most of them hold, as many weights as they on average.

    Equal distances: the first client; equal votes: the first weight.
    """
    chosen = sorted(distances, key=lambda client: (distances[client], client))[:nearest]
    votes: np.ndarray = np.stack([known[client] for client in chosen]).sum(axis=0).astype(np.float64)
    if len(chosen) == 1:
        return known[chosen[0]]
    size = round(float(np.mean([np.count_nonzero(known[client]) for client in chosen])))
    return keep_top(votes, votes > 0, size)


@dataclass(frozen=True)
class TellLabels:
    """Send which share of the training examples (or positions) each class is, (num_classes,)."""

    sends: tuple[tuple[str, str], ...] = ((LABELS, "statistics"),)

    def range(self, name: str, task: Task, /) -> tuple[float, float]:
        return 0.0, 1.0

    def __call__(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Update:
        y = local.train_part.y.cpu().numpy().reshape(-1)
        counts = np.bincount(y[y != IGNORED], minlength=local.task.dataset.num_classes)
        shares = (counts / max(1, counts.sum())).astype(np.float32)
        return Update(state, {LABELS: Content(np.zeros(0, bool), shares, np.zeros(0, np.int64))})


@dataclass(frozen=True)
class TellSignature:
    """Train the global model for a few steps, and send which weights are then the largest."""

    finder: Finder
    density: float
    steps: int
    sends: tuple[tuple[str, str], ...] = ((SIGNATURE, "mask"),)

    def __call__(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Update:
        task = local.task
        short = replace(local.personal_recipe, budget=Budget(steps=self.steps))
        params = local.train(merged(local, inbox, state), recipe=short).params
        score = np.abs(params.floats[: local.full.size])
        mask = self.finder.pick(score, local.full, task.layout, self.density)
        return Update(state, {SIGNATURE: Content(task.shared_mask(mask), None, None)})


@dataclass(frozen=True)
class Remember:
    """Keep what clients said of themselves in the server's memory; the global model stays as it is."""

    name: str

    def init(self, state: ServerState, layout: Layout, /) -> Any:
        return state, list[int](), list[np.ndarray]()

    def add(self, so_far: Any, c: Contribution, /) -> None:
        said = c.content.mask.astype(np.uint8) if c.content.floats is None else c.content.floats
        so_far[1].append(c.client)
        so_far[2].append(said)

    def result(self, so_far: Any, /) -> ServerState:
        state: ServerState = so_far[0]
        clients, said = so_far[1:]
        memory = {**state.memory, WHO: np.array(clients, np.int64), self.name: np.stack(said)}
        return replace(state, memory=memory)


def _said(memory: Mapping[str, np.ndarray], name: str) -> dict[int, np.ndarray]:
    return {int(client): row for client, row in zip(memory.get(WHO, ()), memory.get(name, ()), strict=True)}


@dataclass(frozen=True, kw_only=True)
class Handed:
    """Train and evaluate what was handed over, as an arm of step 2; of the whole model its largest weights."""

    step2: Personalise
    target: float
    sends: tuple[tuple[str, str], ...] = field(default=())

    def __call__(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Update:
        twin = replace(local, stage="personalise")  # the batches of every other arm
        step, shared = self.step2.step2(twin, inbox, state), inbox[THETA_G].mask
        mask = step.finder.pick(
            np.abs(step.theta_g.floats[: local.full.size]), local.full, local.task.layout, self.target
        )
        if not shared.all():
            mask = local.task.whole_mask(shared, mask)
        result = trained(step, HANDED, "theta_g", mask, target=self.target)
        return Update(state, rows=(as_record(row_of(local, result)),))


def phases_of(newcomer: Any, step2: Personalise, density: float) -> tuple[Phase, ...]:
    """Return the phases that follow step 2: newcomers introduce themselves, then work with what they are handed."""
    update: ClientUpdate = Handed(step2=step2, target=density)
    hands = Phase(name=HANDED, update=update, who=Newcomers(), rounds=1, changes_state=False)
    if not newcomer.others:
        return (hands,)
    return newcomer.introduction(step2.finder, density), replace(hands, down="slice", hand=newcomer)
