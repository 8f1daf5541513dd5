"""What a federation's programs answer now: is it they who hold the ports, and does the control API stay inside?"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass

import httpx

from fedlth.deploy.folder import Folder
from fedlth.deploy.settings import CHECKER, Settings, is_loopback
from fedlth.engines.flower_keys import owners_in
from fedlth.engines.flower_online import online_keys
from fedlth.errors import StudyError

LONGEST_S = 5.0
CONTROL = "/v1/control/list-runs"


@dataclass(frozen=True)
class Answer:
    """What came back from an address: an HTTP status; or none, and why (empty where nothing listens)."""

    status: int | None = None
    why: str = ""


# (method, URL, the authority's certificate) -> what came back
Live = Callable[[str, str, str], Answer]
# (the SuperLink's address, the authority's certificate) -> the public keys (PEM) of the SuperNodes that are online
Online = Callable[[str, str], set[bytes]]


def ask(method: str, url: str, authority: str) -> Answer:
    """Ask over TLS, trusting one authority alone."""
    try:
        trusted = ssl.create_default_context(cafile=authority)
        answer = httpx.request(
            method, url, headers={"user-agent": CHECKER}, verify=trusted, trust_env=False, timeout=LONGEST_S
        )
        return Answer(answer.status_code)
    except httpx.ConnectError as error:
        return Answer(why=str(error) if _listens(url) else "")
    except (httpx.HTTPError, OSError) as error:
        return Answer(why=f"{type(error).__name__}: {error}")


def _connected(folder: Folder, settings: Settings, online: Online) -> str:
    """Return which devices are connected, as a note: one that is away is no fault of the folder."""
    count = len(settings.device_ports)
    try:
        owners = owners_in(folder.root / "keys")
        there = {owners.get(key) for key in online(f"127.0.0.1:{settings.superlink_port}", str(folder.trusted))}
    except (StudyError, httpx.HTTPError) as error:
        return f"which devices are connected could not be asked: {error}"
    missing = [f"device-{number}" for number in range(count) if number not in there]
    return f"connected: {count - len(missing)} of {count}" + (f"; missing: {', '.join(missing)}" if missing else "")


def _listens(url: str) -> bool:
    where = httpx.URL(url)
    try:
        with socket.create_connection((where.host, where.port or 443), timeout=LONGEST_S):
            return True
    except OSError:
        return False


def live_faults(
    folder: Folder, settings: Settings, live: Live | None = None, online: Online | None = None
) -> tuple[list[tuple[str, str, str]], list[str]]:
    """Return what is wrong with what runs, each as (place, what, remedy), and notes on who is there and who is not."""
    live, authority = live or ask, str(folder.trusted)
    faults: list[tuple[str, str, str]] = []
    notes: list[str] = []

    def asked(what: str, host: str, port: int) -> bool:
        place = f"port {port}"
        answer = live("GET", f"https://{host}:{port}/health", authority)
        if answer.status is None and answer.why:
            remedy = f"end what listens there (ss -ltnp 'sport = :{port}' names it), or start the {what} anew"
            faults.append((place, f"taken, and not by the {what} with this certificate: {answer.why}", remedy))
        elif answer.status is None:
            notes.append(f"the {what} does not run (nothing listens on {place})")
        elif answer.status != 200:
            faults.append((place, f"the {what} is not healthy: status {answer.status}", "is superlink.sh running?"))
        return answer.status == 200

    superlink = asked("SuperLink", "127.0.0.1", settings.superlink_port)
    near = "[::1]" if settings.bind == "::1" else "127.0.0.1"
    gate = asked("gate", near, settings.port)
    if gate and live("POST", f"https://{near}:{settings.port}{CONTROL}", authority).status != 404:
        what = "the control API answers there: whoever reaches it may register keys and start runs"
        faults.append((f"port {settings.port}", what, "start gate.sh there, and the SuperLink by superlink.sh"))
    if superlink:
        notes.append(_connected(folder, settings, online or online_keys))
    outside = settings.hosts[0]
    if superlink and not is_loopback(outside):
        host = f"[{outside}]" if ":" in outside else outside
        answer = live("GET", f"https://{host}:{settings.superlink_port}/health", authority)
        if answer.status is not None:
            what = f"the SuperLink answers at {outside}, its control API too"
            faults.append((f"port {settings.superlink_port}", what, "start it by superlink.sh, on 127.0.0.1"))
    return faults, notes
