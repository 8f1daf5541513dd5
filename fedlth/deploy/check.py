"""fedlth deploy check: what in a federation's folder, or around it, does not fit; each with its place and a remedy."""

from __future__ import annotations

import stat
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from fedlth.deploy import links
from fedlth.deploy.certificates import certificate_faults, device_public, utc_now
from fedlth.deploy.folder import Folder
from fedlth.deploy.live import Live, Online, live_faults
from fedlth.deploy.make import check_study, supposed
from fedlth.deploy.settings import FILE, Settings, read_settings, versions_here
from fedlth.engines.flower_client import DATA_DIR, PARTITION, STATE_DIR
from fedlth.errors import StudyError
from fedlth.study import schema


@dataclass(frozen=True)
class Fault:
    """What does not fit: where, what, and what to do."""

    place: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.place}: {self.what}; {self.remedy}"


def check(
    root: Path, *, now: datetime | None = None, live: Live | None = None, online: Online | None = None
) -> tuple[list[Fault], list[str]]:
    """Return what does not fit in a federation's folder, and notes on what could not be seen from here.

    `now`, `live` and `online` are there for tests. Raises StudyError where the folder is no federation's.
    """
    folder = Folder(root.resolve())
    settings = read_settings(folder.root)
    here = [k for k in range(len(settings.device_ports)) if folder.device(k).exists()]
    gone = sorted(set(range(len(settings.device_ports))) - set(here))
    of_study, notes = _study(folder, settings)
    faults = [
        *_versions(settings),
        *_private(folder),
        *_certificates(folder, settings, now or utc_now()),
        *_keys(folder, settings, here),
        *_partitions(folder, here, own_data=_own_data(folder)),
        *of_study,
        *_ports(settings),
        *_connection(folder, settings),
    ]
    seen, not_seen = live_faults(folder, settings, live, online)
    faults += [Fault(*one) for one in seen]
    notes += not_seen
    if gone:
        notes.append(f"device {', '.join(map(str, gone))}: not in this folder any more, so not checked")
    return faults, notes


def _versions(settings: Settings) -> Iterator[Fault]:
    here = versions_here()
    for name, then in settings.versions.items():
        if here.get(name) != then:
            remedy = f"install the versions of `deploy init` here and on every device, or write {FILE}'s anew"
            yield Fault(FILE, f"made with {name} {then}, here is {here.get(name)}", remedy)


def _private(folder: Folder) -> Iterator[Fault]:
    devices = sorted(folder.root.glob("device-*/key"))
    for path in (folder.authority_key, folder.server_key, *devices):
        if path.exists() and stat.S_IMODE(path.stat().st_mode) & 0o077:
            yield Fault(_name(folder, path), "a private key that others can read", f"chmod 600 {path}")


def _certificates(folder: Folder, settings: Settings, now: datetime) -> Iterator[Fault]:
    remedies = {
        "clock": "set this machine's clock (timedatectl)",
        "server": f"fedlth deploy certify {folder.root}, then start SuperLink and gate again",
        "authority": "make a new federation: every device needs the new authority's certificate",
    }
    place, trusted = folder.server_certificate, folder.trusted
    try:
        key, certificate, authority = folder.server_key.read_bytes(), place.read_bytes(), trusted.read_bytes()
        found = certificate_faults(certificate, key, authority, settings.hosts, now)
    except (OSError, ValueError, TypeError) as error:
        yield Fault(_name(folder, folder.server), f"cannot be read: {error}", remedies["server"])
        return
    for kind, what in found:
        yield Fault(_name(folder, place), what, remedies[kind])
    for path in (folder.authority, *sorted(folder.root.glob("device-*/ca.crt"))):
        if path.exists() and path.read_bytes() != authority:
            yield Fault(_name(folder, path), "not this server's authority", f"cp {trusted} {path}")


def _keys(folder: Folder, settings: Settings, here: list[int]) -> Iterator[Fault]:
    """Compare the public keys that are registered: a device's own folder may have gone to the device."""
    holder: dict[bytes, str] = {}
    remedy = "give each device its own: make a new federation, or ssh-keygen -t ecdsa -b 384, then register.sh"
    for number in range(len(settings.device_ports)):
        path = folder.device_public(number)
        public = _words(path.read_bytes()) if path.exists() else b""
        if not public:
            yield Fault(_name(folder, path), "is not here", f"ssh-keygen -y -f device-{number}/key > {path}")
            continue
        if public in holder:
            yield Fault(_name(folder, path), f"the same key as {holder[public]}", remedy)
        holder.setdefault(public, _name(folder, path))
        if number in here:
            yield from _own_key(folder, number, public)


def _own_key(folder: Folder, number: int, public: bytes) -> Iterator[Fault]:
    path = folder.device_key(number)
    try:
        own = _words(device_public(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        yield Fault(
            _name(folder, path), f"no key that Flower can read: {error}", "ssh-keygen -t ecdsa -b 384 makes one"
        )
        return
    if own != public:
        place = _name(folder, folder.device_public(number))
        yield Fault(
            _name(folder, path), f"not the key of {place}", "register the device's own: ssh-keygen -y, register.sh"
        )


def _words(public: bytes) -> bytes:
    """Return kind and key of a public key's line, without its comment."""
    return b" ".join(public.split()[:2])


def _partitions(folder: Folder, here: list[int], *, own_data: bool) -> Iterator[Fault]:
    serves: dict[int, list[str]] = {}
    for number in here:
        path = folder.device_node(number)
        name = _name(folder, path)
        remedy = f"{PARTITION} = {number}"
        try:
            tree = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            yield Fault(name, f"cannot be read: {error}", f'two lines: {remedy} and {STATE_DIR} = "state"')
            continue
        said = tree.get(PARTITION)
        if not isinstance(said, int) or isinstance(said, bool):
            yield Fault(name, f"{PARTITION} must be a whole number, got {said!r}", remedy)
            continue
        serves.setdefault(said, []).append(name)
        if said != number:
            yield Fault(name, f"{PARTITION} is {said}: the device of another client", remedy)
        if not tree.get(STATE_DIR):
            yield Fault(name, f"{STATE_DIR} is missing: the device would have no place for its ticket", '"state"')
        if own_data:
            yield from _data(folder, number, tree.get(DATA_DIR))
    for partition, names in sorted(serves.items()):
        if len(names) > 1:
            yield Fault(", ".join(names), f"{PARTITION} {partition} is served twice", "give each device its own")
    for partition in sorted(set(here) - serves.keys()):
        yield Fault(f"device-{partition}", f"no device serves {PARTITION} {partition}", "see its node.toml")


def _data(folder: Folder, number: int, said: object) -> Iterator[Fault]:
    """Look whether a device whose folder is here has its folder of data, too."""
    name = _name(folder, folder.device_node(number))
    if not said:
        yield Fault(name, f"{DATA_DIR} is missing: the study's data live with the devices", f'{DATA_DIR} = "data"')
    elif not (place := folder.device(number) / str(said)).exists():
        remedy = "put this device's data there, or move its folder to where they are"
        yield Fault(name, f"{DATA_DIR}: {place} is not there", remedy)


def _own_data(folder: Folder) -> bool:
    """Say whether the study's data live with the devices; a study that cannot be read is a fault of its own."""
    try:
        return schema.load(folder.study).data.own is not None
    except StudyError:
        return False


def _study(folder: Folder, settings: Settings) -> tuple[list[Fault], list[str]]:
    """Return what does not fit in the study or on the links that it states, and what a model takes on these."""
    place, devices = _name(folder, folder.study), len(settings.device_ports)
    try:
        study = schema.load(folder.study)
        experiment = check_study(study, str(folder.study), devices)
    except StudyError as error:
        what = str(error).removeprefix(f"{folder.study}: ")
        return [Fault(place, what, "mend the study there, or make a new federation")], []
    with supposed(study, devices):
        faults = [Fault(place, what, remedy) for what, remedy in links.faults(experiment)]
        return faults, [f"{place}: {note}" for note in links.notes(experiment)]


def _ports(settings: Settings) -> Iterator[Fault]:
    named = {"port": settings.port, "superlink_port": settings.superlink_port}
    named |= {f"device_ports[{k}]": port for k, port in enumerate(settings.device_ports)}
    holder: dict[int, str] = {}
    for name, port in named.items():
        if port in holder:
            remedy = "give each its own, there and in the scripts"
            yield Fault(FILE, f"{name} is {port}, as {holder[port]} is", remedy)
        holder.setdefault(port, name)


def _connection(folder: Folder, settings: Settings) -> Iterator[Fault]:
    """Compare what `flwr run` is given with where the SuperLink is: the path in it is absolute."""
    place = _name(folder, folder.flower_config)
    wanted = {"address": f"127.0.0.1:{settings.superlink_port}", "root-certificates": str(folder.trusted)}
    try:
        said = tomllib.loads(folder.flower_config.read_text(encoding="utf-8"))["superlink"]["fedlth"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield Fault(place, f"cannot be read: {type(error).__name__}: {error}", f"[superlink.fedlth] with {wanted}")
        return
    for key, value in wanted.items():
        if said.get(key) != value:
            yield Fault(place, f"{key} is {said.get(key)!r}", f'{key} = "{value}" (has DIR been moved?)')


def _name(folder: Folder, path: Path) -> str:
    return str(path.relative_to(folder.root))
