"""Ticket files: both forms hold the same model, and anyone opens the compact one with three lines of numpy."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import nn

from fedlth.data.divided import opened
from fedlth.data.examples import Examples
from fedlth.engines.inprocess import InProcess
from fedlth.errors import StudyError
from fedlth.experiment.resolve import read
from fedlth.experiment.saved_ticket import load_ticket
from fedlth.federation.jobs import Failure, Job, Reply
from fedlth.report import ticket_text as told
from fedlth.report.facts import read_run
from fedlth.report.overlap import read_masks
from fedlth.study import schema
from fedlth.training import task
from fedlth.training.loss import cross_entropy
from tests import tiny, user_model
from tests.test_user_code import own

FINDER = {"schedule": "one_shot", "densities": [0.3]}


def made(out: Path, **changes: object) -> Path:
    arms = {"arms": ["ticket"], "epochs": 1}
    study = tiny.of_method("two_step", finder=FINDER, personalise=arms, **changes)
    tiny.run(study, out)
    return out


def test_a_compact_ticket_is_the_dense_one(tmp_path: Path) -> None:
    dense, compact = made(tmp_path / "dense"), made(tmp_path / "compact", tickets="compact")
    for client in range(4):
        name = f"tickets/client-{client:04d}.safetensors"
        one, other = load_ticket(dense, client).state_dict(), load_ticket(compact, client).state_dict()
        assert one.keys() == other.keys() and all(one[k].equal(other[k]) for k in one)
        with safe_open(compact / name, "numpy") as file:
            shapes = json.loads(file.metadata()["shapes"])
            masked = [n.removesuffix("_mask") for n in file.keys() if n.endswith("_mask")]  # noqa: SIM118
            assert masked
            for n in masked:
                mask = np.unpackbits(file.get_tensor(f"{n}_mask"), count=np.prod(shapes[n])).astype(bool)
                weights = np.zeros(mask.size, np.float32)
                weights[mask] = file.get_tensor(n)
                np.testing.assert_array_equal(weights.reshape(shapes[n]), one[n].numpy())
        assert (compact / name).stat().st_size < (dense / name).stat().st_size
    shown = [told.shown(read_run(run), [0]).partition("tensor  ")[2] for run in (dense, compact)]
    assert shown[0] == shown[1] and "all masked tensors" in shown[0]
    assert told.overlapping(read_run(dense), []) == told.overlapping(read_run(compact), [])


def test_tied_weights_are_kept_once(tmp_path: Path) -> None:
    study = own("aggregate", tickets="compact", personalise={"arms": ["ticket"], "epochs": 1})
    tiny.run(study, tmp_path / "r")
    module = load_ticket(tmp_path / "r", 0)
    state = module.state_dict()
    assert state["embed.weight"].equal(state["decoder.weight"]) and state["embed.weight"].any()


def test_without_files_only_digests_are_left(tmp_path: Path) -> None:
    compact, none = made(tmp_path / "compact", tickets="compact"), made(tmp_path / "none", tickets="none")
    assert not (none / "tickets").exists()
    assert tiny.digests(none) == tiny.digests(compact) and len(tiny.digests(none)["tickets"]) == 4
    with pytest.raises(StudyError, match="no ticket of client 0 .*tickets: none"):
        load_ticket(none, 0)
    with pytest.raises(StudyError, match="no ticket of client 9 .*its clients are 0 to 3"):
        load_ticket(compact, 9)


def test_frozen_dead_weights_need_the_dense_form() -> None:
    study = tiny.of_method("two_step", finder=FINDER | {"dead": "init"}, tickets="compact")
    with pytest.raises(StudyError, match="tickets: must be dense"):
        read(study)


MIXED = {"model": {"name": "tests.user_model:Mixed", "options": {}}}
REFINE = {"refine": {"rounds": 1, "clients_per_round": 2}, "personalise": {"arms": ["ticket"]}}
RUNS: dict[str, Callable[..., schema.Study]] = {
    **{name: lambda name=name, **more: tiny.of_method(name, **more) for name in tiny.KINDS if name != "fedavg"},
    "two_step refined": lambda **more: tiny.of_method("two_step", **REFINE, **more),
    "lotteryfl refined": lambda **more: tiny.of_method("lotteryfl", **REFINE, **more),
    "tied, local statistics": lambda **more: own("local_statistics", personalise={"arms": ["ticket"]}, **more),
    "tied, local norms": lambda **more: own("local_all", method={"name": "lotteryfl"}, **more),
    **{f"mixed {name}": lambda name=name, **more: tiny.of_method(name, **MIXED, **more) for name in tiny.KINDS
       if name in ("two_step", "fedselect", "sub_fedavg", "fedpm", "local")},
}  # fmt: skip


COMPACT = ("two_step", "lotteryfl refined", "fedselect", "tied, local norms", "mixed sub_fedavg")


@pytest.mark.parametrize(("name", "form"), [*((n, "dense") for n in RUNS), *((n, "compact") for n in COMPACT)])
def test_every_saved_ticket_is_its_own_row(tmp_path: Path, name: str, form: str) -> None:
    """Row 1: a ticket, loaded, predicts what its row of metrics.jsonl says, whatever made it."""
    study = RUNS[name](tickets=form)
    tiny.run(study, tmp_path / "r")
    task = tiny.task_of(tmp_path / "r")
    files = sorted((tmp_path / "r" / "tickets").glob("*"))
    assert len(files) == study.clients.count
    for client, file in enumerate(files):
        with safe_open(file, "numpy") as opened:
            meta = opened.metadata()
        main = study.finder.densities[-1]
        rows = [r for r in tiny.rows(tmp_path / "r", "metrics") if (r["client"], r["arm"]) == (client, meta["arm"])]
        row = next((r for r in rows if r["target_density"] == main), rows[0])
        accuracy, loss = measured(load_ticket(tmp_path / "r", client), task.part(client, "test"))
        assert accuracy == row["test_accuracy"] and loss == pytest.approx(row["test_loss"], rel=1e-5)
        assert float(meta["density"]) == row["density"]


def measured(model: nn.Module, data: Examples) -> tuple[float, float]:
    with torch.inference_mode():
        logits = model(data.tensor)
    return float((logits.argmax(-1) == data.y).double().mean()), float(cross_entropy(logits, data.y))


@pytest.mark.parametrize("form", ["dense", "compact"])
def test_a_ticket_keeps_shapes_and_kinds(tmp_path: Path, form: str) -> None:
    """Row 43: scalars keep shape [] in the file, whole numbers and truth values their dtype in the model."""
    tiny.run(tiny.of_method("two_step", **MIXED, personalise={"arms": ["ticket"]}, tickets=form), tmp_path / "r")
    tensors = load_file(tmp_path / "r" / "tickets" / "client-0000.safetensors")
    state = load_ticket(tmp_path / "r", 0).state_dict()
    for name, dtype in (("gain", "float32"), ("seen", "int64"), ("norm.num_batches_tracked", "int64")):
        assert tensors[name].shape == () and tensors[name].dtype == dtype, name
    for name, tensor in user_model.Mixed(4).state_dict().items():
        assert (state[name].dtype, state[name].shape) == (tensor.dtype, tensor.shape), name
    assert state["causal_mask"].equal(torch.arange(16) % 3 > 0) and state["seen"] > 0
    assert "causal_mask" in told.shown(read_run(tmp_path / "r"), [0])
    assert set(read_masks(read_run(tmp_path / "r")).packed) == {"head.weight"}, "causal_mask is no ticket's mask"


def test_loading_needs_no_data_and_leaves_the_process_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 1: no data set is read; torch's threads and three generators are as they were."""
    out = made(tmp_path / "r", **MIXED)
    for name in ("images", "study"):  # the data set's factory
        monkeypatch.setattr(tiny, name, None)
    monkeypatch.setattr(user_model, "Mixed", restless)
    task.forget_tasks()
    opened.cache_clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        before = torch.random.get_rng_state(), random.getstate(), np.random.get_state()
        load_ticket(out, 0)
        after = torch.random.get_rng_state(), random.getstate(), np.random.get_state()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert before[0].equal(after[0]) and before[1] == after[1]
    assert (before[2][1] == after[2][1]).all() and before[2][2:] == after[2][2:]


def restless(num_classes: int, mixed: Callable[[int], nn.Module] = user_model.Mixed) -> nn.Module:
    random.random()
    np.random.rand()
    torch.rand(1)
    torch.set_num_threads(1)
    return mixed(num_classes)


class Changed(user_model.Mixed):
    """The network of a run, whose code has changed since."""

    def __init__(self, num_classes: int, how: str = "") -> None:
        super().__init__(num_classes)
        if how == "renamed":
            self.tail, self.head = self.head, nn.Identity()
        elif how == "one more":
            self.extra = nn.Linear(2, 2)
        elif how == "one less":
            self.norm = nn.Identity()
        elif how == "wider":
            self.head = nn.Linear(16, num_classes + 1)
        elif how == "another kind":
            self.register_buffer("seen", torch.tensor(0.0))
        elif how == "tied":
            self.features.bias = self.norm.bias


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("renamed", "has no tensor head.bias"), ("one more", "has a tensor extra.bias"),
        ("one less", "has no tensor norm.bias"), ("wider", r"tensor head.bias is float32 \[5\], .* float32 \[4\]"),
        ("another kind", r"tensor seen is float32 \[\], .* whole numbers \[\]"),
        ("tied", "norm.bias is tied to features.bias"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["dense", "compact"])
def test_a_model_whose_code_has_changed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, said: str, form: str
) -> None:
    """Row 1: every difference is an error that names the tensor; none leaves a layer at random weights."""
    out = made(tmp_path / "r", **MIXED, tickets=form)
    monkeypatch.setattr(user_model, "Mixed", lambda num_classes: Changed(num_classes, how))
    with pytest.raises(StudyError, match=f"client-0001.*{said}"):
        load_ticket(out, 1)


def test_a_file_without_its_input_shape_asks_the_data_set(tmp_path: Path) -> None:
    out = made(tmp_path / "r")
    file = out / "tickets" / "client-0000.safetensors"
    with safe_open(file, "numpy") as opened:
        meta = opened.metadata()
    assert json.loads(meta["input_shape"]) == [1, 8, 8] and meta["input_dtype"] == "float32"
    wanted = load_ticket(out, 0).state_dict()
    rest = {k: v for k, v in meta.items() if k not in ("num_classes", "input_shape", "input_dtype")}
    save_file(load_file(file), file, metadata=rest)
    assert all(v.equal(wanted[k]) for k, v in load_ticket(out, 0).state_dict().items())


@pytest.mark.parametrize("form", ["dense", "compact"])
def test_a_damaged_file_is_refused(tmp_path: Path, form: str) -> None:
    out = made(tmp_path / "r", tickets=form)
    file = out / "tickets" / "client-0000.safetensors"
    whole = file.read_bytes()
    for damaged, said in (
        (whole[:-5], "expected a ticket"),
        (whole[:-5] + bytes([whole[-5] ^ 8]) + whole[-4:], "damaged"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(StudyError, match=f"client-0000.*{said}"):
            load_ticket(out, 0)


def test_a_client_that_failed_to_refine_keeps_the_ticket_of_step_2(tmp_path: Path) -> None:
    """Row 1: its file says which row it is, not the one that the client never had."""

    class Failing(tiny.Lists):
        def run(self, jobs: list[Job]) -> list[Reply | Failure]:
            answers = tiny.answers(InProcess(), jobs)
            return [
                Failure(round=j.round, client=j.client, kind="died", reason="test")
                if (j.phase, j.client) == ("refined", 2) else a
                for j, a in zip(jobs, answers, strict=True)
            ]  # fmt: skip

    tiny.run(tiny.of_method("two_step", **REFINE), tmp_path / "r", engine=Failing())
    arms = {s.client: s.arm for s in read_run(tmp_path / "r").tickets}
    assert arms == {0: "refined", 1: "refined", 2: "ticket", 3: "refined"}
    (row,) = [
        r for r in tiny.rows(tmp_path / "r", "metrics")
        if (r["client"], r["arm"], r["target_density"]) == (2, "ticket", 0.2)
    ]  # fmt: skip
    data = tiny.task_of(tmp_path / "r").part(2, "test")
    assert measured(load_ticket(tmp_path / "r", 2), data)[0] == row["test_accuracy"]


def test_a_tensor_called_like_a_mask_is_refused_at_the_start() -> None:
    study = tiny.study(model={"name": "tests.test_tickets_file:Masked", "options": {}})
    with pytest.raises(StudyError, match="no tensor must be called head.weight_mask"):
        tiny.open_task(study.science())


class Masked(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(64, num_classes)
        self.head.register_buffer("weight_mask", torch.ones(num_classes, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.flatten(1))
