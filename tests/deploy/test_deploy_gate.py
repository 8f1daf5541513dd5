"""The gate passes the fleet API and health, whole and unchanged, and refuses everything else."""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
import sys
from typing import Any

import httpx
import pytest

from fedlth.deploy.folder import Folder
from fedlth.deploy.gate import Gate, listening
from fedlth.deploy.gate_connections import SAID_EVERY_S, Connections, Tally
from fedlth.deploy.gate_limits import Limits
from fedlth.deploy.live import CONTROL, ask
from fedlth.deploy.settings import CHECKER, FILE, Settings
from fedlth.errors import StudyError
from tests.deploy.served_gate import FLEET, MOST, Upstream, certificates, gate, upstream


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return certificates(tmp_path_factory.mktemp("gate"))


def test_over_tls_fleet_and_health_pass_and_nothing_else(certified: Folder) -> None:
    with upstream(certified) as port, gate(certified, port) as served:
        client = served.client
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
    with gate(certified, port) as served:
        client = served.client
        assert client.post(FLEET, content=b"x").status_code == client.get("/health").status_code == 503


def asked(
    method: str, path: bytes, body: tuple[bytes, ...] = (b"",), query: bytes = b"", peer: str = "10.0.0.1",
    **headers: bytes,
) -> int:  # fmt: skip
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
                "client": (peer, 1),
            }  # fmt: skip
            await Gate(client, MOST, Connections(Limits()))(scope, receive, send)
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
    with caplog.at_level("INFO", "fedlth"):
        for _ in range(3):
            tally.add("10.0.0.1", "not of the fleet API")
        now[0] = SAID_EVERY_S
        tally.add("10.0.0.1", "not of the fleet API")
    first, second = caplog.messages
    assert "refused: 1 so far" in first and "refused: 4 so far" in second and tally.count == 4
    assert "of 10.0.0.1" in first
    caplog.clear()
    with caplog.at_level("INFO", "fedlth"):
        assert asked("POST", b"/v1/control/\x1b[2J" + b"x" * 500) == 404
    assert caplog.messages[0].isprintable() and len(caplog.messages[0]) < 250


def test_a_refusal_that_deploy_check_caused_says_so(certified: Folder, caplog: pytest.LogCaptureFixture) -> None:
    """Who is elsewhere cannot pass for it."""
    marked = f"not of the fleet API (by its User-Agent `{CHECKER}`, which tries this)"
    with caplog.at_level("INFO", "fedlth"), gate(certified, 1) as served:
        url = f"https://127.0.0.1:{served.port}{CONTROL}"
        assert ask("POST", url, str(certified.trusted)).status == 404
        assert served.gate.refused.count == 1 and caplog.messages[-1].endswith(marked)
    for peer, agent, is_own in (
        ("::1", CHECKER, True), ("::ffff:127.0.0.1", CHECKER, True), ("10.0.0.1", CHECKER, False),
        ("::ffff:10.0.0.1", CHECKER, False), ("127.0.0.1", "curl/8", False),
    ):  # fmt: skip
        caplog.clear()
        with caplog.at_level("INFO", "fedlth"):
            assert asked("POST", CONTROL.encode(), peer=peer, user_agent=agent.encode()) == 404
        assert caplog.messages[-1].endswith(marked if is_own else "not of the fleet API")


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
        assert gate.stderr.read().endswith(
            "gate: ended; refused 1 requests, 0 connections; closed 0 that were too slow\n"
        )
    assert gate.returncode == 0


def test_a_taken_port_is_said(certified: Folder) -> None:
    settings = Settings(("127.0.0.1",), "127.0.0.1", 0, 1, (), MOST, {})
    with (
        listening(settings) as first,
        pytest.raises(StudyError, match=r"127\.0\.0\.1 port \d+: Address already in use"),
    ):
        listening(Settings(("127.0.0.1",), "127.0.0.1", first.getsockname()[1], 1, (), MOST, {}))
