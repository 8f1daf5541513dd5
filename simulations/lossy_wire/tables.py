"""python tables.py FOLDER: accuracy and bytes of every codec, paired by seed with the lossless run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

WIRES = ("lossless", "bf16", "f16", "step", "sign")
ARMS = ("global", "ticket", "refined")


def rows(out: Path, name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_bytes().splitlines()]


def accuracy(out: Path, arm: str) -> float:
    """Return the mean test accuracy over clients of one run, per cent."""
    return 100 * float(np.mean([r["test_accuracy"] for r in rows(out, "metrics") if r["arm"] == arm]))


def uplink(out: Path, phase: str) -> float:
    """Return the mean bytes of an update in a phase, as a share of a dense float32 model."""
    dense = json.loads((out / "header.json").read_bytes())["dense_raw_bytes"]
    sent = [r["payload_bytes"] for r in rows(out, "ledger") if r["phase"] == phase and r["name"] == "update"]
    return float(np.mean(sent)) / dense


def main(folder: Path) -> None:
    seeds = sorted(int(p.name.split("-")[1]) for p in folder.glob("lossless-*"))
    print("| wire | " + " | ".join(ARMS) + " | dense update / dense | ticket's update / dense |")
    print("|---" * (len(ARMS) + 3) + "|")
    for wire in WIRES:
        cells = []
        for arm in ARMS:
            got = np.array([accuracy(folder / f"{wire}-{s}", arm) for s in seeds])
            base = np.array([accuracy(folder / f"lossless-{s}", arm) for s in seeds])
            away = got - base
            paired = "" if wire == "lossless" else f" ({away.mean():+.2f} ± {away.std(ddof=1):.2f})"
            cells.append(f"{got.mean():.2f}{paired}")
        for phase in ("federate", "refine"):
            cells.append(f"{np.mean([uplink(folder / f'{wire}-{s}', phase) for s in seeds]):.4f}")
        print(f"| {wire} | " + " | ".join(cells) + " |")
    print(f"\n{len(seeds)} seeds; in brackets the mean and standard deviation of the difference to lossless, by seed.")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
