"""Evaluation between the rounds: all clients, no trace in the run itself, and a step 2 that may begin with the best."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedlth.engines.flower_engine import FlowerEngine
from fedlth.engines.forked import Forked
from fedlth.engines.inprocess import InProcess
from fedlth.errors import StudyError
from fedlth.experiment.resolve import read, resolve
from fedlth.federation import session
from fedlth.federation.jobs import Failure, Job, Reply
from fedlth.forecast import forecast
from fedlth.methods.aggregate import FedAvg
from fedlth.methods.client_update import MaskedUpdate
from fedlth.methods.method import FederatedMethod, Phase
from fedlth.report.facts import read_run
from fedlth.report.traffic import traffic
from fedlth.storage import checkpoint
from fedlth.storage.run_folder import RunFolder
from fedlth.study.schema import Study
from fedlth.wire import metrics
from tests import tiny
from tests.faults.test_resume import Crash, Meddling, crashing
from tests.test_no_test_data import permuted_test_labels

FEDERATED = [name for name in tiny.KINDS if name not in ("local", "standalone")]
# Every client is right on every validation example after two rounds, and stays so: the second is the best.
EARLY: dict[str, Any] = {"train": {"lr": 0.8}, "federate": {"rounds": 5}, "evaluate": {"every": 1, "keep": "best"}}


def evaluated(name: str, **sections: Any) -> Study:
    return tiny.of_method(name, **{"federate": {"rounds": 4}, "evaluate": {"every": 2}, **sections})


def facts(out: Path) -> dict[str, bytes]:
    return {**tiny.facts(out), "curve.jsonl": (out / "curve.jsonl").read_bytes()}


def without(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["phase"] != "evaluate"]


@pytest.mark.parametrize("name", FEDERATED)
def test_a_run_is_the_same_with_and_without(tmp_path: Path, name: str) -> None:
    """States, random streams, bytes: nothing of the training knows of it."""
    curved, plain = tmp_path / "curved", tmp_path / "plain"
    tiny.run(evaluated(name), curved)
    tiny.run(evaluated(name, evaluate={"every": 0}), plain)
    ours, theirs = tiny.facts(curved), tiny.facts(plain)
    assert {n for n in ours if ours[n] != theirs[n]} == {"ledger.jsonl", "rounds.jsonl"}
    for log in ("ledger", "rounds"):
        assert without(tiny.rows(curved, log)) == tiny.rows(plain, log)
    assert not (plain / "curve.jsonl").exists()
    found, wanted = (traffic(read_run(out)) for out in (curved, plain))
    assert replace(found, evaluation=wanted.evaluation) == wanted and found.evaluation.messages


@pytest.mark.parametrize("name", FEDERATED)
def test_the_last_evaluation_is_what_step_2_then_finds(tmp_path: Path, name: str) -> None:
    made = evaluated(name)
    tiny.run(made, tmp_path / "r")
    rows, owns = tiny.rows(tmp_path / "r", "curve"), "own" in tiny.experiment(made).arms
    assert [row["round"] for row in rows] == sorted(row["round"] for row in rows)
    assert {(r["phase"], r["round"]) for r in rows} == {("federate", 2), ("federate", 4)}
    assert {r["arm"] for r in rows} == ({"global", "own"} if owns else {"global"})
    assert sorted((r["client"], r["arm"]) for r in rows) == sorted(
        (c, a) for c in range(4) for a in (("global", "own") if owns else ("global",)) for _ in range(2)
    )
    step2 = {(r["client"], r["arm"]): r for r in tiny.rows(tmp_path / "r", "metrics")}
    for row in (r for r in rows if r["round"] == 4):
        same = step2[row["client"], row["arm"]]
        assert {k: v for k, v in row.items() if k not in ("round", "phase")} == {
            k: same[k] for k in row if k not in ("round", "phase")
        }
    assert {r["client"] for r in rows if r["unseen"]} == set(tiny.task_of(tmp_path / "r").splits.unseen)
    means = [r["val_accuracy"] for r in tiny.rows(tmp_path / "r", "rounds") if r["phase"] == "evaluate"]
    seen = [r["val_accuracy"] for r in rows if (r["round"], r["arm"], r["unseen"]) == (4, "global", False)]
    assert means[-1] == pytest.approx(sum(seen) / len(seen))


@pytest.mark.parametrize("name", ["fedavg", "lotteryfl", "fedpm"])
def test_its_downloads_are_of_kind_evaluation(tmp_path: Path, name: str) -> None:
    tiny.run(evaluated(name), tmp_path / "r")
    rows = [row for row in tiny.rows(tmp_path / "r", "ledger") if row["phase"] == "evaluate"]
    assert {row["kind"] for row in rows if row["sender"] == "server"} == {"evaluation"}
    assert {row["kind"] for row in rows if row["receiver"] == "server"} == {"metrics"}
    slices = [row for row in rows if row["sender"] == "server" and not row["broadcast"]]
    assert bool(slices) == (name == "lotteryfl") and all(row["density"] < 1 for row in slices)
    assert all(row["name"] == "theta_g" for row in rows if row["sender"] == "server")


def two_phases() -> FederatedMethod:
    phases = tuple(Phase(name=name, update=MaskedUpdate(), join=FedAvg(), rounds=3) for name in ("warm", "train"))
    return FederatedMethod(name="mine", paper="", summary="", phases=phases, arms=("global",))


def test_rounds_are_counted_over_all_phases_of_step_1(tmp_path: Path) -> None:
    made = tiny.study(method={"name": "tests.test_curve:two_phases"}, evaluate={"every": 4})
    tiny.run(made, tmp_path / "r")
    assert {(r["phase"], r["round"]) for r in tiny.rows(tmp_path / "r", "curve")} == {("train", 1), ("train", 3)}
    order = [(r["phase"], r["round"]) for r in tiny.rows(tmp_path / "r", "rounds")]
    assert order[:8] == [
        ("warm", 1), ("warm", 2), ("warm", 3), ("train", 1), ("evaluate", 4), ("train", 2), ("train", 3),
        ("evaluate", 6),
    ]  # fmt: skip
    header = read_run(tmp_path / "r").header
    assert [(p.name, p.rounds, p.step) for p in header.phases][:3] == [
        ("warm", 3, 1), ("train", 3, 1), ("evaluate", 2, 1),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["two_step", "fedpm"])
def test_step_2_begins_with_the_best_round(tmp_path: Path, name: str) -> None:
    """It ends in the bits of a run that stopped there; of equals the earlier one is the best."""
    best, stopped = tmp_path / "best", tmp_path / "stopped"
    told: list[str] = []
    refine = {"rounds": 1, "clients_per_round": 2} if name == "two_step" else {}
    tiny.run(tiny.of_method(name, **EARLY, refine=refine), best, tell=told.append)
    rows = [row for row in tiny.rows(best, "rounds") if row["phase"] == "evaluate"]
    accuracies = [row["val_accuracy"] for row in rows]
    first = accuracies.index(max(accuracies)) + 1
    assert rows[-1]["kept_best"] == f"federate {first}" and not any("kept_best" in row for row in rows[:-1])
    assert name == "fedpm" or (first < 5 and accuracies[first:].count(max(accuracies)) > 0), "a tie, to test it"
    assert any(f"step 2 begins with the global model of federate {first}" in line for line in told)
    plain = {**EARLY, "federate": {"rounds": first}, "evaluate": {"every": 0}}
    tiny.run(tiny.of_method(name, **plain, refine=refine), stopped)
    assert tiny.digests(best) == tiny.digests(stopped)
    assert (best / "metrics.jsonl").read_bytes() == (stopped / "metrics.jsonl").read_bytes()


def test_the_choice_looks_at_no_test_data(tmp_path: Path) -> None:
    made = tiny.of_method("two_step", **EARLY)
    tiny.run(made, tmp_path / "honest")
    with permuted_test_labels():
        tiny.run(made, tmp_path / "permuted")
    for name in ("digests.json", "rounds.jsonl", "ledger.jsonl"):
        assert (tmp_path / "honest" / name).read_bytes() == (tmp_path / "permuted" / name).read_bytes()
    columns = {"test_accuracy", "test_loss"}
    honest, permuted = (
        [{k: v for k, v in row.items() if k not in columns} for row in tiny.rows(tmp_path / name, "curve")]
        for name in ("honest", "permuted")
    )
    assert honest == permuted
    assert (tmp_path / "honest" / "curve.jsonl").read_bytes() != (tmp_path / "permuted" / "curve.jsonl").read_bytes()


STUDIES = {
    "best": ("two_step", {**EARLY, "refine": {"rounds": 1, "clients_per_round": 2}}),
    "slices": ("lotteryfl", {"federate": {"rounds": 3}, "evaluate": {"every": 1}}),
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, bytes]]:
    known: dict[str, dict[str, bytes]] = {}

    def found(name: str) -> dict[str, bytes]:
        if name not in known:
            out = tmp_path_factory.mktemp(name) / "run"
            tiny.run(tiny.of_method(STUDIES[name][0], **STUDIES[name][1]), out)
            known[name] = facts(out)
        return known[name]

    return found


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize(
    ("place", "when"),
    [
        ("after the checkpoint", 2), ("before the checkpoint", 4), ("after a log is written", 10),
        ("after a log is written", 20), ("in the middle of a log", 15), ("before old states are dropped", 5),
        ("after the checkpoint", 5), ("while any file is written", 9), ("before the tickets", 1),
    ],
)  # fmt: skip
def test_a_resumed_run_equals_one_that_never_stopped(
    tmp_path: Path, reference: Callable[[str], dict[str, bytes]], name: str, place: str, when: int
) -> None:
    out, (method, sections) = tmp_path / "run", STUDIES[name]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        crashing(patch, place, when)
        tiny.run(tiny.of_method(method, **sections), out)
    session.resume(out, InProcess())
    assert facts(out) == reference(name)


@pytest.mark.slow
def test_every_stop_between_two_commits_of_the_choice(
    tmp_path: Path, reference: Callable[[str], dict[str, bytes]]
) -> None:
    """Above all those around the last evaluation, whose commit makes the best model the current one."""
    for stop in range(1, 13):
        out = tmp_path / str(stop)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
            crashing(patch, "after the checkpoint", stop)
            tiny.run(tiny.of_method("two_step", **STUDIES["best"][1]), out)
        session.resume(out, InProcess())
        assert facts(out) == reference("best"), stop


def test_a_checkpoint_from_before_there_was_a_curve_still_resumes(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        crashing(patch, "after the checkpoint", 2)
        tiny.run(tiny.of_method("fedavg"), out)
    record = json.loads((out / "checkpoint.json").read_bytes())
    assert "curve" not in record["lengths"]
    rest = {k: v for k, v in record.items() if k not in ("digest", "best")}
    (out / "checkpoint.json").write_text(json.dumps({**rest, "digest": checkpoint.digest_of(rest)}))
    session.resume(out, InProcess())
    tiny.run(tiny.of_method("fedavg"), tmp_path / "whole")
    assert tiny.facts(out) == tiny.facts(tmp_path / "whole")


# Faults


def test_an_evaluation_that_fails_for_all_changes_nothing_else(tmp_path: Path) -> None:
    """No roll-back, no end of the run: it is not the training."""

    def meddle(job: Job, answer: Reply | Failure) -> Reply | Failure:
        if job.phase != "evaluate":
            return answer
        return Failure(round=job.round, client=job.client, kind="raised", reason="no memory")

    made = evaluated("fedavg", evaluate={"every": 1, "keep": "best"})
    tiny.run(made, tmp_path / "r", engine=Meddling(meddle))
    tiny.run(evaluated("fedavg", evaluate={"every": 0}), tmp_path / "plain")
    assert tiny.digests(tmp_path / "r") == tiny.digests(tmp_path / "plain")
    assert tiny.rows(tmp_path / "r", "curve") == []
    assert not any("rolled_back_to" in r or "kept_best" in r for r in tiny.rows(tmp_path / "r", "rounds"))


def test_a_round_that_some_did_not_answer_is_not_the_best(tmp_path: Path) -> None:
    """Else the loss of a weak client would make a round look good."""
    made = tiny.of_method("fedavg", **EARLY)
    lost = min(set(range(4)) - set(tiny.open_task(made.science()).splits.unseen))

    def meddle(job: Job, answer: Reply | Failure) -> Reply | Failure:
        if job.phase == "evaluate" and job.client == lost and job.round in (2, 3):
            return Failure(round=job.round, client=job.client, kind="lost", reason="")
        return answer

    tiny.run(made, tmp_path / "r", engine=Meddling(meddle))
    assert tiny.rows(tmp_path / "r", "rounds")[9]["kept_best"] == "federate 4"


BAD: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "client must be 1, got 2": lambda rows: [{**row, "client": 2} for row in rows],
    "unseen must be False, got True": lambda rows: [{**row, "unseen": True} for row in rows],
    "num_test must be 20, got 3": lambda rows: [{**row, "num_test": 3} for row in rows],
    "val_accuracy must be a number in [0, 1] or None, got 7.0": lambda rows: [
        {**row, "val_accuracy": 7.0} for row in rows
    ],
    "arm must be each of global, own once": lambda rows: rows[:1],
    "got ['own', 'own']": lambda rows: [rows[1], rows[1]],
    "got ['global', 'local']": lambda rows: [rows[0], {**rows[1], "arm": "local"}],
    "rows must be a list of records": lambda rows: [],
    "'more' is not a field of CurveRow": lambda rows: [{**row, "more": 1} for row in rows],
    "test_loss is required": lambda rows: [{k: v for k, v in row.items() if k != "test_loss"} for row in rows],
}


@pytest.mark.parametrize("wanted", BAD)
def test_a_row_that_contradicts_the_server_is_refused_and_costs_only_its_sender(tmp_path: Path, wanted: str) -> None:
    made = evaluated("lotteryfl", clients={"unseen": 0.0})

    def meddle(job: Job, answer: Reply | Failure) -> Reply | Failure:
        if job.phase != "evaluate" or job.client != 1 or not isinstance(answer, Reply):
            return answer
        (message,) = answer.outbox
        rows = BAD[wanted](metrics.decode(message.payload)["rows"])
        return replace(answer, outbox=(replace(message, payload=metrics.encode({"rows": rows})),))

    tiny.run(made, tmp_path / "r", engine=Meddling(meddle))
    failed = [f for r in tiny.rows(tmp_path / "r", "rounds") for f in r["failed"]]
    assert [(f["client"], f["kind"]) for f in failed] == [(1, "refused")] * 2 and wanted in failed[0]["reason"]
    assert {r["client"] for r in tiny.rows(tmp_path / "r", "curve")} == {0, 2, 3}


def test_the_server_says_which_round_it_was(tmp_path: Path) -> None:
    def meddle(job: Job, answer: Reply | Failure) -> Reply | Failure:
        if job.phase != "evaluate" or not isinstance(answer, Reply):
            return answer
        (message,) = answer.outbox
        rows = [{**row, "phase": "other", "round": 99} for row in metrics.decode(message.payload)["rows"]]
        return replace(answer, outbox=(replace(message, payload=metrics.encode({"rows": rows})),))

    tiny.run(evaluated("fedavg"), tmp_path / "r", engine=Meddling(meddle))
    assert {(r["phase"], r["round"]) for r in tiny.rows(tmp_path / "r", "curve")} == {("federate", 2), ("federate", 4)}


# What a study may say


@pytest.mark.parametrize(
    ("section", "wanted"),
    [
        ({"every": -1}, "evaluate.every: input should be greater than or equal to 0, got -1"),
        ({"every": 1.5}, "evaluate.every: input should be a valid integer"),
        ({"every": 1, "keep": "worst"}, "evaluate.keep: input should be 'last' or 'best', got 'worst'"),
        ({"evry": 1}, "evaluate.evry: unknown key; did you mean every?"),
    ],
)
def test_a_wrong_section_names_the_place(section: dict[str, Any], wanted: str) -> None:
    with pytest.raises(StudyError) as caught:
        tiny.study(evaluate=section)
    assert wanted in str(caught.value)


@pytest.mark.parametrize("name", ["lotteryfl", "fedselect", "cell", "hermes"])
def test_the_best_is_refused_where_clients_hold_masks_of_later_rounds(name: str) -> None:
    wanted = f"evaluate.keep: must be last for a method whose clients have masks, as {name}"
    with pytest.raises(StudyError, match=wanted):
        resolve(evaluated(name, evaluate={"every": 1, "keep": "best"}))
    resolve(evaluated(name, evaluate={"keep": "best"}))  # which has no effect, see below


def test_the_best_is_refused_where_tensors_stay_with_the_clients() -> None:
    with pytest.raises(StudyError, match="evaluate.keep: must be last where tensors stay with the clients"):
        resolve(evaluated("fedavg", evaluate={"every": 1, "keep": "best"}, model={"personal": ["3.*"]}))


@pytest.mark.parametrize(
    ("name", "sections", "note"),
    [
        ("local", {"evaluate": {"every": 1}}, "evaluate|method local has no rounds"),
        ("fedavg", {"federate": {"rounds": 0}}, "evaluate|federate.rounds is 0"),
        ("fedavg", {"evaluate": {"keep": "best"}}, "evaluate.keep|evaluate.every is 0"),
        ("fedavg", {}, ""),
    ],
)
def test_an_option_without_effect_is_noted(name: str, sections: dict[str, Any], note: str) -> None:
    notes = [line for line in read(evaluated(name, **sections))[1] if "evaluate" in line]
    assert len(notes) == bool(note) and all(part in "".join(notes) for part in note.split("|"))


@pytest.mark.parametrize("name", ["fedavg", "lotteryfl", "sub_fedavg", "fedselect", "fedpm"])
def test_its_bytes_are_forecast_beside_the_others(tmp_path: Path, name: str) -> None:
    from tests.test_forecast_bytes import foretold, near

    made = evaluated(name)
    told, plain = foretold(made), foretold(evaluated(name, evaluate={"every": 0}))
    assert replace(told, evaluation=None) == plain and told.evaluation is not None
    tiny.run(made, tmp_path / "r")
    moved = traffic(read_run(tmp_path / "r")).evaluation
    assert near(told.evaluation.down, moved.down_bytes) and near(told.evaluation.up, moved.up_bytes)
    text = forecast(made)
    assert "beside these, evaluation between rounds, 2 times all 4 clients: down" in text
    assert "evaluation between rounds: " in text and "examples, about" in text


# Engines


def test_forked_workers_and_cohorts_equal_one_process(tmp_path: Path) -> None:
    for name in ("two_step", "lotteryfl"):
        made = evaluated(name, cohort=2)
        tiny.run(made, tmp_path / name)
        tiny.run(made, tmp_path / f"{name}-forked", engine=Forked(2))
        assert facts(tmp_path / name) == facts(tmp_path / f"{name}-forked")


@pytest.mark.parametrize(("name", "sections"), [("two_step", EARLY), ("lotteryfl", {})])
def test_over_flowers_messages_it_is_the_same(tmp_path: Path, name: str, sections: dict[str, Any]) -> None:
    """There the clients keep their own states, which an evaluation must leave as they are."""
    from tests.engines.test_flower_engine import NODES, Loopback, bare

    one, other = tmp_path / "inprocess", tmp_path / "flower"
    made = evaluated(name, **sections)
    tiny.run(made, one)
    engine = FlowerEngine(
        Loopback(other, NODES), study=made, out=other, wait_s=0.2, stop=threading.Event()
    )  # fmt: skip
    tiny.run(made, other, engine=engine)
    for log in ("ledger", "metrics", "rounds", "curve"):
        assert bare(tiny.rows(one, log)) == bare(tiny.rows(other, log)), log
    assert tiny.digests(one) == tiny.digests(other)


@pytest.mark.parametrize("gone", ["state", "mask"])
def test_a_device_that_has_lost_its_state_still_evaluates(tmp_path: Path, gone: str) -> None:
    from tests.engines.test_flower_engine import NODES, Loopback

    out = tmp_path / "r"
    made = evaluated("lotteryfl", evaluate={"every": 1})

    class Losing(Loopback):
        def send(self, records: Any, *, node: int, kind: str) -> Any:
            lost = out / "devices" / f"{1:06d}"
            if kind == "train" and '"phase": "evaluate"' in str(records) and lost.is_dir():
                for file in lost.iterdir():
                    file.unlink()
            return super().send(records, node=node, kind=kind)

    engine = FlowerEngine(Losing(out, NODES), study=made, out=out, wait_s=0.2, stop=threading.Event())
    tiny.run(made, out, engine=engine)
    assert len(tiny.rows(out, "curve")) == 4 * 4 * 2 and RunFolder(out).header().finished
    kinds = {
        row["kind"] for row in tiny.rows(out, "ledger") if row["phase"] == "evaluate" and row["sender"] == "server"
    }
    assert kinds == {"evaluation"}
