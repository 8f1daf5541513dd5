"""A run that is stopped anywhere and resumed ends in the bits of one that never was."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fedlth import cli
from fedlth.engines.inprocess import InProcess
from fedlth.errors import StudyError
from fedlth.federation import session
from fedlth.federation.jobs import Failure, Job, Reply
from fedlth.federation.rounds import Federation
from fedlth.output import lines_to
from fedlth.report.facts import read_run
from fedlth.storage import json_lines, store
from fedlth.storage.run_folder import RunFolder
from fedlth.storage.state_archive import Packs, Writer
from fedlth.training.task import Task
from fedlth.wire import metrics, payload
from tests import tiny

ROOT = Path(__file__).parents[2]
REFINED: dict[str, Any] = {
    "method": {"name": "lotteryfl", **tiny.METHODS["lotteryfl"]},
    "personalise": {"arms": ["own", "dense", "ticket"]},
    "refine": {"rounds": 2, "clients_per_round": 2},
    "finder": {"rewind": {"name": "global", "round": 1}},
}
STUDIES: dict[str, dict[str, Any]] = {
    "refined": REFINED,
    "fedselect": {"method": {"name": "fedselect", **tiny.METHODS["fedselect"]}, "model": {
        "name": "tests.test_methods:normed", "options": {}, "buffers": "local_statistics"}},
    "fedpm": {"method": {"name": "fedpm", **tiny.METHODS["fedpm"]}},
    "recipe": tiny.RECIPE,
    "warm rounds": {"train": {"round_schedule": {"name": "linear", "warmup": 2}}, "federate": {"rounds": 4}},
}  # fmt: skip


class Crash(BaseException):
    """Stands for kill -9: nothing catches it."""


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, bytes]]:
    known: dict[str, dict[str, bytes]] = {}

    def facts(name: str) -> dict[str, bytes]:
        if name not in known:
            out = tmp_path_factory.mktemp(name) / "run"
            tiny.run(tiny.study(**STUDIES[name]), out)
            known[name] = tiny.facts(out)
        return known[name]

    return facts


def crashing(patch: pytest.MonkeyPatch, place: str, when: int) -> None:
    """Crash at the `when`-th time that a place is passed."""
    passed = [0]

    def count() -> None:
        passed[0] += 1
        if passed[0] == when:
            raise Crash(place)

    def before(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **more: Any) -> Any:
            count()
            return function(*args, **more)

        return wrapped

    def after(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **more: Any) -> Any:
            done = function(*args, **more)
            count()
            return done

        return wrapped

    def torn(path: Path, data: bytes) -> None:
        part = path.with_name(path.name + ".part")
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data[: len(data) // 2])
        count()
        os.replace(part, path)
        path.write_bytes(data)

    def half(path: Path, data: bytes) -> int:
        with path.open("ab") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            count()
            file.write(data[len(data) // 2 :])
            return file.tell()

    places: dict[str, Callable[[], None]] = {
        "before a state is written": lambda: patch.setattr(Writer, "add", before(Writer.add)),
        "after a state is written": lambda: patch.setattr(Writer, "add", after(Writer.add)),
        "while any file is written": lambda: patch.setattr(store, "write_atomic", torn),
        "after theta is written": lambda: patch.setattr(RunFolder, "save_state", after(RunFolder.save_state)),
        "in the middle of a log": lambda: patch.setattr(json_lines, "append", half),
        "after a log is written": lambda: patch.setattr(json_lines, "append", after(json_lines.append)),
        "before the checkpoint": lambda: patch.setattr(RunFolder, "commit", before(RunFolder.commit)),
        "after the checkpoint": lambda: patch.setattr(RunFolder, "commit", after(RunFolder.commit)),
        "before old states are dropped": lambda: patch.setattr(Packs, "tidy", before(Packs.tidy)),
        "after old states are dropped": lambda: patch.setattr(Packs, "tidy", after(Packs.tidy)),
        "before the tickets": lambda: patch.setattr(session, "_finish", before(session._finish)),
        "before the last header": lambda: patch.setattr(session, "_finish", after(session._finish)),
    }
    places[place]()


PLACES = [
    ("before a state is written", 1), ("before a state is written", 6), ("after a state is written", 3),
    ("while any file is written", 2), ("while any file is written", 9), ("while any file is written", 16),
    ("after theta is written", 1), ("after theta is written", 4), ("in the middle of a log", 1),
    ("in the middle of a log", 11), ("after a log is written", 6), ("before the checkpoint", 1),
    ("before the checkpoint", 3), ("after the checkpoint", 1), ("after the checkpoint", 4),
    ("before old states are dropped", 3), ("after old states are dropped", 3), ("before the tickets", 1),
    ("before the last header", 1),
]  # fmt: skip


@pytest.mark.parametrize(("place", "when"), PLACES)
def test_a_crash_at_every_place_of_a_commit(
    tmp_path: Path, reference: Callable[[str], dict[str, bytes]], place: str, when: int
) -> None:
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        crashing(patch, place, when)
        tiny.run(tiny.study(**STUDIES["refined"]), out)
    session.resume(out, InProcess())
    assert tiny.facts(out) == reference("refined")


@pytest.mark.parametrize("name", ["fedselect", "fedpm", "recipe", "warm rounds"])
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_stopping_between_commits(
    tmp_path: Path, reference: Callable[[str], dict[str, bytes]], name: str, stop: int
) -> None:
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        crashing(patch, "after the checkpoint", stop)
        tiny.run(tiny.study(**STUDIES[name]), out)
    session.resume(out, InProcess())
    assert tiny.facts(out) == reference(name)


def test_crash_upon_crash(tmp_path: Path, reference: Callable[[str], dict[str, bytes]]) -> None:
    out = tmp_path / "run"
    attempts = 0
    while True:
        attempts += 1
        assert attempts < 40
        try:
            with pytest.MonkeyPatch.context() as patch:
                crashing(patch, PLACES[attempts % 14][0], 1 + attempts % 5)
                if (out / "config.yaml").exists():
                    session.resume(out, InProcess())
                else:
                    tiny.run(tiny.study(**STUDIES["refined"]), out)
            break
        except Crash:
            continue
    assert attempts > 3 and tiny.facts(out) == reference("refined")


def go_on(out: Path, said: Connection) -> None:
    """Begin a run, or go on with it, in a process that will be killed."""
    if (out / "config.yaml").exists():
        with lines_to(said.send):
            session.resume(out, InProcess())
    else:
        tiny.run(tiny.study(**STUDIES["refined"]), out, tell=said.send)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_twenty_kills_at_random_moments(tmp_path: Path, reference: Callable[[str], dict[str, bytes]]) -> None:
    draw, whole = random.Random(0), reference("refined")
    context = multiprocessing.get_context("fork")  # what a killed process had imported changes nothing
    kills = fold = 0
    while kills < 20:
        out = tmp_path / f"run-{fold}"
        fold += 1
        while not (out / "digests.json").exists():
            said, says = context.Pipe(duplex=False)
            process = context.Process(target=go_on, args=(out, says))
            process.start()
            says.close()
            lines = draw.randint(0, 3)
            with suppress(EOFError):  # it has ended
                for _ in range(lines):
                    said.recv()
            process.join(draw.random() * (0.5 if lines == 0 else 0.05))
            if kills < 20:
                process.kill()
            process.join()
            assert process.exitcode in (0, -signal.SIGKILL)
            kills += process.exitcode != 0
        session.resume(out, InProcess())  # a kill may have come after the digests, before the header
        assert tiny.facts(out) == whole


# Damage


def stopped(out: Path, after: int = 3) -> RunFolder:
    """Leave a run of LotteryFL that was stopped after some commits."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        crashing(patch, "after the checkpoint", after)
        tiny.run(tiny.study(**STUDIES["refined"]), out)
    return RunFolder(out)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1
    path.write_bytes(bytes(data))


SHORT = (("checkpoint.json", "flip middle"), ("checkpoints/theta-*.safetensors", "gone"), ("state/*.pack", "cut"))
DAMAGES = ("cut", "flip early", "flip middle", "flip late", "empty", "gone")


def damaged(file: Path, damage: str, size: int) -> None:
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[: size // 2])
    elif damage == "empty":
        file.write_bytes(b"")
    else:
        flip(file, {"flip early": 3, "flip middle": size // 2, "flip late": size - 2}[damage])


@pytest.mark.parametrize(
    ("what", "damage"),
    [
        pytest.param(what, damage, marks=[] if (what, damage) in SHORT else [pytest.mark.long])
        for what in ("checkpoint.json", "checkpoints/theta-*.safetensors", "state/*.pack", "server/*.pack")
        for damage in DAMAGES
    ] + [("ledger.jsonl", "flip late"), pytest.param("rounds.jsonl", "flip late", marks=pytest.mark.long)],
)  # fmt: skip
def test_damage_of_the_last_commit_costs_its_round(
    tmp_path: Path, reference: Callable[[str], dict[str, bytes]], what: str, damage: str
) -> None:
    """It ended the run: only one commit was kept. The one before it is whole, so its round is done again."""
    out = tmp_path / "run"
    stopped(out, after=2)
    file = max(out.glob(what), key=made_last)
    damaged(file, damage, file.stat().st_size)
    said: list[str] = []
    with lines_to(said.append):
        session.resume(out, InProcess())
    assert any("the run goes on from the commit before the last one" in line for line in said), said
    assert tiny.facts(out) == reference("refined")


def made_last(file: Path) -> int:
    number: str = file.stem.rpartition("-")[2]
    return int(number) if number.isdecimal() else 0


@pytest.mark.parametrize("damage", ["flip middle", *(pytest.param(d, marks=pytest.mark.long) for d in DAMAGES[:2])])
@pytest.mark.parametrize("what", ["checkpoint*.json", "checkpoints/theta-*.safetensors", "state/*.pack", "*.jsonl"])
def test_damage_of_both_commits_is_told_with_the_files_name(tmp_path: Path, what: str, damage: str) -> None:
    out = tmp_path / "run"
    stopped(out, after=3)
    for file in out.glob(what):
        damaged(file, damage, file.stat().st_size)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != ".lock"}
    with pytest.raises(StudyError, match=r"(damaged|cannot be read|missing|must hold the \d+ bytes)") as caught:
        session.resume(out, InProcess())
    assert str(caught.value).startswith(str(out)) and "\n" not in str(caught.value)
    assert {p: p.read_bytes() for p in before} == before, "nothing was cut"


@pytest.mark.parametrize(
    "name", ["metrics", *(pytest.param(name, marks=pytest.mark.long) for name in ("ledger", "rounds", "times"))]
)
def test_a_digit_that_changed_on_disk_is_seen(tmp_path: Path, name: str) -> None:
    """States and tickets had digests, rows had none: a metric that had changed was reported as the run's."""
    out = tmp_path / "run"
    tiny.run(tiny.of_method("fedavg"), out)
    folder = RunFolder(out)
    folder.check(folder.progress(), states=True)
    assert not read_run(out).notes
    file = out / f"{name}.jsonl"
    text = file.read_text()
    at = re.search(r'"(?:val_loss|payload_bytes|up_bytes|seconds)": [\d.]*?([1-8])', text)
    assert at is not None
    file.write_text(f"{text[: at.start(1)]}{int(at[1]) + 1}{text[at.end(1) :]}")
    with pytest.raises(StudyError, match=rf"{name}\.jsonl: damaged: its \d+ committed bytes are not those that were"):
        folder.check(folder.progress(), states=True)
    (note,) = read_run(out).notes
    assert note == f"{name}.jsonl: damaged: its {len(text)} committed bytes are not those that were written"


def test_committed_rows_that_are_gone_cost_their_round(
    tmp_path: Path, reference: Callable[[str], dict[str, bytes]]
) -> None:
    out = tmp_path / "run"
    stopped(out)
    file = out / "ledger.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    session.resume(out, InProcess())
    assert tiny.facts(out) == reference("refined")
    with pytest.raises(StudyError, match=r"ledger\.jsonl: must hold the \d+ bytes that are committed"):
        file.write_bytes(b"")
        RunFolder(out).recover()


def test_without_a_checkpoint_the_run_begins_anew(tmp_path: Path, reference: Callable[[str], dict[str, bytes]]) -> None:
    out = tmp_path / "run"
    stopped(out)
    for file in out.glob("checkpoint*.json"):
        file.unlink()
    session.resume(out, InProcess())
    assert tiny.facts(out) == reference("refined")


def test_a_run_that_has_ended_stays_as_it_is(tmp_path: Path) -> None:
    out = tmp_path / "run"
    tiny.run(tiny.of_method("fedavg"), out)
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.rglob("*") if p.is_file() and p.name != ".lock"}
    told: list[str] = []
    with lines_to(told.append):
        session.resume(out, InProcess())
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in before} == before and "has ended" in told[0]
    with pytest.raises(StudyError, match="holds a run already"):
        tiny.run(tiny.of_method("fedavg"), out)


def test_resume_refuses_other_data(tmp_path: Path) -> None:
    out = tmp_path / "run"
    stopped(out)
    text, ours = (out / "config.yaml").read_text(), "  name: tests.tiny:images\n  root: null\n  options: {}"
    (out / "config.yaml").write_text(text.replace(ours, ours.replace("{}", "{seed: 5}")))
    assert (out / "config.yaml").read_text() != text
    with pytest.raises(StudyError, match="the data that it began with"):
        session.resume(out, InProcess())


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="no run here"):
        session.resume(tmp_path / "none", InProcess())
    assert not (tmp_path / "none").exists()


def test_two_processes_cannot_run_one_folder(tmp_path: Path) -> None:
    out = tmp_path / "run"
    folder = stopped(out)
    code = "import sys; from pathlib import Path; from fedlth.storage.run_folder import RunFolder\n" \
           "with RunFolder(Path(sys.argv[1])).locked():\n    print('held', flush=True); sys.stdin.read()"  # fmt: skip
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert other.stdout.readline() == "held\n"
    try:
        with pytest.raises(StudyError, match="another process is running this run"):
            session.resume(out, InProcess())
    finally:
        other.communicate("")
    with folder.locked():
        pass


def test_a_lock_that_a_dead_runs_child_still_holds_is_waited_for(tmp_path: Path) -> None:
    """Found by the kills above: what a killed run had forked for git held the lock for some milliseconds more."""
    folder, ends = RunFolder(tmp_path), threading.Event()

    def child() -> None:
        with (tmp_path / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            ends.set()
            time.sleep(0.1)

    thread = threading.Thread(target=child)
    thread.start()
    ends.wait()
    with folder.locked():
        pass
    thread.join()


def full(*args: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_last_commit(
    tmp_path: Path, reference: Callable[[str], dict[str, bytes]], call: str
) -> None:
    out = tmp_path / "run"
    stopped(out)
    before = (out / "checkpoint.json").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OSError, match="No space left"):
            session.resume(out, InProcess())
    assert (out / "checkpoint.json").read_bytes() == before
    session.resume(out, InProcess())
    assert tiny.facts(out) == reference("refined")


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(StudyError, match="must be a folder that can be written to"):
            tiny.run(tiny.of_method("fedavg"), out)


# Clients


class Meddling(tiny.Lists):
    """An in-process engine whose answers a test may change."""

    def __init__(self, meddle: Callable[[Job, Reply | Failure], Reply | Failure]) -> None:
        self.meddle = meddle

    def run(self, jobs: list[Job]) -> list[Reply | Failure]:
        return [self.meddle(j, a) for j, a in zip(jobs, super().run(jobs), strict=True)]


def test_a_client_that_raises_costs_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Task.part

    def part(self: Task, client: int, name: str) -> Any:
        if client == 1:
            raise RuntimeError("a disk\nof client 1 is gone")
        return honest(self, client, name)

    monkeypatch.setattr(Task, "part", part)
    made = tiny.study(federate={"rounds": 3, "clients_per_round": 3})
    tiny.run(made, tmp_path / "r")
    failed = [f for r in tiny.rows(tmp_path / "r", "rounds") for f in r["failed"]]
    assert {f["client"] for f in failed} == {1} and {f["kind"] for f in failed} == {"raised"}
    assert failed[0]["reason"] == "RuntimeError: a disk of client 1 is gone"
    assert {r["client"] for r in tiny.rows(tmp_path / "r", "metrics")} == {0, 2, 3}
    statuses = {r["status"] for r in tiny.rows(tmp_path / "r", "ledger") if r["sender"] == "client:1"}
    assert statuses == {"failed: raised"}


def replaced(reply: Reply, index: int, data: bytes) -> Reply:
    outbox = list(reply.outbox)
    outbox[index] = replace(outbox[index], payload=data)
    return replace(reply, outbox=tuple(outbox))


def hostile(kind: str, job: Job, reply: Reply) -> Reply:
    task = tiny.open_task(job.study)
    record = metrics.decode(reply.outbox[-1].payload)
    if kind in ("nan", "huge", "sparse"):
        floats = np.full(task.layout.num_floats, {"nan": np.nan, "huge": 1e35}.get(kind, 1), np.float32)
        mask = np.ones(task.layout.num_prunable, bool)
        mask[0] = kind != "sparse"
        content = payload.Content(mask, floats, np.zeros(task.layout.num_ints, np.int64))
        return replaced(reply, 0, payload.encode("values", task.layout, content))
    if kind == "another client":
        return replace(reply, client=reply.client + 1)
    if kind == "no metrics":
        return replace(reply, outbox=reply.outbox[:1])
    if kind == "no values":
        return replace(reply, outbox=reply.outbox[1:])
    if kind == "twice":
        return replace(reply, outbox=(reply.outbox[0], *reply.outbox))
    raw = {
        "raw nan": b'{"num_examples": 3, "val_accuracy": NaN}', "not json": b"\xff", "no examples": b"{}",
        "text for a number": json.dumps({"num_examples": 3, "val_accuracy": "high"}).encode(),
    }  # fmt: skip
    if kind in raw:
        return replaced(reply, 1, raw[kind])
    changed = {
        "negative examples": {"num_examples": -5}, "true examples": {"num_examples": True},
        "too many examples": {"num_examples": 10**12}, "odd accuracy": {"val_accuracy": 7.0},
        "rows of another": {"rows": [{"client": 99}]}, "rows that are none": {"rows": []},
    }[kind]  # fmt: skip
    return replaced(reply, 1, metrics.encode({**record, **changed}))


HOSTILE = [
    "nan", "huge", "sparse", "another client", "no metrics", "no values", "twice", "raw nan", "not json", "no examples",
    "text for a number", "negative examples", "true examples", "too many examples", "odd accuracy", "rows of another",
    "rows that are none",
]  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_bad_reply_is_refused_recorded_and_costs_only_itself(tmp_path: Path, kind: str) -> None:
    made = tiny.of_method("fedavg", federate={"rounds": 2, "clients_per_round": 3}, personalise={"clients_per_wave": 4})
    bad = min(c for c in range(4) if c not in tiny.open_task(made.science()).splits.unseen)

    def meddle(job: Job, answer: Reply | Failure) -> Reply | Failure:
        if job.phase == "federate" and job.client == bad and isinstance(answer, Reply):
            return hostile(kind, job, answer)
        return answer

    def lost(job: Job, answer: Reply | Failure) -> Reply | Failure:
        if job.phase == "federate" and job.client == bad:
            return Failure(round=job.round, client=job.client, kind="lost", reason="")
        return answer

    tiny.run(made, tmp_path / "r", engine=Meddling(meddle))
    tiny.run(made, tmp_path / "lost", engine=Meddling(lost))
    failed = [f for r in tiny.rows(tmp_path / "r", "rounds") for f in r["failed"]]
    assert [(f["client"], f["kind"]) for f in failed] == [(bad, "refused")] * 2
    refused = [r for r in tiny.rows(tmp_path / "r", "ledger") if r["status"].startswith("refused: ")]
    assert refused, "bytes that crossed are counted, used or not"
    assert tiny.digests(tmp_path / "r") == tiny.digests(tmp_path / "lost"), "as if it had never answered"


def test_three_rounds_without_an_answer_end_the_run_with_its_reason(tmp_path: Path) -> None:
    def lost(job: Job, answer: Reply | Failure) -> Reply | Failure:
        if job.phase == "federate":
            return Failure(round=job.round, client=job.client, kind="died", reason="no cable")
        return answer

    made = tiny.of_method("fedavg", federate={"rounds": 3, "clients_per_round": 2})
    with pytest.raises(StudyError, match="3 rounds without one usable reply; last: no cable"):
        tiny.run(made, tmp_path / "r", engine=Meddling(lost))
    session.resume(tmp_path / "r", InProcess())
    assert len(tiny.rows(tmp_path / "r", "metrics")) == 4, "step 2 is not stopped by what step 1 met"


# Ctrl-C


def test_ctrl_c_stops_cleanly_and_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "s.yaml", tmp_path / "run"
    file.write_text(yaml.safe_dump(tiny.tree(method={"name": "fedavg"})))
    committed = Federation._commit

    def interrupted(self: Federation, *args: Any, **more: Any) -> None:
        committed(self, *args, **more)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Federation, "_commit", interrupted)
        assert cli.main(["run", str(file), f"out={out}"]) == 130
    assert f"fedlth resume {out}" in capsys.readouterr().err
    session.resume(out, InProcess())
    tiny.run(tiny.of_method("fedavg"), tmp_path / "whole")
    assert tiny.facts(out) == tiny.facts(tmp_path / "whole")


@pytest.mark.slow
def test_a_real_sigint(tmp_path: Path) -> None:
    file, out = tmp_path / "s.yaml", tmp_path / "run"
    file.write_text(yaml.safe_dump(tiny.tree(method={"name": "fedavg"}, federate={"rounds": 2000})))
    process = subprocess.Popen(
        [sys.executable, "-m", "fedlth", "run", str(file), f"out={out}"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background inherits an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
    )
    for line in process.stderr:
        if "federate 3" in line:
            break
    process.send_signal(signal.SIGINT)
    rest = process.communicate()[1]
    assert process.returncode == 130 and f"fedlth resume {out}" in rest and "Traceback" not in rest


def test_a_loop_opens_where_the_last_commit_left_it(tmp_path: Path) -> None:
    folder = stopped(tmp_path / "run", after=2)
    loop = tiny.opened(folder, InProcess())
    assert loop.progress.step == 2 and loop.progress.theta == "theta-1"
