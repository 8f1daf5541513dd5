"""server_step in its parts: who is sampled, what goes down, which replies are believed, which rules may join them."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedlth import rng
from fedlth.data.split import ClientSplit
from fedlth.errors import StudyError
from fedlth.federation.jobs import Message, Reply
from fedlth.methods.aggregate import Contribution, join
from fedlth.methods.method import Recipe
from fedlth.models.layout import Layout, Params
from fedlth.storage import store
from fedlth.storage.records import MetricRow, VisitRecord, visit_record
from fedlth.storage.server_state import ServerState
from fedlth.storage.typed_record import read
from fedlth.wire import mask as bitmap
from fedlth.wire import metrics, payload
from fedlth.wire.codec import RAW, Codec
from fedlth.wire.errors import PayloadError
from fedlth.wire.payload import Content
from fedlth.wire.reference import Reference


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
    content, known = Content(mask, theta.floats, theta.ints), None if alone else mask
    return Message("values", name, payload.encode("values", layout, content, codec=codec, known_mask=known))


@dataclass(frozen=True)
class Accepted:
    """A reply that passed every check: an update's contribution, a mask, a visit's numbers, rows of step 2 as sent."""

    contribution: Contribution | None = None
    mask: np.ndarray | None = None
    visit: VisitRecord | None = None
    rows: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Held:
    """What a client's upload may refer to: the mask mirrored for it, and the floats it was sent in this visit."""

    mask: np.ndarray | None
    sent: Reference | None


@dataclass(frozen=True)
class Asked:
    """What a reply must fit: the client's own parts of the data; in step 2, the arms and their target densities."""

    split: ClientSplit
    unseen: bool
    arms: frozenset[str] = frozenset()
    targets: frozenset[float] = frozenset()


def accept(
    reply: Reply, *, recipe: Recipe, layout: Layout, sends: str, codec: Codec, held: Held, asked: Asked
) -> Accepted:
    """Decode and check one reply; raise PayloadError saying why it is refused. A refusal costs only its sender.

    Everything that a client sends passes here, and nothing of it is believed before.
    """
    names = {"metrics": "arms" if asked.arms else "visit"}
    if sends:
        names[sends] = "ticket" if asked.arms else "update"
    content: Content | None = None
    record: dict[str, Any] | None = None
    for message in reply.outbox:
        if names.get(message.kind) != message.name:
            raise PayloadError(f"a {_short(message.kind)} message {_short(message.name)} was not asked for")
        if message.kind == "metrics" and record is None:
            record = metrics.decode(message.payload)
        elif message.kind == sends and content is None:
            content = payload.decode(
                message.payload, message.kind, layout, codec=codec, known_mask=held.mask, reference=held.sent
            )
        else:
            raise PayloadError(f"a second {message.kind} message came")
    if record is None:
        raise PayloadError("no metrics came")
    if sends:
        _check_content(content, recipe, sends)
    try:
        if asked.arms:
            return Accepted(mask=content.mask if content else None, rows=_rows(record, content, reply, asked, layout))
        visit = visit_record(record)
        if visit.num_examples != len(asked.split.train):
            raise ValueError(f"num_examples must be {len(asked.split.train)}, got {visit.num_examples}")
    except ValueError as error:
        raise PayloadError(f"metrics: {error}") from error
    if content is None:
        return Accepted(visit=visit)
    return Accepted(Contribution(reply.client, visit.num_examples, content), content.mask, visit)


def check_rule(recipe: Recipe, state: ServerState, layout: Layout, count: int) -> None:
    """Join `count` made-up contributions twice; raise StudyError where a method's own rule cannot be believed.

    Equal calls must give equal results, or a resumed run ends in others without a word. Rules of this package are
    held to that by its tests.
    """
    rule = recipe.aggregate
    if type(rule).__module__.startswith("fedlth."):
        return
    place, sends = f"method: {recipe.name}'s aggregation rule {type(rule).__name__}", recipe.visit.sends
    state = ServerState(Params(_read_only(state.theta.floats), _read_only(state.theta.ints)))
    mask = _read_only(np.ones(layout.num_prunable, bool))
    moved = _read_only(state.theta.floats + np.float32(0.01))
    content = Content(mask, moved, state.theta.ints) if sends == "values" else Content(mask, None, None)
    try:
        found = [
            join(rule, state, (Contribution(client, 10 + client, content) for client in range(count)), layout)
            for _ in range(2)
        ]
        bits = [_bits(one) for one in found]
    except Exception as error:  # the user's code may raise anything
        raise StudyError(f"{place} fails: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if bits[0] != bits[1]:
        raise StudyError(
            f"{place} must give equal results for equal input; what it remembers from round to round belongs into the "
            "memory of the state that it returns"
        )
    new = found[0].theta
    for name, got, wanted in (("floats", new.floats, state.theta.floats), ("ints", new.ints, state.theta.ints)):
        if (got.dtype, got.shape) != (wanted.dtype, wanted.shape):
            raise StudyError(f"{place} must return {name} {wanted.dtype} {wanted.shape}, got {got.dtype} {got.shape}")


def _read_only(values: np.ndarray) -> np.ndarray:
    """Return a view through which a rule cannot change what it was given."""
    view = values.view()
    view.flags.writeable = False
    return view


def _bits(state: ServerState) -> bytes:
    """Return a state as its checkpoint has it; raises where an array cannot be kept."""
    return store.pack(
        {"floats": state.theta.floats, "ints": state.theta.ints, **{f"memory/{k}": v for k, v in state.memory.items()}}
    )


def _check_content(content: Content | None, recipe: Recipe, sends: str) -> None:
    if content is None:
        raise PayloadError(f"no {sends} came")
    if sends == "values" and content.floats is None:
        raise PayloadError("values were wanted, a bare mask came")
    if sends == "mask" and content.floats is not None:
        raise PayloadError("a bare mask was wanted, values came")
    if recipe.down == "broadcast" and recipe.space == "weights" and sends == "values" and not content.mask.all():
        raise PayloadError("a dense update was wanted, a sparse one came")


def _rows(
    record: Mapping[str, Any], content: Content | None, reply: Reply, asked: Asked, layout: Layout
) -> tuple[dict[str, Any], ...]:
    """Return step 2's rows, each as it came; raise ValueError naming the field that is wrong."""
    rows = record.get("rows")
    if set(record) != {"rows"} or not isinstance(rows, list) or not rows or not all(isinstance(r, dict) for r in rows):
        raise ValueError(f"rows must be a list of records and all there is, got {_short(record)}")
    parsed = [read(MetricRow, row, strict=True) for row in rows]
    known = {
        "client": reply.client, "unseen": asked.unseen, "num_train": len(asked.split.train),
        "num_val": len(asked.split.val), "num_test": len(asked.split.test),
    }  # fmt: skip
    met: set[tuple[str, float]] = set()
    for row in parsed:
        for name, value in known.items():
            if getattr(row, name) != value:
                raise ValueError(f"{name} must be {value}, got {getattr(row, name)}")
        if row.arm not in asked.arms or row.target_density not in asked.targets:
            raise ValueError(f"arm {row.arm!r} at target_density {row.target_density} was not asked for")
        if (row.arm, row.target_density) in met:
            raise ValueError(f"arm {row.arm!r} at target_density {row.target_density} came twice")
        if row.layer_density.keys() != {e.name for e in layout.prunable}:
            raise ValueError(f"layer_density must name the model's prunable tensors, got {_short(row.layer_density)}")
        met.add((row.arm, row.target_density))
    if content is not None and _name(content.mask) not in {row.ticket for row in parsed}:
        raise ValueError("ticket must name the mask that came with the rows, in one of them")
    return tuple(rows)


def _name(mask: np.ndarray) -> str:
    return "" if mask.all() else bitmap.digest(mask)


def _short(value: object) -> str:
    return reprlib.repr(value)
