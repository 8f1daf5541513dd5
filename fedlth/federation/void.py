"""Rounds that do not count: too few usable replies, so that everything stays as it was; several in a row end a run."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from fedlth.errors import NothingUsable
from fedlth.federation.replies import Replies
from fedlth.storage.records import DROPPED, LATE, Failed

log = logging.getLogger(__name__)

VOID_ROUNDS_ALLOWED = 3
CLIENTS_SHOWN = 10


def at_fault(replies: Replies, *, ever: bool) -> bool:
    """Say whether a void round counts against the run, as a fleet's bad luck does not.

    Clients that dropped out never count. Where all others were late, the deadline is met in other rounds, or else in
    none: only if nobody has ever met it. `ever`: somebody has. Who asks for more than one reply (federate.min_clients)
    has said that such a round is none; and a deadline of real devices is nobody's draw.
    """
    study, kinds = replies.experiment.study, {f.kind for f in replies.failed}
    drawn = study.fleet is not None and study.federate.min_clients == 1
    lucky = kinds == {DROPPED} or (bool(kinds) and kinds <= {DROPPED, LATE} and ever)
    if drawn and lucky:
        log.info(f"note: nothing was joined in {replies.phase.name} {replies.round}: {why_nothing(replies.failed)}")
    return not (drawn and lucky)


def too_many(replies: Replies, joined: int, present: frozenset[int] | None) -> NothingUsable:
    """Return the error that ends a run after several void rounds in a row; `present` are the clients there now."""
    return _ended(replies, joined, present, f"{VOID_ROUNDS_ALLOWED} rounds without")


def none_counted(replies: Replies, joined: int, present: frozenset[int] | None) -> NothingUsable:
    """Return the error that ends a run whose method is nothing without a phase of which no round has counted."""
    name = replies.experiment.method.name
    told = f"{name} needs what phase {replies.phase.name} finds, none of whose rounds had"
    return _ended(replies, joined, present, told)


def _ended(replies: Replies, joined: int, present: frozenset[int] | None, why: str) -> NothingUsable:
    folder, study = replies.folder, replies.experiment.study
    wanted = study.federate.min_clients
    told = f"{folder.root}: {why} "
    told += "one usable reply" if wanted == 1 else f"federate.min_clients = {wanted} usable replies"
    told += f"; last: {_why_few(replies, joined) if joined else why_nothing(replies.failed)}"
    if present is not None:
        shown = ", ".join(map(str, sorted(present)[:CLIENTS_SHOWN])) + (", ..." if len(present) > CLIENTS_SHOWN else "")
        told += f"; connected now: {len(present)} of {study.clients.count} clients{f' ({shown})' if shown else ''}"
    how = "the same `flwr run`" if replies.holds_state else f"`fedlth resume {folder.root}`"
    return NothingUsable(f"{told}; what was committed is kept, and {how} continues")


def _why_few(replies: Replies, joined: int) -> str:
    """Say why a round had too few updates to join."""
    told = f"of {len(replies.clients)} clients {joined} gave one"
    return f"{told}; {why_nothing(replies.failed)}" if replies.failed else f"{told}, and no more were there"


def why_nothing(failed: Sequence[Failed]) -> str:
    """Say why a round had no update to join, or no further one."""
    kinds = {f.kind for f in failed}
    if not failed:
        return "nobody took part"
    if kinds <= {DROPPED, LATE}:
        late = sum(f.kind == LATE for f in failed)
        first = next((f": the first {f.reason}" for f in failed if f.kind == LATE), "")
        return f"of {len(failed)} clients {late} were late and {len(failed) - late} dropped out{first}"
    died = [f.reason for f in failed if f.kind not in ("refused", DROPPED, LATE)]
    refused = [f"every reply was refused, the first with: {f.reason}" for f in failed if f.kind == "refused"]
    return (*died, *refused)[0]
