"""fedlth as a child of benchmarks/rounds.py: reads a study as JSON, runs up to its measured steps, then one a line.

It is the product's own loop over a real run folder: data, tickets, ledger, states and checkpoints on disk.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

from fedlth.engines.choose import engine_of
from fedlth.experiment.resolve import resolve
from fedlth.federation.rounds import Federation
from fedlth.storage.run_folder import RunFolder
from fedlth.study import schema


def main() -> None:
    given = json.loads(sys.stdin.readline())
    experiment, _ = resolve(schema.build(given["study"]))
    with tempfile.TemporaryDirectory(dir=given["folder"]) as place:
        folder, engine = RunFolder(Path(place)), engine_of(experiment.study)
        folder.create(experiment.study)
        try:
            loop = Federation(experiment, folder, engine)
            loop.run(stop_after=given["skip"])
            print("ready", flush=True)
            for _ in sys.stdin:
                began = time.perf_counter()
                loop.run(stop_after=loop.progress.step + 1)
                print(json.dumps({"wall": time.perf_counter() - began, "steps": _steps(loop)}), flush=True)
        finally:
            engine.close()


def _steps(loop: Federation) -> int:
    """Return how many client-steps the last round had."""
    row = json.loads(loop.folder.log("rounds").read_bytes().splitlines()[-1])
    assert not row["failed"], row["failed"]
    study, splits = loop.experiment.study, loop.experiment.task.splits.clients
    return sum(study.train.epochs * -(-len(splits[c].train) // study.train.batch_size) for c in row["clients"])


if __name__ == "__main__":
    main()
