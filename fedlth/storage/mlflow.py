"""A run in MLflow: a tracking server, or a local store."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fedlth.errors import require

T = TypeVar("T")

COMMITS = "commits"  # the metric by which a resumed run knows what it has been given
# What a call may hold: of a parameter's value, of a name, parameters, metrics.
LONGEST, LONGEST_NAME, AT_ONCE, METRICS_AT_ONCE = 6000, 250, 100, 1000


@dataclass(frozen=True)
class MLflow:
    """MLflow; `uri` names the store, by default MLflow's own choice (MLFLOW_TRACKING_URI)."""

    uri: str | None = None
    experiment: str = "fedlth"

    def require(self) -> None:
        require("trackers: mlflow", "mlflow", extra="mlflow")

    def open(self, run: Path, name: str, config: Mapping[str, Any], id: str, /) -> MLflowRun:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        for talker in ("mlflow", "alembic"):  # they print how they set up a store
            logging.getLogger(talker).setLevel(logging.WARNING)
        client = MlflowClient(tracking_uri=self.uri)
        if id:
            client.update_run(id, status="RUNNING")
            return MLflowRun(client, id, int(client.get_run(id).data.metrics.get(COMMITS, 0)))
        found = client.get_experiment_by_name(self.experiment)
        experiment = found.experiment_id if found else client.create_experiment(self.experiment)
        made = client.create_run(experiment, run_name=name).info.run_id
        params = [Param(key, value[:LONGEST]) for key, value in named(_flat(config))]
        for at in range(0, len(params), AT_ONCE):
            client.log_batch(made, params=params[at : at + AT_ONCE])
        return MLflowRun(client, made, 0)


@dataclass
class MLflowRun:
    """An open run; a commit is one call, so that the store has all of it or nothing.

    Of one with more metrics than a call may hold, the last call has COMMITS: a resume gives all of it again.
    """

    client: Any
    id: str
    given: int | None

    def log(self, commit: int, scalars: Mapping[str, float], /) -> None:
        self._log(commit, {**scalars, COMMITS: commit})
        self.given = commit

    def _log(self, commit: int, scalars: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(key, value, now, commit) for key, value in named(list(scalars.items()))]
        for at in range(0, len(metrics), METRICS_AT_ONCE):
            self.client.log_batch(self.id, metrics=metrics[at : at + METRICS_AT_ONCE])

    def end(self, scalars: Mapping[str, float], texts: Mapping[str, str], /) -> None:
        self._log(self.given or 0, scalars)
        for name, text in texts.items():
            self.client.set_tag(self.id, name, text)
        self.client.set_terminated(self.id)

    def stop(self) -> None:
        self.client.set_terminated(self.id, status="KILLED")


def named(pairs: Sequence[tuple[str, T]]) -> list[tuple[str, T]]:
    """Return pairs under names that MLflow takes, each once: of names that become equal, later ones get a number."""
    found: dict[str, T] = {}
    for key, value in pairs:
        name = plain = re.sub(r"[^\w./ :-]", "_", key)[:LONGEST_NAME]
        number = 1
        while name in found:
            number += 1
            name = f"{plain[: LONGEST_NAME - 6]}_{number}"
        found[name] = value
    return list(found.items())


def _flat(config: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    """Return a config as dotted keys and text, lists and the user's own mappings as JSON."""
    found: list[tuple[str, str]] = []
    for key, value in config.items():
        if isinstance(value, dict) and value and not before:
            found += _flat(value, f"{key}.")
        else:
            found.append((f"{before}{key}", value if isinstance(value, str) else json.dumps(value)))
    return found
