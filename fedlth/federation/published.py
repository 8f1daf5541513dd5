"""What clients last published to one another: their accepted, committed updates, byte for byte as they were sent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from fedlth.experiment.experiment import Experiment
from fedlth.methods.aggregate import Contribution, join
from fedlth.methods.method import Phase
from fedlth.storage.run_folder import RunFolder
from fedlth.storage.server_state import ServerState
from fedlth.wire import payload
from fedlth.wire.payload import Content

KEPT_BYTES = 1 << 28  # of payloads read once for several receivers


@dataclass(frozen=True)
class Published:
    """The last publication of each client; `versions` name those that are current, none of who has not published."""

    experiment: Experiment
    folder: RunFolder
    versions: Mapping[str, str]
    _read: dict[int, bytes] = field(default_factory=dict)

    def has(self, client: int) -> bool:
        return str(client) in self.versions

    def payload(self, client: int) -> bytes:
        """Return what a client published."""
        if client in self._read:
            return self._read[client]
        data = self.folder.published.get(client, self.versions[str(client)])
        assert data is not None, "a version is never empty"
        if sum(map(len, self._read.values())) + len(data) <= KEPT_BYTES:
            self._read[client] = data
        return data

    def content(self, client: int) -> Content:
        """Return it as every receiver decodes it."""
        experiment = self.experiment
        return payload.decode(self.payload(client), "values", experiment.layout, codec=experiment.codec)

    def heard(self, phase: Phase, round: int, client: int) -> tuple[int, ...]:
        """Return whose publications a client gets in a round: its senders that have published."""
        return tuple(filter(self.has, self.experiment.senders(phase, round, client)))

    def sent_bytes(self, phase: Phase, round: int, receivers: Iterable[int]) -> Mapping[int, int]:
        """Return the bytes that each client sends to these receivers."""
        found: dict[int, int] = {}
        for receiver in receivers:
            for sender in self.heard(phase, round, receiver):
                found[sender] = found.get(sender, 0) + len(self.payload(sender))
        return found

    def consensus(self, phase: Phase, state: ServerState) -> ServerState:
        """Return what the phase's rule makes of all that is published: for evaluation alone, nobody sends for it."""
        assert phase.join is not None
        splits = self.experiment.task.splits.clients
        clients = (client for client in range(len(splits)) if self.has(client))
        came = (Contribution(client, len(splits[client].train), self.content(client)) for client in clients)
        return join(phase.join, state, came, self.experiment.layout)
