"""The gate passes the fleet API and health, whole and unchanged, and refuses everything else."""

from __future__ import annotations

import asyncio
import http.server
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from fedlth.deploy.certificates import new_authority, new_server, utc_now
from fedlth.deploy.folder import Folder
from fedlth.deploy.gate import SAID_EVERY_S, Gate, Tally, gate_before, listening, server_of
from fedlth.deploy.settings import FILE, Settings
from fedlth.errors import StudyError

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


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    folder = Folder(tmp_path_factory.mktemp("gate") / "fed")
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


@contextmanager
def gate(folder: Folder, superlink_port: int, most: int = MOST) -> Iterator[httpx.Client]:
    """Serve the gate over TLS before a port; give a client of it."""
    settings = Settings(("127.0.0.1",), "127.0.0.1", 0, superlink_port, (), most, {})
    with listening(settings) as listener:
        servers: list[Any] = []

        async def main() -> None:
            async with gate_before(folder, settings) as made:
                servers.append(server_of(made, folder))
                await servers[0].serve(sockets=[listener])

        thread = threading.Thread(target=asyncio.run, args=(main(),))
        thread.start()
        trusted = ssl.create_default_context(cafile=str(folder.trusted))
        base = f"https://127.0.0.1:{listener.getsockname()[1]}"
        try:
            with httpx.Client(base_url=base, verify=trusted, trust_env=False) as client:
                yield client
        finally:
            servers[0].should_exit = True
            thread.join()


def test_over_tls_fleet_and_health_pass_and_nothing_else(certified: Folder) -> None:
    with upstream(certified) as port, gate(certified, port) as client:
        signed = {"flwr-signature": "c2ln", "flwr-timestamp": "now", "content-type": "application/x-protobuf"}
        answer = client.post(FLEET, content=b"x" * MOST, headers=signed | {"x-forwarded-for": "10.9.9.9"})
        assert (answer.status_code, answer.content, answer.headers["flwr-said"]) == (200, b"x" * MOST, "yes")
        (method, path, headers, body) = Upstream.seen.pop()
        assert (method, path, body) == ("POST", FLEET, b"x" * MOST)
        assert signed.items() <= headers.items() and "x-forwarded-for" not in headers
        assert headers["host"] == f"127.0.0.1:{port}"
        assert client.get("/health").status_code == client.head("/health").status_code == 200
        assert client.post(FLEET, content=b"teapot").status_code == 418
        Upstream.seen.clear()

        assert client.post("/v1/control/start-run", content=b"").status_code == 404
        assert client.post(FLEET, content=b"x" * (MOST + 1)).status_code == 413
        assert client.post(FLEET, content=iter([b"x" * MOST, b"x"])).status_code == 413
        assert not Upstream.seen
        assert client.post(FLEET, content=iter([b"x" * (MOST - 1), b"x"])).content == b"x" * MOST
        assert Upstream.seen.pop()[2]["content-length"] == str(MOST)  # the SuperLink gets it whole


def test_a_superlink_that_is_away_is_503_which_supernodes_try_again(certified: Folder) -> None:
    with upstream(certified) as port:
        pass
    with gate(certified, port) as client:
        assert client.post(FLEET, content=b"x").status_code == client.get("/health").status_code == 503


def asked(method: str, path: bytes, body: tuple[bytes, ...] = (b"",), query: bytes = b"", **headers: bytes) -> int:
    """Put one request to a gate, as a server gives it; return the status, 0 where there is none."""
    passed: list[httpx.Request] = []

    def superlink(request: httpx.Request) -> httpx.Response:
        passed.append(request)
        return httpx.Response(200, stream=httpx.ByteStream(b""))

    async def run() -> int:
        transport = httpx.MockTransport(superlink)
        async with httpx.AsyncClient(transport=transport, base_url="https://127.0.0.1:1") as client:
            parts = [
                {"type": "http.request", "body": one, "more_body": i + 1 < len(body)} for i, one in enumerate(body)
            ]
            sent: list[Any] = []

            async def receive() -> Any:
                return parts.pop(0) if parts else {"type": "http.disconnect"}

            async def send(message: Any) -> None:
                sent.append(message)

            scope = {
                "type": "http", "method": method, "path": path.decode("latin1"), "raw_path": path,
                "query_string": query, "headers": [(k.replace("_", "-").encode(), v) for k, v in headers.items()],
                "client": ("10.0.0.1", 1),
            }  # fmt: skip
            await Gate(client, MOST)(scope, receive, send)
            status = sent[0]["status"] if sent else 0
            assert bool(passed) == (status == 200)
            if passed:
                assert passed[0].url.raw_path == path
            return status

    return asyncio.run(run())


@pytest.mark.parametrize(
    "path",
    [
        b"/v1/control/list-runs", b"/v1/runtime/pull-messages", b"/v1/fleet/../control/start-run",
        b"/v1/fleet/%2e%2e/control/start-run", b"/v1/fleet/..%2fcontrol/start-run", b"/v1/fleet", b"/v1/fleet/",
        b"//v1/control/x", b"/v1/fleet/a/../../control/x", b"/v1/fleet/a?x", b"/v1/fleet/a#x", b"/v1/fleet/a\n",
        b"/V1/fleet/a", b"https://h/v1/fleet/a", b"/docs", b"/openapi.json", b"/", b"/health/", FLEET.encode(),
    ],
)  # fmt: skip
def test_paths(path: bytes) -> None:
    assert asked("POST", path) == (200 if path == FLEET.encode() else 404)


def test_methods_queries_and_lengths() -> None:
    fleet = FLEET.encode()
    assert asked("GET", b"/health") == asked("HEAD", b"/health") == 200
    assert asked("POST", b"/health") == asked("GET", fleet) == asked("PUT", fleet) == 404
    assert asked("POST", fleet, query=b"x=1") == asked("GET", b"/health", query=b"x=1") == 404
    assert asked("POST", fleet, content_length=b"1001") == asked("POST", fleet, content_length=b"9" * 40) == 413
    assert asked("POST", fleet, content_length=b"-1") == asked("POST", fleet, content_length=b"1_0") == 400
    assert asked("POST", fleet, (b"x" * 600, b"x" * 400)) == 200
    assert asked("POST", fleet, (b"x" * 600, b"x" * 401)) == 413


def test_a_sender_who_leaves_is_nobodys_request() -> None:
    assert asked("POST", FLEET.encode(), ()) == 0


def test_refusals_are_counted_and_said_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    tally = Tally("refused", clock=lambda: now[0])
    scope = {"method": "POST", "path": "/v1/control/\x1b[2J" + "x" * 500, "client": ("10.0.0.1", 5)}
    with caplog.at_level("INFO", "fedlth"):
        for _ in range(3):
            tally.add("not of the fleet API", scope)
        now[0] = SAID_EVERY_S
        tally.add("not of the fleet API", scope)
    first, second = caplog.messages
    assert "refused: 1 so far" in first and "refused: 4 so far" in second and tally.count == 4
    assert "of 10.0.0.1" in first and first.isprintable() and len(first) < 200


def test_the_command_listens_until_sigterm_and_says_how_many_it_refused(certified: Folder) -> None:
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
    (certified.root / FILE).write_text(Settings(("127.0.0.1",), "127.0.0.1", port, 1, (), MOST, {}).text())
    command = [sys.executable, "-m", "fedlth", "deploy", "gate", str(certified.root)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as gate:
        assert gate.stderr is not None and f"gate: 127.0.0.1 port {port} -> SuperLink" in gate.stderr.readline()
        trusted = ssl.create_default_context(cafile=str(certified.trusted))
        url = f"https://127.0.0.1:{port}/v1/control/list-runs"
        assert httpx.post(url, verify=trusted, trust_env=False, timeout=60).status_code == 404
        gate.terminate()
        assert gate.stderr.read().endswith("gate: ended; refused 1 requests\n")
    assert gate.returncode == 0


def test_a_taken_port_is_said(certified: Folder) -> None:
    settings = Settings(("127.0.0.1",), "127.0.0.1", 0, 1, (), MOST, {})
    with (
        listening(settings) as first,
        pytest.raises(StudyError, match=r"127\.0\.0\.1 port \d+: Address already in use"),
    ):
        listening(Settings(("127.0.0.1",), "127.0.0.1", first.getsockname()[1], 1, (), MOST, {}))
