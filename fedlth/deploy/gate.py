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
import signal
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx

from fedlth.deploy.folder import Folder
from fedlth.deploy.settings import Settings
from fedlth.errors import StudyError

if TYPE_CHECKING:
    import uvicorn

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
# A SuperNode takes up a connection that was idle for up to 5 s (httpx). Were it closed after 5 s here too, then a
# request that a thin link delays would meet the closing, fail, and cross again.
KEPT_S = 75
SAID_EVERY_S = 10.0

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


@dataclass
class Tally:
    """Counts, and says so at most once in SAID_EVERY_S: who floods the gate must not fill its disk."""

    what: str
    clock: Callable[[], float] = time.monotonic
    count: int = 0
    _said: float | None = None

    def add(self, why: str, scope: Scope) -> None:
        self.count += 1
        now = self.clock()
        if self._said is not None and now - self._said < SAID_EVERY_S:
            return
        self._said = now
        who = (scope.get("client") or ("?",))[0]
        asked = f"{scope['method']} {scope['path']}"[:100]
        log.info(f"gate: {self.what}: {self.count} so far; the last, of {who}: {asked!r}: {why}")


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
    refused: Tally = field(default_factory=lambda: Tally("refused"))
    unanswered: Tally = field(default_factory=lambda: Tally("not answered by the SuperLink"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        try:
            self._check(scope)
            body = await self._body(scope, receive)
        except Refused as refused:
            self.refused.add(str(refused), scope)
            await _answer(send, refused.status, str(refused))
            return
        if body is not None:
            await self._pass(scope, body, send)

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

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """Return the whole body, so that the SuperLink never sees half a request; None where the sender has gone."""
        body = bytearray()
        while True:
            part = await receive()
            if part["type"] == "http.disconnect":
                return None
            if len(body) + len(part.get("body", b"")) > self.most_bytes:
                raise Refused(413, f"longer than {self.most_bytes} bytes")
            body += part.get("body", b"")
            if not part.get("more_body", False):
                return bytes(body)

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
            self.unanswered.add(f"{type(error).__name__}: {error}", scope)
            if not begun:  # SuperNodes try again after 503; a broken answer ends with its connection
                await _answer(send, 503, "the SuperLink does not answer")


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
        yield Gate(superlink, settings.most_body_bytes)


def listening(settings: Settings) -> socket.socket:
    """Return the gate's listening socket; raise StudyError where its address cannot be had."""
    family = socket.AF_INET6 if ":" in settings.bind else socket.AF_INET
    try:
        return socket.create_server(
            (settings.bind, settings.port), family=family, dualstack_ipv6=settings.bind == "::", backlog=1024
        )
    except OSError as error:
        raise StudyError(f"deploy gate: {settings.bind} port {settings.port}: {error.strerror}") from error


def server_of(gate: Gate, folder: Folder) -> uvicorn.Server:
    """Return the HTTP server that ends TLS with the federation's certificate before a gate."""
    import uvicorn

    return uvicorn.Server(
        uvicorn.Config(
            gate, lifespan="off", ws="none", log_level="warning", access_log=False, proxy_headers=False,
            server_header=False, date_header=False,  # the SuperLink's own pass
            ssl_keyfile=folder.server_key, ssl_certfile=folder.server_certificate, timeout_graceful_shutdown=5,
            timeout_keep_alive=KEPT_S,
        )
    )  # fmt: skip


def serve(folder: Folder, settings: Settings) -> None:
    """Listen until Ctrl-C or SIGTERM. Raises StudyError where the port is taken."""

    async def main() -> None:
        async with gate_before(folder, settings) as gate:
            log.info(
                f"gate: {settings.bind} port {settings.port} -> SuperLink at 127.0.0.1 port {settings.superlink_port}; "
                "fleet API and health only"
            )
            try:
                await server_of(gate, folder).serve(sockets=[listener])
            finally:
                log.info(f"gate: ended; refused {gate.refused.count} requests")

    with listening(settings) as listener:
        # uvicorn ends well and then raises the signal again, which would end the process before the last line is said.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        asyncio.run(main())
