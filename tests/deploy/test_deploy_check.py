"""fedlth deploy check finds each fault, names its place and says what to do; a sound folder has none."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
import yaml

from fedlth import cli
from fedlth.deploy import check as checking
from fedlth.deploy import make
from fedlth.deploy.certificates import AUTHORITY_DAYS, SERVER_DAYS, new_authority, new_device_key, new_server, utc_now
from fedlth.deploy.check import check
from fedlth.deploy.folder import Folder
from fedlth.deploy.live import Answer, Live, ask
from fedlth.deploy.settings import FILE
from fedlth.engines.flower_keys import owners_in
from tests import tiny
from tests.deploy.federation import HOST, copied, made


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return made(tmp_path_factory.mktemp("check") / "fed")


@pytest.fixture
def folder(sound: Folder, tmp_path: Path) -> Folder:
    return copied(sound, tmp_path / "fed")


def nothing_runs(method: str, url: str, authority: str) -> Answer:
    return Answer()


def nobody(address: str, authority: str) -> set[bytes]:
    return set()


def found(folder: Folder, live: Live = nothing_runs, days: float = 0) -> list[str]:
    now = utc_now() + timedelta(days=days)
    return [str(fault) for fault in check(folder.root, now=now, live=live, online=nobody)[0]]


def settings(folder: Folder, **changed: object) -> None:
    path = folder.root / FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def node(folder: Folder, number: int, text: str) -> None:
    folder.device_node(number).write_text(text)


def same_key(folder: Folder) -> None:
    shutil.copy(folder.device_key(0), folder.device_key(2))
    shutil.copy(folder.device_public(0), folder.device_public(2))


def other_server(
    folder: Folder, *, authority: bool = False, hosts: tuple[str, ...] = (HOST, "fed.example.org")
) -> None:
    """Give the server another certificate: of another authority, or under other names."""
    key, parent = new_authority("fed", utc_now())
    if not authority:
        key, parent = folder.authority_key.read_bytes(), folder.authority.read_bytes()
    key, certificate = new_server(key, parent, hosts, utc_now())
    folder.replace(folder.server_key, key)
    folder.replace(folder.server_certificate, certificate)


def other_server_key(folder: Folder) -> None:
    shutil.copy(folder.authority_key, folder.server_key)


MUTATIONS: dict[str, tuple[Callable[[Folder], object], str, str]] = {
    "name": (lambda f: other_server(f, hosts=(HOST,)), "server/server.crt: ", "does not name fed.example.org"),
    "authority": (lambda f: other_server(f, authority=True), "server/server.crt: ", "not signed by this federation's"),
    "server key": (other_server_key, "server/server.crt: ", "the key does not belong to the certificate"),
    "no certificate": (lambda f: f.server_certificate.write_text("x"), "server: ", "cannot be read"),
    "device's authority": (
        lambda f: (f.device(1) / "ca.crt").write_bytes(new_authority("b", utc_now())[1]),
        "device-1/ca.crt: ", "not this server's authority",
    ),
    "readable": (lambda f: f.device_key(1).chmod(0o640), "device-1/key: ", "others can read"),
    "readable authority": (lambda f: f.authority_key.chmod(0o604), "ca/ca.key: ", "others can read"),
    "same key": (same_key, "keys/device-2.pub: ", "the same key as keys/device-0.pub"),
    "not registered": (lambda f: f.device_key(1).write_bytes(new_device_key()[0]), "device-1/key: ", "not the key of"),
    "no key": (lambda f: f.device_key(1).write_text("-"), "device-1/key: ", "no key that Flower can read"),
    "no public key": (lambda f: f.device_public(1).unlink(), "keys/device-1.pub: ", "is not here"),
    "twice": (
        lambda f: node(f, 2, 'partition-id = 1\nstate-dir = "state"'),
        "device-1/node.toml, device-2/node.toml: ", "partition-id 1 is served twice",
    ),
    "missing": (
        lambda f: node(f, 2, 'partition-id = 1\nstate-dir = "state"'), "device-2: ", "no device serves partition-id 2",
    ),
    "another's": (
        lambda f: (node(f, 0, 'partition-id = 1\nstate-dir = "s"'), node(f, 1, 'partition-id = 0\nstate-dir = "s"')),
        "device-0/node.toml: ", "partition-id is 1: the device of another client",
    ),
    "no partition": (lambda f: node(f, 0, 'state-dir = "s"'), "device-0/node.toml: ", "whole number, got None"),
    "no state-dir": (lambda f: node(f, 0, "partition-id = 0"), "device-0/node.toml: ", "state-dir is missing"),
    "equal ports": (lambda f: settings(f, superlink_port=8443), f"{FILE}: ", "superlink_port is 8443, as port is"),
    "moved": (
        lambda f: f.flower_config.write_text(f.flower_config.read_text().replace("/fed/", "/old/")),
        "flower/config.toml: ", "root-certificates is ",
    ),
    "version": (lambda f: settings(f, versions={"flwr": "1.0"}), f"{FILE}: ", "made with flwr 1.0, here is "),
    "torch": (lambda f: settings(f, versions={"torch": "1.0"}), f"{FILE}: ", "made with torch 1.0, here is "),
    "wire": (lambda f: settings(f, versions={"wire": "1"}), f"{FILE}: ", "made with wire 1, here is "),
    "count": (
        lambda f: settings(f, device_ports=[8445, 8446]), "app/study.yaml: ", "must be the number of devices, 2, got 3",
    ),
    "study": (
        lambda f: f.study.write_text(f.study.read_text().replace("lr: 0.1", "lr: -1")), "app/study.yaml: ", "train.lr",
    ),
    "no study": (lambda f: f.study.unlink(), "app/study.yaml: ", "no such study file"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_fault_is_found_with_place_and_remedy(name: str, folder: Folder) -> None:
    mutate, place, what = MUTATIONS[name]
    mutate(folder)
    faults = [fault for fault in found(folder) if fault.startswith(place) and what in fault]
    assert len(faults) == 1 and faults[0].rpartition("; ")[2].strip(), found(folder)


@pytest.mark.parametrize(
    ("days", "what", "remedy"),
    [
        (-2, "the certificate is not valid before", "clock"),
        (SERVER_DAYS + 1, "the certificate expired on", "deploy certify"),
        (AUTHORITY_DAYS + 1, "the authority's certificate expired on", "new federation"),
    ],
)
def test_certificates_have_their_time(sound: Folder, days: float, what: str, remedy: str) -> None:
    assert [one for one in found(sound, days=days) if what in one and remedy in one]


# (method, part of the URL) -> what comes back; the first that fits
def answers(*given: tuple[str, Answer]) -> Live:
    return lambda method, url, authority: next((answer for part, answer in given if part in url), Answer())


RUNS = ("/health", Answer(200))
LIVE: dict[str, tuple[Live, str]] = {
    "taken": (answers(("127.0.0.1:8444", Answer(why="WRONG_VERSION_NUMBER"))), "port 8444: taken, and not by the"),
    "gate's taken": (answers(("127.0.0.1:8443", Answer(why="other"))), "port 8443: taken, and not by the gate"),
    "not healthy": (answers(("127.0.0.1:8443", Answer(503))), "port 8443: the gate is not healthy: status 503"),
    "no gate": (answers((HOST, Answer()), RUNS, ("/v1/control/", Answer(415))), "port 8443: the control API answers"),
    "open": (answers(RUNS, ("/v1/control/", Answer(404))), f"port 8444: the SuperLink answers at {HOST}"),
}  # fmt: skip


@pytest.mark.parametrize("name", LIVE)
def test_what_runs_is_asked(name: str, sound: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "_study", lambda *_: ([], []))
    live, wanted = LIVE[name]
    (fault,) = found(sound, live)
    assert fault.startswith(wanted)


def test_a_sound_folder_has_no_fault_and_a_device_that_is_away_is_a_note(folder: Folder) -> None:
    sound = answers((HOST, Answer()), RUNS, ("/v1/control/", Answer(404)))
    keys = {client: key for key, client in owners_in(folder.root / "keys").items()}

    def notes_with(*online: bytes) -> list[str]:
        faults, notes = check(folder.root, live=sound, online=lambda address, authority: set(online))
        assert not faults
        return notes

    assert notes_with(*keys.values()) == ["connected: 3 of 3"]
    assert notes_with(keys[0], keys[2], b"a stranger's") == ["connected: 2 of 3; missing: device-1"]
    assert notes_with() == ["connected: 0 of 3; missing: device-0, device-1, device-2"]

    def refused(address: str, authority: str) -> set[bytes]:
        raise httpx.ConnectError("refused")

    assert check(folder.root, live=sound, online=refused) == (
        [], ["which devices are connected could not be asked: refused"]
    )  # fmt: skip
    shutil.rmtree(folder.device(1))
    faults, notes = check(folder.root, live=nothing_runs)
    assert not faults and "device 1: not in this folder" in notes[-1]
    assert notes[:-1] == [
        "the SuperLink does not run (nothing listens on port 8444)",
        "the gate does not run (nothing listens on port 8443)",
    ]


def test_the_command_prints_faults_and_its_exit_code_says_so(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checking, "_study", lambda *_: ([], []))
    monkeypatch.setattr("fedlth.deploy.live.ask", nothing_runs)
    assert cli.main(["deploy", "check", str(folder.root)]) == 0
    assert capsys.readouterr().out.endswith("everything fits\n")
    folder.server_key.chmod(0o644)
    assert cli.main(["deploy", "check", str(folder.root)]) == 1
    said = capsys.readouterr().out
    assert f"server/server.key: a private key that others can read; chmod 600 {folder.server_key}\n" in said
    assert cli.main(["deploy", "check", str(folder.root / "app")]) == 2
    assert "no federation here" in capsys.readouterr().err


def test_a_port_is_free_or_taken_by_another(sound: Folder) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        url = f"https://127.0.0.1:{other.getsockname()[1]}/health"

        def hang_up() -> None:
            for _ in range(2):
                other.accept()[0].close()

        thread = threading.Thread(target=hang_up, daemon=True)
        thread.start()
        taken = ask("GET", url, str(sound.authority))
        thread.join(5)
    assert taken.status is None and taken.why
    assert ask("GET", url, str(sound.authority)) == Answer()


def test_data_that_live_with_the_devices(tmp_path: Path) -> None:
    """Neither init nor check reads them; each device's node config says where they are there."""
    path = tmp_path / "study.yaml"
    own = {"input_shape": [1, 8, 8], "input_dtype": "uint8", "num_classes": 4}
    data = {"name": "nowhere.on_this_machine:read", "root": "wards/{client}", "own": own}
    tree = tiny.tree(clients={"count": 2, "unseen": 0.0}, data=data, partition={"name": "own"})
    path.write_text(yaml.safe_dump(tree))
    folder = make.init(tmp_path / "fed", path, [], devices=2, hosts=(HOST,), port=8443)
    missing = found(folder)
    assert missing[1] == (
        f"device-1/node.toml: data-dir: {folder.device(1)}/data is not there; put this device's data there, or move "
        "its folder to where they are"
    )
    assert len(missing) == 2 and missing[0].startswith("device-0/node.toml: data-dir: ")
    (folder.device(0) / "data").mkdir()
    (tmp_path / "elsewhere").mkdir()
    node(folder, 1, f'partition-id = 1\nstate-dir = "state"\ndata-dir = "{tmp_path}/elsewhere"\n')
    assert found(folder) == []
    node(folder, 1, 'partition-id = 1\nstate-dir = "state"\ndata-dir = "data"\n')
    (folder.device(1) / "data").mkdir()
    assert found(folder) == []
    assert 'data-dir = "data"' in folder.device_node(1).read_text() and "wards" not in folder.study.read_text()
    node(folder, 1, 'partition-id = 1\nstate-dir = "state"\n')
    (fault,) = found(folder)
    assert (
        fault == 'device-1/node.toml: data-dir is missing: the study\'s data live with the devices; data-dir = "data"'
    )


def test_the_links_that_a_study_states(tmp_path: Path) -> None:
    """What a dense model takes on each is a note; one that is too thin, or a deadline that it cannot keep, a fault."""
    path = tmp_path / "study.yaml"
    thin = {"name": "meter", "clients": [0], "down_bytes_s": 8_000, "up_bytes_s": 8_000}
    thinner = {"name": "buoy", "clients": [1], "down_bytes_s": 8_000, "up_bytes_s": 1_000}
    tree = tiny.tree(
        clients={"count": 3, "unseen": 0.0, "capacity": [thin, thinner]}, federate={"deadline_s": 2, "rounds": 1},
        model={"options": {"hidden": [100]}},
    )  # fmt: skip
    path.write_text(yaml.safe_dump(tree))
    folder = make.init(tmp_path / "fed", path, [], devices=3, hosts=(HOST,), port=8443)
    faults, notes = check(folder.root, live=nothing_runs)
    assert [str(fault).partition("; ")[0] for fault in faults] == [
        "app/study.yaml: meter: federate.deadline_s is 2, a dense model takes about 9 s both ways",
        "app/study.yaml: buoy: a link of 8 kbit/s: Flower's client sends a piece again, and again, that does not cross "
        "within 30 s",
        "app/study.yaml: buoy: federate.deadline_s is 2, a dense model takes about 40 s both ways",
    ]
    assert notes[:2] == [
        "app/study.yaml: meter: a dense model of 0.0285 MB takes about 4 s down at 64 kbit/s, 4 s up at 64",
        "app/study.yaml: buoy: a dense model of 0.0285 MB takes about 4 s down at 64 kbit/s, 36 s up at 8",
    ]
