"""The gate's connections: who is let in, and who is shown out because nothing whole comes from him.

uvicorn counts no connections by address, sets no time to a request's head, and leaves a TLS handshake the 60 s of
asyncio; so the listening socket is served here, and each connection is then one of uvicorn's.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import ssl
import struct
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from fedlth.deploy.gate_limits import Limits

log = logging.getLogger(__name__)

SAID_EVERY_S = 10.0
SHUTDOWN_S = 5.0  # a peer that does not answer TLS's goodbye
RESET = struct.pack("ii", 1, 0)  # SO_LINGER of none: a refused connection leaves nothing behind in the kernel


@dataclass
class Tally:
    """Counts, and says so at most once in SAID_EVERY_S: who floods the gate must not fill its disk."""

    what: str
    clock: Callable[[], float] = time.monotonic
    count: int = 0
    _said: float | None = None

    def add(self, who: str, why: str) -> None:
        self.count += 1
        now = self.clock()
        if self._said is not None and now - self._said < SAID_EVERY_S:
            return
        self._said = now
        log.info(f"gate: {self.what}: {self.count} so far; the last, of {who}: {why}")


def owner(address: str) -> str:
    """Return what counts as one address: an IPv4 address, or the 64 bits that a network gives to one customer."""
    try:
        one = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if one.version == 6 and one.ipv4_mapped is None:
        return str(ipaddress.ip_network((one, 64), strict=False))
    return str(one.ipv4_mapped if one.version == 6 else one)


@dataclass
class Connection:
    """One connection: since when it has been waiting for what; None of `transport` is in the TLS handshake."""

    owner: str
    since: float
    waits: str = "head"  # "head", "idle", or "" while a request is answered
    transport: asyncio.Transport | None = None


@dataclass
class Connections:
    """All that are open. Bounded: nothing of a connection is kept here after its end."""

    limits: Limits
    clock: Callable[[], float] = time.monotonic
    open: dict[tuple[str, int], Connection] = field(default_factory=dict)
    of_owner: Counter[str] = field(default_factory=Counter)
    full: Tally = field(default_factory=lambda: Tally("connections refused, too many"))
    crowded: Tally = field(default_factory=lambda: Tally("connections refused, too many of one address"))
    late: Tally = field(default_factory=lambda: Tally("connections closed, too slow"))

    def admit(self, peer: tuple[Any, ...]) -> Connection | None:
        """Let a connection in and return it; None where it is one too many."""
        who = owner(peer[0])
        if self.of_owner[who] >= self.limits.connections_per_address:
            self.crowded.add(who, f"{self.limits.connections_per_address} are open")
            return None
        if len(self.open) >= self.limits.connections:
            self.full.add(who, f"{self.limits.connections} are open")
            return None
        self.of_owner[who] += 1
        made = self.open[peer[0], peer[1]] = Connection(who, self.clock())
        return made

    def release(self, peer: tuple[Any, ...]) -> None:
        if gone := self.open.pop((peer[0], peer[1]), None):
            self.of_owner[gone.owner] -= 1
            self.of_owner += Counter()  # names without a count take memory

    def mark(self, peer: tuple[str, int] | None, waits: str) -> None:
        """Note what a connection waits for from now on."""
        if peer and (one := self.open.get(peer)):
            one.waits, one.since = waits, self.clock()

    def cut(self, peer: tuple[str, int] | None, why: str) -> None:
        """End a connection at once."""
        if peer and (one := self.open.get(peer)) and one.transport is not None:
            self.late.add(one.owner, why)
            one.transport.abort()

    def sweep(self) -> None:
        """Close every connection whose request's head does not get done; idle ones are uvicorn's to close."""
        now = self.clock()
        for one in list(self.open.values()):
            if one.transport is not None and one.waits == "head" and now - one.since > self.limits.head_s:
                self.late.add(one.owner, f"no whole head of a request within {self.limits.head_s:g} s")
                one.transport.abort()

    async def sweep_on(self) -> None:
        while True:
            await asyncio.sleep(min(1.0, self.limits.head_s / 4))
            self.sweep()

    async def listen(self, listener: socket.socket, make: Callable[[], asyncio.Protocol], tls: ssl.SSLContext) -> None:
        """Accept for ever; each connection that is let in becomes one of `make`, once its handshake is over."""
        loop, opening = asyncio.get_running_loop(), set[asyncio.Task[None]]()
        listener.setblocking(False)
        while True:
            try:
                accepted, peer = await loop.sock_accept(listener)
            except OSError as error:  # no file descriptors left, or a connection that ended while it waited
                self.full.add("?", error.strerror or type(error).__name__)
                await asyncio.sleep(0.1)
                continue
            connection = self.admit(peer)
            if connection is None:
                accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                accepted.close()
                continue
            task = loop.create_task(self._opened(connection, accepted, peer, make, tls))
            opening.add(task)  # the loop itself holds tasks weakly
            task.add_done_callback(opening.discard)

    async def _opened(
        self, connection: Connection, accepted: socket.socket, peer: tuple[Any, ...],
        make: Callable[[], asyncio.Protocol], tls: ssl.SSLContext,
    ) -> None:  # fmt: skip
        try:
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.get_running_loop().connect_accepted_socket(
                make, accepted, ssl=tls, ssl_handshake_timeout=self.limits.handshake_s, ssl_shutdown_timeout=SHUTDOWN_S
            )
        except (OSError, ssl.SSLError) as error:  # asyncio's ConnectionAbortedError where it took too long
            if "longer than" in str(error):
                self.late.add(connection.owner, f"no TLS handshake within {self.limits.handshake_s:g} s")
            self.release(peer)
            with suppress(OSError):
                accepted.close()
        except BaseException:
            self.release(peer)
            raise

    def protocol(self) -> type[asyncio.Protocol]:
        """Return uvicorn's protocol, whose connections say here what they wait for."""
        connections = self

        class Watched(H11Protocol):
            def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
                super().connection_made(transport)
                if self.client and (one := connections.open.get(self.client)):
                    one.transport = transport
                connections.mark(self.client, "head")

            def data_received(self, data: bytes) -> None:
                if self.client and (one := connections.open.get(self.client)) and one.waits == "idle":
                    connections.mark(self.client, "head")
                super().data_received(data)

            def connection_lost(self, exc: Exception | None) -> None:
                super().connection_lost(exc)
                if self.client:
                    connections.release(self.client)

        return Watched


class Server(uvicorn.Server):
    """uvicorn, which is handed its connections one by one instead of a listening socket."""

    def __init__(self, config: uvicorn.Config, connections: Connections) -> None:
        super().__init__(config)
        self.connections = connections

    async def serve_on(self, listener: socket.socket) -> None:
        """Serve until the server is asked to end, as `serve` does."""
        if not self.config.loaded:
            self.config.load()
        tls = self.config.ssl
        assert tls is not None

        def make() -> asyncio.Protocol:
            made: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg]
                config=self.config, server_state=self.server_state, app_state={}
            )
            return made

        tasks = [
            asyncio.create_task(self.connections.listen(listener, make, tls)),
            asyncio.create_task(self.connections.sweep_on()),
        ]
        try:
            await self.serve(sockets=[])
        finally:
            for task in tasks:
                task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(result, Exception):
                    raise result
