"""Trackers: a run's records for TensorBoard, W&B or MLflow, after every commit. None of them may cost the run.

The run folder stays the record; a tracker is a window on it. `trackers.json` in it says which run of the tool is this
one, and how many commits it has been given: a resume goes on there.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

from fedlth.errors import StudyError
from fedlth.storage import store
from fedlth.storage.header import read_header
from fedlth.storage.json_lines import read_object
from fedlth.storage.mlflow import MLflow
from fedlth.storage.records import EVALUATE, CurveRow, Digests, MetricRow, RoundRow, read_log
from fedlth.storage.tensorboard import TensorBoard
from fedlth.storage.wandb import WandB
from fedlth.study.parts import make
from fedlth.study.schema import Study

log = logging.getLogger(__name__)

FILE = "trackers.json"
PATIENCE_S = 90.0  # for one call; who takes longer is given up
Scalars = dict[str, float]


class Tracked(Protocol):
    """One run as a tool has it. `given` is how many commits it has already, where the tool itself can say so."""

    @property
    def id(self) -> str: ...

    @property
    def given(self) -> int | None: ...

    def log(self, commit: int, scalars: Mapping[str, float], /) -> None: ...

    def end(self, scalars: Mapping[str, float], texts: Mapping[str, str], /) -> None:
        """Take a finished run's results and close."""
        ...

    def stop(self) -> None:
        """Close a run that did not finish; it may be opened again."""
        ...


class Tracker(Protocol):
    """A tool; a frozen value."""

    def require(self) -> None:
        """Raise StudyError where it is not installed."""
        ...

    def open(self, run: Path, name: str, config: Mapping[str, Any], id: str, /) -> Tracked:
        """Begin the run in the tool, or go on with the one called `id`. `config` is what decides the numbers."""
        ...


TRACKERS: Mapping[str, Callable[..., Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


def trackers_of(study: Study) -> dict[str, Tracker]:
    """Return a study's trackers by name; raise StudyError naming the place."""
    names = [str(spec.get("name")) for spec in study.trackers]
    if len(set(names)) < len(names):
        raise StudyError(f"trackers: each must be given once, got {names}")
    made = [make(TRACKERS, spec, f"trackers[{i}]", has="open(run, ...)") for i, spec in enumerate(study.trackers)]
    return dict(zip(names, made, strict=True))


@dataclass
class Tracking:
    """The trackers of a run in progress, those that still answer."""

    run: Path
    study: Study
    open: dict[str, Tracked] = field(default_factory=dict)
    given: dict[str, int] = field(default_factory=dict)

    def begin(self) -> None:
        """Open every tracker, and give it the commits that it does not have; their rows are all there are."""
        trackers = trackers_of(self.study)
        if not trackers:
            return
        known = read_object(self.run / FILE) if (self.run / FILE).exists() else {}
        commits = _commits(read_log(self.run, RoundRow)[0], read_log(self.run, CurveRow)[0], one_loss=self._one_loss)
        config = json.loads(self.study.science())
        name = f"{self.study.study} seed {self.study.seed}"
        for tool, tracker in trackers.items():
            self._open(tool, tracker, name, config, known.get(tool, {}))
        for commit, scalars in enumerate(commits, 1):
            self._log(commit, scalars)

    @cached_property
    def _one_loss(self) -> bool:
        """Say whether all clients' losses are of one kind, so that they have a mean."""
        names = [task.name for task in read_header(self.run).tasks]
        specs = [self.study.tasks.get(name) for name in names]
        losses = [
            (self.study.train.loss if spec is None or spec.loss is None else spec.loss, spec.targets if spec else None)
            for spec in specs
        ]
        return all(loss == losses[0] for loss in losses)

    def _open(
        self, tool: str, tracker: Tracker, name: str, config: Mapping[str, Any], known: Mapping[str, Any]
    ) -> None:  # fmt: skip
        opened: list[Tracked] = []
        if self._tried(tool, lambda: opened.append(tracker.open(self.run, name, config, known.get("id", "")))):
            self.open[tool] = tracked = opened[0]  # not in there: one that comes late stays outside
            self.given[tool] = known.get("commits", 0) if tracked.given is None else tracked.given
            self._remember()

    def committed(self, commit: int, row: RoundRow, curve: Sequence[CurveRow]) -> None:
        """Give every tracker one commit, counted from 1."""
        if self.open:
            self._log(commit, _scalars(row, curve, one_loss=self._one_loss))

    def _log(self, commit: int, scalars: Scalars) -> None:
        behind = [tool for tool in self.open if self.given[tool] < commit]
        for tool in behind:
            if self._tried(tool, lambda tracked=self.open[tool]: tracked.log(commit, scalars)):  # type: ignore[misc]
                self.given[tool] = commit
        if behind:
            self._remember()

    def end(self, digests: Digests) -> None:
        """Give every tracker the results of a run that has finished, and close it."""
        scalars = _final(read_log(self.run, MetricRow)[0], one_loss=self._one_loss) if self.open else {}
        for tool, tracked in list(self.open.items()):
            self._tried(tool, lambda tracked=tracked: tracked.end(scalars, _texts(digests)))  # type: ignore[misc]
        self.open.clear()

    def stop(self) -> None:
        """Close what is still open, of a run that goes on another time."""
        for tool, tracked in list(self.open.items()):
            self._tried(tool, tracked.stop)
        self.open.clear()

    def _tried(self, tool: str, act: Callable[[], None]) -> bool:
        """Say whether a tool did it; one that fails is let go with one line."""
        error = bounded(act)
        if error:
            self.open.pop(tool, None)
            log.info(f"note: tracker {tool}: {error}; the run goes on and is not tracked there from here on")
        return not error

    def _remember(self) -> None:
        known = read_object(self.run / FILE) if (self.run / FILE).exists() else {}
        known |= {tool: {"id": tracked.id, "commits": self.given[tool]} for tool, tracked in self.open.items()}
        store.write_atomic(self.run / FILE, json.dumps(known, indent=1).encode())


def bounded(act: Callable[[], None], patience_s: float = PATIENCE_S) -> str:
    """Run a tool's call; return "", or in one line why there is nothing to wait for any more.

    In a thread of its own: a call that hangs on a network cannot be ended, only left. What it warns of is the tool's.
    """
    failed: list[str] = []

    def call() -> None:
        try:
            act()
        except (Exception, SystemExit) as error:  # whatever a tool may raise
            failed.append(" ".join(f"{type(error).__name__}: {error}".split())[:200])

    thread = threading.Thread(target=call, daemon=True)
    with warnings.catch_warnings():  # out here: filters are the whole process's, and a call that hangs ends whenever
        warnings.simplefilter("ignore")
        thread.start()
        thread.join(patience_s)
    return f"no answer for {patience_s:g} s" if thread.is_alive() else "".join(failed)


def _commits(rounds: Sequence[RoundRow], curve: Iterable[CurveRow], *, one_loss: bool) -> list[Scalars]:
    """Return the scalars of every commit, in order; an evaluation is of the round before it."""
    of: dict[tuple[str, int], list[CurveRow]] = {}
    for one in curve:
        of.setdefault((one.phase, one.round), []).append(one)
    found, before = [], ("", 0)
    for row in rounds:
        found.append(_scalars(row, of.get(before, []) if row.phase == EVALUATE else [], one_loss=one_loss))
        before = row.phase, row.round
    return found


def _scalars(row: RoundRow, curve: Sequence[CurveRow], *, one_loss: bool) -> Scalars:
    """Return what a tracker shows of one commit; of the curve, means over clients."""
    found: Scalars = {"up_bytes": row.up_bytes, "down_bytes": row.down_bytes, "failed": len(row.failed)}
    found |= {name: seen for name in ("val_accuracy", "val_metric") if (seen := getattr(row, name)) is not None}
    found = {f"{row.phase}/{name}": float(value) for name, value in found.items()}
    for arm in dict.fromkeys(one.arm for one in curve):
        seen = [one for one in curve if one.arm == arm and not one.unseen]
        unseen = [one for one in curve if one.arm == arm and one.unseen]
        found |= {f"curve/{arm}/{name}": value for name, value in _means(seen, one_loss).items()}
        found |= {f"curve/{arm}/unseen_{name}": value for name, value in _means(unseen, one_loss).items()}
    return found


def _means(rows: Sequence[CurveRow | MetricRow], one_loss: bool) -> Scalars:
    """Return the means over clients of what every one of them has; tasks of different losses have no mean loss."""
    always = ("accuracy", "loss") if one_loss else ("accuracy",)
    names = {f"{part}_{name}": (part, name) for part in ("val", "test") for name in always}
    for part in ("val", "test"):
        names |= {f"{part}_{name}": (part, name) for row in rows[:1] for name in getattr(row, f"{part}_metrics")}
    values = {told: [row.value(*place) for row in rows] for told, place in names.items()}
    return {told: math.fsum(v) / len(v) for told, v in values.items() if v and all(map(math.isfinite, v))}


def _final(metrics: Iterable[MetricRow], *, one_loss: bool) -> Scalars:
    """Return the means over clients by arm and target density."""
    of: dict[tuple[str, float], list[MetricRow]] = {}
    for row in metrics:
        of.setdefault((row.arm, row.target_density), []).append(row)
    return {
        f"final/{arm}/{density:g}/{name}": value
        for (arm, density), rows in of.items()
        for name, value in _means(rows, one_loss).items()
    }


def _texts(digests: Digests) -> dict[str, str]:
    """Return the digests of a run's end; those of all tickets as one."""
    tickets = json.dumps(sorted(digests.tickets.items())).encode()
    return {"digest/theta_g": digests.theta_g, "digest/tickets": blake2b(tickets, digest_size=8).hexdigest()}
