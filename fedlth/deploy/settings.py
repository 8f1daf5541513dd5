"""What a federation's folder was made for: names, ports, number of devices, versions (federation.json)."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from fedlth.deploy.gate_limits import Limits
from fedlth.errors import StudyError, wrong
from fedlth.wire.payload import VERSION

FILE = "federation.json"
# Flower cuts arrays into chunks of 5 MiB, and fedlth puts at most 1 MB a payload elsewhere: no request is longer.
MOST_BODY_BYTES = 16 << 20
HOST_NAME = re.compile(
    r"(?=.{1,253}$)[a-zA-Z0-9]([a-zA-Z0-9-]*[a-zA-Z0-9])?(\.[a-zA-Z0-9]([a-zA-Z0-9-]*[a-zA-Z0-9])?)*"
)
HIGHEST_PORT = 65535
CHECKER = "fedlth deploy check"  # the User-Agent by which its requests are told in the gate's log


@dataclass(frozen=True)
class Settings:
    """A federation's addresses.

    `hosts` are the names or addresses by which devices reach the gate, the first one used; `bind` is the address that
    the gate listens on. `port` is the gate's, `superlink_port` that of the SuperLink on 127.0.0.1, and
    `device_ports[k]` that of device k's SuperNode, on the device's own 127.0.0.1. `limits` are the gate's.
    """

    hosts: tuple[str, ...]
    bind: str
    port: int
    superlink_port: int
    device_ports: tuple[int, ...]
    most_body_bytes: int
    versions: dict[str, str]
    limits: Limits = Limits()

    @staticmethod
    def of(hosts: tuple[str, ...], port: int, devices: int) -> Settings:
        """Return the settings of a new federation: the ports follow `port`, one by one."""
        if devices < 1:
            raise wrong("deploy init: --devices", "at least 1", devices)
        if not 1 <= port <= HIGHEST_PORT - 1 - devices:
            raise wrong("deploy init: --port", f"1 to {HIGHEST_PORT - 1 - devices} (more ports follow it)", port)
        for host in hosts:
            _check_host(host)
        return Settings(
            hosts=hosts, bind=_bind(hosts), port=port, superlink_port=port + 1,
            device_ports=tuple(port + 2 + k for k in range(devices)), most_body_bytes=MOST_BODY_BYTES,
            versions=versions_here(),
        )  # fmt: skip

    @property
    def gate_address(self) -> str:
        """Return host:port as devices dial it."""
        host = self.hosts[0]
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    def text(self) -> str:
        tree = asdict(self)
        return json.dumps(tree | {"gate": tree.pop("limits")}, indent=1) + "\n"


def read_settings(root: Path) -> Settings:
    """Return the settings of a federation's folder; raise StudyError where it is none."""
    path = root / FILE
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StudyError(f"{root}: no federation here ({FILE} is missing); `fedlth deploy init` makes one") from None
    except (ValueError, OSError) as error:
        raise StudyError(f"{path}: cannot be read: {error}") from error
    try:
        return _settings(tree)
    except (KeyError, TypeError, ValueError) as error:
        raise StudyError(f"{path}: not what `fedlth deploy init` writes: {type(error).__name__}: {error}") from error


def _settings(tree: dict[str, Any]) -> Settings:
    ports = [tree["port"], tree["superlink_port"], *tree["device_ports"]]
    if not all(isinstance(p, int) and not isinstance(p, bool) and 1 <= p <= HIGHEST_PORT for p in ports):
        raise ValueError(f"ports must be whole numbers of 1 to {HIGHEST_PORT}, got {ports}")
    most = tree["most_body_bytes"]
    if not isinstance(most, int) or isinstance(most, bool) or most < 1:
        raise ValueError(f"most_body_bytes must be a whole number of at least 1, got {most!r}")
    hosts = tuple(str(host) for host in tree["hosts"])
    if not hosts:
        raise ValueError("hosts must not be empty")
    return Settings(
        hosts=hosts, bind=str(tree["bind"]), port=ports[0], superlink_port=ports[1], device_ports=tuple(ports[2:]),
        most_body_bytes=most, versions={str(k): str(v) for k, v in dict(tree["versions"]).items()},
        limits=Limits.of(tree.get("gate", {})),  # folders of before there were limits have none
    )  # fmt: skip


def versions_here() -> dict[str, str]:
    """Return the versions on which both ends must agree, as they are here."""
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    found = {name: version(name).partition("+")[0] for name in ("fedlth", "flwr", "torch")}  # "+cpu" is no version
    return found | {"python": python, "wire": str(VERSION)}


def is_loopback(host: str) -> bool:
    """Say whether a name or address means this machine alone."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _bind(hosts: tuple[str, ...]) -> str:
    if all(map(is_loopback, hosts)):
        return "::1" if ":" in hosts[0] else "127.0.0.1"
    return "::" if ":" in hosts[0] else "0.0.0.0"


def _check_host(host: str) -> None:
    try:
        ip_address(host)
    except ValueError:
        if not HOST_NAME.fullmatch(host):
            raise wrong("deploy init: --host", "a host name or an IP address, without port or scheme", host) from None
