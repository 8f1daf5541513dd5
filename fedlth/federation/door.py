"""The door: every reply is decoded and checked here, and nothing of it is believed before."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedlth.data.split import ClientSplit
from fedlth.federation.jobs import Reply
from fedlth.federation.noisy_steps import split_off
from fedlth.federation.ranges import Range, check_range
from fedlth.methods.aggregate import Contribution
from fedlth.methods.client_update import NEXT_MASK, UPDATE
from fedlth.models.layout import Layout
from fedlth.personalization.kept import Keep
from fedlth.storage.records import CurveRow, MetricRow, NoisySteps, VisitRecord, visit_record
from fedlth.storage.typed_record import read
from fedlth.study.sections import Tier
from fedlth.training.metrics import Judged, judged
from fedlth.wire import mask as bitmap
from fedlth.wire import metrics, payload
from fedlth.wire.codec import Codec
from fedlth.wire.errors import PayloadError
from fedlth.wire.payload import OF_ITSELF, Content
from fedlth.wire.reference import Reference


@dataclass(frozen=True)
class Accepted:
    """A reply that passed every check: an update's contribution, a visit's numbers, rows of step 2 as sent.

    `contents` are its messages but the metrics, by name; `noisy` the noisy steps of the visit.
    """

    contribution: Contribution | None = None
    contents: Mapping[str, Content] = field(default_factory=dict)
    visit: VisitRecord | None = None
    rows: tuple[dict[str, Any], ...] = ()
    curve: tuple[CurveRow, ...] = ()
    noisy: tuple[NoisySteps, ...] = ()

    @property
    def masks(self) -> Mapping[str, np.ndarray]:
        return {name: content.mask for name, content in self.contents.items()}

    @property
    def mask(self) -> np.ndarray | None:
        """What the client shares from now on: the mask that it names apart, or the first message's; None: none came."""
        return self.masks.get(NEXT_MASK, next(iter(self.masks.values()), None))


@dataclass(frozen=True)
class Held:
    """What a client's upload may refer to: the mask of what it was sent, None for all, and the floats that it held."""

    mask: np.ndarray | None
    sent: Reference | None


@dataclass(frozen=True)
class Asked:
    """What a reply must fit.

    The client's own parts of the data; in step 2, the arms and their target densities, and what tensors are prunable;
    the messages that its phase's update sends, by name: kind and layout; `ranges`: what their numbers may be, by name,
    where not anything. `named`: the mask that comes up is that of a model in the rows. `own_mask`: values may lie under
    another mask than what was sent. `curve`: the rows are those of an evaluation between rounds. `noisy`: noisy steps
    must be told. `keep` is the rule that says which ticket a client of this `tier` keeps, of a task `judged` so.
    """

    split: ClientSplit
    unseen: bool
    sends: Mapping[str, tuple[str, Layout]]
    own_mask: bool
    arms: frozenset[str] = frozenset()
    targets: frozenset[float] = frozenset()
    layers: frozenset[str] = frozenset()
    ranges: Mapping[str, Range] = field(default_factory=dict)
    named: bool = True
    curve: bool = False
    noisy: bool = False
    keep: Keep | None = None
    tier: Tier = field(default_factory=Tier)
    judged: Judged = field(default_factory=lambda: judged(None, (), "classes"))


def accept(reply: Reply, *, codec: Codec, held: Held, asked: Asked) -> Accepted:
    """Decode and check one reply; raise PayloadError saying why it is refused. A refusal costs only its sender."""
    record_name = "arms" if asked.arms else "visit"
    contents: dict[str, Content] = {}
    record: dict[str, Any] | None = None
    for message in reply.outbox:
        kind, name = message.kind, message.name
        if (kind, name) == ("metrics", record_name) and record is None:
            record = metrics.decode(message.payload)
        elif name in asked.sends and asked.sends[name][0] == kind and name not in contents:
            refers = kind not in OF_ITSELF and name == next(iter(asked.sends))  # as the client encodes it
            known = held.mask if refers else None
            if name == NEXT_MASK and UPDATE in contents:
                known = contents[UPDATE].mask
            contents[name] = payload.decode(
                message.payload, kind, asked.sends[name][1], codec=codec, known_mask=known,
                reference=held.sent if refers else None,
            )  # fmt: skip
        else:
            again = name in contents or ((kind, name) == ("metrics", record_name))
            why = "came twice" if again else "was not asked for"
            raise PayloadError(f"a {_short(kind)} message {_short(name)} {why}")
    if record is None:
        raise PayloadError("no metrics came")
    for name, (kind, _) in asked.sends.items():
        if name not in contents:
            raise PayloadError(f"no {kind} came")
        _check_content(contents[name], kind, held, asked)
        if name in asked.ranges:
            check_range(name, contents[name], asked.ranges[name], asked.sends[name][1])
    contents = {name: contents[name] for name in asked.sends}  # in our order, whatever the sender's
    first = next(iter(contents.values()), None)
    noisy: tuple[NoisySteps, ...] = ()
    try:
        if asked.noisy:
            record, noisy = split_off(record, reply.client)
        if asked.arms:
            if asked.curve:
                return Accepted(curve=_curve(record, reply, asked))
            return Accepted(contents=contents, rows=_rows(record, first, reply, asked), noisy=noisy)
        visit = visit_record(record)
        if visit.num_examples != len(asked.split.train):
            raise ValueError(f"num_examples must be {len(asked.split.train)}, got {visit.num_examples}")
        if visit.val_accuracy is not None and not asked.judged.has_accuracy:
            raise ValueError("val_accuracy was not asked for: the targets are real numbers")
        if visit.val_metric is not None:
            _check_metrics("val_metric", {asked.judged.main.name: visit.val_metric}, asked.judged)
        if visit.val_metric is not None and asked.judged.main.name == "accuracy":
            raise ValueError("val_metric was not asked for: the study is judged by accuracy")
    except ValueError as error:
        raise PayloadError(f"metrics: {error}") from error
    if first is None:
        return Accepted(visit=visit, noisy=noisy)
    others = {name: content for name, content in contents.items() if content is not first}
    return Accepted(Contribution(reply.client, visit.num_examples, first, others), contents, visit, noisy=noisy)


def _check_content(content: Content, kind: str, held: Held, asked: Asked) -> None:
    if kind != "mask" and content.floats is None:
        raise PayloadError(f"expected {kind}, got a bare mask")
    if kind == "mask" and content.floats is not None:
        raise PayloadError("expected a bare mask, got values")
    if kind != "values" or asked.own_mask:
        return
    if held.mask is None and not content.mask.all():
        raise PayloadError("expected a dense update, got a sparse one")
    if held.mask is not None and not np.array_equal(content.mask, held.mask):
        raise PayloadError("expected an update of what was sent, got one under another mask")


def _rows(record: Mapping[str, Any], content: Content | None, reply: Reply, asked: Asked) -> tuple[dict[str, Any], ...]:
    """Return step 2's rows, each as it came; raise ValueError naming the field that is wrong."""
    rows = _listed(record)
    parsed = [read(MetricRow, row, strict=True) for row in rows]
    met: set[tuple[str, float]] = set()
    for row in parsed:
        _check_known(row, reply, asked, num_train=len(asked.split.train))
        if row.arm not in asked.arms or row.target_density not in asked.targets:
            raise ValueError(f"arm {row.arm!r} at target_density {row.target_density} was not asked for")
        if (row.arm, row.target_density) in met:
            raise ValueError(f"arm {row.arm!r} at target_density {row.target_density} came twice")
        if row.layer_density.keys() != asked.layers:
            raise ValueError(f"layer_density must name the model's prunable tensors, got {_short(row.layer_density)}")
        _check_scores(row, asked)
        met.add((row.arm, row.target_density))
    _check_choice(parsed, content, asked)
    _check_density(parsed, content, asked)
    if content is not None and asked.named and _name(content.mask) not in {row.ticket for row in parsed}:
        raise ValueError("ticket must name the mask that came with the rows, in one of them")
    return tuple(rows)


def _curve(record: Mapping[str, Any], reply: Reply, asked: Asked) -> tuple[CurveRow, ...]:
    """Return an evaluation's rows, one for each model that was asked for."""
    parsed = [read(CurveRow, row, strict=True) for row in _listed(record)]
    for row in parsed:
        _check_known(row, reply, asked)
        _check_scores(row, asked)
    if sorted(row.arm for row in parsed) != sorted(asked.arms):
        raise ValueError(f"arm must be each of {', '.join(sorted(asked.arms))} once, got {[r.arm for r in parsed]}")
    return tuple(parsed)


def _listed(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = record.get("rows")
    if set(record) != {"rows"} or not isinstance(rows, list) or not rows or not all(isinstance(r, dict) for r in rows):
        raise ValueError(f"rows must be a list of records and nothing else, got {_short(record)}")
    return rows


def _check_known(row: MetricRow | CurveRow, reply: Reply, asked: Asked, **more: int) -> None:
    """Raise ValueError where a row contradicts what the server knows of its client."""
    known = {
        "client": reply.client, "unseen": asked.unseen, **more, "num_val": len(asked.split.val),
        "num_test": len(asked.split.test),
    }  # fmt: skip
    for name, value in known.items():
        if getattr(row, name) != value:
            raise ValueError(f"{name} must be {value}, got {getattr(row, name)}")


def _check_scores(row: MetricRow | CurveRow, asked: Asked) -> None:
    """Raise ValueError where a row lacks a score that its client has, or tells one that was not asked for."""
    for part, size in (("val", len(asked.split.val)), ("test", len(asked.split.test))):
        accuracy, loss, others = (getattr(row, f"{part}_{name}") for name in ("accuracy", "loss", "metrics"))
        for name, value, wanted in (("accuracy", accuracy, asked.judged.has_accuracy), ("loss", loss, True)):
            if (value is not None) != (wanted and size > 0):
                raise ValueError(
                    f"{part}_{name} must be {'a finite number' if wanted and size else 'None'}, got {value}"
                )
        names = asked.judged.named if size else ()
        if others.keys() != set(names):
            raise ValueError(f"{part}_metrics must name {', '.join(names) or 'nothing'}, got {_short(others)}")
        _check_metrics(f"{part}_metrics", others, asked.judged)


def _check_metrics(place: str, values: Mapping[str, float], judged: Judged) -> None:
    """Raise ValueError at a value that its metric cannot have: balanced accuracy 5.0 would be shown as 500 %."""
    for metric in judged.all:
        least, most = metric.range
        if metric.name in values and not least <= values[metric.name] <= most:
            raise ValueError(f"{place}: {metric.name} must be in [{least:g}, {most:g}], got {values[metric.name]:.6g}")


def _check_choice(rows: Sequence[MetricRow], content: Content | None, asked: Asked) -> None:
    """Raise ValueError where the rows do not choose the one ticket that the study's rule picks among them."""
    chosen = [row for row in rows if row.chosen]
    if asked.keep is None or not asked.keep.chooses:
        if chosen:
            raise ValueError("chosen must not be said where every client keeps the same density")
        return
    refined = "refined" in asked.arms
    if len(chosen) > 1 or (not chosen and not refined):
        raise ValueError(f"chosen must be one row, got {len(chosen)}")
    for row in chosen:
        best = not any(
            asked.keep.better(other, row, asked.tier, asked.judged) for other in rows if other.arm == row.arm
        )
        allowed = row.target_density in asked.keep.allowed(asked.tier)
        if row.arm != ("refined" if refined else "ticket") or not allowed or not best:
            raise ValueError(f"chosen must be the ticket to keep, got {row.arm} at {row.target_density}")
        if content is not None and asked.named and _name(content.mask) != row.ticket:
            raise ValueError("ticket must name the mask that came with the rows, in the chosen row")


def _check_density(rows: Sequence[MetricRow], content: Content | None, asked: Asked) -> None:
    """Raise ValueError where a row says another density than the mask that came under its name has."""
    if content is None or not asked.named or content.mask.all():
        return
    name, held = _name(content.mask), int(np.count_nonzero(content.mask)) / content.mask.size
    for row in rows:
        if row.ticket == name and abs(row.density - held) > 1e-9:
            raise ValueError(f"density must be that of the mask that came, {held:.6g}, got {row.density:.6g}")


def _name(mask: np.ndarray) -> str:
    return "" if mask.all() else bitmap.digest(mask)


def _short(value: object) -> str:
    return reprlib.repr(value)
