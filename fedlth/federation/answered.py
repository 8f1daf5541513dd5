"""Answers of a wave that is not committed yet: after a stop, who has answered need not train again."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedlth.federation.jobs import Job, Message, Reply
from fedlth.storage import store

WORTH_S = 1.0  # a client step that took less is sooner done again than read
PLAIN = ("round", "client", "seconds", "worker", "device", "flops", "alive_flops", "injected")


@dataclass(frozen=True)
class Answered:
    """One file a client, under the name of the state that its answer makes; gone with the wave's commit.

    An answer is believed only for the very job that it answered: study, state, inbox.
    """

    root: Path

    def put(self, job: Job, reply: Reply) -> None:
        if reply.seconds < WORTH_S:
            return
        arrays = {f"message.{i}": _bytes(m.payload) for i, m in enumerate(reply.outbox)}
        if reply.state is not None:
            arrays["state"] = _bytes(reply.state)
        told = {
            **{name: getattr(reply, name) for name in PLAIN}, "job": _name(job), "work": list(reply.work),
            "outbox": [[m.kind, m.name, m.broadcast] for m in reply.outbox],
        }  # fmt: skip
        store.write_atomic(self._path(job), store.pack(arrays, told))

    def get(self, job: Job) -> Reply | None:
        """Return the answer to this job, None where there is none."""
        path = self._path(job)
        if not path.is_file():
            return None
        try:
            arrays, told = store.unpack(path.read_bytes())
        except ValueError:  # damaged: the job is done again
            return None
        if told["job"] != _name(job) or not told.keys() >= set(PLAIN):  # another job's, or an earlier version's
            return None
        sent = enumerate(told["outbox"])
        outbox = tuple(Message(kind, name, arrays[f"message.{i}"].tobytes(), one) for i, (kind, name, one) in sent)
        state = arrays["state"].tobytes() if "state" in arrays else None
        plain = {name: told[name] for name in PLAIN}
        return Reply(outbox=outbox, state=state, work=tuple(told["work"]), **plain)

    def clear(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)

    def _path(self, job: Job) -> Path:
        return self.root / f"{job.phase}-{job.round}" / f"{job.client}.safetensors"


def _bytes(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def _name(job: Job) -> str:
    told = [job.study, job.phase, job.round, job.client, job.version, [[m.kind, m.name] for m in job.inbox]]
    state = hashlib.blake2b(json.dumps(told).encode(), digest_size=16)
    for message in job.inbox:
        state.update(message.payload)
    return state.hexdigest()
