"""Trackers: each commit once, also after a resume, and never at the cost of the run."""

from __future__ import annotations

import json
import os
import re
import socket
import struct
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from fedlth.engines.inprocess import InProcess
from fedlth.errors import StudyError
from fedlth.experiment.resolve import resolve
from fedlth.federation import session
from fedlth.output import lines_to
from fedlth.storage import trackers
from fedlth.storage.mlflow import MLflow
from fedlth.storage.run_folder import RunFolder
from fedlth.study import schema
from fedlth.tune import trial_of
from tests import tiny
from tests.faults.test_resume import Crash, crashing

NOTES = "tests.test_trackers:Notes"


@dataclass(frozen=True)
class Notes:
    """A tracker that writes down what it is told, and may fail or hang at a given point."""

    file: str
    fails: str = ""

    def require(self) -> None:
        pass

    def open(self, run: Path, name: str, config: Mapping[str, Any], id: str, /) -> Noted:
        noted = Noted(Path(self.file), self.fails, id or "first")
        noted.write("open", name=name, id=id, seed=config["seed"])
        return noted


@dataclass
class Noted:
    file: Path
    fails: str
    id: str
    given: int | None = None

    def write(self, what: str, **more: Any) -> None:
        if what == self.fails:
            raise ConnectionError("no route\nto host")
        if f"slow {what}" == self.fails:
            time.sleep(30)
        with self.file.open("a") as file:
            file.write(json.dumps({"what": what, **more}) + "\n")

    def log(self, commit: int, scalars: Mapping[str, float], /) -> None:
        self.write("log", commit=commit, scalars=dict(scalars))

    def end(self, scalars: Mapping[str, float], texts: Mapping[str, str], /) -> None:
        self.write("end", scalars=dict(scalars), texts=dict(texts))

    def stop(self) -> None:
        self.write("stop")


def noting(tmp_path: Path, fails: str = "", **sections: Any) -> schema.Study:
    spec = {"name": NOTES, "file": str(tmp_path / "notes"), "fails": fails}
    more = {"federate": {"rounds": 4}, "evaluate": {"every": 2}, **sections}
    return tiny.of_method("lotteryfl", trackers=[spec], **more)


def notes(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]


def test_a_tracker_is_given_every_commit_and_the_end(tmp_path: Path) -> None:
    out = tmp_path / "r"
    tiny.run(noting(tmp_path), out)
    first, *logged, last = notes(tmp_path)
    assert first == {"what": "open", "name": "tiny seed 0", "id": "", "seed": 0}
    assert [one["commit"] for one in logged] == list(range(1, 9))
    rounds, curve = tiny.rows(out, "rounds"), tiny.rows(out, "curve")
    assert logged[0]["scalars"] == {
        "federate/up_bytes": rounds[0]["up_bytes"], "federate/down_bytes": rounds[0]["down_bytes"],
        "federate/failed": 0, "federate/val_accuracy": rounds[0]["val_accuracy"],
    }  # fmt: skip
    seen = [r["test_accuracy"] for r in curve if (r["round"], r["arm"], r["unseen"]) == (4, "own", False)]
    assert logged[5]["scalars"]["curve/own/test_accuracy"] == pytest.approx(sum(seen) / len(seen))
    assert "curve/global/unseen_val_loss" in logged[5]["scalars"] and "curve/own/val_accuracy" in logged[2]["scalars"]
    assert not any(
        name.startswith("curve/") for one in logged for name in one["scalars"] if one["commit"] not in (3, 6)
    )
    own = [r["test_accuracy"] for r in tiny.rows(out, "metrics") if r["arm"] == "own_tuned"]
    assert last["scalars"]["final/own_tuned/1/test_accuracy"] == pytest.approx(sum(own) / len(own))
    assert last["texts"]["digest/theta_g"] == tiny.digests(out)["theta_g"] and last["texts"]["digest/tickets"]
    assert json.loads((out / "trackers.json").read_text()) == {NOTES: {"id": "first", "commits": 8}}


@pytest.mark.parametrize("stop", [1, 3, 6, 8])
def test_a_resume_goes_on_in_the_same_run_and_logs_no_commit_twice(tmp_path: Path, stop: int) -> None:
    out = tmp_path / "r"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        crashing(patch, "after the checkpoint", stop)  # the checkpoint counts, and no tracker has heard of it yet
        tiny.run(noting(tmp_path), out)
    session.resume(out, InProcess())
    found = notes(tmp_path)
    assert [one["commit"] for one in found if one["what"] == "log"] == list(range(1, 9))
    assert [one["id"] for one in found if one["what"] == "open"] == ["", "first"]
    assert [one["what"] for one in found].count("stop") == 1 and found[-1]["what"] == "end"
    one = [{**row["scalars"]} for row in found if row["what"] == "log"]
    (tmp_path / "notes").unlink()
    tiny.run(noting(tmp_path), tmp_path / "whole")
    assert one == [row["scalars"] for row in notes(tmp_path) if row["what"] == "log"]


@pytest.mark.parametrize("fails", ["open", "log", "end", "slow open", "slow log", "slow end"])
def test_a_tracker_that_fails_or_hangs_costs_one_line(
    tmp_path: Path, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers.bounded, "__defaults__", (0.3,))
    told: list[str] = []
    made = noting(tmp_path, fails)
    tiny.run(made, tmp_path / "r", tell=told.append)
    about = [line for line in told if line.startswith("note: tracker")]
    why = "no answer for 0.3 s" if "slow" in fails else "ConnectionError: no route to host"
    assert about == [f"note: tracker {NOTES}: {why}; the run goes on and is not tracked there from here on"]
    tiny.run(made.model_copy(update={"trackers": ()}), tmp_path / "plain")
    assert tiny.facts(tmp_path / "r") == tiny.facts(tmp_path / "plain")
    assert not (tmp_path / "plain" / "trackers.json").exists()


def test_what_a_tracker_missed_it_is_given_when_the_run_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "r"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        crashing(patch, "after the checkpoint", 4)
        tiny.run(noting(tmp_path, fails="open"), out)
    text = (out / "config.yaml").read_text()
    (out / "config.yaml").write_text(text.replace("fails: open", "fails: ''"))
    session.resume(out, InProcess())
    assert [one["commit"] for one in notes(tmp_path) if one["what"] == "log"] == list(range(1, 9))


def test_a_run_that_finds_nothing_usable_is_closed_too(tmp_path: Path) -> None:
    made = noting(tmp_path, train={"lr": 1e30}, personalise={"arms": ["own_tuned"]})
    with pytest.raises(StudyError):
        tiny.run(made, tmp_path / "r")
    assert notes(tmp_path)[-1]["what"] == "stop"


@dataclass
class FakeClient:
    """What MLflow's client is asked for, with the limits of its tracking server."""

    tracking_uri: str | None = None
    params: dict[str, str] = field(default_factory=dict)
    metrics: list[tuple[str, int]] = field(default_factory=list)
    calls: int = 0

    def get_experiment_by_name(self, name: str) -> None: ...
    def set_tag(self, run: str, name: str, text: str) -> None: ...
    def set_terminated(self, run: str, status: str = "FINISHED") -> None: ...

    def create_experiment(self, name: str) -> str:
        return "0"

    def create_run(self, experiment: str, run_name: str) -> Any:
        return SimpleNamespace(info=SimpleNamespace(run_id="1"))

    def log_batch(self, run: str, metrics: Sequence[Any] = (), params: Sequence[Any] = ()) -> None:
        assert len(metrics) <= 1000 and len(params) <= 100
        for key, value in params:
            assert re.fullmatch(r"[\w./ :-]{1,250}", key) and key not in self.params
            self.params[key] = value
        for key, _, _, step in metrics:
            assert re.fullmatch(r"[\w./ :-]{1,250}", key)
            self.metrics.append((key, step))
        self.calls += 1


def test_mlflow_is_sent_names_that_it_takes_in_pieces_that_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = FakeClient()
    entities = SimpleNamespace(Param=lambda *held: held, Metric=lambda *held: held)
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(MlflowClient=lambda tracking_uri: made))
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    tasks = {"what? (a)": {"loss": None}, "what! (a)": {"loss": None}, "ü" * 300: {}}
    tracked = MLflow().open(tmp_path, "name", {"seed": 0, "tasks": tasks}, "")
    assert len(made.params) == 4 and {"seed", "tasks.what_ _a_", "tasks.what_ _a__2"} < made.params.keys()
    tracked.log(1, {"federate/val_accuracy": 0.5})
    assert made.metrics == [("federate/val_accuracy", 1), ("commits", 1)]
    before = made.calls
    tracked.end({f"final/ticket/{i}/test_accuracy": 0.5 for i in range(2500)}, {})
    assert made.calls - before == 3 and len(made.metrics) == 2502


# What a study may say


def test_an_earlier_study_asks_for_tensorboard_as_it_did(tmp_path: Path) -> None:
    def built(**more: Any) -> tuple[dict[str, Any], ...]:
        return tiny.study(**more).trackers

    assert built(tensorboard=False) == () and built(tensorboard=True) == ({"name": "tensorboard"},)
    assert built(tensorboard=True, trackers=["wandb"]) == ({"name": "wandb"}, {"name": "tensorboard"})
    assert built(tensorboard=True, trackers=["tensorboard"]) == ({"name": "tensorboard"},)
    file = tmp_path / "s.yaml"
    file.write_text(yaml.safe_dump(tiny.tree()))
    assert schema.load(file, ["tensorboard=true"]).trackers == ({"name": "tensorboard"},)
    assert schema.load(file, ["trackers=[mlflow]"]).trackers == ({"name": "mlflow"},)
    assert "tensorboard" not in schema.dump(schema.load(file, ["tensorboard=false"]))
    file.write_text(schema.dump(tiny.study(tensorboard=True)))
    assert schema.load(file).trackers == ({"name": "tensorboard"},)


@pytest.mark.parametrize(
    ("sections", "wanted"),
    [
        ({"tensorboard": "yes"}, "tensorboard: unknown key"),
        ({"trackers": "wandb"}, "trackers: input should be a list, got 'wandb'"),
        ({"trackers": [3]}, "trackers.0: input should be a mapping, got 3"),
        (
            {"trackers": ["wandbb"]},
            "trackers[0].name: must be one of tensorboard, wandb, mlflow or package.module:Name",
        ),
        ({"trackers": [{"name": "mlflow", "url": "x"}]}, "trackers[0].url: mlflow has no such option; it takes uri"),
        ({"trackers": [{"name": "wandb", "project": 3}]}, "trackers[0].project: must be str, got 3"),
        ({"trackers": ["tensorboard", "tensorboard"]}, "trackers: each must be given once, got ['tensorboard'"),
        ({"trackers": ["tests.tiny:images"]}, "trackers[0]: tests.tiny:images must give a part with open"),
    ],
)
def test_a_wrong_tracker_names_the_place(sections: dict[str, Any], wanted: str) -> None:
    with pytest.raises(StudyError) as caught:
        resolve(tiny.study(**sections))
    assert wanted in str(caught.value)


def test_one_that_is_not_installed_is_said_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedlth.errors.find_spec", lambda name: None)
    for name in ("tensorboard", "wandb", "mlflow"):
        with pytest.raises(StudyError, match=rf"trackers: {name} needs the extra: pip install 'fedlth\[{name}\]'"):
            resolve(tiny.study(trackers=[name]))


def test_trackers_decide_no_number_and_trials_have_none() -> None:
    made = tiny.study(trackers=["wandb"], tune={"lr": [0.1, 0.2]})
    assert made.science() == tiny.study().science()
    assert trial_of(made, 0.1).trackers == ()


# The tools themselves, where they are installed


def stopped_and_resumed(tmp_path: Path, spec: dict[str, Any]) -> tuple[Path, list[str]]:
    """Run a study with one tracker, stop it after the third commit, and resume it."""
    out = tmp_path / "r"
    made = tiny.of_method("two_step", federate={"rounds": 4}, evaluate={"every": 2}, trackers=[spec])
    told: list[str] = []
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        crashing(patch, "before old states are dropped", 4)
        tiny.run(made, out, tell=told.append)
    with lines_to(told.append):
        session.resume(out, InProcess())
    assert not [line for line in told if line.startswith("note: tracker")]
    assert all(line.startswith(("[", "run folder", "note: ")) for line in told)
    for file in out.rglob("*"):
        assert socket.gethostname() not in file.name
        found = file.is_file() and file.read_bytes()
        assert not found or len(socket.gethostname()) < 4 or socket.gethostname().encode() not in found, file
    assert RunFolder(out).header().finished
    return out, told


def test_tensorboard_events(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, _ = stopped_and_resumed(tmp_path, {"name": "tensorboard"})
    read = EventAccumulator(str(out / "tensorboard")).Reload()
    assert [event.step for event in read.Scalars("federate/val_accuracy")] == [1, 2, 4, 5]
    assert [event.step for event in read.Scalars("curve/global/test_accuracy")] == [3, 6]
    assert read.Scalars("final/ticket/0.2/test_accuracy")[0].step == 8
    assert tiny.digests(out)["theta_g"].encode() in read.Tensors("digest/theta_g")[0].tensor_proto.string_val
    assert capfd.readouterr().out == ""


def test_mlflow_in_a_local_store(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/store.db"
    out, _ = stopped_and_resumed(tmp_path, {"name": "mlflow", "uri": uri})
    client = MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("fedlth").experiment_id])
    assert (run.info.run_name, run.info.status) == ("tiny seed 0", "FINISHED")
    assert run.info.run_id == json.loads((out / "trackers.json").read_text())["mlflow"]["id"]
    assert run.data.params["train.lr"] == "0.1" and run.data.params["method.name"] == "two_step"
    assert run.data.tags["digest/theta_g"] == tiny.digests(out)["theta_g"]
    assert not {"mlflow.user", "mlflow.source.name"} & run.data.tags.keys()
    history = client.get_metric_history(run.info.run_id, "federate/val_accuracy")
    wanted = [row["val_accuracy"] for row in tiny.rows(out, "rounds") if row["phase"] == "federate"]
    assert [(one.step, one.value) for one in history] == list(zip([1, 2, 4, 5], wanted, strict=True))
    assert [one.step for one in client.get_metric_history(run.info.run_id, "commits")] == list(range(1, 9))
    assert "final/ticket/0.2/test_accuracy" in run.data.metrics
    said = capfd.readouterr()
    assert said.out == "" and said.err == ""


def wandb_history(file: Path) -> Iterator[dict[str, str]]:
    """Read an offline run's file: LevelDB's log, blocks of 32 KiB with records of protobuf."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, part = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record, part = Record.FromString(part), b""
            if record.HasField("history"):
                yield {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    out, _ = stopped_and_resumed(tmp_path, {"name": "wandb", "project": "mine"})
    wandb.teardown()
    id = json.loads((out / "trackers.json").read_text())["wandb"]["id"]
    files = sorted((out / "wandb").glob("*/*.wandb"))
    assert len(files) == 2 and all(file.name == f"run-{id}.wandb" for file in files)
    found = [row for file in files for row in wandb_history(file)]
    assert [int(row["_step"]) for row in found] == list(range(1, 9)), "every commit once"
    assert [float(row["federate/val_accuracy"]) for row in found if "federate/val_accuracy" in row] == [
        row["val_accuracy"] for row in tiny.rows(out, "rounds") if row["phase"] == "federate"
    ]
    written = {file.name for file in (out / "wandb").rglob("*") if file.is_file()}
    assert not written & {"wandb-metadata.json", "requirements.txt", "diff.patch", "output.log"}
    text = b"".join(file.read_bytes() for file in (out / "wandb").rglob("*.wandb"))
    assert os.environ.get("USER", "nobody-here").encode() not in text or os.environ.get("USER") == "root"
    said = capfd.readouterr()
    assert said.out == "" and said.err == ""
