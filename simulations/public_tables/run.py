"""Run the rows of two public tables and print ours beside theirs: `python run.py --out RUNS`; goes on after a stop.

Accuracy is over all test examples of all clients, as both tables have it (large clients weigh more), after the last
round; mean and standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Row:
    """One row of a table: what is run for it (nothing: the row is open), which arm it reads, and what they report."""

    table: str
    name: str
    theirs: float | None
    arm: str = ""
    overrides: tuple[str, ...] = ()
    by_partition: bool = False  # each seed has a division of its own

    @property
    def folder(self) -> str:
        return f"{self.table}-{self.name}".lower().replace(" ", "-")


def lolli(name: str, alpha: float, theirs: float) -> Row:
    """A row of table 2, 3, 4 or 13 of the first source."""
    if name != "FedAvg":
        return Row("lolli", f"{name} {alpha}", theirs)
    return Row("lolli", f"{name} {alpha}", theirs, "global", (f"partition.alpha={alpha}",), by_partition=True)


ROWS = (
    *(lolli("FedAvg", alpha, theirs) for alpha, theirs in ((0.5, 86.4), (0.1, 81.6), (0.03, 74.5))),
    *(lolli("FedPer", alpha, theirs) for alpha, theirs in ((0.5, 91.4), (0.1, 95.3), (0.03, 97.1))),
    Row("pfllib", "FedAvg", 85.85, "global", ("method=fedavg", "federate.rounds={rounds}")),
    # Without rounds the shared model is the start, so the arm dense trains alone, for exactly these epochs.
    Row("pfllib", "Local", None, "dense", ("method=local", "federate={{}}", "personalise.arms=[dense]",
                                           "personalise.epochs={epochs}")),
    *(Row("pfllib", name, theirs) for name, theirs in (("FedPer", 97.44), ("Ditto", 97.47), ("FedRep", 97.56))),
)  # fmt: skip


def main() -> int:
    """Run what is not there, then print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/public_tables"))
    parser.add_argument("--tables", nargs="+", choices=("lolli", "pfllib"), default=["lolli", "pfllib"])
    parser.add_argument("--seeds", type=int, default=15, help="of lolli; theirs 15")
    parser.add_argument("--pfllib-seeds", type=int, default=3, help="theirs 3")
    parser.add_argument("--rounds", type=int, default=200, help="of pfllib; theirs 2000")
    parser.add_argument("--epochs", type=int, default=40, help="of pfllib's Local")
    parser.add_argument("--judge", action="store_true", help="run nothing; print what is there")
    parser.add_argument("override", nargs="*", metavar="key=value", help="of every study, such as data.root=/data")
    args = parser.parse_args()
    for table in args.tables:
        lines = []
        for row in (one for one in ROWS if one.table == table):
            seeds = range(args.seeds if table == "lolli" else args.pfllib_seeds)
            runs = [args.out / row.folder / f"seed-{seed}" for seed in seeds if row.arm]
            if not args.judge:
                for seed, run in zip(seeds, runs, strict=False):
                    begin(row, seed, run, [o.format(rounds=args.rounds, epochs=args.epochs) for o in row.overrides]
                          + args.override)  # fmt: skip
            lines.append(line(row, [accuracy(run, row.arm) for run in runs if (run / "digests.json").exists()]))
        print(f"\n| {table} | theirs % | ours % | seeds | difference, points |\n|---|---|---|---|---|")
        print("\n".join(lines))
    return 0


def begin(row: Row, seed: int, run: Path, overrides: Sequence[str]) -> None:
    """Run one seed of a row, or go on with it; a run that has ended stays as it is."""
    if (run / "digests.json").exists():
        return
    if (run / "config.yaml").exists():
        command = ["resume", str(run)]
    else:
        own = [f"partition.seed={seed}"] if row.by_partition else []
        command = ["run", str(HERE / f"{row.table}.yaml"), *overrides, *own, f"seed={seed}", f"out={run}"]
    print(f"{row.name}, seed {seed}", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "fedlth", *command], check=True, stdout=subprocess.DEVNULL)


def accuracy(run: Path, arm: str) -> float:
    """Return the percentage right of all clients' test examples together."""
    rows = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    of_arm = [(row["test_accuracy"], row["num_test"]) for row in rows if row["arm"] == arm]
    return 100 * float(np.average([a for a, _ in of_arm], weights=[n for _, n in of_arm]))


def line(row: Row, found: Sequence[float]) -> str:
    """Return a row of the Markdown table."""
    theirs = "no such row" if row.theirs is None else f"{row.theirs:.2f}"
    if not found:
        return f"| {row.name} | {theirs} | {'not run' if row.arm else 'open'} | 0 | |"
    spread = f" ± {np.std(found, ddof=1):.2f}" if len(found) > 1 else ""
    gap = "" if row.theirs is None else f"{np.mean(found) - row.theirs:+.2f}"
    return f"| {row.name} | {theirs} | {np.mean(found):.2f}{spread} | {len(found)} | {gap} |"


if __name__ == "__main__":
    sys.exit(main())
