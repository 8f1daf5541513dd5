"""A lottery study that runs in a second: the made-up images of tests/tiny.py and a small network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedlth.lab import runner, study
from fedlth.lab.bench import Bench, open_bench
from fedlth.lab.study import Lottery


def tree(**sections: Any) -> dict[str, Any]:
    return {
        "lottery": "tiny",
        "seeds": [0],
        "data": {"name": "tests.tiny:images", "validation": 60},
        "model": {"name": "mlp", "options": {"hidden": [12, 8]}},
        "train": {"iterations": 20, "batch_size": 16, "lr": 0.1, "evaluate_every": 5},
        "searches": {"imp": {"rounds": 3}},
        "workers": 1,
        **sections,
    }


def made(**sections: Any) -> Lottery:
    return study.build(tree(**sections))


def bench(folder: Path | None = None, seed: int = 0, **sections: Any) -> Bench:
    return open_bench(made(**sections).science(), seed, None if folder is None else str(folder))


def run(out: Path, **sections: Any) -> bytes:
    """Run and return the result file's bytes."""
    return (runner.run(made(**sections), out) / "results.jsonl").read_bytes()
