"""What a round sends down: each client's inbox, and what its answer may refer to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from fedlth.experiment.experiment import Experiment
from fedlth.federation.door import Held
from fedlth.federation.jobs import Message
from fedlth.federation.published import Published
from fedlth.methods.client_update import THETA_G
from fedlth.methods.method import Phase
from fedlth.models.layout import Layout, Params
from fedlth.storage.records import party
from fedlth.storage.server_state import ServerState
from fedlth.wire import payload
from fedlth.wire.codec import RAW, Codec
from fedlth.wire.payload import Content
from fedlth.wire.reference import Reference


def broadcast(
    kind: str, name: str, theta: Params, layout: Layout, codec: Codec = RAW, mask: np.ndarray | None = None
) -> Message:
    """Encode the global state once, for everyone; of a model with a mask, what it keeps."""
    content = Content(np.ones(layout.num_prunable, bool) if mask is None else mask, theta.floats, theta.ints)
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
class Downloads:
    """One round's downloads. The global state is encoded once for everyone, and decoded here at most once.

    `masks` are what each client shares, where the phase sends slices; `rewind_targets` earlier global models by name;
    `published` what clients send to one another, where the phase has a topology.
    """

    experiment: Experiment
    phase: Phase
    round: int
    state: ServerState
    masks: Mapping[int, np.ndarray]
    rewind_targets: Mapping[str, Params]
    published: Published

    def inbox(self, client: int, *, alone: bool = False) -> tuple[Message, ...]:
        """Return what a client is sent; `alone` means that nothing in it depends on what the client holds."""
        if self.phase.topology is not None:
            return self._relayed(client, alone)
        if self.phase.down == "nothing":
            return ()
        mask = self.masks.get(client)
        if mask is None:
            return (self._first, *self._also, *self._targets)
        theta, layout, codec = self.state.theta, self.experiment.layout, self.experiment.codec
        alone = alone or self.phase.hand is not None  # the mask is another's
        own = slice_for(THETA_G, theta, layout, mask, codec, alone=alone)
        whole = (replace(self._first, kind="evaluation"),) if self.experiment.needs_whole(self.phase) else ()
        return (own, *whole, *self._targets)

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
        return Held(None if self.phase.in_waves else known, floats)

    def mask(self, client: int) -> np.ndarray | None:
        """Return the mask of what a client is sent, None for all."""
        return self.masks.get(client, self.state.mask)

    def _relayed(self, client: int, alone: bool) -> tuple[Message, ...]:
        """Return what a client's neighbours published, under their names; `alone`: what it published itself, too."""
        senders = self.published.heard(self.phase, self.round, client)
        if alone and self.published.has(client):
            senders = (client, *senders)
        needs = self.experiment.needs_whole(self.phase)
        whole = (replace(self._first, kind="evaluation"),) if needs else ()
        return (*(Message("values", party(s), self.published.payload(s), broadcast=True) for s in senders), *whole)

    @cached_property
    def _first(self) -> Message:
        experiment = self.experiment
        kind = "values" if experiment.method.space == "weights" else "scores"
        return broadcast(kind, THETA_G, self.state.theta, experiment.layout, experiment.codec, self.state.mask)

    @cached_property
    def _also(self) -> tuple[Message, ...]:
        """What the server's rule remembers and clients need, of what everyone keeps; nothing before it is there."""
        layout, codec, mask, memory = self.experiment.layout, self.experiment.codec, self.state.mask, self.state.memory
        found = []
        for name in self.phase.also:
            if name in memory:
                if memory[name].shape != (layout.num_floats,):
                    raise ValueError(f"memory {name} must be ({layout.num_floats},), got {memory[name].shape}")
                vector = Params(memory[name], np.zeros(layout.num_ints, np.int64))
                found.append(broadcast("values", name, vector, layout, codec, mask))
        return tuple(found)

    @cached_property
    def _targets(self) -> tuple[Message, ...]:
        layout, codec, mask = self.experiment.layout, self.experiment.codec, self.state.mask
        return tuple(broadcast("values", n, p, layout, codec, mask) for n, p in self.rewind_targets.items())

    @cached_property
    def _whole(self) -> Reference | None:
        return self._decoded(self._first, None)

    def _decoded(self, own: Message, known: np.ndarray | None) -> Reference | None:
        layout, codec = self.experiment.layout, self.experiment.codec
        return payload.decode(own.payload, own.kind, layout, codec=codec, known_mask=known).reference
