"""The gate's limits, on real connections: each refuses, is said once, counted, and lets those who fit in."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import httpx
import pytest

from fedlth.deploy.folder import Folder
from fedlth.deploy.gate import Gate
from fedlth.deploy.gate_connections import Connections, owner
from fedlth.deploy.gate_limits import Limits, Pace
from fedlth.deploy.settings import Settings, read_settings
from fedlth.errors import StudyError
from tests.deploy.served_gate import FLEET, MOST, Served, certificates, gate, upstream

HEAD = f"POST {FLEET} HTTP/1.1\r\nhost: x\r\ncontent-length: {MOST}\r\n\r\n".encode()


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return certificates(tmp_path_factory.mktemp("gate"))


def plain(served: Served) -> socket.socket:
    return socket.create_connection(("127.0.0.1", served.port), timeout=30)


def connected(served: Served) -> ssl.SSLSocket:
    return served.trusted.wrap_socket(plain(served), server_hostname="127.0.0.1")


def ends(connection: socket.socket) -> bytes:
    """Return what still comes on a connection until the gate ends it."""
    came = b""
    try:
        while more := connection.recv(1000):
            came += more
    except OSError:
        pass
    return came


def settles(true: Callable[[], bool]) -> bool:
    """Wait for what another thread does."""
    end = time.monotonic() + 30
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()


@pytest.mark.parametrize(
    "limits, tally", [(Limits(connections_per_address=2), "crowded"), (Limits(connections=2), "full")]
)
def test_one_connection_too_many_is_refused_and_one_that_ends_makes_room(
    certified: Folder, limits: Limits, tally: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "fedlth"), gate(certified, 1, limits) as served:
        connections = served.gate.connections
        first, second = connected(served), connected(served)
        for _ in range(3):
            # Not over TLS: Python's ssl leaves a socket open that was reset before it was wrapped.
            with suppress(OSError), plain(served) as refused:  # reset at once, or a moment later
                assert ends(refused) == b""
        assert getattr(connections, tally).count == 3 and len(connections.open) == 2
        first.close()
        assert settles(lambda: len(connections.open) == 1)
        with connected(served) as third:
            third.sendall(f"POST {FLEET} HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\n\r\nx".encode())
            assert third.recv(100).startswith(b"HTTP/1.1 503")  # no SuperLink behind: it was let in
        second.close()
        assert settles(lambda: not connections.open and not connections.of_owner)
    assert len([line for line in caplog.messages if "connections refused" in line]) == 1


def test_a_handshake_and_a_head_that_do_not_get_done(certified: Folder, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "fedlth"):
        with gate(certified, 1, Limits(handshake_s=0.1)) as served:
            for _ in range(2):
                with plain(served) as silent:
                    assert ends(silent) == b""
            assert settles(lambda: served.gate.connections.late.count == 2 and not served.gate.connections.open)
        with gate(certified, 1, Limits(head_s=0.1)) as served, connected(served) as slow:
            slow.sendall(HEAD[:20])
            assert ends(slow) == b""
            assert settles(lambda: served.gate.connections.late.count == 1 and not served.gate.connections.open)
    first, second = [line for line in caplog.messages if "too slow" in line]
    assert "1 so far; the last, of 127.0.0.1: no TLS handshake within 0.1 s" in first
    assert "1 so far; the last, of 127.0.0.1: no whole head of a request within 0.1 s" in second


def test_a_body_that_does_not_come_is_408_and_holds_nothing(certified: Folder) -> None:
    with gate(certified, 1, Limits(stall_s=0.1)) as served, connected(served) as slow:
        slow.sendall(HEAD + b"x" * 10)
        assert ends(slow).startswith(b"HTTP/1.1 408")
        assert settles(lambda: not served.gate.held.total())
        assert served.gate.refused.count == 1


def test_bodies_that_wait_are_bounded_together(certified: Folder) -> None:
    """The second sender is asked to try again, and can once the first has gone."""
    with upstream(certified) as port, gate(certified, port, Limits(held_bytes=MOST)) as served:
        first = connected(served)
        first.sendall(HEAD + b"x" * 600)
        assert settles(lambda: served.gate.held.total() == 600)
        assert served.client.post(FLEET, content=b"x" * 600).status_code == 503
        first.close()
        assert settles(lambda: not served.gate.held.total())
        assert served.client.post(FLEET, content=b"x" * 600).status_code == 200


def test_one_address_holds_a_quarter() -> None:
    assert Limits(held_bytes=4000).held_of_one(10) == 1000
    assert Limits(held_bytes=4000).held_of_one(5000) == 5000


def test_who_reads_too_slowly_is_cut() -> None:
    """A part of an answer that nobody takes: the request ends, with the connection."""
    answers = httpx.MockTransport(lambda _: httpx.Response(200, stream=httpx.ByteStream(b"x")))
    stuck: list[Any] = []

    async def run() -> None:
        async with httpx.AsyncClient(transport=answers, base_url="https://127.0.0.1:1") as client:
            connections = Connections(Limits(stall_s=0.05))
            one = connections.admit(("10.0.0.1", 1))
            assert one is not None
            one.transport = Aborted()

            async def receive() -> Any:
                return {"type": "http.request", "body": b"", "more_body": False}

            async def send(part: Any) -> None:
                stuck.append(part["type"])
                await asyncio.sleep(30 * (part["type"] == "http.response.body"))

            scope = {
                "type": "http", "method": "POST", "path": FLEET, "raw_path": FLEET.encode(), "query_string": b"",
                "headers": [], "client": ("10.0.0.1", 1),
            }  # fmt: skip
            await Gate(client, MOST, connections)(scope, receive, send)
            assert connections.late.count == 1 and one.transport.aborted

    asyncio.run(run())
    assert stuck == ["http.response.start", "http.response.body"]


class Aborted(asyncio.Transport):
    aborted = False

    def abort(self) -> None:
        self.aborted = True


def test_a_sender_may_pause_but_must_keep_up_the_average() -> None:
    """A link of 4 kbit/s is borne; a byte now and then is not, however much came before."""
    limits = Limits(stall_s=30, bytes_per_s=500)
    honest, drip = Pace(limits, begun=0.0), Pace(limits, begun=0.0)
    honest.received = 500 * 1000
    assert honest.deadline(1000.0) == 1030.0
    drip.received = 100
    assert drip.deadline(20.0) == 30.2
    drip.received = 1 << 20
    assert drip.deadline(100.0) == 130.0


def test_what_counts_as_one_address() -> None:
    assert owner("192.0.2.7") == owner("::ffff:192.0.2.7") == "192.0.2.7"
    assert owner("2001:db8::1") == owner("2001:db8:0:0:ffff::9") != owner("2001:db8:0:1::1")
    assert owner("fe80::1%eth0") == "fe80::/64" and owner("?") == "?"


def test_limits_are_settings(certified: Folder) -> None:
    assert Limits.of({}) == Limits() and Limits.of({"head_s": 3, "connections": 9}) == Limits(head_s=3, connections=9)
    for wrong in ({"head_s": 0}, {"connections": 1.5}, {"idle_s": True}, {"stall_s": "1"}, {"x": 1}):
        with pytest.raises(ValueError, match="gate."):
            Limits.of(wrong)
    settings = Settings(("127.0.0.1",), "127.0.0.1", 1, 2, (3,), MOST, {}, Limits(head_s=7))
    file = certified.root / "federation.json"
    file.write_text(settings.text())
    assert read_settings(certified.root) == settings
    file.write_text(settings.text().replace('"idle_s": 75', '"idle_s": -1'))
    with pytest.raises(StudyError, match=r"federation\.json.*gate\.idle_s must be a positive whole number, got -1"):
        read_settings(certified.root)


@pytest.mark.long
def test_an_idle_connection_is_kept_for_a_while(certified: Folder) -> None:
    limits = Limits(idle_s=2, head_s=0.5)
    with upstream(certified) as port, gate(certified, port, limits) as served:
        for _ in range(2):
            assert served.client.post(FLEET, content=b"x").status_code == 200
            (one,) = served.gate.connections.open.values()
            time.sleep(1)  # longer than a head may take
        assert [one] == list(served.gate.connections.open.values())
        assert settles(lambda: not served.gate.connections.open) and not served.gate.connections.late.count


@pytest.mark.long
def test_many_slow_senders_and_an_honest_device(certified: Folder) -> None:
    """A hundred handshakes that do not end, and twenty requests: the device is served, the requests are shown out."""
    limits = Limits(connections=150, connections_per_address=120, head_s=2.0, stall_s=2.0)
    with upstream(certified) as port, gate(certified, port, limits) as served:
        slow = [plain(served) for _ in range(100)]
        heads = []
        for number in range(20):
            one = connected(served)
            one.sendall(HEAD[: 20 + number] if number % 2 else HEAD + b"x")
            heads.append(one)
        assert settles(lambda: len(served.gate.connections.open) <= 100)
        for one in slow:
            one.close()
        assert settles(lambda: not served.gate.connections.open)
        assert served.client.post(FLEET, content=b"x" * MOST).status_code == 200
        assert served.gate.connections.late.count == 10 and served.gate.refused.count == 10
        for one in heads:
            one.close()
