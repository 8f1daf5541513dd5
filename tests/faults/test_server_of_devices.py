"""The server of a run on devices: it does no work that only devices do, and names no ticket that is nowhere."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from fedlth.federation import session
from fedlth.federation.jobs import Failure, Job, Reply
from fedlth.storage.store import Store
from tests import tiny


class Devices(tiny.Lists):
    """Clients that keep their own state, in a folder each; `fail` names those that cannot do step 2."""

    holds_state = True

    def __init__(self, root: Path, fail: Iterable[int] = ()) -> None:
        self.store, self.fail = Store(root), set(fail)

    def run(self, jobs: list[Job]) -> list[Reply | Failure]:
        return [self._one(job) for job in jobs]

    def _one(self, job: Job) -> Reply | Failure:
        if job.phase == "personalise" and job.client in self.fail:
            return Failure(round=job.round, client=job.client, kind="raised", reason="ValueError: no")
        state = self.store.held(job.client, job.version)
        (answer,) = super().run([Job(**{**vars(job), "state": state})])
        if isinstance(answer, Reply) and answer.state is not None:
            self.store.put(job.client, f"{job.phase}-{job.round}", answer.state)
        return answer


def test_only_tickets_that_there_are_stay_on_the_devices(tmp_path: Path) -> None:
    """A client that took part in rounds and failed in step 2 has a state, and no ticket."""
    made = tiny.study(clients={"count": 4, "unseen": 0.0}, federate={"rounds": 1, "clients_per_round": 4})
    said: list[str] = []
    tiny.run(made, tmp_path / "r", engine=Devices(tmp_path / "devices", fail={1}), tell=said.append)
    assert "note: 3 tickets stay with their clients; only their masks' names are here" in said


def test_a_server_compiles_no_kernel_for_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    monkeypatch.setattr("fedlth.kernel.kernel.warm", lambda: called.append(1))
    experiment = tiny.experiment(tiny.study(compute="sparse"))
    session._load_kernel(experiment, Devices(tmp_path))
    assert not called
    session._load_kernel(experiment, tiny.Lists())
    assert called
