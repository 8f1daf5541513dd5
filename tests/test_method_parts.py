"""What a method of one's own may be made of: phases, a first mask, clients' capacity, a mask that all share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlth.data.capacity import tiers_of
from fedlth.engines.inprocess import InProcess
from fedlth.errors import NothingUsable, StudyError
from fedlth.experiment.resolve import read, resolve
from fedlth.federation import session
from fedlth.federation.downloads import broadcast, slice_for
from fedlth.methods.aggregate import Contribution, CountMean, FedAvg
from fedlth.methods.client_update import THETA_G, Inbox, MaskedUpdate, Update, merged
from fedlth.methods.method import FederatedMethod, Phase, Sampled, Seen
from fedlth.models.layout import Layout
from fedlth.storage.client_state import ClientState
from fedlth.storage.server_state import ServerState
from fedlth.study import schema
from fedlth.study.sections import Tier
from fedlth.tickets.select import keep_top
from fedlth.training.local_client import LocalClient
from fedlth.training.task import Task
from fedlth.wire.payload import Content
from tests import tiny
from tests.test_forecast_bytes import compared
from tests.test_personal import started

FEDERATE = Phase(name="federate", update=MaskedUpdate(), join=FedAvg())


def made_of(*phases: Any, **more: Any) -> FederatedMethod:
    return FederatedMethod(name="own", paper="", summary="", phases=phases, arms=("global", "own_tuned"), **more)


@dataclass(frozen=True)
class FirstOf:
    """The first weights, as many as a client can carry: HeteroFL's slice, of weights instead of channels."""

    def __call__(self, task: Task, client: int, /) -> np.ndarray:
        size = task.layout.num_prunable
        return np.arange(size) < round(task.capacity(client).density * size)


# Phases

BROKEN: dict[str, tuple[FederatedMethod, str]] = {
    "name": (made_of(replace(FEDERATE, name="Step 1")), "its phase name must be letters a-z and _, got 'Step 1'"),
    "down": (made_of(replace(FEDERATE, down="all")), "its federate.down must be broadcast or slice, got 'all'"),  # type: ignore[arg-type]
    "update": (made_of(replace(FEDERATE, update=Seen())), "its federate.update must be a ClientUpdate, got Seen"),  # type: ignore[arg-type]
    "join": (made_of(replace(FEDERATE, join=None)), "its federate.join must be a rule with init, add and result"),
    "twice": (made_of(FEDERATE, FEDERATE), "phase names must be unique and none that every run has, got federate"),
    "taken": (made_of(replace(FEDERATE, name="refine")), "must be unique and none that every run has, got refine"),
    "no tuple": (replace(made_of(), phases=FEDERATE), "its phases must be a tuple of Phase, got Phase(name='federate'"),  # type: ignore[arg-type]
    "silent": (made_of(replace(FEDERATE, update=MaskedUpdate(sends=()))), "its federate.update must be one that sends"),
    "next mask": (
        made_of(replace(FEDERATE, update=MaskedUpdate(sends=(("update", "values"), ("next_mask", "mask"))))),
        "its federate.update must be one that sends next_mask after its first message",
    ),
    "idle mask": (made_of(FEDERATE, first_mask=FirstOf()), "its first_mask must be Dense where no phase sends slices"),
    "space": (made_of(FEDERATE, space="masks"), "its space must be Weights, Scores or Thresholds, got 'masks'"),
}


def broken(part: str) -> FederatedMethod:
    return BROKEN[part][0]


@pytest.mark.parametrize("part", BROKEN)
def test_a_phase_that_is_none_is_refused_in_one_line(part: str) -> None:
    with pytest.raises(StudyError, match="method: tests.test_method_parts:broken") as caught:
        read(tiny.study(method={"name": "tests.test_method_parts:broken", "part": part}))
    assert BROKEN[part][1] in str(caught.value) and "\n" not in str(caught.value)


# Capacity and the first mask


@dataclass(frozen=True)
class Grown(MaskedUpdate):
    """Choose the whole model at the first visit."""

    def __call__(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Update:
        done = super().__call__(local, inbox, state)
        whole = {name: replace(content, mask=np.ones_like(content.mask)) for name, content in done.contents.items()}
        return replace(done, contents=whole)


def sliced(warm: bool = False, chooses: bool = False, grows: bool = False) -> FederatedMethod:
    update = Grown() if grows else MaskedUpdate()
    federate = replace(FEDERATE, update=update, join=CountMean(), down="slice", own_mask=chooses or grows)
    before = (replace(FEDERATE, name="warm", rounds=1, who=Seen()),) if warm else ()
    return made_of(*before, federate, first_mask=FirstOf(), reads_capacity=True)


SMALL = (0, 1, 3)


def of_slices(**options: Any) -> schema.Study:
    return tiny.study(
        method={"name": "tests.test_method_parts:sliced", **options}, wire="raw",
        clients={"count": 4, "unseen": 0.25, "capacity": [{"clients": list(SMALL), "density": 0.25}]},
        federate={"rounds": 3, "clients_per_round": 3},
    )  # fmt: skip


@pytest.mark.parametrize("chooses", [False, True])
@pytest.mark.parametrize("warm", [False, True])
def test_a_client_is_sent_its_first_slice_until_it_chooses(tmp_path: Path, warm: bool, chooses: bool) -> None:
    """Found as a bug: who had taken part in a phase of whole models was sent whole models ever after."""
    experiment, told = resolve(of_slices(warm=warm, chooses=chooses))
    assert not any("capacity" in note for note in told)
    folder = tiny.run(of_slices(warm=warm, chooses=chooses), tmp_path / "r")
    assert not [f for r in tiny.rows(folder.root, "rounds") for f in r["failed"]]
    layout, theta = experiment.layout, experiment.initial()
    whole = len(broadcast("values", THETA_G, theta, layout).payload)
    (unseen,) = experiment.task.splits.unseen
    met = set()
    for row in tiny.rows(folder.root, "ledger"):
        if row["sender"] != "server" or row["phase"] == "warm" or row["kind"] == "evaluation":
            continue
        client = int(row["receiver"].partition(":")[2])
        mask = experiment.first_mask(client)
        small = client in SMALL
        assert (mask is not None) == small
        assert row["density"] == pytest.approx(0.25 if small else 1, abs=0.01) and row["broadcast"] is not small
        assert row["payload_bytes"] == (whole if mask is None else len(slice_for("", theta, layout, mask).payload))
        met.add((row["phase"], client))
    assert ("personalise", unseen) in met and len(met) == 3 + 4
    own = {r["client"]: r["density"] for r in tiny.rows(folder.root, "metrics") if r["arm"] == "own_tuned"}
    assert own == {c: pytest.approx(0.25 if c in SMALL else 1, abs=0.01) for c in range(4)}


def test_a_client_that_chose_everything_does_not_fall_back_to_its_first_slice(tmp_path: Path) -> None:
    folder = tiny.run(of_slices(grows=True), tmp_path / "r")
    assert not [f for r in tiny.rows(folder.root, "rounds") for f in r["failed"]]
    visits: dict[str, list[float]] = {}
    for row in tiny.rows(folder.root, "ledger"):
        if row["sender"] == "server" and row["phase"] == "federate":
            visits.setdefault(row["receiver"], []).append(row["density"])
    assert [d for _, *later in visits.values() for d in later] == [1.0] * 6
    assert visits["client:1"][0] == visits["client:3"][0] == pytest.approx(0.25, abs=0.01)
    started(of_slices(grows=True), tmp_path / "cut", after=2)
    session.resume(tmp_path / "cut", InProcess())
    assert tiny.facts(tmp_path / "cut") == tiny.facts(folder.root)


def test_a_slice_is_forecast_as_a_bound_and_resumes(tmp_path: Path) -> None:
    compared(of_slices(), tmp_path / "whole")
    started(of_slices(), tmp_path / "cut", after=2)
    session.resume(tmp_path / "cut", InProcess())
    assert tiny.facts(tmp_path / "cut") == tiny.facts(tmp_path / "whole")


def test_capacity_is_by_client_and_by_share() -> None:
    half, tenth = Tier(share=0.5, width=0.5), Tier(clients=(3, 7), density=0.1)
    found = tiers_of([half, tenth], 12, seed=0)
    assert [c for c, tier in enumerate(found) if tier is tenth] == [3, 7]
    assert sum(tier is half for tier in found) == 5 and sum(tier == Tier() for tier in found) == 5
    assert found == tiers_of([half, tenth], 12, seed=0) != tiers_of([half, tenth], 12, seed=1)
    thirds = [Tier(share=1 / 3, density=d) for d in (0.1, 0.2, 0.3)]
    assert sorted(tier.density for tier in tiers_of(thirds, 10, seed=0)) == [0.1] * 3 + [0.2] * 4 + [0.3] * 3
    task = tiny.task(clients={"capacity": [{"share": 0.5, "speed": 0.25}]})
    assert sorted(task.capacity(c).speed for c in range(4)) == [0.25, 0.25, 1, 1]


@pytest.mark.parametrize(
    ("capacity", "says"),
    [
        ([{"density": 0.5}], "clients.capacity.0: must give either clients or share"),
        ([{"clients": [0], "share": 0.5}], "clients.capacity.0: must give either clients or share"),
        ([{"clients": [4]}], r"clients.capacity.0.clients: each of 0..3 at most once, got 4"),
        ([{"share": 0.1}, {"clients": [1, 1]}], r"clients.capacity.1.clients: each of 0..3 at most once, got 1"),
        ([{"share": 0.6}, {"share": 0.6}], "clients.capacity: shares must be at most 1 together, got 1.2"),
        ([{"share": 0.5, "density": 0}], "clients.capacity.0.density"),
        ([{"share": 0.5, "size": 0}], "clients.capacity.0.size"),
    ],
)
def test_a_capacity_that_is_none_is_refused_before_the_run(capacity: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(StudyError, match=says):
        resolve(tiny.study(clients={"capacity": capacity}))


def test_a_capacity_that_nothing_reads_is_noted() -> None:
    capacity: Sequence[Any] = [{"share": 0.5, "density": 0.5}]
    assert resolve(tiny.study(clients={"capacity": capacity}))[1] == [
        "clients.capacity: has no effect, method two_step does not ask for it"
    ]
    one, other = tiny.study(), tiny.study(clients={"capacity": capacity})
    assert one.science() != other.science(), "a method may read it"


# One mask for all, from a phase of its own


@dataclass(frozen=True)
class Moved:
    """Send how far each weight moved in a training, not the weights."""

    sends: tuple[tuple[str, str], ...] = (("saliency", "scores"),)

    def __call__(self, local: LocalClient, inbox: Inbox, state: ClientState, /) -> Update:
        start = merged(local, inbox, state)
        moved = np.abs(local.train(start, recipe=local.recipe).params.floats - start.floats)[: local.full.size]
        return Update(replace(state, visits=state.visits + 1), {"saliency": Content(local.full, moved, start.ints[:0])})


@dataclass(frozen=True)
class TopMask:
    """Keep the weights that moved most in sum; the global model stays as it is."""

    density: float

    def init(self, state: ServerState, layout: Layout, /) -> tuple[ServerState, np.ndarray]:
        return state, np.zeros(layout.num_prunable)

    def add(self, so_far: tuple[ServerState, np.ndarray], contribution: Contribution, /) -> None:
        assert contribution.content.floats is not None
        so_far[1][:] += contribution.content.floats

    def result(self, so_far: tuple[ServerState, np.ndarray], /) -> ServerState:
        state, total = so_far
        return replace(state, mask=keep_top(total, np.ones(total.size, bool), round(self.density * total.size)))


def salient(density: float = 0.3) -> FederatedMethod:
    return made_of(Phase(name="saliency", update=Moved(), join=TopMask(density), who=Seen(), rounds=1), FEDERATE)


@pytest.mark.parametrize("wire", ["lossless", "step"])
def test_a_mask_from_a_phase_of_its_own_is_everyones_and_survives_a_resume(tmp_path: Path, wire: str) -> None:
    made = tiny.study(method={"name": "tests.test_method_parts:salient"}, wire=wire)
    folder = tiny.run(made, tmp_path / "whole")
    assert not [f for r in tiny.rows(folder.root, "rounds") for f in r["failed"]]
    size = tiny.task_of(folder.root).layout.num_prunable
    rows = [r for r in tiny.rows(folder.root, "ledger") if r["kind"] != "metrics"]
    assert {r["kind"] for r in rows if r["phase"] == "saliency"} == {"install", "scores"}
    later = [r for r in rows if r["phase"] != "saliency"]
    assert {r["density"] for r in later} == {round(0.3 * size) / size} and len({r["ticket"] for r in later}) == 1
    assert {r["density"] for r in tiny.rows(folder.root, "metrics")} == {round(0.3 * size) / size}
    for after in (1, 2, 3):
        started(made, tmp_path / f"cut-{after}", after=after)
        mask = tiny.opened(session.RunFolder(tmp_path / f"cut-{after}")).state.mask
        assert mask is not None and mask.sum() == round(0.3 * size)
        session.resume(tmp_path / f"cut-{after}", InProcess())
        assert tiny.facts(tmp_path / f"cut-{after}") == tiny.facts(folder.root)


# Rounds of nobody, and rounds of a phase's own


@dataclass(frozen=True)
class Early:
    """All clients in the first round, nobody later."""

    def __call__(
        self, round: int, /, *, seen: Sequence[int], everyone: Sequence[int], rng: np.random.Generator
    ) -> list[int]:
        return list(seen) if round == 1 else []


def early() -> FederatedMethod:
    return made_of(replace(FEDERATE, who=Early()))


def test_rounds_of_nobody_leave_the_model_as_it_is(tmp_path: Path) -> None:
    """Found in review: they counted as "nobody could use it", and round 1's model was rolled back to theta_0."""
    made = tiny.study(method={"name": "tests.test_method_parts:early"}, federate={"rounds": 3})
    run = tiny.run(made, tmp_path / "r")
    assert [row.get("rolled_back_to", "") for row in tiny.rows(run.root, "rounds")][:3] == ["", "", ""]
    assert not np.array_equal(tiny.opened(run).state.theta.floats, tiny.experiment(made).initial().floats)
    with pytest.raises(NothingUsable, match="rounds without one usable reply; last: nobody took part"):
        tiny.run(made.model_copy(update={"federate": made.federate.model_copy(update={"rounds": 9})}), tmp_path / "s")


def own_rounds() -> FederatedMethod:
    return made_of(replace(FEDERATE, rounds=3))


def test_notes_know_a_phase_with_rounds_of_its_own() -> None:
    """Found in review: the notes looked at federate.rounds alone."""

    def told(**sections: Any) -> str:
        name = "tests.test_method_parts:own_rounds"
        return " ".join(resolve(tiny.study(method={"name": name}, **sections))[1])

    unseen = {"count": 4, "unseen": 0.3}
    trained = told(federate={"rounds": 0, "clients_per_round": 2}, train={"epochs": 2}, clients=unseen)
    assert "no client is left out" not in trained and "train.epochs" not in trained and "theta_0" not in trained
    idle = told(federate={"rounds": 7, "clients_per_round": 2}, tune={"lr": [0.1, 0.2], "rounds": 1})
    assert "federate.rounds, tune.rounds: have no effect, each phase of method" in idle


def many() -> FederatedMethod:
    return made_of(replace(FEDERATE, who=Sampled(9)))


def test_a_methods_own_number_of_clients_is_named_where_it_stands() -> None:
    with pytest.raises(StudyError, match=r"its federate\.who: must be at most the 3 clients that take part, got 9"):
        resolve(tiny.study(method={"name": "tests.test_method_parts:many"}, clients={"count": 4}))
