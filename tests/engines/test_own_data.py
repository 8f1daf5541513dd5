"""Data that live with each client alone: a federation of devices equals the simulation, and the server has counts."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedlth.data.divided import opened
from fedlth.data.own import Here, become, here
from fedlth.engines.flower_client import Place, roll_call, serve
from fedlth.engines.flower_counts import counted
from fedlth.engines.flower_engine import Back, FlowerEngine, Sent
from fedlth.engines.flower_record import BODY, HEAD, Records
from fedlth.engines.inprocess import InProcess
from fedlth.errors import StudyError
from fedlth.experiment.resolve import resolve
from fedlth.experiment.saved_ticket import load_ticket
from fedlth.export.export import export_ticket
from fedlth.federation import session
from fedlth.output import lines_to
from fedlth.report.diff import diff, notes
from fedlth.storage import ticket_file
from fedlth.study import schema
from fedlth.training.task import forget_tasks
from tests import tiny

IMAGES = {"input_shape": [1, 8, 8], "input_dtype": "uint8", "num_classes": 4}
SENTENCES = {
    "input_shape": {"ids": [9], "mask": [9]}, "input_dtype": {"ids": "int64", "mask": "float32"}, "num_classes": 4,
}  # fmt: skip
MASKED_MEAN = {"name": "tests.user_model:MaskedMean", "options": {}}


def read(root: str) -> dict[str, Any]:
    """A device's factory: the arrays of one folder."""
    return {**{file.stem: np.load(file) for file in Path(root).glob("*.npy")}, "num_classes": 4}


def sentences(root: str) -> dict[str, Any]:
    """Sentences of unequal length, the longest of which no other device knows."""
    size = int(Path(root).name)
    rng = np.random.default_rng(size)
    made: dict[str, Any] = {"num_classes": 4}
    for part, count in (("train", 40 + size), ("test", 20)):
        lengths = rng.integers(3, 6 + size, count)
        ids = [rng.integers(0, 9, n) for n in lengths]
        made[f"x_{part}"] = {"ids": ids, "mask": [np.ones(n, np.float32) for n in lengths]}
        made[f"y_{part}"] = rng.integers(0, 4, count)
    return made


@pytest.fixture(autouse=True)
def _simulation_again() -> Iterator[None]:
    yield
    become(None)
    forget_tasks()


def devices(folder: Path, count: int = 3) -> Path:
    """Write a folder for each client, of other sizes and other classes."""
    whole = tiny.images(train=300, test=150)
    for client in range(count):
        own = folder / str(client)
        own.mkdir(parents=True)
        for part in ("train", "test"):
            y = whole[f"y_{part}"]
            mine = np.flatnonzero((y != client) & (np.arange(len(y)) % count == client))[: 60 - 7 * client]
            np.save(own / f"x_{part}.npy", whole[f"x_{part}"][mine])
            np.save(own / f"y_{part}.npy", y[mine])
    return folder


def study(folder: Path, **more: Any) -> schema.Study:
    return tiny.study(
        **{
            "data": {"name": f"{__name__}:read", "root": f"{folder}/{{client}}", "own": IMAGES},
            "partition": {"name": "own", "seed": 3},
            "clients": {"count": 3, "unseen": 0.34, "validation": 0.2, "test_samples": 15},
            "federate": {"rounds": 2, "clients_per_round": 2},
            **more,
        }
    )


class Devices:
    """Nodes in this process: it takes each device's place for the time of an answer, and the server's again."""

    poll_s = 0.0

    def __init__(self, folder: Path, states: Path, count: int = 3) -> None:
        self.places = {100 + c: Place(c, states / str(c), None, folder / str(c)) for c in range(count)}
        self.backs: list[Back] = []
        self.sent, self.given = 0, set[str]()

    def online(self) -> Iterable[int]:
        return list(self.places)

    def send(self, records: Records, *, node: int, kind: str) -> Sent:
        self.sent += 1
        id, place, server = f"m{self.sent}", self.places[node], here()
        try:
            if kind == "query":
                config = {"partition-id": place.partition} | (
                    {"data-dir": str(place.data_dir)} if place.data_dir else {}
                )
                said = roll_call(records, config)
                self.backs.append(Back(id, records={HEAD: {BODY: said}}))
            else:
                self.backs.append(Back(id, 9, serve(records, place)))
        finally:
            become(server)
        return Sent(id, 7)

    def collect(self, ids: Iterable[str]) -> list[Back]:
        ids = set(ids)
        assert not ids & self.given, "Flower gives an answer once; asked for again, it is an error"
        due = [b for b in self.backs if b.id in ids][:1]  # they come one after another
        self.given |= {b.id for b in due}
        self.backs = [b for b in self.backs if b not in due]
        return due


def federated(made: schema.Study, transport: Devices, out: Path) -> list[str]:
    """Run as the server of a deployment does."""
    lines: list[str] = []
    with lines_to(lines.append):
        become(Here(counts=counted(made, transport, wait_s=1.0, pause=lambda: None)))
        experiment, notes = resolve(made)
        engine = FlowerEngine(transport, study=experiment.study, out=out, wait_s=1.0, stop=threading.Event())
        session.start(experiment, notes, out, engine)
    return lines


def numbers(out: Path) -> dict[str, Any]:
    """Return all that a run without tickets of its own tells; the rows name the tickets' masks."""
    ledger = [{k: v for k, v in row.items() if "framed" not in k} for row in tiny.rows(out, "ledger")]
    return {"ledger": ledger, "metrics": tiny.rows(out, "metrics"), "theta_g": tiny.digests(out)["theta_g"]}


OWN_TESTS = {"clients": {"count": 3, "unseen": 0.0, "validation": 0.2, "test": "own"}}
LOTTERY = {"method": {"name": "lotteryfl", **tiny.METHODS["lotteryfl"]}}


@pytest.mark.parametrize("more", [{}, OWN_TESTS, LOTTERY], ids=["two_step", "own tests", "lotteryfl"])
def test_devices_equal_the_simulation(tmp_path: Path, more: dict[str, Any]) -> None:
    """The server's folder has no data, no path of a device, and no count of a class."""
    made = study(devices(tmp_path / "data"), **more)
    tiny.run(made, tmp_path / "all")
    # A server that could read the folders would prove nothing.
    away = made.model_copy(update={"data": made.data.model_copy(update={"root": None})})
    lines = federated(away, Devices(tmp_path / "data", tmp_path / "states"), tmp_path / "apart")
    assert numbers(tmp_path / "all") == numbers(tmp_path / "apart")
    assert diff(tmp_path / "all", tmp_path / "apart") == []
    assert notes(tmp_path / "all", tmp_path / "apart")[-1].endswith(
        "knows how many examples each client has, not which"
    )
    assert any(line.startswith("data of 3 devices: ") for line in lines)
    for client in range(3):  # its own file, which needs neither run nor data
        (file,) = (tmp_path / "states" / str(client)).glob(f"*/client-{client:04d}.safetensors")
        simulated_file = tmp_path / "all" / "tickets" / file.name
        assert ticket_file.read(file)[1]["study"] == ticket_file.read(simulated_file)[1]["study"] == "tiny"
        exported = export_ticket(file, to="safetensors")
        assert exported.random and exported.client == client and exported.folder.is_relative_to(file.parent / "export")
        own, simulated = load_ticket(file).state_dict(), load_ticket(tmp_path / "all", client).state_dict()
        assert own.keys() == simulated.keys() and all(torch.equal(own[name], simulated[name]) for name in own)
    header = json.loads((tmp_path / "apart" / "header.json").read_text())
    assert header["client_labels"] == [[], [], []]
    written = b"".join(file.read_bytes() for file in (tmp_path / "apart").rglob("*") if file.is_file())
    assert str(tmp_path / "data").encode() not in written


def test_ragged_fields_by_name(tmp_path: Path) -> None:
    """No device has rows as long as the study says; each pads its own."""
    for client in range(3):
        (tmp_path / "data" / str(client)).mkdir(parents=True)
    data = {"name": f"{__name__}:sentences", "root": f"{tmp_path}/data/{{client}}", "own": SENTENCES}
    made = study(tmp_path / "data", data=data, model=MASKED_MEAN)
    tiny.run(made, tmp_path / "all")
    federated(made, Devices(tmp_path / "data", tmp_path / "states"), tmp_path / "apart")
    assert numbers(tmp_path / "all") == numbers(tmp_path / "apart")


def test_a_run_whose_devices_have_other_data_is_not_gone_on_with(tmp_path: Path) -> None:
    folder = devices(tmp_path / "data")
    made, transport = study(folder), Devices(folder, tmp_path / "states")
    federated(made, transport, tmp_path / "r")
    header = tmp_path / "r" / "header.json"
    header.write_text(header.read_text().replace('"finished": true', '"finished": false'))
    for file in (folder / "1").glob("*_train.npy"):
        np.save(file, np.load(file)[:-1])
    opened.cache_clear()
    forget_tasks()
    become(Here(counts=counted(made, transport, wait_s=1.0, pause=lambda: None)))
    with pytest.raises(StudyError, match="must continue with the data that it began with"):
        session.resume(tmp_path / "r", InProcess())


@pytest.mark.parametrize(
    ("own", "says"),
    [
        (
            {"input_shape": [1, 4, 8]},
            r"node 100: partition-id 0: data of client 0: x must be uint8 of data.own.input_shape \[1, 4, 8\]",
        ),
        ({"input_dtype": "float32"}, r"x must be float32 of data.own.input_shape \[1, 8, 8\], got uint8 \[1, 8, 8\]"),
        ({"num_classes": 3}, "must have the classes or outputs of data.own.num_classes, 3, got 4"),
        ({"input_shape": {"ids": [9]}}, "must have the inputs of data.own.input_shape, ids, got x"),
        ({"targets": "numbers"}, "must have the targets of data.own.targets, numbers, got classes"),
    ],
)
def test_a_device_whose_data_are_others_is_named(tmp_path: Path, own: dict[str, Any], says: str) -> None:
    folder = devices(tmp_path / "data")
    made = study(folder, data={"name": f"{__name__}:read", "own": {**IMAGES, **own}})
    with pytest.raises(StudyError, match=says):
        counted(made, Devices(folder, tmp_path), wait_s=1.0, pause=lambda: None)


def test_what_a_node_cannot_tell_is_refused(tmp_path: Path) -> None:
    folder = devices(tmp_path / "data")
    made, transport = study(folder), Devices(folder, tmp_path)
    transport.places[100] = replace(transport.places[100], data_dir=None)
    with pytest.raises(StudyError, match="node 100: partition-id 0: node config: data-dir must name"):
        counted(made, transport, wait_s=1.0, pause=lambda: None)
    transport.places[100] = replace(transport.places[101], state_dir=None)
    with pytest.raises(StudyError, match="each SuperNode must have its own partition-id, got 1 more than once"):
        counted(made, transport, wait_s=1.0, pause=lambda: None)
    del transport.places[100]
    with pytest.raises(StudyError, match=r"got no answer of clients \[0, 2\] in 0 s"):
        counted(made, transport, wait_s=0.0, pause=lambda: None)
    shutil.rmtree(folder / "2")
    opened.cache_clear()
    transport.places = {102: Place(2, None, None, folder / "2")}
    with pytest.raises(StudyError, match="node 102: partition-id 2: data of client 2: data: ") as raised:
        counted(made, transport, wait_s=1.0, pause=lambda: None)
    assert raised.value.__suppress_context__, "what the device says is no JSON, and that is not why the run ends"


NO_COUNTS = [
    "[0, 5, 1]",
    "[0, 0, 1, 1]",
    "[3, 5, 1, 1]",
    "[0, 5, 1, -1]",
    "[0, 1e9, 1, 1]",
    "[0, 9999999999, 1, 1]",
    "{}",
    7,
]


@pytest.mark.parametrize("said", NO_COUNTS)
def test_counts_that_are_none(tmp_path: Path, said: Any) -> None:
    class Says(Devices):
        def send(self, records: Records, *, node: int, kind: str) -> Sent:
            self.backs.append(Back("m", records={HEAD: {BODY: said}}))
            return Sent("m", 7)

    folder = devices(tmp_path / "data")
    with pytest.raises(StudyError, match="flower: node 100: "):
        counted(study(folder), Says(folder, tmp_path, 1), wait_s=1.0, pause=lambda: None)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"partition": {"name": "iid"}}, "partition: must be own where data.own is given"),
        ({"data": {"name": f"{__name__}:read"}}, "partition: own needs data.own"),
        (
            {"data": {"name": f"{__name__}:read", "own": IMAGES, "pool": True}, "clients": {"count": 3, "test": "own"}},
            "data.pool: must not be given with data.own",
        ),
        ({"tasks": {"a": {"num_classes": 2}}}, "tasks: must not be given with data.own"),
    ],
)  # fmt: skip
def test_what_asks_for_all_examples_in_one_place_is_refused(tmp_path: Path, more: dict[str, Any], says: str) -> None:
    with pytest.raises(StudyError, match=says):
        study(tmp_path, **more)


def test_a_simulation_needs_the_folders(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"data.root: must say where each client's folder is in a simulation"):
        resolve(study(tmp_path, data={"name": f"{__name__}:read", "root": "/one", "own": IMAGES}))


def test_a_simulation_names_the_client_whose_folder_is_at_fault(tmp_path: Path) -> None:
    folder = devices(tmp_path / "data")
    for name in ("x_train", "y_train"):
        np.save(folder / "1" / f"{name}.npy", np.load(folder / "1" / f"{name}.npy")[:0])
    with pytest.raises(StudyError, match=r"^data of client 1: data set .*: x_train must be a non-empty array"):
        resolve(study(folder))
    shutil.rmtree(folder / "0")
    with pytest.raises(StudyError, match="^data of client 0: data: .* must return the fields"):
        resolve(study(folder))


def unused(root: str) -> dict[str, Any]:
    """Sentences of which the test part, which nobody uses, is empty."""
    made = sentences(root)
    made["x_test"], made["y_test"] = {name: rows[:0] for name, rows in made["x_test"].items()}, made["y_test"][:0]
    return made


def test_a_ragged_test_split_that_nobody_uses_may_be_empty(tmp_path: Path) -> None:
    for client in range(3):
        (tmp_path / str(client)).mkdir()
    data = {"name": f"{__name__}:unused", "root": f"{tmp_path}/{{client}}", "own": SENTENCES}
    clients = {"count": 3, "test": "own"}
    splits = resolve(study(tmp_path, data=data, clients=clients, model=MASKED_MEAN))[0].task.splits
    assert [len(part.test) for part in splits.clients] == [8, 8, 8]
