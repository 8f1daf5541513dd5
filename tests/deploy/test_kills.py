"""kill -9 of a SuperNode, of the SuperLink, of the ServerApp in mid-round: what docs/deploy.md says then, done.

The measure is the run in this process, which an undisturbed federation equals (test_federation.py).
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from fedlth.experiment.saved_ticket import load_ticket
from fedlth.report.diff import diff
from fedlth.storage.records import LedgerRow, RoundRow
from fedlth.storage.run_folder import RunFolder
from fedlth.study import schema
from tests import tiny
from tests.deploy.federation import DEVICES, ROOT, SERVER_APP, Federation, federation

pytestmark = [pytest.mark.long, pytest.mark.timeout(3000)]
WORDS = [
    "--study", str(ROOT / "configs" / "smoke.yaml"), "clients.count=3", "clients.unseen=0.0", "federate.rounds=2",
    "federate.clients_per_round=3", "personalise.arms=[dense,ticket]",
]  # fmt: skip
FEDLTH = (sys.executable, "-m", "fedlth")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the same study's run in this process."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    tiny.run(schema.load(Path(WORDS[1]), WORDS[2:]), out)
    return out


def in_mid_round(fed: Federation, out: Path, committed: int) -> None:
    """Wait until so many rounds are committed and device 0 is at work on its next message."""
    rounds = out / "rounds.jsonl"
    fed.wait_for(
        f"round {committed + 1}",
        lambda: rounds.exists() and rounds.read_bytes().count(b"\n") == committed and fed.at_work(0),
    )


def goes_on(fed: Federation, out: Path) -> None:
    """Continue the run as docs/deploy.md says, to its end: the command's exit code is the run's."""
    assert "ticket" in fed.said(*FEDLTH, "resume", out)


def ended(fed: Federation) -> str:
    """Wait for run.sh's end and return what it said."""
    fed.programs.pop("run").wait(timeout=2000)
    return fed.log("run").read_text()


def its_ticket_predicts(fed: Federation, undisturbed: Path, number: int) -> None:
    """A device's own ticket file is that of the undisturbed run, and predicts without run folder or data."""
    (file,) = (fed.device(number) / "state").glob(f"*/client-{number:04d}.safetensors")
    own, wanted = load_ticket(file), load_ticket(undisturbed, number)
    x = torch.rand(5, 1, 28, 28, generator=torch.Generator().manual_seed(number))
    assert torch.equal(own(x), wanted(x)) and own(x).shape == (5, 10)


def test_serverapp_and_superlink_killed(tmp_path: Path, undisturbed: Path) -> None:
    """Both in one run: the ServerApp in its second round, the SuperLink in step 2. Nothing of either is to be seen."""
    with federation(tmp_path, WORDS) as fed:
        out = fed.folder.root / "run"
        fed.begin("run", fed.folder.root / "run.sh")
        in_mid_round(fed, out, 1)
        (server_app,) = fed.processes(SERVER_APP, fed.folder.root)
        os.kill(server_app, signal.SIGKILL)
        fed.kill("run")  # it prints what comes of a run that is no more
        fed.begin("resume", *FEDLTH, "resume", out)
        in_mid_round(fed, out, 2)
        fed.kill("superlink")
        assert fed.programs.pop("resume").wait(timeout=600) != 0, "a script learns that the run has not ended"
        assert "has not ended" in fed.log("resume").read_text()
        fed.start("superlink")
        goes_on(fed, out)
        assert diff(undisturbed, out) == []
        for number in range(DEVICES):
            its_ticket_predicts(fed, undisturbed, number)


def test_supernode_killed_and_started_again(tmp_path: Path, undisturbed: Path) -> None:
    """The round waits for it, and sends it its work again; the ledger's frames count both tries."""
    with federation(tmp_path, WORDS) as fed:
        out = tmp_path / "run"
        fed.begin("run", fed.folder.root / "run.sh", out)
        in_mid_round(fed, out, 1)
        fed.kill("device-0")
        fed.wait_for("the run's word", lambda: "waiting for clients whose SuperNode has gone: [0]" in said(fed))
        fed.start("device-0")
        assert "fedlth: done" in ended(fed)
        assert "back: clients [0]" in said(fed)
        assert diff(undisturbed, out) == []
        its_ticket_predicts(fed, undisturbed, 0)
    rows = [r for r in RunFolder(out).rows(LedgerRow) if (r.phase, r.round, r.sender) == ("federate", 2, "server")]
    framed = {row.receiver: row.framed_bytes or 0 for row in rows}
    assert framed["client:0"] == pytest.approx(2 * framed["client:1"], rel=1e-3)


def said(fed: Federation) -> str:
    return fed.log("run").read_text()


def test_supernode_killed_for_good_with_a_quorum(tmp_path: Path) -> None:
    """The run goes on without it and says so; the device that comes back after the run's end gets its ticket."""
    with federation(tmp_path, [*WORDS, "federate.quorum=2"]) as fed:
        app = fed.folder.root / "app" / "pyproject.toml"
        app.write_text(app.read_text().replace("wait-s = 120", "wait-s = 90"))
        out = fed.folder.root / "run"
        fed.begin("run", fed.folder.root / "run.sh")
        in_mid_round(fed, out, 1)
        fed.kill("device-0")
        assert "fedlth: done" in ended(fed)
        rounds = RunFolder(out).rows(RoundRow)
        lost = [(row.phase, row.round) for row in rows_without(rounds, 0)]
        assert lost == [("federate", 2), ("personalise", 1)], rounds
        assert "no result of 1 clients, whose machine was lost ([0])" in said(fed)
        tickets = [list((fed.device(n) / "state").glob("*/client-*.safetensors")) for n in range(DEVICES)]
        assert [len(found) for found in tickets] == [0, 1, 1]
        fed.start("device-0")
        goes_on(fed, out)
        (file,) = (fed.device(0) / "state").glob("*/client-0000.safetensors")
        assert load_ticket(file)(torch.zeros(1, 1, 28, 28)).shape == (1, 10)
        assert {row["client"] for row in metrics(out) if row["arm"] == "ticket"} == set(range(DEVICES))


def rows_without(rounds: tuple[RoundRow, ...], client: int) -> list[RoundRow]:
    """Return the rounds that say that they did not have a client."""
    return [row for row in rounds if client in row.absent or client in {one.client for one in row.failed}]


def metrics(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
