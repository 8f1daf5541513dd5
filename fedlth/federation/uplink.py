"""A client's update on its way up: what it may refer to, and what a lossy codec still owes the server."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fedlth.models.layout import Layout
from fedlth.storage.client_state import ClientState
from fedlth.wire import payload
from fedlth.wire.codec import Codec
from fedlth.wire.payload import Content
from fedlth.wire.reference import Reference


@dataclass(frozen=True)
class Uplink:
    """What an upload may refer to: mask and floats of the same visit's decoded download, which the server sent."""

    codec: Codec
    known_mask: np.ndarray | None = None
    reference: Reference | None = None

    def encode(self, kind: str, layout: Layout, content: Content) -> bytes:
        return payload.encode(
            kind, layout, content, codec=self.codec, known_mask=self.known_mask, reference=self.reference
        )

    def update(self, kind: str, layout: Layout, content: Content, state: ClientState) -> tuple[bytes, ClientState]:
        """Return the payload of an update, and the state after it.

        Under a codec with error feedback the client adds what its last update left out, and keeps what this one
        leaves out (Seide et al., 1-bit SGD, Interspeech 2014; Karimireddy et al., ICML 2019, arXiv 1901.09847). What
        is owed on a weight that has left the mask is forgotten with it.
        """
        if not self.codec.feedback or content.floats is None or self.reference is None:
            return self.encode(kind, layout, content), state
        wanted = content.floats.copy()
        places = _places(content.mask, layout)
        if "owed" in state.masks:
            owed = np.zeros_like(wanted)
            owed[_places(state.masks["owed"], layout)] = state.vectors["owed"]
            wanted[places] += owed[places]
        data = self.encode(kind, layout, replace(content, floats=wanted))
        got = payload.decode(data, kind, layout, codec=self.codec, known_mask=self.known_mask, reference=self.reference)
        assert got.floats is not None
        left = (wanted - got.floats)[places]
        return data, state.with_(masks={"owed": content.mask}, vectors={"owed": left})


def _places(mask: np.ndarray, layout: Layout) -> np.ndarray:
    """Return (num_floats,) bool: what a payload with this mask carries."""
    return np.concatenate((mask, np.ones(layout.num_floats - mask.size, bool)))
