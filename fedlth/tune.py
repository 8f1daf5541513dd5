"""Learning rates chosen on validation data before the run, with the same budget for every method."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

from fedlth.config import Study
from fedlth.engines.choose import drive
from fedlth.methods.resolve import KEPT_FIRST, resolve


def tuned(study: Study, out: Path, tell: Callable[[str], None]) -> Study:
    """Return the study with the best of `tune.lr` as `train.lr`; without candidates, the study itself.

    Each candidate runs `tune.rounds` rounds and the whole of step 2 in its own folder under `out`/tune, where it
    can be resumed and read. The mean validation accuracy of the arm that would be kept decides; ties go to the first.
    """
    if not study.tune.lr:
        return study
    resolve(study)
    scores: dict[float, float] = {}
    for lr in study.tune.lr:
        rounds = study.federate.model_copy(update={"rounds": min(study.tune.rounds, study.federate.rounds)})
        trial = study.model_copy(
            update={"train": study.train.model_copy(update={"lr": lr}), "federate": rounds, "tune": type(study.tune)()}
        )
        where = out / "tune" / f"lr-{lr}"
        drive(trial, where, lambda _: None, again=(where / "config.yaml").exists())
        scores[lr] = _val_accuracy(where)
        tell(f"tune: lr {lr}: validation accuracy {100 * scores[lr]:.2f} %")
    best = max(scores, key=lambda lr: scores[lr])
    tell(f"tune: lr {best} chosen")
    (out / "tune" / "chosen.json").write_text(
        json.dumps({"lr": best, "val_accuracy": {str(k): v for k, v in scores.items()}})
    )
    return study.model_copy(update={"train": study.train.model_copy(update={"lr": best}), "tune": type(study.tune)()})


def _val_accuracy(run: Path) -> float:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    for arm in (*KEPT_FIRST, "global"):
        values = [r["val_accuracy"] for r in rows if r["arm"] == arm]
        if values:
            return math.fsum(values) / len(values)
    return -math.inf
