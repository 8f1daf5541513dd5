"""The gate: passes what SuperNodes ask of the SuperLink, and its health, to the SuperLink on this machine; no more.

In flwr 1.41 the control API (register keys, start runs), the runtime API and the fleet API share one port, and
`--enable-supernode-auth` protects the fleet API alone. A SuperNode signs the time and sends its public key beside it;
the signature covers neither host, path nor body, so a request passes a gate unchanged. What protects path and body on
the way is TLS, which ends here.
"""

from __future__ import annotations

import asyncio
import logging
import re
import resource
import signal
import socket
import ssl
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import uvicorn

from fedlth.deploy.folder import Folder
from fedlth.deploy.gate_connections import Connections, Server, Tally, owner
from fedlth.deploy.gate_limits import Limits, Pace
from fedlth.deploy.settings import CHECKER, Settings, is_loopback
from fedlth.errors import StudyError

log = logging.getLogger(__name__)

# The path as it came, before anything is decoded or shortened: "/v1/fleet/../control/x" is none of these.
FLEET, HEALTH = re.compile(rb"/v1/fleet/[a-z]+(-[a-z]+)*"), b"/health"
# Of one connection only (RFC 9110, 7.6.1), or said anew by the gate. The SuperLink would believe a device's own word
# about its address, since it comes from this machine.
NOT_PASSED_ON = re.compile(
    rb"host|content-length|connection|keep-alive|proxy-.*|te|trailer|transfer-encoding|upgrade|expect"
    rb"|forwarded|x-forwarded-.*|x-real-ip"
)
NOT_PASSED_BACK = re.compile(rb"connection|keep-alive|proxy-.*|te|trailer|transfer-encoding|upgrade")
# The SuperLink (uvicorn) closes a connection that is idle for 5 s; one that is taken up just then would be an error.
IDLE_S = 2.0
ANSWER_S = 60.0
MOST_HEAD_BYTES = 16 << 10
SPARE_FILES = 64

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Gone(Exception):
    """A sender who is shown out in the middle of an answer."""


class Refused(Exception):
    """A request that does not pass: the status that it is answered with, and why."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


@dataclass
class Gate:
    """An ASGI app. `superlink` is a client with the SuperLink's base URL; bodies are at most `most_bytes` long."""

    superlink: httpx.AsyncClient
    most_bytes: int
    connections: Connections
    held: Counter[str] = field(default_factory=Counter)  # bytes of bodies that are here, by whose they are
    refused: Tally = field(default_factory=lambda: Tally("refused"))
    unanswered: Tally = field(default_factory=lambda: Tally("not answered by the SuperLink"))

    @property
    def limits(self) -> Limits:
        return self.connections.limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        self.connections.mark(scope.get("client"), "")
        try:
            await self._answer(scope, receive, self._paced(scope, send))
        except Gone:
            await asyncio.sleep(0.1)  # until uvicorn knows of the end too, or it complains of half an answer
        finally:
            self.connections.mark(scope.get("client"), "idle")

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        whose, body = owner((scope.get("client") or ("?",))[0]), bytearray()
        try:
            self._check(scope)
            if await self._fill(body, whose, receive):
                await self._pass(scope, bytes(body), send)
        except Refused as refused:
            self.refused.add(_who(scope), f"{_asked(scope)}: {refused}{_of_check(scope)}")
            await _answer(send, refused.status, str(refused))
        finally:
            self.held[whose] -= len(body)
            self.held += Counter()  # names without a count take memory

    def _paced(self, scope: Scope, send: Send) -> Send:
        """Return what sends an answer's parts; a reader who does not take one in time is gone."""

        async def paced(part: MutableMapping[str, Any]) -> None:
            patience = self.limits.stall_s + len(part.get("body", b"")) / self.limits.bytes_per_s
            try:
                async with asyncio.timeout(patience):
                    await send(part)
            except TimeoutError:
                self.connections.cut(scope.get("client"), "takes an answer too slowly")
                raise Gone from None

        return paced

    def _check(self, scope: Scope) -> None:
        method, path = scope["method"], scope.get("raw_path", b"")
        fleet = method == "POST" and FLEET.fullmatch(path)
        health = method in ("GET", "HEAD") and path == HEALTH
        if not (fleet or health) or scope["query_string"]:
            raise Refused(404, "not of the fleet API")
        for value in _values(scope, b"content-length"):
            if not value.isdigit():
                raise Refused(400, "the length is no number")
            if len(value) > 18 or int(value) > self.most_bytes:
                raise Refused(413, f"longer than {self.most_bytes} bytes")

    async def _fill(self, body: bytearray, whose: str, receive: Receive) -> bool:
        """Read a body whole, so that the SuperLink never sees half a request; False where the sender has gone."""
        clock = self.connections.clock
        pace = Pace(self.limits, clock())
        while True:
            now = clock()
            try:
                async with asyncio.timeout(pace.deadline(now) - now):
                    part = await receive()
            except TimeoutError:
                raise Refused(408, f"sent too slowly: {len(body)} bytes in {clock() - pace.begun:.0f} s") from None
            if part["type"] == "http.disconnect":
                return False
            more = part.get("body", b"")
            if len(body) + len(more) > self.most_bytes:
                raise Refused(413, f"longer than {self.most_bytes} bytes")
            if self.held.total() + len(more) > max(self.limits.held_bytes, self.most_bytes):
                raise Refused(503, "too much is sent at once")  # which SuperNodes try again
            if self.held[whose] + len(more) > self.limits.held_of_one(self.most_bytes):
                raise Refused(503, "too much is sent at once from one address")
            body += more
            self.held[whose] += len(more)
            pace.received += len(more)
            if not part.get("more_body", False):
                return True

    async def _pass(self, scope: Scope, body: bytes, send: Send) -> None:
        headers = [(name, value) for name, value in scope["headers"] if not NOT_PASSED_ON.fullmatch(name.lower())]
        url = self.superlink.base_url.join(scope["raw_path"].decode("ascii"))
        asked = httpx.Request(scope["method"], url, headers=headers, content=body)
        begun = False
        try:
            answer = await self.superlink.send(asked, stream=True)
            try:
                back = [one for one in answer.headers.raw if not NOT_PASSED_BACK.fullmatch(one[0].lower())]
                await send({"type": "http.response.start", "status": answer.status_code, "headers": back})
                begun = True
                async for part in answer.aiter_raw():
                    await send({"type": "http.response.body", "body": part, "more_body": True})
                await send({"type": "http.response.body", "body": b""})
            finally:
                await answer.aclose()
        except httpx.HTTPError as error:
            self.unanswered.add(_who(scope), f"{_asked(scope)}: {type(error).__name__}: {error}")
            if not begun:  # SuperNodes try again after 503; a broken answer ends with its connection
                await _answer(send, 503, "the SuperLink does not answer")


def _who(scope: Scope) -> str:
    return str((scope.get("client") or ("?",))[0])


def _asked(scope: Scope) -> str:
    return repr(f"{scope['method']} {scope['path']}"[:100])


def _of_check(scope: Scope) -> str:
    """Say of a request from this machine that it calls itself `fedlth deploy check`; it is refused and counted too."""
    near = is_loopback(_who(scope).removeprefix("::ffff:"))  # an IPv4 address on a socket of both families
    own = near and list(_values(scope, b"user-agent")) == [CHECKER.encode()]
    return f" (by its User-Agent `{CHECKER}`, which tries this)" if own else ""


def _values(scope: Scope, name: bytes) -> Iterable[bytes]:
    return (value for key, value in scope["headers"] if key.lower() == name)


async def _answer(send: Send, status: int, text: str) -> None:
    body = text.encode()
    headers = [
        (b"content-type", b"text/plain"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),  # what else comes on it may be the rest of a body that nobody reads
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def gate_before(folder: Folder, settings: Settings) -> AsyncIterator[Gate]:
    """Give the gate before a federation's SuperLink."""
    trusted = ssl.create_default_context(cafile=str(folder.trusted))
    async with httpx.AsyncClient(
        base_url=f"https://127.0.0.1:{settings.superlink_port}", verify=trusted, trust_env=False,
        timeout=ANSWER_S, limits=httpx.Limits(keepalive_expiry=IDLE_S),
    ) as superlink:  # fmt: skip
        yield Gate(superlink, settings.most_body_bytes, Connections(settings.limits))


def listening(settings: Settings) -> socket.socket:
    """Return the gate's listening socket; raise StudyError where its address cannot be had."""
    family = socket.AF_INET6 if ":" in settings.bind else socket.AF_INET
    try:
        return socket.create_server(
            (settings.bind, settings.port), family=family, dualstack_ipv6=settings.bind == "::", backlog=1024
        )
    except OSError as error:
        raise StudyError(f"deploy gate: {settings.bind} port {settings.port}: {error.strerror}") from error


def server_of(gate: Gate, folder: Folder) -> Server:
    """Return the HTTP server that ends TLS with the federation's certificate before a gate."""
    config = uvicorn.Config(
        gate, lifespan="off", ws="none", access_log=False, proxy_headers=False,
        log_level="error",  # it warns of every request that is none, which would fill a disk
        server_header=False, date_header=False,  # the SuperLink's own pass
        ssl_keyfile=folder.server_key, ssl_certfile=folder.server_certificate, timeout_graceful_shutdown=5,
        http=gate.connections.protocol(), h11_max_incomplete_event_size=MOST_HEAD_BYTES,
        timeout_keep_alive=gate.limits.idle_s,
    )  # fmt: skip
    return Server(config, gate.connections)


def serve(folder: Folder, settings: Settings) -> None:
    """Listen until Ctrl-C or SIGTERM. Raises StudyError where the port is taken."""

    async def main() -> None:
        async with gate_before(folder, settings) as gate:
            log.info(
                f"gate: {settings.bind} port {settings.port} -> SuperLink at 127.0.0.1 port {settings.superlink_port}; "
                "fleet API and health only"
            )
            try:
                await server_of(gate, folder).serve_on(listener)
            finally:
                met = gate.connections
                log.info(
                    f"gate: ended; refused {gate.refused.count} requests, {met.full.count + met.crowded.count} "
                    f"connections; closed {met.late.count} that were too slow"
                )

    allow_files(2 * settings.limits.connections + SPARE_FILES)  # a connection here, and one to the SuperLink
    with listening(settings) as listener:
        # uvicorn ends well and then raises the signal again, which would end the process before the last line is said.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        asyncio.run(main())


def allow_files(count: int) -> None:
    """Let this process have so many open files, as far as the system allows; without them nobody could be refused."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        if wanted < count:
            log.info(f"gate: {wanted} files may be open here, {count} were wanted for all connections (ulimit -n)")
