"""A step's messages as ledger rows: kind, bytes, and what the payload is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from fedlth.federation.jobs import Failure, Message, Reply
from fedlth.methods.client_update import UPDATE
from fedlth.models.layout import Layout
from fedlth.storage.records import LedgerRow, client_of, party
from fedlth.wire import mask as bitmap
from fedlth.wire.describe import iid_bytes, sections
from fedlth.wire.payload import Content


def down(
    round: int, phase: str, client: int, inbox: Sequence[Message], mask: np.ndarray | None, framed: int | None, *,
    layout: Layout, everyones: np.ndarray | None = None, kind: str = "",
) -> list[LedgerRow]:  # fmt: skip
    """Return the rows of what a client was sent; the frame's bytes stand on the first.

    `mask` is the one that the client's own slice holds, `everyones` that of broadcasts and evaluation copies (None:
    dense). `kind` replaces the first message's own: "install" for a client's first model, "resync" for one that is
    sent again, alone.
    """
    rows = []
    for i, m in enumerate(inbox):
        parts, held = sections(m.payload), everyones if m.broadcast or m.kind == "evaluation" else mask
        rows.append(
            LedgerRow(
                round=round, phase=phase, sender=party(None), receiver=party(client),
                kind=kind if kind and i == 0 else m.kind, name=m.name, payload_bytes=len(m.payload),
                framed_bytes=framed if i == 0 else None, broadcast=m.broadcast, density=_density(held),
                ticket=_ticket(held), coding=parts.coding, mask_bytes=parts.mask_bytes, value_bytes=parts.value_bytes,
                iid_bytes=_iid(held, layout),
            )
        )  # fmt: skip
    return rows


def between(
    round: int, phase: str, client: int, inbox: Sequence[Message], contents: Callable[[int], Content],
    framed: int | None, *, layout: Layout, kind: str = "",
) -> list[LedgerRow]:  # fmt: skip
    """Return the rows of what clients sent to a client, one an edge: its own sender's bytes and mask.

    `contents` decodes what a client published; `kind` replaces each message's own. What the client itself once
    published comes back from who relays it.
    """
    rows = []
    for i, m in enumerate(inbox):
        sender = client_of(m.name)
        assert sender is not None
        parts, held = sections(m.payload), contents(sender).mask
        rows.append(
            LedgerRow(
                round=round, phase=phase, sender=party(None if sender == client else sender), receiver=party(client),
                kind=kind or m.kind, name=UPDATE, payload_bytes=len(m.payload), framed_bytes=framed if i == 0 else None,
                density=_density(held), ticket=_ticket(held), coding=parts.coding, mask_bytes=parts.mask_bytes,
                value_bytes=parts.value_bytes, iid_bytes=_iid(held, layout),
            )
        )  # fmt: skip
    return rows


def up(
    round: int, phase: str, reply: Reply, masks: Mapping[str, np.ndarray], status: str, *,
    layout_of: Callable[[str], Layout],
) -> list[LedgerRow]:  # fmt: skip
    """Return the rows of what a client sent, with the density and the name of the mask it carried.

    What was refused is only counted: its sections are nobody's business.
    """
    rows = []
    for i, m in enumerate(reply.outbox):
        held = masks.get(m.name) if m.kind != "metrics" else None
        told = status if status == "ok" else _told(status, reply)  # what had no effect is in the round's row alone
        row = LedgerRow(
            round=round, phase=phase, sender=party(reply.client), receiver=party(None), kind=m.kind, name=m.name,
            payload_bytes=len(m.payload), framed_bytes=reply.framed_up_bytes if i == 0 else None, status=told,
            density=_density(held), ticket=_ticket(held),
        )  # fmt: skip
        if held is not None:
            parts = sections(m.payload)
            row = replace(
                row, coding=parts.coding, mask_bytes=parts.mask_bytes, value_bytes=parts.value_bytes,
                iid_bytes=_iid(held, layout_of(m.kind)),
            )  # fmt: skip
        rows.append(row)
    return rows


def failed(round: int, phase: str, failure: Failure) -> LedgerRow:
    """Return the row of an answer that never came; a message may say so, and has a frame."""
    return LedgerRow(
        round=round, phase=phase, sender=party(failure.client), receiver=party(None), kind="none", name="",
        payload_bytes=0, framed_bytes=failure.framed_up_bytes, status=_told(f"failed: {failure.kind}", failure),
    )  # fmt: skip


def _told(status: str, answer: Reply | Failure) -> str:
    """Return a status with the fault that was injected, if one was."""
    return f"{status} (chaos: {answer.injected})" if answer.injected else status


def _density(mask: np.ndarray | None) -> float:
    return 1.0 if mask is None or not mask.size else int(np.count_nonzero(mask)) / mask.size


def _ticket(mask: np.ndarray | None) -> str:
    return "" if mask is None or mask.all() else bitmap.digest(mask)


def _iid(mask: np.ndarray | None, layout: Layout) -> float | None:
    return None if mask is None or mask.all() else round(iid_bytes(mask, layout), 1)
