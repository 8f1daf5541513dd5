"""What holds for every method: its ledger is what crossed, its masks have the bits it says, a stop changes nothing.

Ray and Flower run the same studies in tests/engines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedlth.engines.forked import Forked
from fedlth.engines.inprocess import InProcess
from fedlth.experiment.experiment import Experiment
from fedlth.experiment.resolve import resolve
from fedlth.federation import session
from fedlth.federation.jobs import Failure, Job, Message, Reply
from fedlth.storage.run_folder import RunFolder
from fedlth.training import train
from fedlth.training.flat_model import FlatModel
from fedlth.training.request import TrainingRequest, TrainingResult
from fedlth.training.task import Task
from fedlth.wire import varint
from fedlth.wire.codec import BITMAP, REUSE
from fedlth.wire.payload import HEADER
from tests import tiny

Sent = tuple[str, str, bytes]  # kind, name, payload


class Meter(tiny.Lists):
    """The in-process engine; it notes every message of every job, and knows nothing of ledgers."""

    def __init__(self) -> None:
        self.down: dict[int, list[Sent]] = {}
        self.up: dict[int, list[Sent]] = {}

    def run(self, jobs: list[Job]) -> list[Reply | Failure]:
        answers = super().run(jobs)
        for job, answer in zip(jobs, answers, strict=True):
            assert isinstance(answer, Reply), answer
            _note(self.down, job.client, job.inbox)
            _note(self.up, job.client, answer.outbox)
        return answers


def _note(seen: dict[int, list[Sent]], client: int, box: Sequence[Message]) -> None:
    seen.setdefault(client, []).extend((m.kind, m.name, m.payload) for m in box)


def sends_between(out: Path) -> bool:
    """Say whether the clients of a run send to one another."""
    return tiny.experiment(RunFolder(out).study()).method.topology is not None


def study_of(name: str, **more: Any) -> Any:
    """Return the method's tiny study: raw payloads, whose lengths hang on no float's last bit."""
    return tiny.of_method(name, wire="raw", **more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Run each method once, whole, and keep what its tests look at."""
    known: dict[str, tuple[Path, Meter]] = {}

    def run(name: str) -> tuple[Path, Meter]:
        if name not in known:
            meter, out = Meter(), tmp_path_factory.mktemp(name) / "run"
            tiny.run(study_of(name), out, engine=meter)
            known[name] = out, meter
        return known[name]

    return run


@pytest.mark.parametrize("name", tiny.METHODS)
def test_the_ledger_is_what_crossed(name: str, whole: Any) -> None:
    """What clients publish to one another has a row where another client receives it, none on its way to the relay."""
    out, meter = whole(name)
    rows, between = tiny.rows(out, "ledger"), sends_between(out)
    for client in meter.down:
        party = f"client:{client}"
        received = [r for r in rows if r["receiver"] == party]
        sent = [r for r in rows if r["sender"] == party and r["receiver"] == "server"]
        assert [r["payload_bytes"] for r in received] == [len(data) for _, _, data in meter.down[client]]
        up = [data for kind, _, data in meter.up[client] if not (between and kind == "values")]
        assert [r["payload_bytes"] for r in sent] == list(map(len, up))


@pytest.mark.parametrize("name", tiny.METHODS)
def test_every_mask_has_as_many_bits_as_the_ledger_says(name: str, whole: Any) -> None:
    """Counted in the bytes themselves: in the bits of a mask that is sent, in the number of values under it."""
    out, meter = whole(name)
    experiment = tiny.experiment(RunFolder(out).study())
    boxes, end = (meter.down, "receiver") if sends_between(out) else (meter.up, "sender")
    sent = [one for client in sorted(boxes) for one in boxes[client]]
    rows = [r for client in sorted(boxes) for r in tiny.rows(out, "ledger") if r[end] == f"client:{client}"]
    checked = 0
    for (kind, _, data), row in zip(sent, rows, strict=True):
        if kind in ("metrics", "evaluation", "statistics"):
            continue
        layout = experiment.layout_of(kind)
        bits = round(row["density"] * layout.num_prunable)
        _, _, _, mode, _, _, _ = HEADER.unpack_from(data)
        mask_bytes, at = varint.get(data, HEADER.size, len(data) - 4)
        value_bytes, at = varint.get(data, at, len(data) - 4)
        if mode == BITMAP:
            section = np.unpackbits(np.frombuffer(data[at : at + mask_bytes], np.uint8))
            assert int(section.sum()) == bits
        if value_bytes:
            values = (value_bytes - 8 * layout.num_ints) // 4
            assert values - (layout.num_floats - layout.num_prunable) == bits
        assert mode in (BITMAP, REUSE) or row["density"] == 1
        checked += 1
    assert checked or not experiment.federated


@pytest.mark.parametrize("name", tiny.METHODS)
def test_a_stop_after_any_commit_changes_nothing(name: str, whole: Any, tmp_path: Path) -> None:
    """Stopped after the first commit and in the middle, each time begun again from what lies in the folder."""
    out, _ = whole(name)
    folder = RunFolder(tmp_path / "run")
    folder.create(resolve(study_of(name))[0].study)
    steps = len(tiny.experiment(folder.study()).steps)
    for stop in sorted({1, steps // 2}):
        tiny.opened(folder).run(stop_after=stop)
    session.resume(folder.root, InProcess())
    assert tiny.facts(folder.root) == tiny.facts(out)


@pytest.mark.parametrize("name", tiny.each_method())
def test_two_workers_give_the_same_bits(name: str, whole: Any, tmp_path: Path) -> None:
    out, _ = whole(name)
    tiny.run(study_of(name), tmp_path / "run", engine=Forked(2))
    assert tiny.facts(tmp_path / "run") == tiny.facts(out)


class Counter(tiny.Lists):
    """The in-process engine; it counts the examples that the network itself sees in each federated job.

    Of a training in which a part alone moves it counts them by that part.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.experiment, self.seen = experiment, {"trained": 0, "scored": 0, "without": 0}
        self.told: list[tuple[float, float]] = []
        self.part: np.ndarray | None = None
        self.in_part = 0.0

    def run(self, jobs: list[Job]) -> list[Reply | Failure]:
        answers: list[Reply | Failure] = []
        for job in jobs:
            task = self.experiment.task_of(job.client)
            self.seen, self.in_part = dict.fromkeys(self.seen, 0), 0.0
            hook = task.flat_model.module.register_forward_pre_hook(partial(self._count, task))
            real = train.train
            try:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(train, "train", partial(self._train, real))
                    (answer,) = super().run([job])
            finally:
                hook.remove()
            assert isinstance(answer, Reply), answer
            if job.phase in {phase.name for phase in self.experiment.federated_phases}:
                of = {"trained": task.model.training_flops, "scored": task.model.gradient_flops}
                of["without"] = task.model.flops
                whole = float(sum(n * of[how][""] for how, n in self.seen.items()))
                self.told.append((answer.flops, self.in_part + whole))
            answers.append(answer)
        return answers

    def _train(self, real: Callable[..., TrainingResult], model: FlatModel, request: TrainingRequest) -> TrainingResult:
        self.part = request.trainable
        try:
            return real(model, request)
        finally:
            self.part = None

    def _count(self, task: Task, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if torch.is_grad_enabled() and self.part is not None:
            self.in_part += len(args[0]) * task.model.part_flops(self.part)[""]
        elif torch.is_grad_enabled():
            # Weights that nothing trains have a gradient where masks over them are scored.
            all_of_them = all(tensor.requires_grad for tensor in module.parameters() if tensor.ndim > 1)
            self.seen["scored" if all_of_them else "trained"] += len(args[0])
        elif module.training:  # in evaluation mode it only looks
            self.seen["without"] += len(args[0])


@pytest.mark.parametrize("name", tiny.each_method())
def test_its_flops_are_those_of_what_the_network_saw(name: str, tmp_path: Path) -> None:
    """Three forwards where all is trained; every pass that a round makes is told, and nothing else."""
    fleet = {"flops_s": 1e12, "down_bytes_s": 1e12, "up_bytes_s": 1e12}
    made = resolve(study_of(name, fleet=fleet))[0]
    engine = Counter(made)
    tiny.run(study_of(name, fleet=fleet), tmp_path / "run", engine=engine)
    assert bool(engine.told) == made.federated
    for told, counted in engine.told:
        assert told == pytest.approx(counted, rel=1e-9)
