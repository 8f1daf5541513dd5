"""federate.join in every method: five equal clients give what its own mean gives, one of five moves no median far."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from fedlth.errors import StudyError
from fedlth.experiment.experiment import Experiment
from fedlth.experiment.resolve import resolve
from fedlth.methods.aggregate import Contribution, CountMean, MaskMean, join
from fedlth.methods.client_update import UPDATE, sends_in
from fedlth.methods.global_mask import TopMask, scores
from fedlth.methods.gossip import GossipUpdate
from fedlth.methods.method import Phase
from fedlth.methods.robust import JOINS, Median, WithoutOutliers
from fedlth.models.layout import Entry, Layout, Params
from fedlth.storage.client_state import ClientState
from fedlth.storage.records import party
from fedlth.storage.server_state import ServerState
from fedlth.training.local_client import LocalClient
from fedlth.wire.payload import Content
from tests import tiny

JOINED = [name for name in tiny.METHODS if name not in ("local", "standalone")]  # these have no rounds
SMALL: dict[str, Any] = {"model": {"name": "tests.tiny:Small", "options": {}}}  # with running statistics and counters
MORE = {name: SMALL for name in ("fedavg", "fedtiny", "scaffold", "hermes", "heterofl", "dispfl")}
NONE = np.zeros(0, np.int64)
BADLY = 1000.0
EXAMPLES = 48  # of each client of the tiny study: SCAFFOLD's rule knows how many all have together


def experiment(name: str, rule: str | None = None) -> Experiment:
    federate: dict[str, Any] = {"rounds": 3, "clients_per_round": 3}
    if rule is not None:
        federate["join"] = rule
    return tiny.experiment(tiny.of_method(name, federate=federate, **MORE.get(name, {})))


def content(name: str, kind: str, layout: Layout, shared: np.ndarray, draw: np.random.Generator) -> Content:
    """Return what an honest client might send: values under the mask `shared`, of dead weights' gradients some."""
    if kind == "mask":
        return Content(draw.random(layout.num_prunable) < 0.5, None, None)
    mask = np.ones(layout.num_prunable, bool)
    floats = draw.normal(size=layout.num_floats)
    if kind == "values":
        mask = shared
    else:
        floats = np.abs(floats) + 0.1
    if name == "gradients":
        mask = ~shared & (draw.random(mask.size) < 0.3)
    floats[: mask.size][~mask] = 0.0
    return Content(mask, floats.astype(np.float32), np.full(layout.num_ints, 5, np.int64))


def scaled(one: Content, factor: float) -> Content:
    """Return what another honest client sends: all a little larger, so that what is largest is the same."""
    return one if one.floats is None else replace(one, floats=one.floats * np.float32(factor))


def hostile(one: Content) -> Content:
    """Return the opposite: other bits, large numbers of the other sign, or in reverse order where none is negative."""
    if one.floats is None or one.ints is None:
        return replace(one, mask=~one.mask)
    floats, largest = one.floats, one.floats.max(initial=0)
    turned = -floats if (floats < 0).any() else np.where(floats != 0, largest + 1 - floats, 0)
    return Content(one.mask, (BADLY * turned).astype(np.float32), np.full_like(one.ints, 2**40))


def phases(made: Experiment) -> Iterator[tuple[Phase, tuple[tuple[str, str], ...]]]:
    """Yield each phase with each set of messages that its rounds may have."""
    for phase in made.federated_phases:
        for sends in sorted({sends_in(phase.update, round) for round in range(1, phase.rounds + 1)}):
            yield phase, sends


def honest(
    made: Experiment, phase: Phase, sends: tuple[tuple[str, str], ...], state: ServerState
) -> dict[str, Content]:
    draw = np.random.default_rng(len(sends))
    shared = np.ones(made.task.exchange.num_prunable, bool) if state.mask is None else state.mask
    if state.mask is None and (phase.own_mask or phase.down == "slice"):
        shared = draw.random(shared.size) < 0.5
    return {name: content(name, kind, made.message_layout(phase, name, kind), shared, draw) for name, kind in sends}


def came(client: int, sent: Mapping[str, Content], examples: int = EXAMPLES) -> Contribution:
    first, *others = sent.items()
    return Contribution(client, examples, first[1], dict(others))


def joined(made: Experiment, phase: Phase, state: ServerState, got: list[Contribution]) -> ServerState:
    rule = made.rule(made.phase(phase.name))
    assert rule is not None
    new = join(rule, state, got, made.layout)
    return new if new.mask is not None else replace(new, mask=state.mask)


def numbers(state: ServerState) -> dict[str, np.ndarray]:
    return {"theta": state.theta.floats, **{name: np.asarray(value) for name, value in state.memory.items()}}


@pytest.mark.parametrize("name", JOINED)
def test_of_equal_clients_every_rule_makes_what_the_methods_own_mean_makes(name: str) -> None:
    plain = experiment(name)
    rules = [rule for rule in JOINS if (name, rule) != ("spafl", "without_outliers")]
    for rule in rules:
        robust, state = experiment(name, rule), plain.start()
        for phase, sends in phases(plain):
            one = honest(plain, phase, sends, state)
            got = [came(client, one, EXAMPLES + client) for client in range(5)]
            wanted, found = (joined(made, phase, state, got) for made in (plain, robust))
            assert (wanted.mask is None) == (found.mask is None) and wanted.memory.keys() == found.memory.keys()
            if wanted.mask is not None and found.mask is not None:
                np.testing.assert_array_equal(found.mask, wanted.mask, err_msg=f"{rule} {phase.name}")
            for what, values in numbers(wanted).items():
                np.testing.assert_allclose(numbers(found)[what], values, rtol=1e-5, atol=1e-5, err_msg=f"{rule} {what}")
            np.testing.assert_array_equal(found.theta.ints, wanted.theta.ints)
            state = wanted


@pytest.mark.parametrize("name", JOINED)
def test_one_hostile_client_of_five_moves_no_median_beyond_the_honest_ones(name: str) -> None:
    """Each message of each phase; the method's own mean is moved, so that there is something to bear."""
    plain, robust = experiment(name), experiment(name, "median")
    state = plain.start()
    for phase, sends in phases(plain):
        one = honest(plain, phase, sends, state)
        clients = [{n: scaled(c, 1 + 0.01 * client) for n, c in one.items()} for client in range(4)]
        # What would come of five like one honest client, for each of them: between these lies what is honest.
        alone = [joined(plain, phase, state, [came(c, sent) for c in range(5)]) for sent in clients]
        bad = {n: hostile(c) for n, c in one.items()}
        got = [*(came(c, sent) for c, sent in enumerate(clients)), came(4, bad)]
        moved, found = (joined(made, phase, state, got) for made in (plain, robust))
        assert within(found, alone), f"{phase.name} {sends}"
        assert not within(moved, alone), f"{phase.name} {sends}: nobody was hostile"
        state = alone[0]


def within(state: ServerState, honest: list[ServerState]) -> bool:
    """Say whether a state has the mask of the honest ones, and numbers between theirs, up to rounding."""
    for other in honest:
        if (state.mask is None) != (other.mask is None) or numbers(state).keys() != numbers(other).keys():
            return False
        if state.mask is not None and other.mask is not None and (state.mask != other.mask).any():
            return False
        if state.theta.ints.size and state.theta.ints.max() > max(o.theta.ints.max() for o in honest):
            return False
    for what, values in numbers(state).items():
        stack = np.stack([numbers(one)[what] for one in honest]).astype(np.float64)
        room = 1e-5 * (1 + np.abs(stack).max(0))
        if not ((values >= stack.min(0) - room) & (values <= stack.max(0) + room)).all():
            return False
    return True


@pytest.mark.parametrize("name", ["dfedavg", "dispfl"])
def test_without_a_server_each_client_takes_the_rule_of_its_neighbours(name: str) -> None:
    found = {}
    for rule in (None, "median"):
        made = experiment(name, rule)
        update, personalise = made.federated_phases[0].update, made.phase("personalise").update
        assert isinstance(update, GossipUpdate) and personalise.own == update  # type: ignore[attr-defined]
        assert update.mean == (Median() if rule else CountMean())
        task, draw = made.task, np.random.default_rng(3)
        mask = draw.random(task.exchange.num_prunable) < 0.5
        one = content(UPDATE, "values", task.exchange, mask, draw)
        inbox = {party(c): scaled(one, 1 + 0.01 * c) for c in range(4)} | {party(4): hostile(one)}
        own = update.own(LocalClient(task, 0, 1, "federate"), inbox, ClientState())
        found[rule] = task.shared_part(own.params).floats
        assert (own.mask == mask).all()
    assert one.floats is not None
    ends = np.stack([one.floats, one.floats * np.float32(1.03)])
    low, high = ends.min(0), ends.max(0)
    assert ((found["median"] >= low - 1e-6) & (found["median"] <= high + 1e-6)).all()
    assert ((found[None] < low - 1e-3) | (found[None] > high + 1e-3)).any()


@pytest.mark.parametrize(
    "name", ["scaffold", "hermes", "fedtiny", "ssfl", "flash", "fedpm", "fedmask", "spafl", "dispfl"]
)
def test_a_study_with_a_rule_is_one(name: str) -> None:
    made = tiny.of_method(name, federate={"join": {"name": "trimmed_mean", "share": 0.3}})
    found = resolve(made)[0]
    assert all(rule is None or "TrimmedMean" in repr(rule) for rule in (phase.join for phase in found.federated_phases))


@pytest.mark.parametrize("name", ["fedavg", "scaffold", "fedpm", "prunefl"])
def test_the_users_own_rule_is_tried_wherever_it_stands(name: str) -> None:
    resolve(tiny.of_method(name, federate={"join": "tests.methods.test_robust_everywhere:First"}))
    with pytest.raises(StudyError, match=r"must return floats float32 \(\d+,\), got float64"):
        resolve(tiny.of_method(name, federate={"join": "tests.methods.test_robust_everywhere:Wide"}))


@dataclass(frozen=True)
class First:
    """A rule as a user writes one: what the first client sent."""

    def init(self, state: ServerState, layout: Layout, /) -> Any:
        return [state]

    def add(self, so_far: Any, c: Contribution, /) -> None:
        so_far.append(c.content.floats)

    def result(self, so_far: Any, /) -> ServerState:
        return ServerState(Params(so_far[1], so_far[0].theta.ints))


@dataclass(frozen=True)
class Wide(First):
    """One that returns numbers of another type."""

    def result(self, so_far: Any, /) -> ServerState:
        return ServerState(Params(so_far[1].astype(np.float64), so_far[0].theta.ints))


def bare(rows: list[str]) -> list[Contribution]:
    return [Contribution(c, 1, Content(np.array([b == "1" for b in row]), None, None)) for c, row in enumerate(rows)]


def test_outliers_are_told_by_the_masks_that_came_though_bits_are_meant() -> None:
    """Five send nearly one mask, the sixth another: FedPM's mean without it is the mean of five."""
    layout = Layout((Entry("w", (40,), "param", 0, prunable=True),))
    one = "1" * 20 + "0" * 20
    rows = [one[:c] + ("0" if one[c] == "1" else "1") + one[c + 1 :] for c in range(5)]
    state = ServerState(Params(np.zeros(40, np.float32), NONE))
    six = bare([*rows, "0" * 20 + "1" * 20])
    found, five, plain = (
        join(rule, state, got, layout).theta.floats
        for rule, got in ((MaskMean(mean=WithoutOutliers()), six), (MaskMean(), six[:5]), (MaskMean(), six))
    )
    np.testing.assert_allclose(found, five, rtol=1e-6)
    assert not np.allclose(plain, five)


def test_a_mean_of_few_that_believes_nobody_leaves_scores_and_masks_as_they_were() -> None:
    """Two clients have no middle: with few: keep bits leave their scores, saliency falls back on sizes."""
    layout = Layout((Entry("w", (4,), "param", 0, prunable=True),))
    state = ServerState(Params(np.float32([1, -2, 0.5, 3]), NONE))
    keeping = Median(few="keep")
    new = join(MaskMean(mean=keeping), state, bare(["1111", "0011"]), layout)
    np.testing.assert_allclose(new.theta.floats, state.theta.floats, rtol=1e-5)
    told = [Contribution(c, 1, scores(np.float32([9, 0, 9, 0]))) for c in range(2)]
    assert join(TopMask(0.5, keeping), state, told, layout).mask.tolist() == [False, True, False, True]  # type: ignore[union-attr]
    assert join(TopMask(0.5), state, told, layout).mask.tolist() == [True, False, True, False]  # type: ignore[union-attr]
