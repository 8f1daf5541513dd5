"""theta_0 that both ends hold by its digest: models that go down refer to it, exactly, and whoever has another asks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlth import forecast
from fedlth.engines.forked import Forked
from fedlth.errors import StudyError
from fedlth.experiment.experiment import Experiment, open_experiment
from fedlth.experiment.resolve import resolve
from fedlth.federation import client_step, session
from fedlth.federation.forecast_bytes import forecast_bytes
from fedlth.federation.jobs import Failure, Job, Reply
from fedlth.federation.rounds import Federation
from fedlth.report.facts import read_run
from fedlth.report.traffic import traffic
from fedlth.storage.run_folder import RunFolder
from fedlth.study.schema import Study
from fedlth.training.task import open_task
from fedlth.wire.reference import Reference
from tests import tiny
from tests.test_server_state import Stopped, stop
from tests.test_transport import Counting, check
from tests.wire import reader

ADAPTED = tiny.SECTIONS["ticket_lora"]["model"]
NUMBERS = 128 + 24 + 12 * 4 + 4  # of two adapters and the head


def study(rounds: int = 2, **sections: Any) -> Study:
    given: dict[str, Any] = {
        "model": ADAPTED, "method": {"name": "fedavg_ft"}, "federate": {"rounds": rounds, "clients_per_round": 2},
        "personalise": {"arms": ["global", "dense"]},
    }  # fmt: skip
    return tiny.study(**{**given, **sections})


def downs(out: Path, kind: str = "install") -> list[dict[str, Any]]:
    return [row for row in tiny.rows(out, "ledger") if row["kind"] == kind]


@pytest.mark.parametrize("wire", ["lossless", "step", "sign"])
def test_a_first_model_costs_next_to_nothing(wire: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing has moved: not a byte for each number, and the results of whole float32 numbers."""
    for name, one in (("near", study(0, wire=wire)), ("raw", study(0, wire="raw"))):
        meter = Counting()
        tiny.run(one, tmp_path / name, engine=meter)
        check(meter, tmp_path / name, capsys)
    near, raw = downs(tmp_path / "near"), downs(tmp_path / "raw")
    assert len(near) == len(raw) == 4 and {row["coding"] for row in near} == {"full + delta"}
    assert all(row["payload_bytes"] < 100 for row in near) and all(row["payload_bytes"] > 4 * NUMBERS for row in raw)
    assert tiny.rows(tmp_path / "near", "metrics") == tiny.rows(tmp_path / "raw", "metrics")
    made = resolve(study(0, wire=wire))[0]
    told = forecast_bytes(made, 0.1).down
    sent = [row["payload_bytes"] for row in tiny.rows(tmp_path / "near", "ledger") if row["sender"] == "server"]
    assert told.size == sum(sent) and not told.bounds


def test_a_model_that_has_moved_refers_to_it_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained a little away from theta_0: the bits are those of any other coding, on other engines too."""
    made = study(train={"lr": 1e-4}, finder={"rewind": {"name": "global", "round": 1}})
    made = made.model_copy(update={"personalise": made.personalise.model_copy(update={"arms": ("ticket", "dense")})})
    meter = Counting()
    tiny.run(made, tmp_path / "one", engine=meter)
    found = check(meter, tmp_path / "one", capsys)
    sent = [row for row in tiny.rows(tmp_path / "one", "ledger") if row["sender"] == "server"]
    assert all(row["coding"] == "full + delta" and row["payload_bytes"] < 3 * NUMBERS for row in sent)
    assert {row["name"] for row in sent} == {"theta_g", "theta_g@1"}
    assert found["dense_same_codec"]["down_bytes"] >= found["unicast"]["down_bytes"] - 4 * max(
        row["payload_bytes"] for row in sent
    )
    forked = Forked(2)
    tiny.run(made, tmp_path / "two", engine=forked)
    forked.close()
    assert tiny.facts(tmp_path / "one") == tiny.facts(tmp_path / "two")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Federation, "run", lambda self: stop(self, 2))
        with pytest.raises(Stopped):
            tiny.run(made, tmp_path / "cut")
    session.resume(tmp_path / "cut", tiny.Lists())
    assert tiny.facts(tmp_path / "one") == tiny.facts(tmp_path / "cut")
    tiny.run(made.model_copy(update={"wire": "raw"}), tmp_path / "raw")
    assert tiny.digests(tmp_path / "one") == tiny.digests(tmp_path / "raw")


def test_another_decoder_reads_it_from_the_format_alone(tmp_path: Path) -> None:
    """Format FLT1, version 2, as it was: a payload that refers to floats, which are theta_0's."""
    sent: list[bytes] = []

    class Keeping(Counting):
        def run(self, jobs: list[Job]) -> list[Reply | Failure]:
            sent.extend(message.payload for job in jobs for message in job.inbox)
            return super().run(jobs)

    tiny.run(study(2), tmp_path / "r", engine=Keeping())
    task = tiny.task_of(tmp_path / "r")
    tensors: list[reader.Tensor] = [(e.name, e.shape, e.is_int, e.prunable) for e in task.exchange.entries]
    theta_0, found = task.shared_part(task.theta_0).floats, []
    for data in sent:
        mask, floats, _ = reader.decode(
            data, kind="values", tensors=tensors, buffers=set(), known_mask=None, reference=theta_0
        )
        assert floats is not None and mask.all()
        found.append(floats)
    assert np.array_equal(found[0], theta_0) and not np.array_equal(found[-1], theta_0)
    assert np.array_equal(found[-1], tiny.opened(RunFolder(tmp_path / "r")).theta.floats)


@pytest.mark.parametrize("name", ["sub_fedavg", "salientgrads"])
def test_slices_and_masked_models_refer_to_it_too(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"method": {"name": name, **tiny.METHODS[name]}, "personalise": {"arms": ["global", "own"]}}
    meter = Counting()
    tiny.run(study(3, **more), tmp_path / "near", engine=meter)
    check(meter, tmp_path / "near", capsys)
    tiny.run(study(3, **more, wire="raw"), tmp_path / "raw")
    assert tiny.digests(tmp_path / "near") == tiny.digests(tmp_path / "raw")
    assert tiny.rows(tmp_path / "near", "metrics") == tiny.rows(tmp_path / "raw", "metrics")
    assert not any(row["failed"] for row in tiny.rows(tmp_path / "near", "rounds"))


class Drawn(Counting):
    """Machines of some clients draw a head with other last bits than the server's."""

    def __init__(self, others: set[int], patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.others, self.patch = others, patch

    def run(self, jobs: list[Job]) -> list[Reply | Failure]:
        return [answer for job in jobs for answer in self._one(job)]

    def _one(self, job: Job) -> list[Reply | Failure]:
        if job.client not in self.others:
            return super().run([job])
        client_step._broadcasts.kept.clear()
        with self.patch.context() as patch:
            patch.setattr(client_step, "open_experiment", self._opened)
            return super().run([job])

    def _opened(self, text: str) -> Experiment:
        made = replace(open_experiment(text))
        assert made.known_start is not None
        floats = made.known_start.floats.copy()
        floats[-1] = np.nextafter(floats[-1], np.float32(9))
        made.__dict__["known_start"] = Reference(floats)
        return made


def test_who_drew_another_head_gets_the_model_in_full(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not refused, and all that was sent counts; the others are sent what they are without it."""
    engine = Drawn({1}, monkeypatch)
    made = study(finder={"rewind": {"name": "global", "round": 1}}, personalise={"arms": ["ticket", "dense"]})
    tiny.run(made, tmp_path / "hit", engine=engine)
    check(engine, tmp_path / "hit", capsys)
    tiny.run(made, tmp_path / "whole")
    assert tiny.digests(tmp_path / "hit") == tiny.digests(tmp_path / "whole")
    again = downs(tmp_path / "hit", "resync")
    assert again and {row["receiver"] for row in again} == {"client:1"}
    assert all("delta" not in row["coding"] and row["payload_bytes"] > 3 * NUMBERS for row in again)
    assert not any(row["failed"] for row in tiny.rows(tmp_path / "hit", "rounds"))


def test_whoever_has_other_weights_is_refused(tmp_path: Path) -> None:
    """What the study names by its digest is compared before anything is decoded."""
    made = resolve(study())[0].study
    other = made.model_copy(update={"model": made.model.model_copy(update={"theta_0": "0" * 32})})
    with pytest.raises(StudyError, match=r"model.theta_0: the study begins with the weights 0{32}"):
        open_task(other.science())


def test_a_model_that_is_drawn_as_a_whole_crosses_as_before(tmp_path: Path) -> None:
    made = resolve(tiny.study())[0]
    assert made.study.model.theta_0 is None and made.known_start is None
    assert resolve(study(wire="raw"))[0].known_start is None and resolve(study(wire="bf16"))[0].known_start is None


@pytest.mark.parametrize("rounds", [0, 1, 4])
def test_fedavg_moves_what_dense_fedavg_does(tmp_path: Path, rounds: int) -> None:
    """Found: the baseline paid a whole model for each first download; FedAvg itself was at .82 of it in 4 rounds."""
    made = study(rounds, method="fedavg", personalise={"arms": ["global"]})
    wire = traffic(read_run(tiny.run(made, tmp_path / "r").root))
    assert wire.dense_down_bytes == pytest.approx(wire.unicast.down_bytes, rel=0.04)
    plain = tiny.study(method="fedavg", federate={"rounds": 2})
    assert read_run(tiny.run(plain, tmp_path / "plain").root).header.dense_first_bytes is None


def test_a_forecast_of_models_that_move_is_a_bound() -> None:
    assert "coded as if theta_0 told nothing of them" in forecast.forecast(study())


@pytest.mark.parametrize("method", ["two_step", "lotteryfl"])
@pytest.mark.parametrize("wire", ["lossless", "step", "sign"])
def test_a_model_of_which_no_visit_is_tried_has_moved_all_the_same(method: str, wire: str, tmp_path: Path) -> None:
    """Found: with slow visits, as of a transformer, and under step and sign, every download was about 60 bytes."""
    made = study(wire=wire, method={"name": method, **tiny.METHODS[method]})
    told, out = forecast_bytes(resolve(made)[0], 60.0), tmp_path / "r"
    tiny.run(made, out)
    rows = tiny.rows(out, "ledger")
    down = sum(row["payload_bytes"] for row in rows if row["sender"] == "server")
    up = sum(row["payload_bytes"] for row in rows if row["receiver"] == "server")
    assert told.tried == 0 and "models that have moved coded as if theta_0 told nothing of them" in told.down.bounds
    assert down <= told.down.size < 2 * down and up <= told.up.size * 1.001
