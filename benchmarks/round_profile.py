"""Where each per cent of a round goes: python benchmarks/round_profile.py W1 --density 0.2 [--wire lossless].

One process (`workers: 1`), CPU seconds of its one thread, each second counted once, under the innermost of the parts
below that it was spent in. Waiting for the disk takes no CPU and is told apart, by the clock.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from rounds import WORKS, idle_study, study

from fedlth.engines.inprocess import InProcess
from fedlth.experiment.resolve import resolve
from fedlth.federation import client_step, ledger_rows
from fedlth.federation import rounds as loops
from fedlth.federation.update_norms import UpdateNorms
from fedlth.methods.aggregate import CountMean, FedAvg
from fedlth.storage.client_state import ClientState
from fedlth.storage.run_folder import RunFolder
from fedlth.storage.state_archive import Packs, Writer
from fedlth.study import schema
from fedlth.training import evaluation, train
from fedlth.training.task import Task
from fedlth.wire import payload

PARTS: dict[str, list[tuple[Any, str]]] = {
    "training": [(train, "train")],
    "validation of the received model": [(evaluation, "evaluate")],
    "images to tensors": [(Task, "part")],
    "payloads: encode": [(payload, "encode")],
    "payloads: decode and check": [(payload, "decode")],
    "state: pack, read, write": [
        (ClientState, "to_bytes"), (ClientState, "from_bytes"), (Packs, "get"), (Writer, "add"), (Writer, "finish"),
        (Packs, "tidy"), (RunFolder, "mirror"), (RunFolder, "packed_mask"),
    ],
    "checkpoint": [(RunFolder, "save_state"), (RunFolder, "commit"), (RunFolder, "drop_params")],
    "ledger and logs": [(ledger_rows, "down"), (ledger_rows, "up"), (RunFolder, "append")],
    "joining": [(rule, part) for rule in (FedAvg, CountMean) for part in ("init", "add", "result")],
    "distances of updates": [(UpdateNorms, "distances"), (UpdateNorms, "check")],
    "client: all else": [(client_step, "client_step")],
    "loop: all else": [(loops.Federation, "_step")],
}  # fmt: skip


class Account:
    """CPU seconds by part; a part that runs inside another is taken off it."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self.open: list[list[float]] = []
        self.disk_s = 0.0

    def watch(self, name: str, owner: Any, attribute: str) -> None:
        static = isinstance(vars(owner).get(attribute), staticmethod)
        real = getattr(owner, attribute)

        def call(*args: Any, **more: Any) -> Any:
            began = time.thread_time()
            self.open.append([0.0])
            try:
                return real(*args, **more)
            finally:
                took = time.thread_time() - began
                self.spent[name] += took - self.open.pop()[0]
                if self.open:
                    self.open[-1][0] += took

        setattr(owner, attribute, staticmethod(call) if static else call)

    def watch_disk(self) -> None:
        real = os.fsync

        def fsync(file: int) -> None:
            began = time.perf_counter()
            real(file)
            self.disk_s += time.perf_counter() - began

        os.fsync = fsync


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("work", choices=[*WORKS, "idle"])
    options.add_argument("--density", type=float, default=1.0)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--wire", default="raw")
    options.add_argument("--k", type=int, default=10)
    options.add_argument("--compute", default="auto")
    options.add_argument("--data")
    args = options.parse_args()
    tree = idle_study(args) if args.work == "idle" else study(args.work, args.density, False, args.wire, args)
    experiment, _ = resolve(schema.build(tree))
    spent = Account()
    with tempfile.TemporaryDirectory() as place:
        folder = RunFolder(Path(place))
        folder.create(experiment.study)
        engine = InProcess()
        loop = loops.Federation(experiment, folder, engine)
        first = 1 if args.density == 1 or args.work == "idle" else 3
        loop.run(stop_after=first)
        for name, places in PARTS.items():
            for owner, attribute in places:
                spent.watch(name, owner, attribute)
        _rebind()
        spent.watch_disk()
        loop.run(stop_after=first + args.rounds)
    whole = sum(spent.spent.values())
    print(f"{args.work}, density {args.density:g}, wire {args.wire}: {whole / args.rounds:.3f} CPU s a round, and "
          f"{spent.disk_s / args.rounds:.3f} s of waiting for the disk\n")  # fmt: skip
    print("| part | CPU ms a round | % |\n|---|---|---|")
    for name in PARTS:
        print(f"| {name} | {1e3 * spent.spent[name] / args.rounds:.1f} | {100 * spent.spent[name] / whole:.1f} |")
    ours = sum(v for k, v in spent.spent.items() if k.partition(":")[0] in ("payloads", "state", "checkpoint"))
    print(f"\npayloads, state and checkpoint: {100 * ours / whole:.1f} % of the round's CPU time")


def _rebind() -> None:
    """Give what was imported by name the watched function."""
    import fedlth.engines.inprocess as inprocess

    inprocess.client_step = client_step.client_step


if __name__ == "__main__":
    main()
