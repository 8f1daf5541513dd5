"""The search: walk a finder's parts down to a ticket, given a way to train."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from fedlth.errors import StudyError
from fedlth.models.layout import Layout, Params
from fedlth.tickets.checks import check_values
from fedlth.tickets.evidence import Evidence, Network, needed
from fedlth.tickets.finder import Finder
from fedlth.tickets.gate import Look, Proposal
from fedlth.tickets.granularity import Groups
from fedlth.tickets.regrow import Regrow
from fedlth.tickets.rewind import Anchors, changed
from fedlth.tickets.select import is_tied


@dataclass(frozen=True)
class Walked:
    """Where a training ended, and the prunable weights after the epochs before, oldest first, as many as asked."""

    params: Params
    previous: tuple[np.ndarray, ...] = ()


class Diverged(FloatingPointError):
    """A training of a search did not end in numbers; `mask` is the one it trained under."""

    def __init__(self, told: str, mask: np.ndarray) -> None:
        super().__init__(told)
        self.mask = mask


class TrainFn(Protocol):
    """A training as a pure function of what it is given; one that diverges raises FloatingPointError."""

    def __call__(
        self,
        start: Params,
        mask: np.ndarray,
        /,
        *,
        replay_lr: bool,
        held: bool = False,
        window: int = 0,
        first_step: int = 0,
        last_step: int | None = None,
    ) -> Walked:
        """Train what `mask` holds, for the finder's epochs.

        The others are zero, or with `held` keep what `start` gives them. `window` asks for earlier epochs' weights.
        `first_step` and `last_step` cut the run: start there in the batches and rates, end there.
        """
        ...


@dataclass(frozen=True)
class Found:
    """A ticket at one target density: its mask (num_prunable,), the weights trained under it, what came before.

    `before` is what was scored to find the mask, `fallen` (num_prunable,) each weight at the end of the last training
    that it took part in. `trainings` counts those of the search, the last one (the ticket's own) not included; `chain`
    numbers the searches that began anew. The mask's density is the target's, unless a stop came first. `diverged` says
    why there is no ticket, "" where there is one: the mask is then the last of the search, the weights are its start.
    """

    target: float
    mask: np.ndarray
    params: Params
    before: Params
    fallen: np.ndarray
    start: str
    trainings: int
    chain: int = 0
    diverged: str = ""


def find(
    finder: Finder,
    *,
    start: Params,
    start_name: str,
    targets: tuple[float, ...],
    layout: Layout,
    anchors: Anchors,
    train: TrainFn,
    rng: Callable[[str], np.random.Generator],
    network: Callable[[Params], Network | None] = lambda _: None,
    val_accuracy: Callable[[Params], float] | None = None,
    normalised: Callable[[Params, np.ndarray], Params] = lambda params, _: params,
) -> Iterator[Found]:
    """Yield a ticket a target density, in the schedule's order. `train` must be a pure function.

    `network` gives the network with all that is no prunable weight as in given params; scores that look only at
    weights do without. `val_accuracy` is what gates and stops may see. `normalised` gives params the running statistics
    that their norms have under a mask on training data: a ticket that nothing trains has none of its own. Raises
    StudyError where a part needs one of the first two and there is none. A training that diverges ends its chain: what
    it had still to find is yielded as diverged.
    """
    search = _Search(
        finder, layout, finder.granularity.groups(layout), anchors, train, rng, network, val_accuracy, normalised
    )
    for number, chain in enumerate(finder.chains(targets)):
        left = {d for d in chain if d in targets}
        try:
            for found in search.descend(start, start_name, chain, targets, number):
                left.discard(found.target)
                yield found
        except FloatingPointError as error:  # yield outside of it: its frames hold the models
            told, mask = str(error), error.mask if isinstance(error, Diverged) else np.ones(layout.num_prunable, bool)
        for target in sorted(left, reverse=True):
            name, floats = finder.rewind.anchor or start_name, start.floats[: mask.size]
            yield Found(target, mask, start, start, floats, name, 0, number, told)


@dataclass(frozen=True)
class _State:
    """Where a search stands: the mask in force, where its last training began and ended, all trainings so far.

    fallen: each prunable weight at the end of the last training before the last prune that it took part in.
    """

    mask: np.ndarray
    began: Params
    walked: Walked
    trainings: int
    fallen: np.ndarray
    held: bool = False


@dataclass(frozen=True)
class _Search:
    finder: Finder
    layout: Layout
    groups: Groups
    anchors: Anchors
    train: TrainFn
    rng: Callable[[str], np.random.Generator]
    network: Callable[[Params], Network | None]
    val_accuracy: Callable[[Params], float] | None
    normalised: Callable[[Params, np.ndarray], Params]

    @property
    def _regrow(self) -> Regrow | None:
        return getattr(self.finder.schedule, "regrow", None)

    def descend(
        self, start: Params, start_name: str, chain: tuple[float, ...], targets: tuple[float, ...], number: int
    ) -> Iterator[Found]:
        """Walk one chain, from the dense model down."""
        finder, full = self.finder, np.ones(self.layout.num_prunable, bool)
        at = _State(full, start, Walked(start), 0, start.floats[: full.size])
        if finder.dense_first:
            at = replace(at, walked=self._trained(start, full, replay_lr=True, window=finder.window), trainings=1)
        good = Found(1.0, full, at.walked.params, start, at.fallen, start_name, max(0, at.trainings - 1), number)
        looks: list[Look] = []
        for index, density in enumerate(chain):
            again = chain[:index].count(density)
            final = density in targets and density not in chain[index + 1 :]
            at = self._waited(at, density, again, index)
            looks = looks or [self._look(at, density, again, index)]
            before = at.walked.params
            at, trained = self._pruned(at, start, density, again, final)
            if not trained and not final:
                continue
            looks.append(self._look(at, density, again, index + 1))
            if finder.stop(looks):
                # The training that went too far is part of what the search cost.
                good = replace(good, trainings=at.trainings - 1)
                yield from (replace(good, target=d) for d in chain[index:] if d in targets)
                return
            looks = [look.let_go() for look in looks]
            name = finder.rewind.anchor or start_name
            spent = at.trainings - trained
            good = Found(density, at.mask, at.walked.params, before, at.fallen, name, spent, number)
            if final:
                yield good

    def _trained(self, start: Params, mask: np.ndarray, **how: Any) -> Walked:
        try:
            return self.train(start, mask, **how)
        except FloatingPointError as error:
            raise Diverged(str(error), mask) from error

    def _waited(self, at: _State, density: float, again: int, prunes: int) -> _State:
        """Train on until the gate opens."""
        looks = [self._look(at, density, again, prunes)]
        while not self.finder.gate(looks):
            walked = self._trained(
                at.walked.params, at.mask, replay_lr=self.finder.rewind.replay_lr, held=at.held,
                window=self.finder.window,
            )  # fmt: skip
            at = replace(at, began=at.walked.params, walked=walked, trainings=at.trainings + 1)
            looks = [*(look.let_go() for look in looks), self._look(at, density, again, prunes)]
        return at

    def _pruned(self, at: _State, start: Params, density: float, again: int, final: bool) -> tuple[_State, bool]:
        """Prune once, rewind, train; return the new state and whether it was trained."""
        finder, now = self.finder, at.walked.params.floats[: at.mask.size]
        at = replace(at, fallen=now if at.mask.all() else np.where(at.mask, now, at.fallen))
        if self._regrow is not None and again:
            mask, stayed = self._regrown(at, self._regrow, density, again)
        else:
            mask = stayed = self.groups.spread(self._proposal(at, density, again).mask)
        left = at.walked.params.masked(stayed)  # what comes back begins at zero
        if not finder.trains and not final:
            return replace(at, mask=mask, began=left, walked=Walked(left)), False
        began = self._rewound(start, left, at.walked.params, mask)
        del left  # a whole model, while another trains
        held = finder.dead.holds
        if not getattr(finder.rewind, "trains", True):
            return replace(at, mask=mask, began=began, walked=Walked(self.normalised(began, mask)), held=held), False
        first, last = getattr(finder.rewind, "steps", 0), None
        if finder.moves and self._regrow is not None:
            first, last = self._regrow.window(again)
        walked = self._trained(
            began, mask, replay_lr=finder.rewind.replay_lr or finder.moves, held=held, window=finder.window,
            first_step=first, last_step=last,
        )  # fmt: skip
        return _State(mask, began, walked, at.trainings + (last is None), at.fallen, held), True

    def _rewound(self, start: Params, left: Params, now: Params, mask: np.ndarray) -> Params:
        """Return what the next training starts from: survivors as the rewind says, the dead as their rule says."""
        rewind, size = self.finder.rewind, mask.size
        steps = int(getattr(rewind, "steps", 0))
        if steps:
            origin = self._trained(start, np.ones(size, bool), replay_lr=True, last_step=steps).params
        else:
            origin = left if rewind.anchor is None else self.anchors(rewind.anchor)
        began = changed(rewind, origin, mask, self.layout, self.rng("rewind")).masked(mask)
        if self.finder.dead.holds:
            first = self.anchors("theta_0") if origin is left else origin
            rule = self.finder.dead
            held = check_values("dead", rule, rule(first.floats[:size], now.floats[:size]), size)
            began.floats[:size][~mask] = held[~mask]
        return began

    def _proposal(self, at: _State, density: float, again: int) -> Proposal:
        """Return what a prune to `density` would keep now, by group."""
        if self._regrow is not None and self._regrow.first == "random":
            score = self.rng(f"first@{density:.6f}").random(self.groups.layout.num_prunable)
        else:
            score = self.groups.reduced(self._scored(self._evidence(at, density, again)))
        alive = self.groups.reduced(at.mask) > 0

        def keep(score: np.ndarray) -> np.ndarray:
            return self.finder.kept(score, alive, self.groups, density)

        return Proposal(keep(score), lambda: is_tied(score, keep))

    def _scored(self, evidence: Evidence) -> np.ndarray:
        score = self.finder.score
        try:
            values = score(evidence)
        except (StudyError, MemoryError, FloatingPointError):  # the last: a mask that is learned may diverge too
            raise
        except Exception as error:  # the user's code may raise anything
            raise StudyError(f"finder.score: {type(score).__name__} fails: {type(error).__name__}: {error}") from error
        return check_values("score", score, values, evidence.mask.size)

    def _regrown(self, at: _State, regrow: Regrow, density: float, again: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the moved mask, and which of it stayed alive throughout."""
        evidence, size = self._evidence(at, density, again), at.mask.size
        if regrow.by == "random":
            growth = self.rng(f"grow@{density:.6f}#{again}").random(size)
        else:
            growth = np.abs(needed(evidence.at_now, regrow).gradient(evidence.now))
        score, growth = (self.groups.reduced(a) for a in (self._scored(evidence), growth))
        mask, stayed = regrow(score, growth, self.groups.reduced(at.mask) > 0, self.groups.layout, again - 1)
        return self.groups.spread(mask), self.groups.spread(stayed)

    def _look(self, at: _State, density: float, again: int, prunes: int) -> Look:
        return Look(density, prunes, at.walked.params, self._measured, lambda: self._proposal(at, density, again))

    def _measured(self, params: Params) -> float:
        if self.val_accuracy is None:
            raise StudyError("finder.gate: needs validation accuracy, which is not available here")
        return self.val_accuracy(params)

    def _evidence(self, at: _State, density: float, again: int) -> Evidence:
        size, at_start = at.mask.size, self.network(at.began)
        return Evidence(
            layout=self.layout,
            init=_seen(self.anchors("theta_0").floats[:size]),
            start=_seen(at.began.floats[:size]),
            now=_seen(at.walked.params.floats[:size]),
            mask=_seen(at.mask),
            gradient=lambda weights: needed(at_start, self.finder.score).gradient(weights),
            rng=self.rng(f"score@{density:.6f}" + (f"#{again}" if again else "")),
            density=density,
            previous=tuple(map(_seen, at.walked.previous)),
            groups=self.groups,
            at_start=at_start,
            at_now=self.network(at.walked.params),
        )


def _seen(values: np.ndarray) -> np.ndarray:
    """Return a view that cannot be written to: a score looks at what the next training starts from."""
    view = values.view()
    view.flags.writeable = False
    return view
