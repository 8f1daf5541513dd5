"""The server's state: a rule that remembers resumes to equal bits, and one that cannot be believed is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlth import api
from fedlth.engines.inprocess import InProcess
from fedlth.errors import StudyError
from fedlth.federation import session
from fedlth.federation.rounds import Federation
from fedlth.forecast import forecast
from fedlth.methods.aggregate import Contribution, FedAvg
from fedlth.methods.client_update import VALUES, MaskedUpdate
from fedlth.methods.method import FederatedMethod, Phase
from fedlth.models.layout import Layout, Params
from fedlth.storage.run_folder import RunFolder
from fedlth.storage.server_state import ServerState
from tests import tiny


@dataclass(frozen=True)
class FedAvgM:
    """FedAvg with server momentum (Hsu, Qi, Brown, 2019, arXiv 1909.06335): theta - (beta v + (theta - mean))."""

    beta: float = 0.9

    def init(self, state: ServerState, layout: Layout, /) -> tuple[ServerState, Any]:
        return state, FedAvg().init(state, layout)

    def add(self, so_far: tuple[ServerState, Any], contribution: Contribution, /) -> None:
        FedAvg().add(so_far[1], contribution)

    def result(self, so_far: tuple[ServerState, Any], /) -> ServerState:
        old, mean = so_far[0], FedAvg().result(so_far[1]).theta
        step = old.theta.floats - mean.floats
        velocity = self.beta * old.memory.get("velocity", np.float32(0)) + step
        rounds = np.asarray(old.memory.get("rounds", 0) + np.int64(1))  # no dimension: must come back as it went
        return ServerState(
            Params((old.theta.floats - velocity).astype(np.float32), mean.ints),
            {"velocity": velocity.astype(np.float32), "rounds": rounds},
        )


@dataclass(frozen=True)
class HiddenMomentum(FedAvgM):
    """Keeps its momentum in a field that hashes well and can be written to."""

    velocity: dict[str, Any] = field(default_factory=dict, compare=False)


class PlainMomentum:
    """No value at all."""

    def init(self, state: ServerState, layout: Layout, /) -> Any: ...


VELOCITY: dict[str, Any] = {}


@dataclass(frozen=True)
class GlobalMomentum(FedAvgM):
    """A frozen value whose momentum lies in the module."""

    def result(self, so_far: tuple[ServerState, Any], /) -> ServerState:
        old, mean = so_far[0], FedAvg().result(so_far[1]).theta
        VELOCITY["v"] = self.beta * VELOCITY.get("v", 0) + (old.theta.floats - mean.floats)
        return ServerState(Params((old.theta.floats - VELOCITY["v"]).astype(np.float32), mean.ints))


@dataclass(frozen=True)
class Meddling(FedAvgM):
    """Writes into the state that it was given."""

    def result(self, so_far: tuple[ServerState, Any], /) -> ServerState:
        so_far[0].theta.floats[:] = 0
        return so_far[0]


@dataclass(frozen=True)
class Doubled(FedAvgM):
    """Returns what no checkpoint of this layout holds."""

    def result(self, so_far: tuple[ServerState, Any], /) -> ServerState:
        theta = so_far[0].theta
        return ServerState(Params(theta.floats.astype(np.float64), theta.ints))


@dataclass
class Loose:
    """An update that counts in itself: what it counts depends on the worker."""

    sends: tuple[tuple[str, str], ...] = VALUES

    def __call__(self, *args: Any) -> Any: ...


RULES: Mapping[str, type] = {
    c.__name__: c for c in (FedAvgM, HiddenMomentum, PlainMomentum, GlobalMomentum, Meddling, Doubled)
}


def method(rule: str = "FedAvgM", loose: bool = False) -> FederatedMethod:
    phase = Phase(name="federate", update=Loose() if loose else MaskedUpdate(), join=RULES[rule]())
    return FederatedMethod(name="own", paper="", summary="", phases=(phase,), arms=("global",))


def study(**options: Any) -> Any:
    return tiny.study(
        method={"name": "tests.test_server_state:method", **options}, federate={"rounds": 4, "clients_per_round": 2}
    )


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_rule_with_memory_resumes_to_equal_bits(tmp_path: Path, after: int) -> None:
    """Row 13: what a rule remembers lies beside theta in the checkpoint."""
    tiny.run(study(), tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Federation, "run", lambda self: stop(self, after))
        with pytest.raises(Stopped):
            tiny.run(study(), tmp_path / "cut")
    kept = RunFolder(tmp_path / "cut").load_state(f"theta-{after - 1}")
    assert kept.memory["rounds"].shape == () and kept.memory["rounds"] == after and kept.memory["velocity"].any()
    session.resume(tmp_path / "cut", InProcess())
    assert tiny.facts(tmp_path / "cut") == tiny.facts(tmp_path / "whole")
    tiny.run(tiny.study(method="fedavg", federate={"rounds": 4, "clients_per_round": 2}), tmp_path / "plain")
    assert tiny.digests(tmp_path / "whole") != tiny.digests(tmp_path / "plain"), "the momentum does something"


class Stopped(Exception):
    pass


RUN = Federation.run


def stop(loop: Any, after: int) -> None:
    RUN(loop, stop_after=after)
    raise Stopped


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "HiddenMomentum"}, r"frozen dataclasses .* got federate\.join\.velocity: dict; what a rule"),
        ({"rule": "PlainMomentum"}, "got federate.join: PlainMomentum"),
        ({"loose": True}, "got federate.update: Loose"),
        ({"rule": "GlobalMomentum"}, "GlobalMomentum must give equal results for equal input"),
        ({"rule": "Meddling"}, "Meddling fails: ValueError: assignment destination is read-only"),
        ({"rule": "Doubled"}, r"Doubled must return floats float32 \(\d+,\), got float64"),
    ],
)
def test_a_rule_that_hides_state_is_refused_before_anything_runs(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    """Row 13: refused by check, by the forecast and by a run, which writes nothing."""
    for asked in (api.check, forecast, lambda made: tiny.run(made, tmp_path / "run")):
        with pytest.raises(StudyError, match=message):
            asked(study(**options))
    assert not (tmp_path / "run").exists()


def test_a_loop_holds_what_the_checkpoint_holds(tmp_path: Path) -> None:
    folder = tiny.run(study(), tmp_path / "run")
    assert tiny.opened(folder, InProcess()).state.memory["rounds"] == 4
