"""What a method's run cost: FLOPs as they were spent, those of what was alive, and of a run that did not say them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedlth.bench.spending import Spending, shared_numbers, spending
from fedlth.report.choice import main_choice
from fedlth.report.facts import read_run
from tests import tiny


def spent(out: Path) -> Spending:
    facts = read_run(out)
    return spending(facts, main_choice([facts]))


def as_of_old(out: Path) -> None:
    """Take from a run's times what earlier versions did not write."""
    rows = tiny.rows(out, "times")
    for row in rows:
        for work in row.get("work", ()):
            work.pop("flops", None), work.pop("alive_flops", None)
    (out / "times.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("method", ["fedavg", "spafl", "fedtiny", "fedbn"])
def test_bits_are_of_the_models_numbers_and_of_visits_that_train(tmp_path: Path, method: str) -> None:
    folder = tiny.run(tiny.of_method(method, wire="raw", clients={"count": 4, "unseen": 0.25}), tmp_path / "r").root
    facts, shared = read_run(folder), tiny.task_of(folder).exchange.num_floats
    rows = [row for row in facts.ledger if row.phase == "federate"]
    visits = len({(row.round, row.receiver) for row in rows if row.sender == "server"})
    found = spent(folder)
    ups = sum(row.payload_bytes for row in rows if row.receiver == "server")
    downs = sum(row.payload_bytes for row in rows if row.sender == "server")
    assert found.up_bits == pytest.approx(8 * ups / visits / shared)
    assert found.down_bits == pytest.approx(8 * downs / visits / shared)
    if method == "spafl":  # a threshold a row stands for all weights of it
        assert facts.header.num_exchanged < shared / 4 and found.up_bits < 8
    elif method == "fedtiny":  # its phases before send one number, or many models
        assert {row.phase for row in facts.ledger} > {"measure", "select", "federate"}
        assert found.total_bytes > ups + downs
    else:
        assert 32 <= found.up_bits < 40
    header = json.loads((folder / "header.json").read_bytes())
    del header["num_shared"]
    (folder / "header.json").write_text(json.dumps(header))
    assert shared_numbers(read_run(folder).header) == shared, "what an earlier version told is enough here"
    (folder / "header.json").write_text(json.dumps({**header, "num_exchanged": 7}))
    odd = spent(folder)
    assert odd.up_bits is None or shared_numbers(read_run(folder).header) == header["num_parameters"] == shared


@pytest.mark.parametrize(("method", "options"), [("fedavg", {}), ("apfl", {}), ("salientgrads", {"density": 0.2})])
def test_flops_are_those_of_the_trainings_that_were_done(
    tmp_path: Path, method: str, options: dict[str, float]
) -> None:
    tiny.run(tiny.study(method={"name": method, **options}), tmp_path / "r")
    now = spent(tmp_path / "r")
    assert now.alive_flops is not None
    trained = [w for row in tiny.rows(tmp_path / "r", "times") for w in row.get("work", ()) if w.get("epochs")]
    assert trained and all(0 < work["alive_flops"] <= work["flops"] for work in trained)
    as_of_old(tmp_path / "r")
    old = spent(tmp_path / "r")
    assert old.alive_flops is None
    if method == "salientgrads":
        assert now.alive_flops < 0.7 * now.flops  # a fifth of the prunable weights, all biases
    else:
        assert now.alive_flops == pytest.approx(now.flops)
        assert old.flops == pytest.approx(now.flops)  # every epoch is one of the dense network: apfl trains two
