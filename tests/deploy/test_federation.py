"""A whole federation on loopback, as `fedlth deploy init` writes it, equals the in-process run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlth.deploy.check import check
from fedlth.engines.flower_record import PIECE_BYTES
from fedlth.experiment.saved_ticket import load_ticket
from fedlth.report.diff import diff, notes
from fedlth.storage.records import LedgerRow
from fedlth.storage.run_folder import RunFolder
from fedlth.study import schema
from tests import tiny
from tests.deploy.federation import DEVICES, LONGEST_S, ROOT, Federation, federation
from tests.engines import test_own_data

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(3000),
    pytest.mark.filterwarnings("ignore:'click:DeprecationWarning"),  # typer's, which Flower imports
    # httpx's, of how Flower calls it
    pytest.mark.filterwarnings("ignore:.verify=<str>. is deprecated:DeprecationWarning"),
]
STUDY = (
    "clients.count=3 clients.unseen=0.0 federate.rounds=2 federate.clients_per_round=2 personalise.arms=[dense,ticket] "
    "model.name=mlp model.options.hidden=[128]"
)


def federated(
    tmp_path: Path, words: list[str], prepare: Callable[[int, Path], object] = lambda *_: None
) -> tuple[Path, dict[str, Any]]:  # fmt: skip
    """Run a federation's study on three devices and end everything; return the run's folder, and Flower's own record.

    `prepare` puts into a device's folder, by its number, what only that device has.
    """
    with federation(tmp_path, words, prepare) as fed:
        fed.wait_for("devices", lambda: f"connected: {DEVICES} of {DEVICES}" in check(fed.folder.root)[1])
        faults, seen = check(fed.folder.root)  # it asks the gate for the control API, too
        assert not faults and len(seen) == 2 and "not in this folder any more" in seen[1]
        refused_at_the_gate(fed)
        out = tmp_path / "devices"
        assert "fedlth: done" in fed.said(fed.folder.root / "run.sh", out)
        for name in ("superlink", "gate"):
            assert int((fed.folder.root / f"{name}.pid").read_text()) == fed.programs[name].pid
        (told,) = fed.flower_runs()
    # Each answer that a device pushed is one line of the SuperLink's; a slow device is asked twice whom it serves.
    return out, {**told, "answers": fed.log("superlink").read_text().count("Push replies from")}


def test_a_federation_on_loopback_equals_the_in_process_run(tmp_path: Path) -> None:
    out, told = federated(tmp_path, ["--study", str(ROOT / "configs" / "smoke.yaml"), *STUDY.split()])
    tiny.run(schema.load(tmp_path / "fed" / "app" / "study.yaml"), tmp_path / "inprocess")
    assert diff(tmp_path / "inprocess", out) == []
    assert [note for note in notes(tmp_path / "inprocess", out) if f"{DEVICES} tickets stay on their devices" in note]
    for number in range(DEVICES):
        assert list((tmp_path / f"moved-{number}" / "state").rglob("personalise-*"))
    the_ledger_is_what_flower_counted(out, told)


def the_ledger_is_what_flower_counted(out: Path, told: dict[str, Any]) -> None:
    """Flower's counter is within 1 % of the ledger's frames both ways; what it has more is its envelopes and roll call.

    The envelopes are 0.5 to 0.8 % of the payload of a model of 0.4 MB.
    """
    rows = RunFolder(out).rows(LedgerRow)
    visits = {(row.phase, row.round, client_of(row)) for row in rows}
    assert len(visits) == 2 * 2 + DEVICES, "two rounds of two clients, and step 2"
    asked = told["answers"] - len(visits)
    assert asked >= DEVICES
    for direction, key in (("down", "outbound-bytes"), ("up", "inbound-bytes")):
        own = [row for row in rows if (row.receiver == "server") == (direction == "up")]
        framed, counted = sum(row.framed_bytes or 0 for row in own), told["network-traffic"][key]
        assert sum(row.payload_bytes for row in own) < framed < counted < 1.01 * framed, (direction, framed, counted)
        roll_call = asked * (envelope(direction, down=4, up=3) + ROLL_CALL[direction])
        least, most = (
            roll_call + sum(envelope(direction, **objects(rows, one, small)) for one in visits) for small in (0, 1)
        )
        slack = 40 * told["answers"]  # ids and times are numbers of unequal length
        assert least - slack < counted - framed < most + slack, (direction, framed, counted, least, most)


ROLL_CALL = {"down": 620, "up": 390}  # the question, with the server's versions, and its answer: no row of the ledger


def client_of(row: LedgerRow) -> str:
    return row.sender if row.receiver == "server" else row.receiver


def objects(rows: tuple[LedgerRow, ...], visit: tuple[str, int, str], small: int) -> dict[str, int]:
    """Return how many objects a visit's messages are: message, records, head, and one for each piece of a payload.

    A payload that is no longer than a piece lies in the head, or is an object of its own: it counts as `small` ones.
    """
    found = {"down": 3, "up": 3}
    for row in rows:
        if (row.phase, row.round, client_of(row)) == visit:
            pieces = -(-row.payload_bytes // PIECE_BYTES)
            found["up" if row.receiver == "server" else "down"] += pieces if pieces > 1 else small
    return found


def envelope(direction: str, *, down: int, up: int) -> int:
    """Return the bytes that Flower 1.41 counts around a visit, by its own protocol buffers: its messages' objects.

    Down they are the answer to a pull (metadata, the objects' ids) and to a push (which objects are wanted); up they
    are the two questions.
    """
    from flwr.proto import fleet_pb2 as fleet
    from flwr.proto.message_pb2 import Message, Metadata, ObjectTree
    from flwr.proto.node_pb2 import Node

    node, id = Node(node_id=1 << 63), 64 * "f"
    about = Metadata(
        run_id=1 << 63, message_id=id, src_node_id=1, dst_node_id=1 << 63, ttl=1.0, message_type="train", created_at=1.0
    )  # fmt: skip
    message = Message(metadata=about)
    tree = ObjectTree(object_id=id, children=[ObjectTree(object_id=id, children=[ObjectTree(object_id=id)])])
    for _ in range((down if direction == "down" else up) - 3):
        tree.children[0].children.append(ObjectTree(object_id=id))
    if direction == "down":
        pushed = fleet.PushMessagesResponse(results={id: 0}, objects_to_push=[id] * up, session_id=32 * "f")
        pulled = fleet.PullMessagesResponse(messages_list=[message], message_object_trees=[tree])
        return int(pulled.ByteSize() + pushed.ByteSize())
    message.metadata.reply_to_message_id = id
    pushes = fleet.PushMessagesRequest(
        node=node, messages_list=[message], message_object_trees=[tree], clientapp_runtime_list=[1.0]
    )  # fmt: skip
    return int(fleet.PullMessagesRequest(node=node).ByteSize() + pushes.ByteSize())


def test_devices_with_data_that_nobody_else_has_equal_the_simulation(tmp_path: Path) -> None:
    """Each device's ticket is a file of its own that predicts as the simulation's does."""
    study = test_own_data.study(test_own_data.devices(tmp_path / "data"), federate={"rounds": 1})
    (tmp_path / "study.yaml").write_text(schema.dump(study))
    tiny.run(study, tmp_path / "simulation")
    away = (tmp_path / "data").rename(tmp_path / "away")
    out, _ = federated(
        tmp_path, ["--study", str(tmp_path / "study.yaml")],
        lambda number, folder: shutil.copytree(away / str(number), folder / "data"),
    )  # fmt: skip
    assert diff(tmp_path / "simulation", out) == []
    for number in range(DEVICES):
        (file,) = (tmp_path / f"moved-{number}" / "state").glob(f"*/client-{number:04d}.safetensors")
        own, simulated = load_ticket(file).state_dict(), load_ticket(tmp_path / "simulation", number).state_dict()
        assert all(torch.equal(own[name], simulated[name]) for name in simulated)


def test_a_standing_process_that_is_killed_or_outdated_costs_no_answer(tmp_path: Path) -> None:
    """Device 0's is killed, then a file that all have imported is replaced: the run equals the in-process one."""
    extra = tmp_path / "extra"
    extra.mkdir()
    (extra / "sitecustomize.py").write_text("value = 1\n")
    words = ["--study", str(ROOT / "configs" / "smoke.yaml"), *STUDY.split()]
    with federation(tmp_path, words, path=(extra,)) as fed:
        out = tmp_path / "devices"
        fed.begin("run", fed.folder.root / "run.sh", out)
        fed.wait_for("a round", lambda: "federate 1:" in fed.log("run").read_text())
        killed = fed.serving(0)
        os.kill(killed, signal.SIGKILL)
        (extra / "sitecustomize.py").write_text("value = 20\n")
        assert fed.programs.pop("run").wait(LONGEST_S) == 0
        assert "another follows" in fed.log("device-0").read_text() and fed.serving(0) not in (0, killed)
        for number in (1, 2):
            told = fed.log(f"device-{number}").read_text()
            assert "sitecustomize.py has changed" in told
            assert told.count("standing: one process for the messages") == 2
        fed.kill("device-2")
        fed.wait_for("the end of what served it", lambda: not fed.serving(2))
    tiny.run(schema.load(tmp_path / "fed" / "app" / "study.yaml"), tmp_path / "inprocess")
    assert diff(tmp_path / "inprocess", out) == []


def refused_at_the_gate(fed: Federation) -> None:
    """Try to register a key with nothing but the authority's certificate, as a stranger could at the SuperLink."""
    home = fed.root / "stranger"
    home.mkdir()
    text = fed.folder.flower_config.read_text()
    (home / "config.toml").write_text(text.replace(f":{fed.settings.superlink_port}", f":{fed.settings.port}"))
    done = subprocess.run(
        ["flwr", "supernode", "register", fed.folder.device_public(0), "fedlth"],
        env={**fed.env, "FLWR_HOME": str(home)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0 and "404" in done.stdout + done.stderr, done.stdout + done.stderr
