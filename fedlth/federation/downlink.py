"""What a step sends down: each client's inbox, and what its answer may refer to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from fedlth.federation import server
from fedlth.federation.jobs import Message
from fedlth.methods.method import Recipe
from fedlth.models.layout import Layout, Params
from fedlth.wire import payload
from fedlth.wire.codec import Codec
from fedlth.wire.reference import Reference


@dataclass(frozen=True)
class Downlink:
    """One step's downloads. The global state is encoded once for everyone, and decoded here at most once.

    `masks` are the server's copies of its clients' last committed masks, where the recipe sends slices. `whole` says
    that controls need the whole global model beside a client's slice. `anchors` are earlier global models by name.
    """

    recipe: Recipe
    layout: Layout
    codec: Codec
    theta: Params
    masks: Mapping[int, np.ndarray]
    anchors: Mapping[str, Params]
    whole: bool

    def inbox(self, client: int, *, alone: bool = False) -> tuple[Message, ...]:
        """Return what a client is sent; `alone` means that nothing in it leans on what the client holds."""
        if not self.recipe.federated:
            return ()
        mask = self.masks.get(client)
        if mask is None:
            return self._shared
        own = server.slice_for("theta_g", self.theta, self.layout, mask, self.codec, alone=alone)
        controls = [replace(m, kind="evaluation") for m in self._shared[:1] if self.whole]
        return (own, *controls, *self._shared[1:])

    def held(self, client: int, inbox: tuple[Message, ...], *, mask: bool) -> server.Held:
        """Return what a client's answer may refer to: its download, decoded as the client decoded it.

        `mask` False leaves the mask out: a ticket is sent on its own, not as a change of step 1's last mask.
        """
        known = self.masks.get(client)
        floats = None
        if inbox and self.codec.refers:
            floats = self._whole if inbox[0].broadcast else self._decoded(inbox[0], known)
        return server.Held(known if mask else None, floats)

    @cached_property
    def _shared(self) -> tuple[Message, ...]:
        kind = "values" if self.recipe.space == "weights" else "scores"
        first = server.broadcast(kind, "theta_g", self.theta, self.layout, self.codec)
        rest = (server.broadcast("values", n, p, self.layout, self.codec) for n, p in self.anchors.items())
        return (first, *rest)

    @cached_property
    def _whole(self) -> Reference | None:
        return self._decoded(self._shared[0], None)

    def _decoded(self, own: Message, known: np.ndarray | None) -> Reference | None:
        return payload.decode(own.payload, own.kind, self.layout, codec=self.codec, known_mask=known).reference
