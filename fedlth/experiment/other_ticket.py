"""A ticket of another run as a mask for this one's network: matched by the names of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedlth.errors import StudyError
from fedlth.experiment.saved_ticket import network_of
from fedlth.models.layout import Layout, Params, layout_of, read
from fedlth.storage import ticket_file


@dataclass(frozen=True)
class OtherTicket:
    """A ticket's file, read: the packed bits of each mask by its tensor's name, and what the file says of itself."""

    path: Path
    bits: Mapping[str, np.ndarray]
    metadata: Mapping[str, str]

    def mask(self, name: str, layout: Layout) -> np.ndarray:
        """Return the mask over `layout`, (num_prunable,) bool; raise StudyError where it has none for a tensor.

        `name` is what the user calls the mask. Masks of tensors that `layout` does not have are left out.
        """
        parts = [np.zeros(0, bool)]
        for e in layout.prunable:
            bits = self.bits.get(e.name)
            if bits is None or bits.size != (e.size + 7) // 8:
                got = "none" if bits is None else f"one of about {8 * bits.size}"
                raise StudyError(f"--mask {name}: {self.path}: must mask {e.name}, {e.size} weights, got {got}")
            parts.append(np.unpackbits(bits, count=e.size).astype(bool))
        return np.concatenate(parts)

    def start_differs(self, layout: Layout, theta_0: Params) -> str:
        """Say where its run began with other weights than `theta_0` under these masks; "" where it did not."""
        module = network_of(self.path, self.path.parent.parent, self.metadata)[1]
        theirs = layout_of(module, ())
        values, places = read(module, theirs).floats, {n: e for e in theirs.floats for n in (e.name, *e.aliases)}
        other = [
            e.name for e in layout.prunable
            if e.name not in places or not np.array_equal(values[places[e.name].slice], theta_0.floats[e.slice])
        ]  # fmt: skip
        if not other:
            return ""
        return (
            f"{self.path} is of a run that began with other values in {len(other)} of {len(layout.prunable)} prunable "
            "tensors: a mask of other weights says nothing of these"
        )


def other_ticket(run: Path, client: int | None, seed: int) -> OtherTicket:
    """Return a run's ticket, of `client`, or the only one; of a folder of seeds that of `seed`.

    Raises StudyError where there is none, or no client is named among several.
    """
    if list(run.glob("seed-*/config.yaml")):
        run = run / f"seed-{seed}"
    found = sorted((run / "tickets").glob("client-*.safetensors"))
    if client is not None:
        found = [run / "tickets" / f"client-{client:04d}.safetensors"]
    if len(found) > 1:
        raise StudyError(f"{run / 'tickets'}: expected one ticket, got {len(found)}; RUN:CLIENT names one of them")
    if not found or not found[0].is_file():
        whose = "a ticket" if client is None else f"a ticket of client {client}"
        raise StudyError(f"{run / 'tickets'}: expected {whose}, got none (tickets: none leaves no file)")
    tensors, metadata = ticket_file.read(found[0])
    bits = {name.removesuffix("_mask"): a for name, a in tensors.items() if ticket_file.is_mask(name, a)}
    return OtherTicket(found[0], bits, metadata)
