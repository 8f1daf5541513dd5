"""What the Ray tests share: a small study on the faulty factory, run through session.start into a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedlth.engines.inprocess import InProcess
from fedlth.engines.ray import RayEngine
from fedlth.federation.jobs import Job
from fedlth.study.schema import Study, build
from tests import tiny

EQUAL = ("ledger.jsonl", "metrics.jsonl", "rounds.jsonl", "digests.json")


def study_of(*, fault: str = "", marker: str = "", once: str = "", **more: Any) -> Study:
    """Return a study of four clients, of which client 2 meets `fault`; the clients after it meet further ones.

    `once`: what ends a worker is met once; files whose names begin so say that it was.
    """
    count = more.get("clients", {}).get("count", 4)
    tree: dict[str, Any] = {
        "data": {"name": "faulty:data", "options": {"fault": fault, "clients": count}},
        "model": {"name": "faulty:Net", "options": {"marker": marker, "once": once}},
        "partition": "natural",
        "clients": {"count": 4, "test_samples": 8},
        "method": "fedavg",
        "federate": {"rounds": 1, "clients_per_round": 4},
    }
    return build({**tree, **more})


def engine_of(study: Study) -> RayEngine:
    return RayEngine(study.ray, job_timeout_s=study.job_timeout_s, device=study.device)


def run(study: Study, out: Path) -> Path:
    """Run on the engine that the study names."""
    tiny.run(study, out, engine=engine_of(study) if study.engine == "ray" else InProcess())
    return out


def rows(out: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]


def map_one(study: Study, engine: RayEngine | None = None) -> None:
    """Map one empty job and close."""
    engine = engine or engine_of(study)
    try:
        list(engine.map([Job(study=study.science(), phase="federate", round=1, client=0, inbox=())]))
    finally:
        engine.close()
