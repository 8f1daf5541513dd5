"""A gate over TLS before a tiny SuperLink, for the tests of the gate."""

from __future__ import annotations

import asyncio
import http.server
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from fedlth.deploy.certificates import new_authority, new_server, utc_now
from fedlth.deploy.folder import Folder
from fedlth.deploy.gate import Gate, gate_before, listening, server_of
from fedlth.deploy.gate_connections import Server
from fedlth.deploy.gate_limits import Limits
from fedlth.deploy.settings import Settings

MOST = 1000
FLEET = "/v1/fleet/pull-messages"


class Upstream(http.server.BaseHTTPRequestHandler):
    """A tiny SuperLink: answers with what it was sent, and remembers it."""

    protocol_version = "HTTP/1.1"
    seen: list[tuple[str, str, dict[str, str], bytes]] = []

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.seen.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, body))
        self.send_response(418 if body == b"teapot" else 200)
        self.send_header("content-length", str(len(body)))
        self.send_header("flwr-said", "yes")
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_HEAD = do_POST = answer

    def log_message(self, format: str, *args: Any) -> None:
        pass


def certificates(root: Path) -> Folder:
    """Write what a gate on 127.0.0.1 ends TLS with."""
    folder = Folder(root / "fed")
    key, authority = new_authority("fed", utc_now())
    server_key, certificate = new_server(key, authority, ("127.0.0.1",), utc_now())
    for path, data in (
        (folder.trusted, authority), (folder.server_key, server_key),
        (folder.server_certificate, certificate),
    ):  # fmt: skip
        folder.write(path, data)
    return folder


@contextmanager
def upstream(folder: Folder, handler: type[http.server.BaseHTTPRequestHandler] = Upstream) -> Iterator[int]:
    """Serve a tiny SuperLink over TLS; give its port."""
    Upstream.seen.clear()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(folder.server_certificate, folder.server_key)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        server.socket = tls.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


@dataclass
class Served:
    """A gate that listens: its port, what it counts, and a client that trusts it."""

    port: int
    gate: Gate
    client: httpx.Client
    trusted: ssl.SSLContext


@contextmanager
def gate(
    folder: Folder, superlink_port: int, limits: Limits = Limits(), most: int = MOST  # noqa: B008
) -> Iterator[Served]:  # fmt: skip
    """Serve the gate over TLS before a port."""
    settings = Settings(("127.0.0.1",), "127.0.0.1", 0, superlink_port, (), most, {}, limits)
    with listening(settings) as listener:
        servers: list[Server] = []
        made: list[Gate] = []
        up = threading.Event()

        async def main() -> None:
            async with gate_before(folder, settings) as one:
                made.append(one)
                servers.append(server_of(one, folder))
                asyncio.get_running_loop().call_soon(up.set)
                await servers[0].serve_on(listener)

        thread = threading.Thread(target=asyncio.run, args=(main(),))
        thread.start()
        assert up.wait(60)
        trusted = ssl.create_default_context(cafile=str(folder.trusted))
        port = listener.getsockname()[1]
        try:
            with httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=trusted, trust_env=False) as client:
                yield Served(port, made[0], client, trusted)
        finally:
            servers[0].should_exit = True
            thread.join()
