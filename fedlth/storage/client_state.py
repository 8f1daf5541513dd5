"""What a client keeps between its visits: bit-packed masks and float vectors, as bytes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from fedlth.storage import store


@dataclass(frozen=True)
class ClientState:
    """A client's state as a value. `masks` are bool, `vectors` of numbers, `visits` counts its own finished rounds."""

    visits: int = 0
    masks: dict[str, np.ndarray] = field(default_factory=dict)
    vectors: dict[str, np.ndarray] = field(default_factory=dict)

    def with_(
        self, *, masks: dict[str, np.ndarray] | None = None, vectors: dict[str, np.ndarray] | None = None
    ) -> ClientState:
        """Return a copy with some masks and vectors replaced."""
        return replace(self, masks={**self.masks, **(masks or {})}, vectors={**self.vectors, **(vectors or {})})

    def without(self, name: str) -> ClientState:
        """Return a copy without the mask and the vector of this name."""
        return replace(
            self,
            masks={k: v for k, v in self.masks.items() if k != name},
            vectors={k: v for k, v in self.vectors.items() if k != name},
        )

    def to_bytes(self) -> bytes:
        arrays = {f"mask.{k}": np.packbits(v) for k, v in self.masks.items()}
        arrays |= {f"vector.{k}": v for k, v in self.vectors.items()}
        sizes = {k: int(v.size) for k, v in self.masks.items()}
        return store.pack(arrays, {"visits": self.visits, "sizes": sizes})

    @staticmethod
    def from_bytes(data: bytes | None) -> ClientState:
        if data is None:
            return ClientState()
        arrays, meta = store.unpack_whole(data)  # every store checks what it reads
        sizes: dict[str, int] = meta["sizes"]
        masks = {k: np.unpackbits(arrays[f"mask.{k}"], count=n).astype(bool) for k, n in sizes.items()}
        vectors = {k[len("vector.") :]: v for k, v in arrays.items() if k.startswith("vector.")}
        return ClientState(int(meta["visits"]), masks, vectors)
