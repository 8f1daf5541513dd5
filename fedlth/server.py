"""server_step in its parts: who is sampled, what goes down, which replies are believed, how they are joined."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from fedlth import rng
from fedlth.jobs import Message, Reply
from fedlth.methods.aggregate import Aggregate, Contribution
from fedlth.methods.recipe import Recipe
from fedlth.params import Layout, Params
from fedlth.wire import metrics, payload
from fedlth.wire.codec import RAW, Codec
from fedlth.wire.errors import PayloadError
from fedlth.wire.payload import Content
from fedlth.wire.reference import Reference

MOST_EXAMPLES = 10**9


def sample(seed: int, phase: str, round: int, *, clients: Sequence[int], count: int) -> list[int]:
    """Draw `count` clients without replacement from a named stream, sorted."""
    picked = rng.stream(seed, f"sample {phase}", round).choice(len(clients), size=count, replace=False)
    return sorted(clients[int(i)] for i in picked)


def broadcast(kind: str, name: str, theta: Params, layout: Layout, codec: Codec = RAW) -> Message:
    """Encode the global state once, for everyone."""
    content = Content(np.ones(layout.num_prunable, bool), theta.floats, theta.ints)
    return Message(kind, name, payload.encode(kind, layout, content, codec=codec), broadcast=True)


def slice_for(
    name: str, theta: Params, layout: Layout, mask: np.ndarray, codec: Codec = RAW, *, alone: bool = False
) -> Message:
    """Encode what a client's last committed mask holds; the client has that mask, so no bits of it are sent.

    `alone` sends the mask too, to a client that has lost it.
    """
    content, known = Content(mask, theta.masked(mask).floats, theta.ints), None if alone else mask
    return Message("values", name, payload.encode("values", layout, content, codec=codec, known_mask=known))


@dataclass(frozen=True)
class Accepted:
    """A reply that passed every check."""

    contribution: Contribution | None
    mask: np.ndarray | None
    record: dict[str, Any]


@dataclass(frozen=True)
class Held:
    """What a client's upload may refer to: the mask mirrored for it, and the floats it was sent in this visit."""

    mask: np.ndarray | None
    sent: Reference | None


def accept(reply: Reply, *, recipe: Recipe, layout: Layout, sends: str, codec: Codec, held: Held) -> Accepted:
    """Decode and check one reply; raise PayloadError saying why it is refused. A refusal costs only its sender."""
    content: Content | None = None
    record: dict[str, Any] | None = None
    for message in reply.outbox:
        if message.kind == "metrics" and record is None:
            record = metrics.decode(message.payload)
        elif message.kind == sends and content is None:
            content = payload.decode(
                message.payload, message.kind, layout, codec=codec, known_mask=held.mask, reference=held.sent
            )
        else:
            raise PayloadError(f"a {message.kind} message was not asked for")
    if record is None:
        raise PayloadError("no metrics came")
    _check_record(record, reply.client)
    if not sends:
        if content is not None:
            raise PayloadError("values were not asked for")
        return Accepted(None, None, record)
    if content is None:
        raise PayloadError(f"no {sends} came")
    if sends == "values" and content.floats is None:
        raise PayloadError("values were wanted, a bare mask came")
    if recipe.down == "broadcast" and recipe.space == "weights" and sends == "values" and not content.mask.all():
        raise PayloadError("a dense update was wanted, a sparse one came")
    examples = record.get("num_examples", 0)
    if sends == "values" and (
        not isinstance(examples, int) or isinstance(examples, bool) or not 0 < examples <= MOST_EXAMPLES
    ):
        raise PayloadError(f"num_examples must be in 1..{MOST_EXAMPLES}, got {examples!r}")
    return Accepted(Contribution(reply.client, int(examples), content), content.mask, record)


def _check_record(record: dict[str, Any], client: int) -> None:
    """Refuse numbers that the loop would stumble on, and rows that speak for another client."""
    accuracy = record.get("val_accuracy", 0.0)
    if not isinstance(accuracy, float) or not 0 <= accuracy <= 1:
        raise PayloadError(f"val_accuracy must be in [0, 1], got {accuracy!r}")
    rows = record.get("rows", [])
    if not isinstance(rows, list) or any(not isinstance(r, dict) or r.get("client") != client for r in rows):
        raise PayloadError(f"rows must be records of client {client}")


def aggregate(
    rule: Aggregate, theta: Params, contributions: Iterable[Contribution], layout: Layout
) -> tuple[Params, bool]:
    """Join in the order in which they come; with none the old state stays. Says also whether there was none."""
    stream = iter(contributions)
    first = next(stream, None)
    if first is None:
        return theta, True
    joined = rule(theta, chain((first,), stream), layout)
    deque(stream, maxlen=0)  # a rule that stops early must not stop the visits
    return joined, False
