"""Each form of an export holds the ticket: read again by the tools that it is for, and refused where it cannot be."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fedlth
from fedlth.cli import main
from fedlth.errors import MissingExtra, StudyError
from fedlth.export import export, kernel_time, onnx_file, small_network
from fedlth.models.call import call
from tests import tiny, user_model

DOCS = Path(__file__).parents[2] / "docs"
ROWS = {"granularity": "row", "schedule": "one_shot", "densities": [0.4], "scope": "layerwise"}
CONV = {"name": "tests.export.test_forms:Conv", "options": {}}


class Conv(nn.Module):
    """Convolutions with a rim of zeros, a batch norm and a shortcut: all that makes a smaller network hard."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.inner, self.outer = nn.Conv2d(12, 16, 3, padding=1), nn.Conv2d(16, 12, 3, padding=1)
        self.head = nn.Linear(12 * 16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.outer(torch.relu(self.inner(x))))
        return self.head(torch.max_pool2d(x, 2).flatten(1))


@pytest.fixture(scope="module", autouse=True)
def no_kernel() -> Any:
    """Measure nothing in the kernel, which would first be compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_time.kernel, "available", lambda: "the kernel is not here")
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    study = tiny.study(
        model=CONV, finder=ROWS, personalise={"arms": ["ticket"], "epochs": 1}, tickets="compact",
        partition={"name": "iid"}, data={"name": "tests.tiny:images"},
    )  # fmt: skip
    return tiny.run(study, tmp_path_factory.mktemp("export") / "r").root


def test_the_dense_form_loads_strictly_without_us(run: Path) -> None:
    told = fedlth.export_ticket(run, 1, to="safetensors")
    assert told.folder == run / "export" / "safetensors" / "client-0001" and told.difference == 0
    again = Conv(tiny.NUM_CLASSES)
    again.load_state_dict(load_file(told.folder / "model.safetensors"), strict=True)
    ours = fedlth.load_ticket(run, 1)
    assert all(tensor.equal(ours.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert again.state_dict()["norm.num_batches_tracked"].dtype == torch.int64
    assert told.kept == 1 and told.density < 0.5 and told.kernel_why == "the kernel is not here"
    with safe_open(told.folder / "model.safetensors", "pt") as file:
        meta = file.metadata()
    assert meta["format"] == "pt" and meta["model"] == CONV["name"] and json.loads(meta["input_shape"]) == [1, 8, 8]
    assert meta["study"] == "tiny"  # the run's own, which the text of a job is without
    assert json.loads(meta["mean"]) == [0.5] and meta["num_classes"] == "4" and len(meta["ticket"]) == 16
    assert set(json.loads(meta["client_classes"])) <= {0, 1, 2, 3}


def test_the_reader_in_the_docs_opens_the_packed_form(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = fedlth.export_ticket(run, 2, to="compact")
    code = re.search(r"```python\n(import json\n.*?)```", (DOCS / "export.md").read_text(), re.S)
    assert code and len([line for line in code.group(1).splitlines() if line.strip()]) <= 16
    monkeypatch.chdir(told.folder)
    names: dict[str, Any] = {}
    exec(code.group(1), names)
    ours = fedlth.load_ticket(run, 2).state_dict()
    assert names["weights"].keys() == ours.keys()
    for name, array in names["weights"].items():
        np.testing.assert_array_equal(array, ours[name].numpy())
    dense = fedlth.export_ticket(run, 2, to="safetensors")
    assert (dense.folder / "sparse.safetensors").read_bytes() == (told.folder / "ticket.safetensors").read_bytes()
    assert told.kept < 0.5 and told.export.file_bytes < 0.6 * dense.export.file_bytes


def test_a_smaller_network_leaves(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tickets", "export", str(run), "0", "3", "--to", "small"]) == 0
    text = capsys.readouterr().out
    folder = run / "export" / "small" / "client-0003"
    assert "opened by fedlth.load_small" in text and "  stem: " in text and " of 12" in text and "latency" in text
    assert "zeros" not in text
    told = json.loads((folder / "export.json").read_text())
    assert told["difference"] <= 1e-5 and told["form"] == "small" and told["examples"] == 20
    assert told["kept"] < 0.6 and told["export"]["flops"] < 0.5 * told["ticket"]["flops"]
    assert 0 < told["export"]["memory_bytes"] < told["ticket"]["memory_bytes"]
    small, ours = fedlth.load_small(folder), fedlth.load_ticket(run, 3)
    assert told["export"]["parameters"] == sum(tensor.numel() for tensor in small.parameters())
    x = tiny.task_of(run).part(3, "test").x
    with torch.no_grad():
        assert torch.allclose(call(small, x), call(ours, x), atol=1e-5)
        assert torch.equal(call(small, x).argmax(1), call(ours, x).argmax(1))
    assert main(["tickets", "export", str(run), "0", "3", "--to", "small"]) == 2
    assert "client-0000: must not be there yet" in capsys.readouterr().err


def test_a_file_alone_leaves_in_the_other_forms(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a device has its own: what is written is what the run's folder gives, compared on random inputs."""
    file = fedlth.export_ticket(run, 3, to="compact", out=tmp_path / "own").folder / "ticket.safetensors"
    assert main(["tickets", "export", str(file), "--to", "safetensors"]) == 0
    assert "on 32 random inputs (no data beside a file alone): 0.0e+00" in capsys.readouterr().out
    folder = tmp_path / "own" / "export" / "safetensors" / "client-0003"
    with_data = fedlth.export_ticket(run, 3, to="safetensors", out=tmp_path / "with_data")
    for name in ("model.safetensors", "sparse.safetensors"):
        assert (folder / name).read_bytes() == (with_data.folder / name).read_bytes()
    assert not with_data.random and json.loads((folder / "export.json").read_text())["random"]
    small = fedlth.export_ticket(file, to="small", out=tmp_path / "small")
    assert small.kept < 1 and small.random and isinstance(fedlth.load_small(small.folder), nn.Module)


def test_a_file_that_cannot_be_exported_alone_is_refused(run: Path, tmp_path: Path) -> None:
    file = run / "tickets" / "client-0000.safetensors"
    with pytest.raises(StudyError, match="does not describe its network"):
        fedlth.export_ticket(file, to="safetensors")
    assert main(["tickets", "export", str(file), "0", "--to", "safetensors"]) == 2
    with pytest.raises(StudyError, match="expected a ticket"):
        fedlth.export_ticket(run, to="safetensors")
    whole = fedlth.export_ticket(run, 0, to="compact", out=tmp_path / "own").folder / "ticket.safetensors"
    with safe_open(whole, "pt") as opened:
        about = opened.metadata()
    for changed, says in (
        ({"input_dtype": "int64"}, "has inputs of whole numbers"), ({"client": "x"}, "whose it is, got client 'x'"),
        ({"mean": "["}, "expected metadata of a ticket"),
    ):  # fmt: skip
        save_file(load_file(whole), tmp_path / "other", metadata={**about, **changed})
        with pytest.raises(StudyError, match=says):
            fedlth.export_ticket(tmp_path / "other", to="safetensors")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["other", "own"]


def test_a_damaged_folder_is_refused(run: Path, tmp_path: Path) -> None:
    folder = fedlth.export_ticket(run, 1, to="small", out=tmp_path / "s").folder
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "norm.bias": tensors["norm.bias"] + 1}, file)
    with pytest.raises(StudyError, match="model.safetensors has other tensors than were written"):
        fedlth.load_small(folder)
    with pytest.raises(StudyError, match="must hold a model's config.json"):
        fedlth.load_small(tmp_path)


def test_bad_input_is_refused_and_nothing_is_left(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def says(*words: str) -> str:
        assert main(["tickets", "export", *words]) == 2
        return capsys.readouterr().err

    to, r = ["--out", str(tmp_path / "out" / "deep")], str(run)
    assert "--to must be one of onnx, safetensors, compact, small, got none" in says(r, "0")
    assert "got onnx, small" in says(r, "0", "--to", "onnx", "--to", "small", *to)
    assert "got pickle" in says(r, "0", "--to", "pickle", *to)
    assert "expected a client, got none" in says(r, "--to", "compact", *to)
    assert "no ticket of client 9; there are those of 0, 1, 2, 3" in says(r, "0", "9", "--to", "compact", *to)
    assert str(tmp_path) in says(str(tmp_path / "no"), "0", "--to", "compact", *to)
    with pytest.raises(StudyError, match="no ticket of client 9 in this run, its clients are 0 to 3"):
        fedlth.export_ticket(run, 9, to="compact")
    assert main(["tickets", "ls", r, "--to", "onnx"]) == 2
    assert not (tmp_path / "out").exists() and not list((run / "export").glob("*/*.part*"))


def test_nothing_is_kept_that_differs(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = small_network.cut

    def wrong(*given: Any) -> Any:
        made, fits = real(*given)
        with torch.no_grad():
            made.norm.bias.add_(1e-2)
        return made, fits

    monkeypatch.setattr(small_network, "cut", wrong)
    with pytest.raises(
        StudyError, match=f"{run}: client 0, as small: outputs must not differ from the ticket's by 1e-05"
    ):
        fedlth.export_ticket(run, 0, to="small", out=tmp_path / "deep" / "s")
    assert not list(tmp_path.iterdir())


def test_what_has_no_whole_channels_is_refused(tmp_path: Path) -> None:
    plain = tiny.study(finder={"densities": [0.5]}, personalise={"arms": ["ticket"], "epochs": 1})
    run = tiny.run(plain, tmp_path / "r").root
    with pytest.raises(
        StudyError, match="client 0: no channel is pruned as a whole; finder.granularity: row or channel"
    ):
        fedlth.export_ticket(run, 0, to="small")
    shutil.rmtree(run / "tickets")
    with pytest.raises(StudyError, match="no ticket of client 0 in this run"):
        fedlth.export_ticket(run, 0, to="compact")


def test_tied_frozen_and_integer_tensors_come_back(tmp_path: Path) -> None:
    """Of a model of one's own: tokens, tied weights, a part that nothing trains, an LSTM."""
    study = tiny.study(
        model={"name": "tests.user_model:reader", "options": {}}, data={"name": "tests.user_model:sentences"},
        personalise={"arms": ["ticket"], "epochs": 1}, tickets="compact",
    )  # fmt: skip
    run = tiny.run(study, tmp_path / "r").root
    for form in ("safetensors", "compact"):
        assert fedlth.export_ticket(run, 0, to=form).difference == 0
    again = user_model.Reader(user_model.CLASSES, 8)
    again.load_state_dict(load_file(run / "export" / "safetensors" / "client-0000" / "model.safetensors"), strict=True)
    with pytest.raises(StudyError, match="model: tests.user_model:reader cannot leave smaller: layer lstm is a LSTM"):
        fedlth.export_ticket(run, 0, to="small")


def test_without_the_extra_it_says_which(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(what: str, *packages: str, extra: str) -> None:
        raise MissingExtra(f"{what} needs the extra: pip install 'fedlth[{extra}]' ({packages[0]} not installed)")

    monkeypatch.setattr(onnx_file, "require", absent)
    with pytest.raises(MissingExtra, match=r"--to onnx needs the extra: pip install 'fedlth\[onnx\]'"):
        fedlth.export_ticket(run, 0, to="onnx")
    assert not (run / "export" / "onnx").exists() and export.FORMS["onnx"] is onnx_file.onnx
