"""fedlth deploy init and certify: write everything that a federation needs into one folder."""

from __future__ import annotations

import getpass
import json
import shlex
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

from fedlth.data.own import as_server
from fedlth.deploy.certificates import new_authority, new_device_key, new_server, utc_now
from fedlth.deploy.folder import Folder, filled, new_folder, refuse_existing
from fedlth.deploy.settings import FILE, Settings, read_settings
from fedlth.engines.flower_client import DATA_DIR
from fedlth.engines.flower_session import refuse_several
from fedlth.errors import StudyError
from fedlth.experiment.experiment import Experiment
from fedlth.experiment.resolve import resolve
from fedlth.study import schema
from fedlth.study.yaml_text import text_of

SUPPOSED = (10_000, 1_000, 1_000)  # examples of a device's training, validation and test parts
SERVICES = (("superlink.sh", "SuperLink"), ("gate.sh", "gate before the SuperLink"))


def init(root: Path, study: Path, override: Sequence[str], *, devices: int, hosts: Sequence[str], port: int) -> Folder:
    """Write a new federation's folder and return it; raise StudyError, before anything is written, where it cannot be.

    The study is kept as it was given, with the overrides: the ServerApp resolves it, as any run does.
    """
    settings = Settings.of(tuple(hosts), port, devices)
    refuse_existing(root)  # before the study's data are read
    tree = schema.read_tree(study, list(override))
    tree.pop("out", None)  # a folder of this machine; the devices need not read its name
    made = schema.build(tree, str(study))
    if made.data.own is not None:
        tree["data"].pop("root", None)  # where a simulation finds what here the devices have
    check_study(made, str(study), devices)
    folder = new_folder(root)
    folder.write(folder.root / FILE, settings.text())
    folder.write(folder.root / ".gitignore", filled("gitignore"))
    authority_key, authority = new_authority(folder.root.name, utc_now())
    folder.write(folder.authority_key, authority_key)
    folder.write(folder.authority, authority)
    _write_server(folder, settings, authority)
    key, certificate = new_server(authority_key, authority, settings.hosts, utc_now())
    folder.write(folder.server_key, key)
    folder.write(folder.server_certificate, certificate)
    folder.write(folder.study, text_of(tree))
    described = filled("app_pyproject.toml", version=settings.versions["fedlth"])
    folder.write(folder.root / "app" / "pyproject.toml", described)
    package = folder.root / "app" / "fedlth_federation"
    folder.write(package / "__init__.py", '"""Made by fedlth deploy init."""\n')
    folder.write(package / "apps.py", filled("apps.py"))
    for number in range(devices):
        _write_device(folder, settings, number, authority, own_data=made.data.own is not None)
    return folder


def certify(root: Path, hosts: Sequence[str]) -> Settings:
    """Give the server a new key and certificate, for `hosts` if any are given; devices need no change.

    Raises StudyError where the folder is no federation's or its authority's key is not here.
    """
    settings, folder = read_settings(root), Folder(root.resolve())
    if hosts:
        new = Settings.of(tuple(hosts), settings.port, len(settings.device_ports))
        settings = replace(settings, hosts=new.hosts, bind=new.bind)
    try:
        authority = folder.authority.read_bytes()
        key, certificate = new_server(folder.authority_key.read_bytes(), authority, settings.hosts, utc_now())
    except FileNotFoundError as error:
        raise StudyError(f"{error.filename}: is not here; without it no certificate can be made") from error
    except ValueError as error:
        raise StudyError(f"{folder.authority_key.parent}: cannot be read: {error}") from error
    folder.replace(folder.server_key, key)
    folder.replace(folder.server_certificate, certificate)
    folder.replace(folder.root / FILE, settings.text().encode())
    return settings


def check_study(study: schema.Study, place: str, devices: int) -> Experiment:
    """Return a study's experiment; raise StudyError where it cannot run on so many devices. Reads data, builds a model.

    Data that live with the devices (data.own) are not here to be read.
    """
    refuse_several(study, place)
    if study.clients.count != devices:
        raise StudyError(
            f"{place}: clients.count must be the number of devices, {devices}, got {study.clients.count}; "
            f"a study for them: clients.count={devices}"
        )
    with supposed(study, devices):
        return resolve(study)[0]


def supposed(study: schema.Study, devices: int) -> AbstractContextManager[None]:
    """Give a context in which an experiment's task can be opened here.

    Of data that live with the devices nobody here knows how many there are; the run asks.
    """
    return as_server([SUPPOSED] * devices) if study.data.own is not None else nullcontext()


def next_steps(folder: Folder, settings: Settings) -> str:
    """Return what a person does with a folder that has just been written."""
    root, last = folder.root, len(settings.device_ports) - 1
    return (
        f"{root}: a federation of {last + 1} devices, which reach it at {settings.gate_address}\n"
        f"1. here, each in its own terminal (or by the units in {root.name}/units): superlink.sh, then gate.sh\n"
        f"2. here, once, when the SuperLink is up: register.sh\n"
        f"3. move device-0 ... device-{last} each to its device (key and all, over ssh), and there: start.sh\n"
        f"   (on one machine: leave them)\n"
        f"4. here: fedlth deploy check {root}, then run.sh\n"
        f"Keep {folder.authority_key.relative_to(root)} elsewhere: who has it can be this server to every device."
    )


def _environment() -> str:
    return filled("environment.sh").rstrip()


def _write_server(folder: Folder, settings: Settings, authority: bytes) -> None:
    common = {
        # Flower starts its other programs by their names, so PATH must have them under systemd too.
        "programs": shlex.quote(str(Path(sys.executable).parent)),
        "environment": _environment(),
    }
    folder.write(folder.trusted, authority)
    superlink = filled("superlink.sh", superlink_port=settings.superlink_port, **common)
    folder.write(folder.root / "superlink.sh", superlink, script=True)
    gate = filled("gate.sh", programs=common["programs"])
    folder.write(folder.root / "gate.sh", gate, script=True)
    for name in ("register.sh", "run.sh"):
        folder.write(folder.root / name, filled(name, **common), script=True)
    for script, what in SERVICES:
        unit = f"fedlth-{script.removesuffix('.sh')}.service"
        text = filled("server.service", unit=unit, what=what, script=script, root=folder.root, user=getpass.getuser())
        folder.write(folder.root / "units" / unit, text)
    trusted = json.dumps(str(folder.trusted))  # JSON's text is TOML's
    config = filled("flower_config.toml", superlink_port=settings.superlink_port, authority=trusted)
    folder.write(folder.flower_config, config)


def _write_device(folder: Folder, settings: Settings, number: int, authority: bytes, *, own_data: bool) -> None:
    private, public = new_device_key()
    place = folder.device(number)
    folder.write(folder.device_key(number), private)
    folder.write(folder.device_public(number), public + b"\n")
    folder.write(place / "ca.crt", authority)
    data_dir = f'{DATA_DIR} = "data"\n' if own_data else ""
    folder.write(folder.device_node(number), filled("node.toml", device=number) + data_dir)
    start = filled(
        "device.sh", gate_address=settings.gate_address, device_port=settings.device_ports[number],
        environment=_environment(),
    )  # fmt: skip
    folder.write(place / "start.sh", start, script=True)
    unit = f"fedlth-device-{number}.service"
    folder.write(place / unit, filled("device.service", unit=unit, device=number))
