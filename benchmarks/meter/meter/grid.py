"""A Flower grid with a meter: it serialises every message itself, and reads the payloads out of those bytes."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

from flwr.app import Message
from flwr.supercore.inflatable.inflatable_object import InflatableObject
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

Place = tuple[str, str, int, int]  # direction, phase, round, client


class Meter:
    """Passes everything on to the grid. Nothing here is fedlth's but the names in a message's head.

    `payload` and `framed` hold bytes by direction, phase, round and client; `control` holds serialised bytes of
    messages without any payload, which no ledger row stands for: who are you, and work that needs no download.
    """

    def __init__(self, grid: Any) -> None:
        self._grid = grid
        self.messages: Counter[str] = Counter()
        self.payload: Counter[Place] = Counter()
        self.framed: Counter[Place] = Counter()
        self.control: Counter[str] = Counter()
        self._orders: dict[str, dict[str, Any]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        pushed = list(messages)
        ids = self._grid.push_messages(pushed)
        for message in pushed:
            self._count("down", message)
        return ids  # type: ignore[no-any-return]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        pulled = list(self._grid.pull_messages(message_ids))
        for message in pulled:
            if message.has_content():  # an error is made up by Flower at this end
                self._count("up", message)
        return pulled

    def _count(self, direction: str, message: Message) -> None:
        top, objects = serialised(message)
        size = sum(map(len, objects.values()))
        again = inflate_object_from_contents(top, objects)
        assert isinstance(again, Message)
        payloads, head = contents(again)
        if direction == "down" and head:
            self._orders[message.metadata.message_id] = head
        order = head if direction == "down" else self._orders.get(message.metadata.reply_to_message_id, {})
        if not order or (direction == "down" and not payloads):
            self.control[direction] += size
            return
        place = (direction, str(order["phase"]), int(order["round"]), int(order["client"]))
        self.messages[direction] += len(payloads)
        self.payload[place] += sum(payloads)
        self.framed[place] += size

    def compare(self, ledger: list[dict[str, Any]]) -> tuple[list[str], bool]:
        """Return lines that set the ledger beside the meter, and whether they agree in every round and client."""
        payload: Counter[Place] = Counter()
        framed: Counter[Place] = Counter()
        rows: Counter[str] = Counter()
        for row in ledger:
            direction = "up" if row["receiver"] == "server" else "down"
            client = int((row["sender"] if direction == "up" else row["receiver"]).partition(":")[2])
            place = (direction, row["phase"], row["round"], client)
            rows[direction] += row["kind"] != "none"
            payload[place] += row["payload_bytes"]
            framed[place] += row["framed_bytes"] or 0
        lines, equal = [], rows == self.messages
        for direction in ("up", "down"):
            lines.append(f"{direction}: {rows[direction]} ledger rows, {self.messages[direction]} payloads crossed")
            for name, ours, theirs in (("payload", self.payload, payload), ("framed", self.framed, framed)):
                crossed, told = total(ours, direction), total(theirs, direction)
                lines.append(
                    f"{direction}: {name} bytes: ledger {told:,}, meter {crossed:,}, difference {told - crossed}"
                )
        for name, ours, theirs in (("payload", self.payload, payload), ("framed", self.framed, framed)):
            apart = [place for place in ours.keys() | theirs.keys() if ours[place] != theirs[place]]
            lines += [f"{name}: {place}: ledger {theirs[place]}, meter {ours[place]}" for place in sorted(apart)[:10]]
            equal = equal and not apart
        control = ", ".join(f"{size:,} {direction}" for direction, size in sorted(self.control.items()))
        lines.append(f"without any payload, in no ledger row: {control or 0} bytes")
        lines.append(
            f"{'equal' if equal else 'DIFFERENT'} in {len(self.framed)} messages by round, client and direction"
        )
        return lines, equal


def total(sizes: Counter[Place], direction: str) -> int:
    return sum(size for place, size in sizes.items() if place[0] == direction)


def serialised(message: Message) -> tuple[str, dict[str, bytes]]:
    """Return the id of a message and its objects by the SHA-256 of their bytes: equal ones once, as Flower has it."""
    objects: dict[str, bytes] = {}

    def walk(part: InflatableObject) -> str:
        for child in (part.children or {}).values():
            walk(child)
        data = part.deflate()
        name = hashlib.sha256(data).hexdigest()
        objects[name] = data
        return name

    return walk(message), objects


def contents(message: Message) -> tuple[list[int], dict[str, Any]]:
    """Return the sizes of all payloads in a message, and its head where it is an order.

    A payload is a byte string, or those of the records that are named alike but for a number behind a dot.
    """
    sizes: Counter[tuple[str, str]] = Counter()
    head: dict[str, Any] = {}
    for name, record in message.content.items():
        for key, value in record.items():
            if isinstance(value, bytes):
                sizes[name.partition(".")[0], key] += len(value)
            elif isinstance(value, str) and value.startswith("{"):
                head = json.loads(value)
    return list(sizes.values()), head if "phase" in head else {}
