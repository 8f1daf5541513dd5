"""A bench that runs in seconds: the tests' tiny study, two methods and the baseline that is added, two partitions."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import yaml

from fedlth.bench import command
from tests import tiny

STUDY = {k: v for k, v in tiny.tree(workers=1).items() if k not in ("study", "method", "partition")}


def tree(**sections: Any) -> dict[str, Any]:
    """Return the bench as a plain tree; sections replace those that it has."""
    return {
        "bench": "tiny",
        "study": STUDY,
        "methods": {"fedavg": {}, "lotteryfl": tiny.METHODS["lotteryfl"]},
        "partitions": {"iid": {"partition": "iid"}, "skewed": {"partition": {"name": "dirichlet", "alpha": 0.3}}},
        "seeds": [0, 1],
        "parallel": 2,
        **sections,
    }


def write(folder: Path, **sections: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "bench.yaml"
    file.write_text(yaml.safe_dump(tree(**sections)))
    return file


def run(file: Path, out: Path, *, only: str | None = None, dry_run: bool = False, report_only: bool = False) -> Path:
    """Run a bench as the command line does and return its folder."""
    command.bench([file], Namespace(out=out, only=only, dry_run=dry_run, report_only=report_only))
    return out / "tiny"
