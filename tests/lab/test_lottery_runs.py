"""The same study gives the same bytes: run twice, stopped and resumed, on one worker or two; another seed does not."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedlth.errors import StudyError
from fedlth.lab import bench as bench_module
from fedlth.lab import runner, study
from fedlth.lab.search import finder_of, rounds
from fedlth.report.lottery import lottery_text
from tests.lab import tiny_lottery as tiny

ARMS = {
    "reinit": {"of": "imp", "start": "reinit"},
    "shuffle": {"of": "imp", "mask": "shuffle", "rounds": [2]},
    "dropped": {"of": "imp", "rounds": [2], "train": {"dropout": 0.5}},
}
ROOT = Path(__file__).parents[2]
PROBES = {
    "instability": {"name": "instability", "search": "imp", "rounds": [1], "steps": [0, 10], "alphas": 3},
    "attack": {"name": "attack", "search": "imp", "round": 2, "arms": ["shuffle"], "eps": [0.0, 0.1], "examples": 40},
}


def test_twice_gives_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    sections = {"arms": ARMS, "probes": PROBES}
    one = tiny.run(tmp_path / "one", **sections)
    assert one == tiny.run(tmp_path / "two", **sections)
    assert one != tiny.run(tmp_path / "three", **sections, seeds=[1])
    assert one == tiny.run(tmp_path / "one", **sections)  # and a finished run is left as it is


@pytest.mark.long
def test_two_workers_give_what_one_gives(tmp_path: Path) -> None:
    one = tiny.run(tmp_path / "one", arms={"reinit": ARMS["reinit"]}, seeds=[0, 1])
    two = tiny.run(tmp_path / "two", arms={"reinit": ARMS["reinit"]}, seeds=[0, 1], workers=2)
    assert one == two


def test_a_stop_at_any_training_ends_as_if_it_had_not_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tiny.run(tmp_path / "whole", arms=ARMS)
    real, left = bench_module.train, [0]

    def stopping(*args: object, **named: object) -> object:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(*args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(bench_module, "train", stopping)
    out, stops = tmp_path / "stopped", 0
    while not (out / "results.jsonl").exists():
        left[0] = 3
        try:
            tiny.run(out, arms=ARMS)
        except KeyboardInterrupt:
            stops += 1
    assert stops >= 2
    assert (out / "results.jsonl").read_bytes() == whole


def test_a_damaged_training_is_an_error_that_names_it_not_a_result(tmp_path: Path) -> None:
    tiny.run(tmp_path / "run")
    (tmp_path / "run" / "results.jsonl").unlink()
    for rows in (tmp_path / "run" / "rows").iterdir():
        rows.unlink()
    victim = sorted((tmp_path / "run" / "trainings").iterdir())[0]
    data = bytearray(victim.read_bytes())
    data[-5] ^= 1
    victim.write_bytes(bytes(data))
    with pytest.raises(StudyError, match=victim.name):
        tiny.run(tmp_path / "run")


def test_a_folder_of_another_study_is_refused(tmp_path: Path) -> None:
    tiny.run(tmp_path / "run")
    with pytest.raises(StudyError, match=r"holds another study \(seeds\); give another out="):
        tiny.run(tmp_path / "run", seeds=[3])


def test_every_row_says_what_it_is(tmp_path: Path) -> None:
    tiny.run(tmp_path / "run", arms=ARMS, probes=PROBES)
    rows = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    trainings = [r for r in rows if r["kind"] == "training"]
    assert [r["round"] for r in trainings if r["arm"] == "imp"] == [0, 1, 2, 3]
    assert [r["round"] for r in trainings if r["arm"] == "shuffle"] == [2]
    for row in trainings:
        iterations, losses, _ = zip(*row["curve"], strict=True)
        assert row["early_stop"] == iterations[losses.index(min(losses))]
        assert sum(row["layer_kept"].values()) == row["kept"]
    assert len(trainings[0]["curve"]) == 4


def test_a_study_survives_its_own_dump(tmp_path: Path) -> None:
    made = tiny.made(arms=ARMS, probes=PROBES)
    file = tmp_path / "study.yaml"
    file.write_text(study.dump(made))
    assert study.load(file) == made
    assert study.load(file, ["train.lr=0.2"]).train.lr == 0.2


RESCORED = {"one": {"densities": [0.5], "score": "snip", "schedule": "rescore"}}


def linear(num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))


MOVING = {"densities": [0.5], "schedule": {"name": "constant", "rounds": 1, "every": 5}, "rewind": "none"}


class Running(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - self.running_mean


def odd_norm(num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    return nn.Sequential(nn.Flatten(), Running(), nn.Linear(64, num_classes))


class Broken:
    def __call__(self, evidence: object) -> None:
        raise KeyError("no")


def no_dataclass() -> object:
    return object()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"train": {"lrr": 1}}, "train.lrr: unknown key; did you mean lr"),
        ({"searches": {"imp": {"rounds": 2, "scor": "x"}}}, "searches.imp.scor: unknown key; did you mean score"),
        ({"searches": {"imp": {"rounds": 2, "train": {"steps": 3}}}}, "searches.imp.train: steps: unknown key"),
        ({"searches": {"imp": {}}}, "searches.imp: must have either rounds or densities"),
        ({"searches": {"imp": {"densities": [0.2, 0.5]}}}, "searches.imp.densities: must fall"),
        ({"searches": {"imp": {"rounds": 2, "score": "nothing"}}}, "searches.imp.score.name: must be one of"),
        ({"arms": {"a": {"of": "nowhere"}}}, "arms.a.of: must be one of imp"),
        ({"arms": {"a": {"of": "imp", "rounds": [9]}}}, "arms.a.rounds: must name rounds of imp in [0, 3]"),
        ({"arms": {"a": {"of": "imp", "mask": "upside_down"}}}, "arms.a.mask.name: must be one of"),
        ({"arms": {"a": {"of": "imp", "start": "global"}}}, "arms.a.start: the laboratory has no"),
        ({"probes": {"p": {"name": "attack", "search": "imp"}}}, "probes.p.round: required"),
        ({"probes": {"p": {"name": "attack", "search": "imp", "round": 1, "arms": ["x"]}}}, "probes.p"),
        (
            {
                "arms": {"dense": {"of": "imp", "mask": "full"}},
                "probes": {"p": {"name": "attack", "search": "imp", "round": 1, "arms": ["dense"]}},
            },
            "probes.attack must be of a search and arms that are not called dense",
        ),
        ({"probes": {"p": {"name": "overlap", "searches": ["imp", "x"], "rounds": [1]}}}, "probes.p"),
        ({"seeds": []}, "seeds: must be one or more"),
        ({"train": {"milestones": [30]}}, "train.milestones.0"),
        ({"train": {"batch_size": 1000}}, "train.batch_size: must be at most the 180 training examples, got 1000"),
        ({"searches": {"../up": {"rounds": 2}}}, "searches: a name must be letters, digits, . _ -, got '../up'"),
        ({"lottery": "a/b"}, "lottery: must be letters"),
        ({"method": {"name": "fedavg"}}, "is a federated study; `fedlth run`"),
        (
            {"searches": {"imp": {"rounds": 1, "score": "tests.lab.test_lottery_runs:Broken"}}},
            "searches.imp.score: Broken fails: KeyError: 'no'",
        ),
        (
            {"arms": {"a": {"of": "imp", "start": {"name": "step", "step": 20}}}},
            "arms.a.start: must lie inside a training's 20",
        ),
        (
            {"arms": {"a": {"of": "imp", "start": {"name": "step", "step": 7}, "train": {"iterations": 5}}}},
            "arms.a.start: must lie inside a training's 5 iterations, got 7",
        ),
        (
            {"searches": {"imp": {"rounds": 2, "rewind": {"name": "step", "step": 500}}}},
            "searches.imp.rewind: must lie",
        ),
        ({"searches": {"imp": {"rounds": 2, "rewind": "global"}}}, "searches.imp.rewind: the laboratory has no"),
        (
            {"probes": {"p": {"name": "instability", "search": "imp", "steps": [500]}}},
            "probes.p.steps: must lie inside",
        ),
        (
            {"searches": RESCORED, "probes": {"p": {"name": "overlap", "searches": ["one"], "rounds": [0]}}},
            "in [1, 1], got 0",
        ),
        ({"searches": RESCORED, "arms": {"a": {"of": "one", "rounds": [0]}}}, "arms.a.rounds: must name rounds of one"),
        (
            {"probes": {"p": {"name": "settling", "search": "imp", "every": 0}}},
            "probes.settling.every must be at least 1",
        ),
        (
            {"probes": {"p": {"name": "settling", "search": "imp", "density": 1.5}}},
            "settling.density must be in (0, 1)",
        ),
        ({"probes": {"p": {"name": "collapse", "scores": ["snip"]}}}, "probes.collapse.steps must be 1 numbers"),
        ({"probes": {"p": {"name": "subset_sums", "k": [3]}}}, "probes.subset_sums.errors must be 1 numbers"),
        ({"probes": {"p": {"name": "tests.lab.test_lottery_runs:no_dataclass"}}}, "probes.p: must be a dataclass"),
        (
            {"train": {"dropout": 0.5}, "model": {"name": "tests.lab.test_lottery_runs:linear"}},
            "linear has no module nn.ReLU",
        ),
        (
            {"searches": {"imp": {"rounds": 2, "train": {"norm_l1": 0.1}}}},
            "searches.imp.train.norm_l1: mlp has no norm",
        ),
        (
            {"searches": {"imp": MOVING}, "arms": {"a": {"of": "imp"}}},
            "arms.a.start: must be named, since the mask of imp",
        ),
        (
            {
                "model": {"name": "tests.lab.test_lottery_runs:odd_norm"},
                "probes": {"p": {"name": "instability", "search": "imp"}},
            },
            "probes.p: model: 1 (Running) has running statistics",
        ),
        ({"data": {"name": "tests.tiny:images", "validation": 60, "train": 1000}}, "data: train and validation"),
        ({"data": {"name": "tests.tiny:images", "validation": 60, "test": 1000}}, "data.test: must be at most the 120"),
    ],
)
def test_a_wrong_study_is_an_error_that_names_the_place(change: dict[str, object], told: str, tmp_path: Path) -> None:
    with pytest.raises(StudyError) as error:
        tiny.run(tmp_path / "run", **change)
    assert told in str(error.value)
    late = "fails" in told  # what a user's part does is seen when it is called
    assert late or not (tmp_path / "run" / "config.yaml").exists(), json.dumps(change)


def test_a_training_that_diverges_costs_itself_alone(tmp_path: Path) -> None:
    """Row 10: it ended the study, the other arms with it."""
    arms = {"wild": {"of": "imp", "train": {"lr": 1e30}}, "tame": {"of": "imp"}}
    searches = {"imp": {"rounds": 1}, "lost": {"rounds": 1, "train": {"lr": 1e30}}}
    probes = {"apart": {"name": "instability", "search": "lost", "rounds": [0], "steps": [0], "alphas": 3}}
    found = list(map(json.loads, tiny.run(tmp_path / "run", searches=searches, arms=arms, probes=probes).splitlines()))
    rows = {(row["arm"], row["round"]): row for row in found if row["kind"] == "training"}
    assert all(row["diverged"] >= 1 for row in found if row["kind"] == "probe")
    assert {arm for (arm, _), row in rows.items() if row.get("diverged")} == {"wild", "lost"}
    assert rows["tame", 1]["test_accuracy"] == rows["imp", 1]["test_accuracy"]
    assert "Diverged: wild at round" in lottery_text(tmp_path / "run")


def test_two_probes_may_call_different_tasks_alike(tmp_path: Path) -> None:
    def probe(alpha: float) -> dict[str, object]:
        return {"name": "transfer", "clients": 2, "alpha": alpha, "examples": 60, "pretraining": 10}

    both = tiny.run(tmp_path / "both", searches={}, probes={"a": probe(0.1), "b": probe(100.0)})
    alone = tiny.run(tmp_path / "alone", searches={}, probes={"b": probe(100.0)})
    rows = [json.loads(line) for line in both.splitlines()]
    assert [row for row in rows if row["probe"] == "b"] == [json.loads(line) for line in alone.splitlines()]


def test_the_output_layer_loses_half_as_much_a_round_whatever_the_rate() -> None:
    search = {"rounds": 2, "rate": 0.5, "scope": "half_output"}
    bench = tiny.bench(searches={"imp": search})
    sizes = {e.name: e.size for e in bench.layout.prunable}
    kept = [{e.name: int(one.mask[e.slice].sum()) for e in bench.layout.prunable} for one in rounds(bench, "imp")]
    output = max(bench.layout.prunable, key=lambda e: e.place).name
    assert [one[output] for one in kept] == [sizes[output], 0.75 * sizes[output], 0.5625 * sizes[output]]
    assert all(
        one[name] == size * 0.5**n for n, one in enumerate(kept) for name, size in sizes.items() if name != output
    )


@pytest.mark.parametrize("rate", [0.5, 0.1])
def test_a_round_is_one_prune_whatever_the_rate(rate: float) -> None:
    finder = finder_of(tiny.made(searches={"imp": {"rounds": 2, "rate": rate}}).searches["imp"], "searches.imp")
    assert finder.chains((1 - rate, (1 - rate) ** 2)) == ((1 - rate, (1 - rate) ** 2),)


def test_the_score_shown_in_the_docs_works_in_a_lottery_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docs = Path(__file__).parents[2] / "docs" / "study.md"
    code = re.search(r"```python\n(# mine.py.*?)```", docs.read_text(), re.S)
    assert code
    (tmp_path / "mine.py").write_text(code.group(1))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("mine", None)
    one = tiny.run(tmp_path / "run", searches={"own": {"rounds": 2, "score": {"name": "mine:Grown", "power": 2.0}}})
    other = tiny.run(tmp_path / "plain", searches={"own": {"rounds": 2}})
    assert [r["layer_kept"] for r in map(json.loads, one.splitlines())]
    assert one != other


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], bytes]:
    """A study that is long enough to be stopped in its middle, and its results without a stop."""
    sections = {"seeds": [0, 1], "workers": 2, "searches": {"imp": {"rounds": 3}}}
    tree = tiny.tree(**sections, train={"iterations": 3000, "batch_size": 16, "lr": 0.05, "evaluate_every": 500})
    folder = tmp_path_factory.mktemp("long") / "whole"
    runner.run(study.build({**tree, "workers": 1}), folder)
    return tree, (folder / "results.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("stop", ["main", "worker"])
def test_a_stopped_command_ends_soon_says_how_to_go_on_and_does(
    tmp_path: Path, stop: str, long: tuple[dict[str, Any], bytes]
) -> None:
    tree, whole = long
    out, file = tmp_path / "out", tmp_path / "study.yaml"
    file.write_text(json.dumps(tree))
    command = [sys.executable, "-m", "fedlth", "lottery", str(file), f"out={out}"]
    # A test run in the background inherits an ignored SIGINT.
    heard = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, preexec_fn=heard) as running:
        assert running.stderr is not None
        while "round 0" not in (line := running.stderr.readline()):
            assert line, "ended before it was stopped"
        if stop == "main":
            running.send_signal(signal.SIGINT)
        else:
            children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
            workers = [c for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]
            os.kill(int(workers[-1]), signal.SIGKILL)
        told = running.stderr.read()
        assert running.wait(60) == (130 if stop == "main" else 2), told
    assert f"out={out}" in told
    assert not (out / "results.jsonl").exists()
    runner.run(study.build({**tree, "workers": 1}), out)
    assert (out / "results.jsonl").read_bytes() == whole


def test_a_ticket_is_taken_out_as_the_docs_say_and_nothing_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (Path(__file__).parents[2] / "docs" / "lottery.md").read_text()
    (code,) = re.findall(r"```python\n(from fedlth.lab import study\n.*?)```", text, re.S)
    tiny.run(tmp_path / "run")
    monkeypatch.setattr(bench_module, "train", None)
    found: dict[str, Any] = {}
    exec(code.replace("runs/lottery_quick-1", str(tmp_path / "run")).replace("== 8", "== 3"), found)
    one = found["ticket"]
    assert one.number == 3 and one.mask.sum() == round(0.8**3 * one.mask.size)
    weights = torch.cat([p.detach().reshape(-1) for p in found["network"].parameters()])
    assert not found["network"].training and torch.equal(
        weights.sort().values, torch.from_numpy(one.run.best.floats).sort().values
    )
