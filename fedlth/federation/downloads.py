"""What a round sends down: each client's inbox, and what its answer may refer to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from fedlth import rng
from fedlth.experiment.experiment import Experiment
from fedlth.federation.door import Held
from fedlth.federation.jobs import Message
from fedlth.federation.published import Published
from fedlth.methods.client_update import THETA_G
from fedlth.methods.method import KNOWN, Phase
from fedlth.models.layout import Layout, Params
from fedlth.storage.records import party
from fedlth.storage.server_state import ServerState
from fedlth.wire import mask as bitmap
from fedlth.wire import payload
from fedlth.wire.codec import RAW, Codec
from fedlth.wire.payload import Content
from fedlth.wire.reference import Reference


def broadcast(
    kind: str, name: str, theta: Params, layout: Layout, codec: Codec = RAW, mask: np.ndarray | None = None, *,
    known: bool = False, start: Reference | None = None,
) -> Message:  # fmt: skip
    """Encode the global state once, for everyone; of a model with a mask, what it keeps.

    `known` leaves the mask's bits out: for those who hold this mask. `start` are floats that everyone holds.
    """
    content = Content(np.ones(layout.num_prunable, bool) if mask is None else mask, theta.floats, theta.ints)
    return Message(kind, name, _coded(kind, layout, content, codec, mask if known else None, start), broadcast=True)


def slice_for(
    name: str, theta: Params, layout: Layout, mask: np.ndarray, codec: Codec = RAW, *, alone: bool = False,
    start: Reference | None = None,
) -> Message:  # fmt: skip
    """Encode what a client's last committed mask holds; the client has that mask, so no bits of it are sent.

    `alone` sends the mask too, to a client that has lost it. `start` are floats that the client holds.
    """
    content, known = Content(mask, theta.floats, theta.ints), None if alone else mask
    return Message("values", name, _coded("values", layout, content, codec, known, start))


def _coded(
    kind: str, layout: Layout, content: Content, codec: Codec, known: np.ndarray | None, start: Reference | None
) -> bytes:
    """Return a payload, against `start` where that is shorter: numbers that have left it far behind are longer so."""
    data = payload.encode(kind, layout, content, codec=codec, known_mask=known, reference=start)
    numbers = layout.num_floats - content.mask.size + int(np.count_nonzero(content.mask))
    if start is None or len(data) < 3 * numbers:  # of 4 bytes a number, as they hardly ever are alone
        return data
    return min(data, payload.encode(kind, layout, content, codec=codec, known_mask=known), key=len)


def mask_name(mask: np.ndarray | None) -> str:
    """Return the name of a mask, "" for one that holds everything."""
    return "" if mask is None or mask.all() else bitmap.digest(mask)


@dataclass(frozen=True)
class Downloads:
    """One round's downloads. The global state is encoded once for everyone, and decoded here at most once.

    A global state with a mask is encoded twice: with the mask's bits, and for those who hold it without. `masks` are
    what each client shares, where the phase sends slices; `rewind_targets` earlier global models by name; `holds` the
    name of everyone's mask that a client was last sent; `published` what clients send to one another, where the phase
    has a topology.
    """

    experiment: Experiment
    phase: Phase
    round: int
    state: ServerState
    masks: Mapping[int, np.ndarray]
    rewind_targets: Mapping[str, Params]
    published: Published
    holds: Mapping[int, str] = field(default_factory=dict)

    def inbox(self, client: int, *, alone: bool = False) -> tuple[Message, ...]:
        """Return what a client is sent; `alone` means that nothing in it depends on what the client holds."""
        if self.phase.topology is not None:
            return self._relayed(client, alone)
        if self.phase.down == "nothing":
            return ()
        mask = self.masks.get(client)
        first = self._apart if alone else self._first
        if mask is None:
            known = not alone and self._knows(client)
            return (self._short if known else first, *self._also, *self._targets(alone))
        theta, layout, codec = self.state.theta, self.experiment.layout, self.experiment.codec.down
        start = None if alone else self.experiment.known_start
        # The client cannot know what the server cuts, or whose mask it is handed: the bits go along.
        bits = alone or self.phase.cut is not None or self.phase.hand is not None
        own = slice_for(THETA_G, theta, layout, mask, codec, alone=bits, start=start)
        whole = (replace(first, kind="evaluation"),) if self.experiment.needs_whole(self.phase) else ()
        return (own, *whole, *self._targets(alone))

    def held(self, client: int, inbox: Sequence[Message]) -> Held:
        """Return what a client's answer may refer to: its download, decoded as the client decoded it.

        In step 2 a mask comes on its own, not as a change of what the client shared before.
        """
        if self.phase.topology is not None:
            return Held(None, None)  # it will be read by clients that hold nothing of this one's
        known = self.mask(client)
        floats = None
        if inbox and self.experiment.codec.refers and self.phase.update.sends:
            floats = self._whole if inbox[0].broadcast else self._decoded(inbox[0], known)
        if self.phase.in_waves:
            return Held(None, floats)
        draw = rng.stream(self.experiment.study.seed, f"{self.phase.name}/{KNOWN}", self.round, client)
        sent = self.state.theta.floats if floats is None else floats.floats  # without a reference nothing was coded
        return Held(self.phase.known(draw, known, sent), floats)

    def mask(self, client: int) -> np.ndarray | None:
        """Return the mask of what a client is sent, None for all."""
        return self.masks.get(client, self.state.mask)

    def _relayed(self, client: int, alone: bool) -> tuple[Message, ...]:
        """Return what a client's neighbours published, under their names; `alone`: what it published itself, too."""
        senders = self.published.heard(self.phase, self.round, client)
        if alone and self.published.has(client):
            senders = (client, *senders)
        needs = self.experiment.needs_whole(self.phase)
        whole = (replace(self._apart if alone else self._first, kind="evaluation"),) if needs else ()
        return (*(Message("values", party(s), self.published.payload(s), broadcast=True) for s in senders), *whole)

    @cached_property
    def name(self) -> str:
        """The name of everyone's mask, "" where everyone keeps everything."""
        return mask_name(self.state.mask)

    def _knows(self, client: int) -> bool:
        """Say whether a client holds everyone's mask, so that no bit of it must be sent."""
        if not self.name or self.phase.down != "broadcast":
            return False
        held = self.holds.get(client)
        return self.name == (mask_name(self.experiment.start_mask) if held is None else held)

    @cached_property
    def _first(self) -> Message:
        return self._whole_state(known=False)

    @cached_property
    def _apart(self) -> Message:
        """The same for a client that turned out to hold nothing, or another theta_0."""
        return self._first if self.experiment.known_start is None else self._whole_state(known=False, apart=True)

    @cached_property
    def _short(self) -> Message:
        return self._whole_state(known=True)

    def _whole_state(self, *, known: bool, apart: bool = False) -> Message:
        experiment, state, kind = self.experiment, self.state, self.experiment.method.space.kind
        start = None if apart else experiment.known_start
        return broadcast(
            kind, THETA_G, state.theta, experiment.layout, experiment.codec.down, state.mask, known=known, start=start
        )

    @cached_property
    def _also(self) -> tuple[Message, ...]:
        """What the server's rule remembers and clients need, of what everyone keeps; nothing before it is there."""
        layout, codec, mask = self.experiment.layout, self.experiment.codec.down, self.state.mask
        memory, found = self.state.memory, []
        for name in self.phase.also:
            if name in memory:
                if memory[name].shape != (layout.num_floats,):
                    raise ValueError(f"memory {name} must be ({layout.num_floats},), got {memory[name].shape}")
                vector = Params(memory[name], np.zeros(layout.num_ints, np.int64))
                # Everyone's mask comes before it in the same inbox.
                found.append(broadcast("values", name, vector, layout, codec, mask, known=True))
        return tuple(found)

    def _targets(self, alone: bool) -> tuple[Message, ...]:
        """Return earlier global models, as far as everyone keeps them now."""
        return self._targets_apart if alone and self.experiment.known_start is not None else self._targets_near

    @cached_property
    def _targets_near(self) -> tuple[Message, ...]:
        return self._earlier(self.experiment.known_start)

    @cached_property
    def _targets_apart(self) -> tuple[Message, ...]:
        return self._earlier(None)

    def _earlier(self, start: Reference | None) -> tuple[Message, ...]:
        layout, codec, mask = self.experiment.layout, self.experiment.codec.down, self.state.mask
        known = self.phase.down == "broadcast"  # that mask comes before them in the same inbox
        return tuple(
            broadcast("values", n, p, layout, codec, mask, known=known, start=start)
            for n, p in self.rewind_targets.items()
        )

    @cached_property
    def _whole(self) -> Reference | None:
        return self._decoded(self._first, None)

    def _decoded(self, own: Message, known: np.ndarray | None) -> Reference | None:
        layout, codec, start = self.experiment.layout, self.experiment.codec.down, self.experiment.known_start
        return payload.decode(own.payload, own.kind, layout, codec=codec, known_mask=known, reference=start).reference
