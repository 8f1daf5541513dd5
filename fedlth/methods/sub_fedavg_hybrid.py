"""Sub-FedAvg's hybrid: channels leave by network slimming, weights of other layers one by one, each behind its gate.

Vahidian, Morafah, Lin. Personalized Federated Learning by Structured and Unstructured Pruning under Data
Heterogeneity. ICDCS workshop 2021, arXiv 2105.00562; network slimming: Liu et al., ICCV 2017, arXiv 1708.06519.

In training an L1 pull draws the scales of the norms behind convolutions to zero; the channels with the smallest scales
leave, in the whole network at once, and one stays in each convolution. Which norm is whose is found by running the
model. Where a convolution has no such norm, the mean size of its filters' weights serves, and filters compete within
their convolution. A channel that leaves takes its filter along; the norm's shift stays, as every bias does.
Left open: each gate decides on its own cut, the channels' first, and accuracy is asked for each.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from fedlth.methods.client_update import MaskedUpdate
from fedlth.methods.method import FederatedMethod
from fedlth.methods.options import OWN, at_least, check, density_of, score_of, share_of, sliced
from fedlth.methods.prune import passes
from fedlth.models.layout import Entry, Layout, Params
from fedlth.tickets.granularity import Granularity, Groups, numbered
from fedlth.tickets.scope import Global, Layerwise
from fedlth.tickets.score import Magnitude, Score
from fedlth.training.local_client import LocalClient
from fedlth.training.loss_probe import norm_behind
from fedlth.training.pull import L1
from fedlth.training.recipe import TrainingRecipe
from fedlth.training.request import TrainingResult
from fedlth.training.task import Task

FILTERS, FLOORED = Layerwise(), Global(floor=1)


@dataclass(frozen=True)
class Filters:
    """All that leads into one filter of a convolution; a weight of any other layer for itself."""

    def groups(self, layout: Layout, /) -> Groups:
        def number(e: Entry) -> np.ndarray:
            each = np.arange(e.size)
            return np.asarray(e.as_stored(each // e.fan_in)) if is_convolution(e) else each

        return numbered(layout, number)


def is_convolution(e: Entry) -> bool:
    return e.prunable and len(e.shape) > 2


def scales_behind(local: LocalClient) -> dict[str, Entry]:
    """Return the scale of the norm that runs right behind each convolution, by the name of the convolution's weight."""
    layout, model = local.task.layout, local.task.flat_model
    at = {name: e for e in layout.floats for name in (e.name, *e.aliases)}
    with model.lock:
        behind = norm_behind(model.module, layout, local.train_part.batch(slice(2)).x)
    return {e.name: at[behind[e.name]] for e in layout.prunable if is_convolution(e) and e.name in behind}


class Cut(Protocol):
    """One kind of prune: `distance` is how far its masks after two epochs must lie apart."""

    @property
    def distance(self) -> float: ...

    def __call__(self, local: LocalClient, params: Params, mask: np.ndarray, /) -> np.ndarray:
        """Return the next mask of the whole model, (num_prunable,) bool; `mask` itself where nothing is to be cut."""
        ...

    def apart(self, local: LocalClient, one: np.ndarray, other: np.ndarray, /) -> float:
        """Return the mean over the layers it cuts of the share of what it cuts in which two masks differ."""
        ...


@dataclass(frozen=True)
class CutChannels:
    """Cut `rate` of the channels that are left, down to `density` of all, the smallest norm scales."""

    rate: float
    density: float
    distance: float

    def __call__(self, local: LocalClient, params: Params, mask: np.ndarray, /) -> np.ndarray:
        part, places = _part(local.task.layout, convolutions=True)
        if not places.size:
            return mask
        groups = Filters().groups(part)
        assert groups.of is not None
        alive = groups.reduced(mask[places]) > 0
        target = max(self.density, float(alive.mean()) * (1 - self.rate))
        if round(target * alive.size) >= int(alive.sum()):
            return mask
        behind, score = scales_behind(local), groups.reduced(np.abs(params.floats[places]))
        for e, rows in zip(part.prunable, groups.layout.prunable, strict=True):
            if e.name in behind:
                score[rows.slice] = np.abs(params.floats[behind[e.name].slice])
        everywhere = len(behind) == len(part.prunable)
        scope = FLOORED if everywhere and round(target * alive.size) >= len(part.prunable) else FILTERS
        cut = mask.copy()
        cut[places] &= groups.spread(scope(score, alive, groups.layout, target))
        return cut

    def apart(self, local: LocalClient, one: np.ndarray, other: np.ndarray, /) -> float:
        return _apart(local.task.layout, one, other, convolutions=True)


@dataclass(frozen=True)
class CutWeights:
    """Cut `rate` of the weights that are left outside of convolutions, down to `density` of them, layer by layer."""

    rate: float
    density: float
    distance: float
    score: Score = field(default_factory=Magnitude)

    def __call__(self, local: LocalClient, params: Params, mask: np.ndarray, /) -> np.ndarray:
        part, places = _part(local.task.layout, convolutions=False)
        alive = mask[places]
        target = max(self.density, float(alive.mean()) * (1 - self.rate)) if places.size else 1.0
        if round(target * alive.size) >= int(alive.sum()):
            return mask
        score = self.score(local.evidence(start=params, now=params, mask=mask, density=target))
        cut = mask.copy()
        cut[places] = Layerwise()(score[places], alive, part, target)
        return cut

    def apart(self, local: LocalClient, one: np.ndarray, other: np.ndarray, /) -> float:
        return _apart(local.task.layout, one, other, convolutions=False)


def _part(layout: Layout, *, convolutions: bool) -> tuple[Layout, np.ndarray]:
    """Return the layout of the prunable tensors that are convolutions or not, and their places in the whole prefix."""
    part = layout.select(lambda e: e.prunable and is_convolution(e) == convolutions)
    places = [np.arange(e.offset, e.offset + e.size) for e in layout.prunable if is_convolution(e) == convolutions]
    return part, np.concatenate([np.zeros(0, np.int64), *places])


def _apart(layout: Layout, one: np.ndarray, other: np.ndarray, *, convolutions: bool) -> float:
    entries = [e for e in layout.prunable if is_convolution(e) == convolutions]
    return float(np.mean([np.mean(one[e.slice] != other[e.slice]) for e in entries])) if entries else 0.0


@dataclass(frozen=True)
class PruneBoth:
    """Make each cut whose masks after the first and the last epoch lie far enough apart, and that accuracy allows."""

    cuts: tuple[Cut, ...]
    val_accuracy: float
    snapshots: tuple[int, ...] = (1,)

    def __call__(
        self, local: LocalClient, params: Params, mask: np.ndarray, trained: TrainingResult | None, /
    ) -> tuple[Params, np.ndarray]:
        if trained is None:
            raise ValueError("this prune follows a training")
        early = replace(params, floats=trained.snapshots[1])
        for cut in self.cuts:
            last = cut(local, params, mask)
            if last is mask or cut.apart(local, cut(local, early, mask), last) <= cut.distance:
                continue
            pruned = params.masked(last)
            if passes(local, pruned, self.val_accuracy):
                params, mask = pruned, last
        return params, mask


@dataclass(frozen=True)
class SlimmingUpdate(MaskedUpdate):
    """Train with an L1 pull of `strength` on the norm scales behind convolutions; 0: none."""

    strength: float = 0.0

    @property
    def own_pull(self) -> bool:
        """Say whether its objective has a pull of its own."""
        return self.strength > 0

    @property
    def granularity(self) -> Granularity:
        return Filters()

    def remark(self, task: Task) -> str:
        """Say that no norm tells which channels matter."""
        layout = task.layout
        if any(e.norm for e in layout.entries) or not any(is_convolution(e) for e in layout.prunable):
            return ""
        return f"prunes filters by the mean size of their weights, {task.study.model.name} has no norms to scale them"

    def recipe(self, local: LocalClient, recipe: TrainingRecipe, /) -> TrainingRecipe:
        scales = {e.offset: e for e in scales_behind(local).values()} if self.strength else {}
        if not scales:
            return recipe
        spans = tuple((at, at + e.size) for at, e in sorted(scales.items()))
        return replace(recipe, pull=L1(strength=self.strength, spans=spans))


def sub_fedavg_hybrid(
    rate: float = 0.1, density: float = 0.1, channel_rate: float = 0.45, channel_density: float = 0.5,
    val_accuracy: float = 0.5, distance: float = 5e-4, channel_distance: float = 0.01, pull: float = 1e-4,
    score: str | dict[str, Any] = "magnitude",
) -> FederatedMethod:  # fmt: skip
    check(
        rate=share_of(rate), density=density_of(density), channel_rate=share_of(channel_rate),
        channel_density=density_of(channel_density), pull=at_least(0, pull),
    )  # fmt: skip
    channels = CutChannels(channel_rate, channel_density, channel_distance)
    after = PruneBoth((channels, CutWeights(rate, density, distance, score_of(score))), val_accuracy)
    return FederatedMethod(
        name="sub_fedavg_hybrid", paper="Vahidian et al., ICDCS-W 2021, arXiv 2105.00562",
        summary="clients prune channels by norm scales and other weights one by one; holders of a weight average it",
        phases=(sliced(SlimmingUpdate(after=after, strength=pull)),), arms=(*OWN, "own_random"),
    )  # fmt: skip
