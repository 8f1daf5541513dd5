"""The gate with a meter before it: `python -m tests.deploy.metered_gate DIR FILE`, a line of JSON for each request.

A line says who asked (address), for what (path), the object's id where there is one, the bytes of the request's body
that came and of the answer's, whether either ended early, and when the request began (seconds since the epoch).
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from collections.abc import MutableMapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from google.protobuf.message import DecodeError

from fedlth.deploy.folder import Folder
from fedlth.deploy.gate import Gate, Receive, Scope, Send, gate_before, listening, server_of
from fedlth.deploy.settings import read_settings

PUSH, PULL = "/v1/fleet/push-object", "/v1/fleet/pull-object"


@dataclass
class Request:
    """One request of a SuperNode; `content_bytes` are those of the object in it or in its answer, 0 where none is."""

    who: str
    path: str
    began: float
    up_bytes: int = 0
    down_bytes: int = 0
    status: int = 0
    whole: bool = False
    object: str = ""
    content_bytes: int = 0


@dataclass(frozen=True)
class Metered:
    """An ASGI app: the gate, and what every request through it was."""

    gate: Gate
    file: IO[str]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = Request((scope.get("client") or ("?",))[0], scope["path"], time.time())
        up, down = bytearray(), bytearray()

        async def received() -> MutableMapping[str, Any]:
            part = await receive()
            up.extend(part.get("body", b""))
            return part

        async def sent(part: MutableMapping[str, Any]) -> None:
            await send(part)
            request.status = part.get("status", request.status)
            down.extend(part.get("body", b""))
            request.whole = part["type"] == "http.response.body" and not part.get("more_body", False)

        try:
            await self.gate(scope, received, sent)
        finally:
            request.up_bytes, request.down_bytes = len(up), len(down)
            request.object, request.content_bytes = _object(request.path, bytes(up), bytes(down))
            self.file.write(json.dumps(asdict(request)) + "\n")
            self.file.flush()


def _object(path: str, up: bytes, down: bytes) -> tuple[str, int]:
    """Return the id of the object that a request carries or asks for, and its bytes; of half a request neither."""
    from flwr.proto.message_pb2 import PullObjectRequest, PullObjectResponse, PushObjectRequest

    try:
        if path == PUSH:
            pushed = PushObjectRequest.FromString(up)
            return pushed.object_id, len(pushed.object_content)
        if path == PULL:
            return PullObjectRequest.FromString(up).object_id, len(PullObjectResponse.FromString(down).object_content)
    except DecodeError:
        pass
    return "", 0


def requests_in(file: Path) -> list[Request]:
    """Return what a meter has written."""
    return [Request(**json.loads(line)) for line in file.read_text().splitlines()]


async def _serve(folder: Folder, file: IO[str]) -> None:
    settings = read_settings(folder.root)
    with listening(settings) as listener:
        async with gate_before(folder, settings) as gate:
            server = server_of(gate, folder)
            server.config.app = Metered(gate, file)
            await server.serve_on(listener)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with Path(sys.argv[2]).open("a") as written:
        asyncio.run(_serve(Folder(Path(sys.argv[1]).resolve()), written))
