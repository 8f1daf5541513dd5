"""A study over a link of 64 kbit/s that loses 5 % of its packets, and a link that is reset in mid-message."""

from __future__ import annotations

import asyncio
import http.server
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fedlth.engines.flower_link import ANSWER_S
from fedlth.engines.flower_record import PIECE_BYTES
from fedlth.report.diff import diff
from fedlth.study import schema
from tests import tiny
from tests.deploy.behind_link import BITS_S, LOSS, TICKETS, ran_behind
from tests.deploy.metered_gate import PULL, PUSH
from tests.deploy.served_gate import certificates, gate, upstream
from tests.deploy.thin_link import impossible, probe, thin_link

# typer, which Flower imports, against a newer click.
pytestmark = pytest.mark.filterwarnings("ignore:'click.utils:DeprecationWarning")
ROOT = Path(__file__).parents[2]


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_a_study_of_tickets_over_a_thin_link_that_loses_packets(tmp_path: Path) -> None:
    """It equals the in-process run, and every message crosses once: Flower sends nothing again.

    A dense update is longer than what the link carries before Flower's client gives up an answer.
    """
    if why := impossible():
        pytest.skip(why)
    with thin_link(bits_s=BITS_S, loss=LOSS) as link:
        lost, bits_s = probe(link)
        assert LOSS / 4 < lost < LOSS * 3 and bits_s < BITS_S
        ran = ran_behind(link, tmp_path / "thin", ["--study", str(ROOT / "configs" / "smoke.yaml"), *TICKETS.split()])
    tiny.run(schema.load(tmp_path / "thin" / "fed" / "app" / "study.yaml"), tmp_path / "inprocess")
    assert diff(tmp_path / "inprocess", ran.out) == []
    assert ran.twice() == [] and ran.retried == 0
    # The ledger's frames are all that crossed, but for the roll call and its answer, which are no client's visit.
    framed, longest = ran.ledger("framed_bytes"), ran.longest()
    assert 0 < ran.content_bytes(PUSH) - framed["up"] < 1_000 > ran.content_bytes(PULL) - framed["down"] > 0
    assert ran.largest(PUSH) < PIECE_BYTES + 1_000 > ran.largest(PULL)
    assert longest["up"] > ANSWER_S * BITS_S / 8 < longest["down"]
    # And nothing crossed behind the gate's back: TLS, HTTP, TCP and its repetitions, polls and heartbeats.
    assert framed["up"] < ran.link.up_bytes < 2 * framed["up"] and framed["down"] < ran.link.down_bytes
    assert 0.01 < ran.link.sent_again / ran.link.up_packets < 0.3, "packets were lost, and TCP repeated them"


class Objects(http.server.BaseHTTPRequestHandler):
    """What a SuperLink does with objects: keeps those that are pushed, gives those that are asked for."""

    protocol_version = "HTTP/1.1"
    pushed: list[tuple[str, bytes]] = []
    pulled: list[str] = []

    def do_POST(self) -> None:
        from flwr.proto.message_pb2 import PullObjectRequest, PullObjectResponse, PushObjectRequest, PushObjectResponse

        body = self.rfile.read(int(self.headers["content-length"]))
        if self.path == PUSH:
            push = PushObjectRequest.FromString(body)
            self.pushed.append((push.object_id, push.object_content))
            answer = PushObjectResponse(stored=True).SerializeToString()
        else:
            self.pulled.append(PullObjectRequest.FromString(body).object_id)
            content = dict(self.pushed)[self.pulled[-1]]
            response = PullObjectResponse(object_found=True, object_available=True, object_content=content)
            answer = response.SerializeToString()
        self.send_response(200)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def cutting(port: int, up: list[int], down: list[int]) -> Iterator[int]:
    """Give a port that leads to another; each connection in turn is reset after so many bytes up or down, 0 for never.

    Connections behind the last of them are not cut.
    """
    loop, ports = asyncio.new_event_loop(), list[int]()

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, most: int, both: list[Any]) -> None:
        passed = 0
        try:
            while data := await source.read(4096):
                sink.write(data)
                await sink.drain()
                passed += len(data)
                if most and passed >= most:
                    for end in both:  # close with a reset
                        linger = struct.pack("ii", 1, 0)
                        end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                        end.transport.abort()
        except OSError:
            pass
        sink.close()

    async def way(near: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        far, forth = await asyncio.open_connection("127.0.0.1", port)
        most = [cuts.pop(0) if cuts else 0 for cuts in (up, down)]
        both = [back, forth]
        await asyncio.gather(pump(near, forth, most[0], both), pump(far, back, most[1], both))

    async def serve() -> None:
        server = await asyncio.start_server(way, "127.0.0.1", 0)
        ports.append(server.sockets[0].getsockname()[1])
        ready.set()
        await stop.wait()
        server.close()

    ready, stop = threading.Event(), asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    ready.wait(10)
    try:
        yield ports[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.run_until_complete(loop.shutdown_asyncgens())
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


def test_a_link_that_is_reset_in_mid_message_costs_a_piece(tmp_path: Path) -> None:
    """Flower's own client over the gate: a piece that broke off crosses again, and no other; nothing is lost."""
    from flwr.proto.message_pb2 import PullObjectRequest, PushObjectRequest
    from flwr.supercore.inflatable.inflatable_utils import pull_objects, push_object_contents_from_iterable
    from flwr.supercore.retry import make_simple_http_retry_invoker
    from flwr.supernode.fleet_http_client import FleetHttpClient

    certified = certificates(tmp_path)
    Objects.pushed.clear()
    pieces = {f"{i:064x}": bytes([i]) * PIECE_BYTES for i in range(4)}
    again = make_simple_http_retry_invoker()
    again.wait_function = lambda _: None
    # The first connection breaks in the second piece up, the second in the first piece down, a third lives.
    with (
        upstream(certified, Objects) as port,
        gate(certified, port, most=PIECE_BYTES + 1_000) as way,
        cutting(way.port, [PIECE_BYTES * 3 // 2], [0, PIECE_BYTES // 2]) as cut,
        FleetHttpClient.from_server_address(
            f"127.0.0.1:{cut}", False, certified.trusted.read_bytes(), [], retry_invoker=again
        ) as client,
    ):
        push_object_contents_from_iterable(
            pieces.items(),
            lambda id, data: client.PushObject(PushObjectRequest(object_id=id, object_content=data)) and None,
            max_concurrent_pushes=1,
        )
        assert Objects.pushed == list(pieces.items()), "the SuperLink never sees half a piece"
        pulled = pull_objects(
            list(pieces), lambda id: client.PullObject(PullObjectRequest(object_id=id)).object_content,
            max_concurrent_pulls=1,
        )  # fmt: skip
        assert pulled == pieces and Objects.pulled == [next(iter(pieces)), *pieces]
