"""Runs of several seeds, learning rates chosen on validation data, and the Python API that README shows."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fedlth import api, tune
from fedlth.engines import choose
from fedlth.engines.inprocess import InProcess
from fedlth.errors import StudyError
from fedlth.experiment.experiment import Experiment
from fedlth.federation import rounds, session
from fedlth.output import lines_to
from fedlth.report.diff import diff
from fedlth.storage import store
from fedlth.storage.run_folder import RunFolder
from fedlth.study import schema
from tests import tiny

ROOT = Path(__file__).parents[1]


def study(out: Path, **sections: Any) -> schema.Study:
    return tiny.study(**sections, out=str(out))


def stop_at(monkeypatch: pytest.MonkeyPatch, where: Any, when: Callable[[schema.Study], bool]) -> list[int]:
    """Let the runs of a study go on until one of which `when` is true is to begin; return the seeds that began."""
    began: list[int] = []

    def stopped(experiment: Experiment, out: Path, **more: Any) -> None:
        began.append(experiment.study.seed)
        if when(experiment.study):
            raise KeyboardInterrupt
        choose.drive(experiment, out, **more)

    monkeypatch.setattr(where, "drive", stopped)
    return began


def test_seeds_go_on_where_a_stop_left_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop in the second seed loses neither the first nor the third, which had not begun."""
    api.run(study(tmp_path / "whole", seeds=[0, 1, 2]))
    began = stop_at(monkeypatch, api, lambda one: one.seed == 1)
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt), lines_to(said.append):
        api.run(study(tmp_path / "cut", seeds=[0, 1, 2]))
    assert began == [0, 1] and said[-1] == f"stopped; to go on: fedlth resume {tmp_path / 'cut'}"
    monkeypatch.undo()
    api.resume(tmp_path / "cut")
    for seed in (0, 1, 2):
        assert tiny.facts(tmp_path / "cut" / f"seed-{seed}") == tiny.facts(tmp_path / "whole" / f"seed-{seed}")


def test_a_folder_is_never_run_over(tmp_path: Path) -> None:
    api.run(study(tmp_path / "a", seeds=[0]))
    for sections in ({"seeds": [0]}, {}):
        with pytest.raises(StudyError, match="holds a run already"):
            api.run(study(tmp_path / "a", **sections))


def test_validation_chooses_the_learning_rate(tmp_path: Path) -> None:
    out = api.run(study(tmp_path / "t", tune={"lr": [1e-6, 0.2], "rounds": 1}))
    chosen = json.loads((out / "tune" / "chosen.json").read_bytes())
    assert chosen["lr"] == 0.2 and schema.load(out / "config.yaml").train.lr == 0.2
    trial = [json.loads(line) for line in (out / "tune" / "lr-0.2" / "metrics.jsonl").read_bytes().splitlines()]
    kept = [row["val_accuracy"] for row in trial if row["arm"] == "ticket"]
    assert chosen["val_accuracy"]["0.2"] == pytest.approx(sum(kept) / len(kept))
    assert len((out / "tune" / "lr-0.2" / "rounds.jsonl").read_bytes().splitlines()) < len(
        (out / "rounds.jsonl").read_bytes().splitlines()
    )


def test_tuning_goes_on_after_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"tune": {"lr": [0.05, 0.2], "rounds": 1}}
    api.run(study(tmp_path / "whole", **asked))
    stop_at(monkeypatch, tune, lambda one: one.train.lr == 0.2)
    with pytest.raises(KeyboardInterrupt):
        api.run(study(tmp_path / "cut", **asked))
    monkeypatch.undo()
    api.resume(tmp_path / "cut")
    assert tiny.facts(tmp_path / "cut") == tiny.facts(tmp_path / "whole")


def test_readme_predicts_with_a_ticket_in_three_lines(tmp_path: Path) -> None:
    run = api.run(study(tmp_path / "r"))
    model = api.load_ticket(run, client=1)
    logits = model(torch.zeros(2, 1, tiny.SIDE, tiny.SIDE))
    assert logits.shape == (2, tiny.NUM_CLASSES)
    with pytest.raises(StudyError, match="no ticket of client 99"):
        api.load_ticket(run, client=99)


# Decisions that a resume must not make anew


def test_a_default_is_no_wish_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 12: `standalone` rewinds to theta_0 by default; a resume took the study's own default, written down."""
    tree = {"seeds": [0, 1], "personalise": {"arms": ["ticket"], "epochs": 1}, "workers": 1}
    api.run(tiny.of_method("standalone", **tree, out=str(tmp_path / "whole")))
    stop_at(monkeypatch, api, lambda one: one.seed == 1)
    with pytest.raises(KeyboardInterrupt):
        api.run(tiny.of_method("standalone", **tree, out=str(tmp_path / "cut")))
    monkeypatch.undo()
    said: list[str] = []
    with lines_to(said.append):
        api.resume(tmp_path / "cut")
    assert diff(tmp_path / "whole", tmp_path / "cut") == []
    rewinds = [RunFolder(tmp_path / "cut" / f"seed-{s}").study().finder.rewind for s in (0, 1)]
    assert rewinds == [{"name": "init"}] * 2
    assert not [line for line in said if "no effect" in line]


def test_a_default_is_no_wish_after_a_resume_of_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 12: the same with `tune.lr`, whose final run begins after the resume."""
    tree = {"tune": {"lr": [0.05, 0.1]}, "personalise": {"arms": ["ticket"], "epochs": 1}, "workers": 1}
    api.run(tiny.of_method("standalone", **tree, out=str(tmp_path / "whole")))
    stop_at(monkeypatch, tune, lambda one: one.train.lr == 0.1)
    with pytest.raises(KeyboardInterrupt):
        api.run(tiny.of_method("standalone", **tree, out=str(tmp_path / "cut")))
    monkeypatch.undo()
    api.resume(tmp_path / "cut")
    assert diff(tmp_path / "whole", tmp_path / "cut") == []


def test_what_was_given_is_what_is_dumped() -> None:
    """Row 12: given and default survive a dump of what was given; a full dump makes everything given."""
    made = tiny.of_method("standalone")
    again = schema.build(schema.parse(schema.dump(made, given_only=True), "dump"))
    assert again == made
    for place in ("finder", "finder.densities", "finder.rewind", "ray", "tune.rounds", "train.lr", "train.epochs"):
        assert again.given(place) == made.given(place), place
    assert made.given("finder.densities") and not made.given("finder.rewind") and not made.given("ray.workers")


def test_what_the_machine_decides_is_decided_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 12's brother: `auto` is decided when a study begins, not by whatever machine resumes it."""
    stop_at(monkeypatch, api, lambda one: one.seed == 1)
    with pytest.raises(KeyboardInterrupt):
        api.run(study(tmp_path / "r", seeds=[0, 1], compute="auto", cohort="auto", device="auto", workers=1))
    monkeypatch.undo()
    asked, begun = schema.load(tmp_path / "r" / api.ASKED), RunFolder(tmp_path / "r" / "seed-0").study()
    for key in ("compute", "cohort", "device"):
        assert getattr(asked, key) == getattr(begun, key) != "auto", key


def test_seeds_go_on_with_the_data_that_they_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 12's brother: a seed that has not begun must not begin on other data than the seeds before it."""
    stop_at(monkeypatch, api, lambda one: one.seed == 1)
    with pytest.raises(KeyboardInterrupt):
        api.run(study(tmp_path / "r", seeds=[0, 1]))
    monkeypatch.undo()
    asked = tmp_path / "r" / api.ASKED
    name = "name: tests.tiny:images"
    asked.write_text(asked.read_text().replace(name, f"{name}\n  options: {{seed: 5}}"))
    with pytest.raises(StudyError, match="seed-0: must continue with the data that it began with"):
        api.resume(tmp_path / "r")
    header = tmp_path / "r" / "seed-0" / "header.json"
    header.write_text("{")  # found in review: a traceback of json
    with pytest.raises(StudyError, match=re.escape(str(header))):
        api.resume(tmp_path / "r")


# Learning rates


def test_a_rate_that_diverges_loses(tmp_path: Path) -> None:
    """Row 14: a diverging candidate has lost; its study does not die of it, and a resume does not try it again."""
    said: list[str] = []
    with lines_to(said.append):
        out = api.run(study(tmp_path / "t", tune={"lr": [1e8, 0.1], "rounds": 1}, federate={"rounds": 1}, workers=1))
    chosen = json.loads((out / "tune" / "chosen.json").read_bytes())
    assert chosen["lr"] == 0.1 and chosen["val_accuracy"]["100000000.0"] == "diverged"
    assert "tune: lr 100000000.0: diverged" in said
    assert schema.load(out / "config.yaml").train.lr == 0.1


def test_all_rates_diverge(tmp_path: Path) -> None:
    """Row 14: one clear line where no candidate is left."""
    with pytest.raises(StudyError, match=r"tune: every rate of tune\.lr diverged, got \[100000000\.0, 1000000000\.0\]"):
        api.run(study(tmp_path / "t", tune={"lr": [1e8, 1e9], "rounds": 1}, workers=1))


def row(client: int, arm: str, target: float, accuracy: float, **more: Any) -> str:
    rest = {"unseen": False, "density": target, "test_accuracy": 0.0, "num_train": 1}
    return json.dumps(rest | {"client": client, "arm": arm, "target_density": target, "val_accuracy": accuracy} | more)


@pytest.mark.parametrize(
    ("sections", "rows", "score"),
    [
        ({}, [row(0, "ticket", 0.5, 0.9), row(0, "ticket", 0.2, 0.4), row(1, "ticket", 0.2, 0.2)], 0.15),
        ({"finder": {"main": 0.5}}, [row(0, "ticket", 0.5, 0.8), row(0, "ticket", 0.2, 0.4)], 0.2),
        ({"refine": {"rounds": 1, "clients_per_round": 2}},
         [row(0, "ticket", 0.2, 0.9), row(0, "refined", 0.2, 0.4)], 0.1),
        ({}, [row(0, "ticket", 0.2, 0.25, diverged=True), row(1, "ticket", 0.2, 0.75)], "diverged"),
        ({}, [row(c, "ticket", 0.2, 0.25, diverged=True) for c in range(4)], "diverged"),
        ({"personalise": {"arms": ["own", "global"]}}, [row(0, "own", 1.0, 0.8), row(0, "global", 1.0, 0.4)], 0.2),
    ],
    ids=["the kept density, a missing client counts 0", "main", "refined", "one diverged", "all diverged", "own"],
)  # fmt: skip
def test_what_is_kept_is_what_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any], rows: list[str], score: float | str
) -> None:
    """Row 14: the kept arm at the kept density decides, not the mean of all densities."""
    monkeypatch.setattr(tune, "drive", lambda *args, **more: None)
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
    assert tune._score(tiny.study(**sections), tmp_path) == (score if isinstance(score, str) else pytest.approx(score))


def test_own_is_a_model_like_any_other(tmp_path: Path) -> None:
    """Row 15: `own` is kept after tuned models and before dense ones, saved, loaded, and scored."""
    order = ("ticket", "own_tuned", "own", "dense", "local")
    for i, arm in enumerate(order):
        made = tiny.of_method("lotteryfl", personalise={"arms": ["global", *reversed(order[i:])]})
        assert tiny.experiment(made).kept_arm == arm
    made = tiny.of_method(
        "lotteryfl", personalise={"arms": ["global", "own"]}, tune={"lr": [1e-6, 0.2], "rounds": 2}, workers=1,
        out=str(tmp_path / "r"),
    )  # fmt: skip
    out = api.run(made)
    chosen = json.loads((out / "tune" / "chosen.json").read_bytes())
    assert chosen["lr"] == 0.2 and all(0 <= score <= 1 for score in chosen["val_accuracy"].values())
    assert sorted(tiny.digests(out)["tickets"]) == ["0", "1", "2", "3"]
    api.load_ticket(out, client=1)
    assert tiny.experiment(made).product_arm == "own"


# Folders


def test_looking_at_progress_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 25: only who goes on with a run cuts its logs, and holds the lock while doing so."""
    made = tiny.of_method("fedavg")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rounds.Federation, "_step", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        tiny.run(made, tmp_path / "r", engine=InProcess())
    log = tmp_path / "r" / "ledger.jsonl"
    log.write_bytes(b"a row that another process is writing")
    folder = RunFolder(tmp_path / "r")
    assert folder.progress().step == 0 and log.read_bytes()
    tiny.opened(folder, InProcess())
    assert log.read_bytes()
    held: list[bool] = []
    recover = RunFolder.recover

    def spied(self: RunFolder, *, states: bool) -> None:
        with pytest.raises(StudyError, match="another process"), self.locked():
            pass
        held.append(True)
        recover(self, states=states)

    monkeypatch.setattr(RunFolder, "recover", spied)
    session.resume(tmp_path / "r", InProcess())
    assert held == [True] and b"another process" not in log.read_bytes()


def test_one_lock_for_the_whole_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 37: two studies of several runs in one folder, started together: the second is refused, whole."""
    out, refused = tmp_path / "r", []
    real = api.write_atomic

    def second_comes(path: Path, data: bytes) -> None:
        for other in ({"seeds": [0, 1]}, {"tune": {"lr": [0.1, 0.2]}}, {}):  # before the first has written anything
            with pytest.raises(StudyError, match="another process is running") as error:
                api.run(study(out, train={"lr": 0.3}, **other))
            refused.append(error)
        real(path, data)

    monkeypatch.setattr(api, "write_atomic", second_comes)
    monkeypatch.setattr(api, "drive", lambda *args, **more: None)
    api.run(study(out, train={"lr": 0.01}, seeds=[0, 1]))
    assert len(refused) == 3 and schema.load(out / api.ASKED).train.lr == 0.01
    monkeypatch.setattr(api, "drive", lambda *args, **more: api.resume(out))
    with pytest.raises(StudyError, match="another process is running"):
        api.resume(out)


@pytest.mark.slow
def test_two_processes_with_seeds_in_one_folder(tmp_path: Path) -> None:
    """Row 37, with real processes: one runs, one is refused with one line, all seeds have one rate."""
    file, out = tmp_path / "s.yaml", tmp_path / "r"
    file.write_text(yaml.safe_dump(tiny.tree(seeds=[0, 1], workers=1)))
    command = [sys.executable, "-m", "fedlth", "run", str(file), f"out={out}"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    ran = [subprocess.Popen([*command, f"train.lr={lr}"], **pipes) for lr in (0.1, 0.2)]
    said = [one.communicate()[1] for one in ran]
    assert sorted(one.returncode for one in ran) == [0, 2], said
    loser = said[[one.returncode for one in ran].index(2)]
    assert "another process is running this run" in loser or "holds a run already" in loser
    assert len({schema.load(out / f"seed-{s}" / "config.yaml").train.lr for s in (0, 1)}) == 1


def test_runs_started_together_have_each_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 38: a folder is claimed by making it, so no two runs without `out` can want the same."""
    gate = threading.Barrier(8)

    def claim(_: int) -> Path:
        gate.wait()
        return api.free_folder(tmp_path / "runs", "smoke")

    with ThreadPoolExecutor(8) as pool:
        claimed = list(pool.map(claim, range(8)))
    assert sorted(p.name for p in claimed) == sorted(f"smoke-{i}" for i in range(1, 9))
    monkeypatch.chdir(tmp_path)
    made = tiny.study(study="smoke", workers=1)
    assert api.run(made) == Path("runs/smoke-9")
    monkeypatch.setattr(session.RunFolder, "create", lambda *args: (_ for _ in ()).throw(StudyError("no")))
    with pytest.raises(StudyError, match="^no$"):
        api.run(made)
    assert not Path("runs/smoke-10").exists(), "what has not begun leaves no folder"
    with pytest.raises(StudyError):
        api.run(tiny.study(study="smoke", federate={"clients_per_round": 9}))
    assert not Path("runs/smoke-10").exists(), "nor does what is refused"


def test_a_disk_that_is_full_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 46: nothing was committed, so nothing is said to be; the folder is named."""

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write_atomic", full)
    monkeypatch.setattr(api, "write_atomic", full)
    for more in ({}, {"seeds": [0, 1]}):
        with pytest.raises(OSError, match="No space left") as error:
            api.run(study(tmp_path / "r", **more))
        assert error.value.__notes__ == [f"the run in {tmp_path / 'r'} has not begun, and nothing of it is kept"]
        assert not (tmp_path / "r").exists()


def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 46: what was committed is said to be kept, with the folder."""

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left") as error:
        patch.setattr(RunFolder, "save_state", full)
        api.run(study(tmp_path / "r", workers=1))
    assert error.value.__notes__ == [f"what was committed is kept: fedlth resume {tmp_path / 'r'}"]
    api.resume(tmp_path / "r")
