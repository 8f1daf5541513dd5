"""fedlth deploy init writes what devices and their server need: private, complete, and readable by Flower."""

from __future__ import annotations

import shutil
import ssl
import stat
import subprocess
import tomllib
from pathlib import Path

import pytest

from fedlth import cli
from fedlth.deploy.folder import Folder, filled
from fedlth.deploy.make import certify, next_steps
from fedlth.deploy.settings import Settings, read_settings
from fedlth.errors import StudyError
from fedlth.study import schema
from tests import tiny
from tests.deploy.federation import DEVICES, HOST, copied, made

# typer and pathspec, which Flower imports, against newer ones.
pytestmark = [
    pytest.mark.filterwarnings("ignore:'click.utils:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return made(tmp_path_factory.mktemp("init") / "fed")


def test_everything_is_private_and_a_device_has_its_own_alone(folder: Folder) -> None:
    for path in [folder.root, *folder.root.rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() or path.suffix == ".sh" else 0o600), path
    for number in range(DEVICES):
        names = {path.name for path in folder.device(number).iterdir()}
        assert names == {"key", "ca.crt", "node.toml", "start.sh", f"fedlth-device-{number}.service"}
        text = "".join(path.read_text() for path in folder.device(number).iterdir())
        assert str(folder.root) not in text, "a device's folder may lie anywhere"
    assert "*" in (folder.root / ".gitignore").read_text().splitlines()


def test_keys_are_what_flower_reads(folder: Folder) -> None:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization.ssh import load_ssh_private_key  # what a SuperNode calls
    from flwr.cli.supernode.register import try_load_public_key
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message, verify_signature

    seen = set()
    for number in range(DEVICES):
        key = load_ssh_private_key(folder.device_key(number).read_bytes(), None)
        assert isinstance(key, EllipticCurvePrivateKey) and key.curve.name == "secp384r1"
        registered = try_load_public_key(folder.device_public(number))
        assert registered == public_key_to_bytes(key.public_key())
        assert verify_signature(key.public_key(), b"now", sign_message(key, b"now"))
        seen.add(registered)
    assert len(seen) == DEVICES


def test_flower_reads_node_config_connection_and_app(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.cli.build import build_fab_from_disk
    from flwr.cli.config_utils import load_and_validate, load_certificate_in_connection
    from flwr.cli.flower_config import read_superlink_connection
    from flwr.common.config import parse_config_args

    for number in range(DEVICES):
        said = parse_config_args([str(folder.device_node(number))])
        assert said == {"partition-id": number, "state-dir": "state"}
    monkeypatch.setenv("FLWR_HOME", str(folder.flower_config.parent))
    for name in ("fedlth", None):
        connection = read_superlink_connection(name)
        assert connection.address == "127.0.0.1:8444" and not connection.insecure
        assert load_certificate_in_connection(connection) == folder.authority.read_bytes()
    app = folder.root / "app"
    load_and_validate(app / "pyproject.toml")  # finds the components
    assert len(build_fab_from_disk(app)) < 10_000


def test_the_app_is_the_installed_fedlth_and_finds_the_study(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.supercore.object_ref import load_app

    monkeypatch.syspath_prepend(str(folder.root / "app"))
    wanted = tomllib.loads((folder.root / "app" / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    for name, kind in (("serverapp", ServerApp), ("clientapp", ClientApp)):
        assert isinstance(load_app(wanted["components"][name], ValueError, folder.root / "app"), kind)
    study = schema.load(folder.root / "app" / wanted["config"]["study"])
    assert study == tiny.study(clients={"count": DEVICES, "unseen": 0.0}, seed=3)


def test_a_client_trusts_the_certificate_under_each_name(folder: Folder) -> None:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder.server_certificate, folder.server_key)
    client = ssl.create_default_context(cafile=str(folder.authority))
    client.verify_flags |= ssl.VERIFY_X509_STRICT  # Python's own default from 3.13 on
    for name in (HOST, "fed.example.org", "localhost", "127.0.0.1"):
        assert handshake(server, client, name)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(server, client, "192.0.2.8")


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> bool:
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(down, up, server_hostname=name), server.wrap_bio(up, down, server_side=True)]
    left = list(ends)
    while left:
        for end in list(left):
            try:
                end.do_handshake()
                left.remove(end)
            except ssl.SSLWantReadError:
                pass
    return True


def test_scripts_and_units_say_what_they_must(folder: Folder) -> None:
    superlink = (folder.root / "superlink.sh").read_text()
    assert "--host 127.0.0.1 --port 8444 --enable-supernode-auth" in superlink and "--insecure" not in superlink
    assert f"--superlink {HOST}:8443 " in (folder.device(1) / "start.sh").read_text()
    for number in range(DEVICES):
        unit = (folder.device(number) / f"fedlth-device-{number}.service").read_text()
        (wait,) = [line.partition("=")[2] for line in unit.splitlines() if line.startswith("RestartSec=")]
        assert int(wait) > 60 and "StartLimitIntervalSec=0" in unit
    install = "pip install -c constraints.txt ."  # as the docs have it: both ends need equal versions
    assert f"`{install}`" in (folder.device(0) / "start.sh").read_text()
    assert install in " ".join((Path(__file__).parents[2] / "docs" / "deploy.md").read_text().split())
    for script in folder.root.rglob("*.sh"):
        assert subprocess.run(["sh", "-n", script]).returncode == 0 and "@@" not in script.read_text()
    assert str(folder.root) in next_steps(folder, read_settings(folder.root))


# What flwr says of a key: a new one, one that is there, one of another kind; and of the SuperLink, twice not yet there.
FLWR = """#!/bin/sh
case "$2 $(basename "$3")" in
  "list fedlth") [ "$(wc -l < waits)" -eq 2 ] || { echo >> waits; echo "unavailable"; exit 1; } ;;
  *device-0.pub) echo "SuperNode 7 registered successfully." ;;
  *device-1.pub) echo "Error: [code: 23] Public key already in use."; exit 1 ;;
  *) [ ! -e bad ] || { echo "Error: EC curve is not approved"; exit 1; } ;;
esac
"""


def test_register_waits_and_tells_a_known_key_from_a_failure(folder: Folder, tmp_path: Path) -> None:
    for name, text in {"flwr": FLWR, "sleep": "#!/bin/sh\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o700)
    script = tmp_path / "register.sh"
    script.write_text(filled("register.sh", programs=tmp_path, environment=""))
    shutil.copytree(folder.root / "keys", tmp_path / "keys")
    (tmp_path / "waits").touch()

    def registered() -> tuple[int, str, str]:
        done = subprocess.run(["sh", script], capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    said = "device-0: registered\ndevice-1: was registered before\n"
    assert registered() == (0, f"{said}device-2: registered\n", "")
    (tmp_path / "bad").touch()
    wrong = "Error: EC curve is not approved\nregister.sh: not registered: device-2\n"
    assert registered() == (1, said, wrong)


def test_the_gate_listens_where_devices_can_reach_it() -> None:
    for hosts, bind in (
        (("127.0.0.1",), "127.0.0.1"), (("localhost", "127.0.0.2"), "127.0.0.1"), (("::1",), "::1"),
        (("fed.example.org",), "0.0.0.0"), (("2001:db8::1",), "::"),
    ):  # fmt: skip
        assert Settings.of(hosts, 8443, 2).bind == bind
    assert Settings.of(("2001:db8::1",), 8443, 2).gate_address == "[2001:db8::1]:8443"


def test_what_cannot_be_is_refused_and_nothing_is_written(
    folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = folder.root.with_suffix(".yaml")

    def refused(*words: str, devices: str = "3", to: Path = tmp_path / "new") -> str:
        assert cli.main(["deploy", "init", str(to), "--study", str(study), "--devices", devices, *words]) == 2
        assert not (tmp_path / "new").exists()
        return capsys.readouterr().err

    before = folder.authority_key.read_bytes()
    assert "is there already" in refused(to=folder.root) and folder.authority_key.read_bytes() == before
    assert "clients.count must be the number of devices, 2, got 3" in refused(devices="2")
    assert "--devices must be at least 1" in refused(devices="0")
    assert "--host must be a host name" in refused("--host", "https://a.example")
    assert "--port must be 1 to" in refused("--port", "65535")
    assert "seeds must be empty under flwr run" in refused("seeds=[0,1]")
    assert "train.lr" in refused("train.lr=-1")
    assert "no quotes" in refused(to=tmp_path / "a$b")


def test_certify_keeps_the_authority_and_names_the_new_host(folder: Folder, tmp_path: Path) -> None:
    other = copied(folder, tmp_path / "fed")
    certify(other.root, ["other.example.org"])
    assert read_settings(other.root).hosts == ("other.example.org",)
    assert other.authority.read_bytes() == folder.authority.read_bytes()
    assert other.server_key.read_bytes() != folder.server_key.read_bytes()
    assert stat.S_IMODE(other.server_key.stat().st_mode) == 0o600
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(other.server_certificate, other.server_key)
    assert handshake(server, ssl.create_default_context(cafile=str(folder.authority)), "other.example.org")
    other.authority_key.unlink()
    with pytest.raises(StudyError, match="is not here"):
        certify(other.root, [])


def test_a_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("fedlth.errors.find_spec", lambda name: None)
    assert cli.main(["deploy", "check", "nowhere"]) == 2
    assert "pip install 'fedlth[deploy]'" in capsys.readouterr().err
