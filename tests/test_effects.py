"""Options without effect: every one that is given and changes nothing is said, once, and a resume says nothing anew."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from fedlth import api
from fedlth.engines import choose
from fedlth.experiment import feasible
from fedlth.experiment.experiment import Experiment
from fedlth.experiment.resolve import read
from fedlth.forecast import forecast
from fedlth.output import lines_to
from fedlth.study import schema
from tests import tiny

BARE: dict[str, Any] = {  # a study in which nothing that could be idle is given
    "data": {"name": "tests.tiny:images"},
    "clients": {"count": 4, "test_samples": 20},
    "model": {"name": "mlp", "options": {"hidden": [12]}},
    "federate": {"rounds": 2, "clients_per_round": 2},
}


def notes(method: str, **sections: Any) -> list[str]:
    """Return the notes of a bare study with these sections."""
    tree = {**BARE, "method": {"name": method, **tiny.METHODS[method]}}
    for key, value in sections.items():
        tree[key] = {**tree[key], **value} if isinstance(value, dict) and isinstance(tree.get(key), dict) else value
    if method in ("local", "standalone"):
        del tree["federate"]
    return read(schema.build(tree))[1]


IDLE: list[tuple[str, dict[str, Any], str]] = [
    # Row 24
    ("two_step", {"ray": {"workers": 4}}, "ray: has no effect, engine is inprocess"),
    ("two_step", {"ray": {"num_gpus": 0.5}, "engine": "flower"}, "ray: has no effect, engine is flower"),
    ("two_step", {"workers": 2, "engine": "ray"}, "workers: has no effect, engine ray has workers of its own"),
    ("fedpm", {"train": {"round_decay": 0.9}}, "train.round_decay: has no effect, method fedpm learns scores "
     "at its own rate"),
    ("fedpm", {"train": {"round_schedule": "linear"}}, "train.round_schedule: has no effect, method fedpm learns "
     "scores at its own rate"),
    ("local", {"train": {"round_schedule": "linear"}}, "train.round_schedule: has no effect, method local has no "
     "rounds"),
    ("two_step", {"tune": {"rounds": 3}}, "tune.rounds: has no effect, tune.lr names no rates to try"),
    ("two_step", {"refine": {"clients_per_round": 2}}, "refine.clients_per_round: has no effect, refine.rounds is 0"),
    # Row 35
    ("local", {"tune": {"lr": [0.1], "rounds": 2}}, "tune.rounds: has no effect, method local has no rounds"),
    ("local", {"wire": "raw"}, "wire: has no effect, method local sends nothing"),
    ("local", {"model": {"buffers": "local_all"}}, "model.buffers: has no effect, method local sends nothing"),
    ("local", {"clients": {"unseen": 0.25}},
     "clients.unseen: has no effect, method local has no rounds: no client is left out"),
    ("local", {"train": {"epochs": 3}}, "train.epochs: has no effect, method local has no rounds"),
    ("local", {"train": {"lr": 0.1}, "personalise": {"lr": 0.2}},
     "train.lr: has no effect, every training takes personalise.lr"),
    ("local", {"tune": {"lr": [0.1]}, "personalise": {"lr": 0.2}},
     "tune: has no effect, every training takes personalise.lr"),
    ("local", {"finder": {"densities": [0.1]}},
     "finder: only decides how long local train, no arm of method local searches for a ticket"),
    ("fedavg", {"personalise": {"epochs": 3}}, "personalise.epochs: has no effect, no arm of method fedavg trains"),
    ("fedavg", {"personalise": {"lr": 0.1, "schedule": "cosine"}},
     "personalise.lr, personalise.schedule: have no effect, no arm of method fedavg trains"),
    ("fedavg", {"finder": {"main": 0.2}}, "finder: has no effect, no arm of method fedavg searches for a ticket"),
    ("fedavg", {"tickets": "compact"}, "tickets: has no effect, no arm of method fedavg is a client's own model"),
    ("fedpm", {"finder": {"densities": [0.1]}},
     "finder: only decides how long local train, no arm of method fedpm searches for a ticket"),
    ("lotteryfl", {"finder": {"densities": [0.1]}},
     "finder: only decides how long local train, no arm of method lotteryfl searches for a ticket"),
    (
        "fedpm",
        {"train": {"loss": {"name": "cross_entropy", "label_smoothing": 0.1}}},
        "train.loss.label_smoothing: not for method fedpm, which learns scores by the loss that evaluations report",
    ),
    ("fedpm", {"train": {"lr": 0.1}}, "train.lr: only for the arms local, method fedpm learns scores at its own rate"),
    ("fedpm", {"train": {"lr": 0.1}, "personalise": {"arms": ["own_tuned"]}},
     "train.lr: has no effect, no arm of method fedpm trains weights"),
    ("fedpm", {"personalise": {"arms": ["own_tuned"], "lr": 0.1}},
     "personalise.lr: has no effect, no arm of method fedpm trains weights"),
    ("two_step", {"clients": {"test": "own"}}, "clients.test_samples: has no effect, clients.test is own"),
    ("two_step", {"clients": {"test_share": 0.3}}, "clients.test_share: has no effect, clients.test is split"),
    # Brothers
    ("two_step", {"seed": 3, "seeds": [0, 1]}, "seed: has no effect, seeds are given"),
    ("two_step", {"finder": {"rewind": "init"}, "personalise": {"arms": ["ticket_0"]}},
     "finder.rewind: has no effect on the arms ticket_0"),
    ("two_step", {"finder": {"schedule": "shrink"}, "personalise": {"arms": ["one_shot"]}},
     "finder.schedule: has no effect on the arms one_shot"),
    ("dfedavg", {"federate": {"roll_back": 0.2}},
     "federate.roll_back: has no effect, clients of method dfedavg are sent no server's model"),
    # Row 47
    ("fedavg", {"federate": {"rounds": 0}},
     "federate.rounds: is 0, so the global model is theta_0, which no round has trained"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "sections", "says"), IDLE, ids=[f"{m}: {s}" for m, _, s in IDLE])
def test_an_option_without_effect_is_said(method: str, sections: dict[str, Any], says: str) -> None:
    """Rows 24, 35 and 47: given and idle, a note; the same study without it has none."""
    assert says in notes(method, **sections)
    assert says not in notes(method) and not [n for n in notes(method) if "no effect" in n]


@pytest.mark.parametrize("method", tiny.KINDS)
def test_an_option_with_effect_is_not_noted(method: str) -> None:
    """Rows 24 and 35: nothing is said of what counts."""
    made = {"personalise": {"clients_per_wave": 2}, "train": {"batch_size": 8}, "partition": {"name": "iid", "seed": 1}}
    assert [n for n in notes(method, **made) if "effect" in n] == []
    if method == "two_step":
        refined = {"refine": {"rounds": 1, "clients_per_round": 2}, "tune": {"lr": [0.1, 0.2], "rounds": 1}}
        assert notes(method, **refined, ray={"workers": 3}, engine="ray", finder={"densities": [0.5]}) == []


def test_a_buffer_policy_without_a_norm_is_said() -> None:
    """Row 35: `model.buffers` needs norms; `local_statistics` needs running ones."""

    def said(**model: Any) -> list[str]:
        made = tiny.study(model=model)
        return feasible.check(made, tiny.experiment(made))

    assert said(buffers="local_all") == ["model.buffers: has no effect, mlp has no norm"]
    assert said() == []
    assert said(name="tests.test_methods:normed", options={}, buffers="local_statistics") == []


def test_batches_by_length_of_equal_lengths_are_said() -> None:
    made = tiny.study(train={"group_by_length": True})
    assert feasible.check(made, tiny.experiment(made)) == [
        "train.group_by_length: has no effect, all examples are of one length"
    ]


def rooted(**given: Any) -> dict[str, Any]:
    return tiny.images()


def rootless() -> dict[str, Any]:
    return tiny.images()


def test_a_root_that_nothing_reads_is_said(tmp_path: Path) -> None:
    made = tiny.study(data={"name": "fashion_slice", "root": str(tmp_path)}, model={"name": "lenet300", "options": {}})
    assert feasible.check(made, tiny.experiment(made)) == [
        "data.root: has no effect, fashion_slice is not read from a folder"
    ]
    told = []
    for name in ("rooted", "rootless"):
        made = tiny.study(data={"name": f"{__name__}:{name}", "root": str(tmp_path)})
        told += feasible.check(made, tiny.experiment(made))
    assert told == [f"data.root: has no effect, {__name__}:rootless has no parameter root"]


def test_a_time_limit_in_this_process_is_said(tmp_path: Path) -> None:
    """Row 24: `job_timeout_s` needs a process to end."""
    made = tiny.study(job_timeout_s=5.0, workers=1)
    says = "job_timeout_s: has no effect, clients train in this process, whose own steps cannot be dropped"
    assert choose.without_effect(made) == [says] and f"note: {says}" in forecast(made)
    if sys.platform == "linux":
        assert choose.without_effect(tiny.study(job_timeout_s=5.0, workers=2)) == []
    assert choose.without_effect(tiny.study(job_timeout_s=5.0, engine="ray")) == []


def test_a_note_is_said_once_and_not_by_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 24: two seeds say a note once; what resumes, and what it begins, says nothing that was not so."""
    made = tiny.of_method("standalone", seeds=[0, 1], ray={"workers": 3}, workers=1, out=str(tmp_path / "r"))
    said: list[str] = []

    def stopped(one: Experiment, *given: Any, **more: Any) -> None:
        if one.study.seed == 1:
            raise KeyboardInterrupt
        choose.drive(one, *given, **more)

    monkeypatch.setattr(api, "drive", stopped)
    with pytest.raises(KeyboardInterrupt), lines_to(said.append):
        api.run(made)
    found = [line for line in said if line.startswith("note: ") and "read at once" not in line]  # of each run
    assert found == [f"note: {n}" for n in read(made)[1]]
    assert "note: ray: has no effect, engine is inprocess" in found
    monkeypatch.undo()
    said.clear()
    with lines_to(said.append):
        api.resume(tmp_path / "r")
    assert not [line for line in said if line.startswith("note: ") and "read at once" not in line]
