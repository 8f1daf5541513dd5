"""Flower itself: the simulation, its faults, and `flwr run`, against the in-process run."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from fedlth.engines.flower_client import Step
from fedlth.experiment.resolve import resolve
from fedlth.federation.client_step import client_step
from fedlth.federation.jobs import Job, Reply
from fedlth.output import lines_to
from fedlth.study import schema
from tests import everything, tiny
from tests.text.sentences import IN_ROUNDS, bert_tickets

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    # typer, which Flower imports, against a newer click.
    pytest.mark.filterwarnings("ignore:'click.utils:DeprecationWarning"),
    # Ray leaves its processes' handles and their output to the garbage collector.
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
]
ROOT = Path(__file__).parents[2]
NAMES = ("ledger", "metrics", "rounds", "curve")


PARTS: dict[str, Any] = {
    "finder": {
        "score": {"name": "inverted", "of": {"name": "shuffled", "of": {"name": "fisher", "per_cost": False}}},
        "schedule": {"name": "cubic", "rounds": 2},
        "scope": {"name": "global", "floor": 2},
        "rewind": {"name": "noise", "sigmas": 0.5},
        "dead": "zero_if_shrunk",
        "granularity": "row",
        "gate": {"name": "adaptive", "most": 2},
        "stop": {"name": "val_drop", "drop": 0.9},
        "densities": [0.5],
    },
    "personalise": {"arms": ["global", "dense", "ticket", "random", "global_mask"], "clients_per_wave": 2},
}


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Collect what Ray leaves while this test's filters hold."""
    yield
    gc.collect()


@pytest.fixture(scope="class")
def one_simulation() -> Iterator[None]:
    """Run every study in one simulation; it starts though RAY_ADDRESS names a Ray, here one that has gone."""
    from simulation import Simulation

    simulation = Simulation()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flwr.simulation.run_simulation", simulation)
        patch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
        yield
        simulation.close()


def bare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "framed_bytes"} for row in rows]


def assert_equal(one: Path, other: Path) -> None:
    for name in (name for name in NAMES if name != "curve" or (one / "curve.jsonl").exists()):
        assert bare(tiny.rows(one, name)) == bare(tiny.rows(other, name)), name
    assert tiny.digests(one) == tiny.digests(other)


def unruly(job: Job) -> Reply:
    """In round 1, client 1 raises, client 2 kills its process, client 3 hangs."""
    if job.phase == "federate" and job.round == 1:
        if job.client == 1:
            raise RuntimeError("no luck")
        if job.client == 2:
            os._exit(1)
        if job.client == 3:
            time.sleep(3600)
    return client_step(job)


def unlucky(job: Job) -> Reply:
    """In step 2, client 1 raises."""
    if job.phase == "personalise" and job.client == 1:
        raise RuntimeError("no luck")
    return client_step(job)


class Stop(Exception):
    pass


def run_under_flower(study: schema.Study, out: Path, tell: Callable[[str], None] | None = None, **given: Any) -> None:
    from fedlth.engines import flower

    with lines_to(tell) if tell else nullcontext():
        flower.run_under_flower(resolve(study)[0], out, **given)


def relay(meter: Any, ledger: list[dict[str, Any]]) -> None:
    """Take off the meter what clients publish on its way to the relay: the ledger has it where it is received."""
    visits = [r for r in ledger if r["phase"] == "federate" and r["kind"] == "metrics" and r["status"] == "ok"]
    for row in visits:
        place = ("up", "federate", row["round"], int(row["sender"].partition(":")[2]))
        assert meter.payload[place] > row["payload_bytes"]
        meter.payload[place] = row["payload_bytes"]
    meter.messages["up"] -= len(visits)


METHODS = [
    pytest.param(name, {}, client_step, id=name, marks=() if name in tiny.EXCHANGES else pytest.mark.long)
    for name in tiny.METHODS
    if name not in ("two_step", "lotteryfl")
]


@pytest.mark.usefixtures("one_simulation")
class TestInOneSimulation:
    @pytest.mark.parametrize(
        ("method", "sections", "step"),
        [
            pytest.param("two_step", {"wire": "raw", **PARTS}, client_step, id="every part"),
            pytest.param("lotteryfl", {"wire": "lossless"}, unlucky, id="a client that raises"),
            *METHODS,
            pytest.param(
                "two_step", {"train": {"lr": 0.8}, "evaluate": {"every": 1, "keep": "best"}}, client_step,
                id="the best of a curve",
            ),
        ],
    )  # fmt: skip
    def test_a_study_equals_the_in_process_run_and_its_ledger_what_crossed_the_grid(
        self, method: str, sections: dict[str, Any], step: Step, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Rows 22 and 39, and a meter on Flower's grid: equal for every message, to clients that fail too."""
        from benchmarks.meter.meter.grid import Meter
        from fedlth.engines import flower

        meters: list[Meter] = []

        def metered(grid: Any) -> Any:
            meters.append(Meter(grid))
            return transport(meters[-1])

        transport = flower.GridTransport
        monkeypatch.setattr(flower, "GridTransport", metered)
        study, out = tiny.of_method(method, **sections), tmp_path / "flower"
        run_under_flower(study, out, step=step)
        (meter,) = meters
        ledger = tiny.rows(out, "ledger")
        if tiny.experiment(study).method.topology is not None:
            relay(meter, ledger)
        lines, equal = meter.compare(ledger)
        assert equal, "\n".join(lines)
        assert meter.messages["up"] and bool(meter.messages["down"]) == bool(resolve(study)[0].method.phases)
        down = [r for r in tiny.rows(out, "ledger") if r["name"] == "theta_g" and r["framed_bytes"]]
        assert all(r["framed_bytes"] > r["payload_bytes"] for r in down)
        monkeypatch.setattr("fedlth.engines.inprocess.client_step", step)
        tiny.run(study, tmp_path / "inprocess")
        assert_equal(tmp_path / "inprocess", out)
        failed = [f["client"] for r in tiny.rows(out, "rounds") for f in r["failed"]]
        assert failed == ([1] if step is unlucky else [])

    def test_a_study_with_everything_equals_the_in_process_run(self, tmp_path: Path) -> None:
        """A client that drops out on the fleet is sent nothing here: the meter would miss its rows."""
        run_under_flower(everything.study(), tmp_path / "flower")
        tiny.run(everything.study(), tmp_path / "inprocess")
        assert_equal(tmp_path / "inprocess", tmp_path / "flower")

    @pytest.mark.long  # Ray's engine, on which a simulation runs too, does so by default
    def test_tickets_of_a_transformer_equal_the_in_process_run(self, tmp_path: Path) -> None:
        pytest.importorskip("transformers")
        made = bert_tickets(tmp_path, **IN_ROUNDS)
        run_under_flower(made, tmp_path / "flower")
        tiny.run(made, tmp_path / "inprocess")
        assert_equal(tmp_path / "inprocess", tmp_path / "flower")

    def test_a_client_that_raises_dies_or_hangs_costs_only_itself(self, tmp_path: Path) -> None:
        study = tiny.study(
            clients={"unseen": 0.0}, federate={"clients_per_round": 4}, personalise={"clients_per_wave": 4},
            job_timeout_s=10.0,
        )  # fmt: skip
        run_under_flower(study, tmp_path / "run", step=unruly)
        first, *rest = tiny.rows(tmp_path / "run", "rounds")
        assert {f["client"]: f["kind"] for f in first["failed"]} == {1: "raised", 2: "died", 3: "hung"}
        assert [r["failed"] for r in rest] == [[], []]
        assert len(tiny.digests(tmp_path / "run")["tickets"]) == 4

    def test_a_run_that_was_stopped_goes_on(self, tmp_path: Path) -> None:
        """What is raised in the ServerApp arrives here, and the state that the clients keep is found again."""
        study = tiny.of_method("lotteryfl")
        tiny.run(study, tmp_path / "inprocess")
        lines: list[str] = []

        def tell(line: str) -> None:
            lines.append(line)
            if len(lines) == 2:
                raise Stop("enough")

        with pytest.raises(Stop, match="enough"):
            run_under_flower(study, tmp_path / "flower", tell)
        run_under_flower(study, tmp_path / "flower", resume=True)
        assert_equal(tmp_path / "inprocess", tmp_path / "flower")


OVERRIDES = (
    "clients.count=3 clients.unseen=0.0 federate.rounds=1 federate.clients_per_round=2 personalise.arms=[dense,ticket]"
)


@pytest.fixture(scope="module")
def flwr_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Give a Flower home and a port of our own; end the local SuperLink that `flwr run` leaves behind."""
    home = tmp_path_factory.mktemp("flwr-home")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    yield {
        **os.environ, "PATH": path, "FLWR_HOME": str(home), "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": port,
        "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }  # fmt: skip
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if b"flower-superlink" in command and str(home).encode() in command:
            os.kill(int(entry.name), signal.SIGTERM)


def flwr_run(env: dict[str, str], out: Path, *, app: Path = ROOT, overrides: str = OVERRIDES) -> str:
    study = "configs/smoke.yaml" if app == ROOT else ROOT / "configs" / "smoke.yaml"
    run_config = f'study="{study}" out="{out}" overrides="{overrides}"'
    federation = "num-supernodes=3 client-resources-num-cpus=1"
    command = ["flwr", "run", ".", "--stream", "--run-config", run_config, "--federation-config", federation]
    done = subprocess.run(command, cwd=app, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr  # that of the submission, not of the run
    return done.stdout + done.stderr


def test_flwr_run_equals_the_in_process_run(tmp_path: Path, flwr_home: dict[str, str]) -> None:
    study = schema.load(ROOT / "configs" / "smoke.yaml", OVERRIDES.split())
    tiny.run(study, tmp_path / "inprocess")
    said = flwr_run(flwr_home, tmp_path / "flwr")
    assert "fedlth: done" in said
    assert_equal(tmp_path / "inprocess", tmp_path / "flwr")


@pytest.mark.long
def test_a_meter_under_flwr_run_equals_the_ledger(tmp_path: Path, flwr_home: dict[str, str]) -> None:
    """The documented command: an app around fedlth's that serialises every message itself."""
    app = ROOT / "benchmarks" / "meter"
    said = flwr_run(flwr_home, tmp_path / "flwr", app=app, overrides=f"{OVERRIDES} wire=lossless")
    assert "meter: equal in 10 messages by round, client and direction" in said, said
