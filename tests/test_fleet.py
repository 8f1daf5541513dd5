"""Simulated time: by hand on two clients, late and dropped clients, equal on every engine and after any stop."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlth import rng
from fedlth.engines.flower_record import of_answer, to_answer
from fedlth.engines.forked import Forked
from fedlth.engines.inprocess import InProcess
from fedlth.errors import NothingUsable, StudyError
from fedlth.experiment.resolve import resolve
from fedlth.federation import session
from fedlth.federation.jobs import Failure, Job, Reply
from fedlth.forecast import forecast
from fedlth.report.build import read_results, write_report
from fedlth.report.compare import compare
from fedlth.report.facts import read_run
from fedlth.report.fleet import curve, simulated_s, tiers_table, time_to
from fedlth.report.traffic import traffic
from fedlth.study.schema import Study
from tests import tiny
from tests.test_personal import started

FLEET: dict[str, Any] = {"flops_s": 1e6, "down_bytes_s": 1000, "up_bytes_s": 500, "latency_s": 0.25}
SLOW = {"clients": [1], "speed": 0.5, "down_bytes_s": 100, "latency_s": 1.0, "name": "slow"}
# Training of the tiny network: 3 forwards of 2 x 816 FLOPs for each of 48 examples, one epoch.
FLOPS = 3 * 2 * 816 * 48


def study(fleet: dict[str, Any] | None = None, **more: Any) -> Study:
    sections: dict[str, Any] = {
        "method": "fedavg_ft",
        "clients": {"unseen": 0.0, "capacity": [SLOW]},
        "federate": {"rounds": 4, "clients_per_round": 3},
        "personalise": {"epochs": 2, "arms": ["global", "local", "dense"], "clients_per_wave": 3},
        "fleet": {**FLEET, **(fleet or {})},
    }
    return tiny.study(**{**sections, **more})


def moved(out: Path, phase: str, round: int, client: int) -> tuple[int, int]:
    """Return the bytes of one visit, down and up."""
    rows = [r for r in tiny.rows(out, "ledger") if (r["phase"], r["round"]) == (phase, round)]
    down = sum(r["payload_bytes"] for r in rows if r["receiver"] == f"client:{client}")
    return down, sum(r["payload_bytes"] for r in rows if r["sender"] == f"client:{client}")


def by_hand(client: int, down: float, up: float, flops: float) -> float:
    slow = client == 1
    latency, rate, speed = (1.0, 100, 0.5) if slow else (0.25, 1000, 1.0)
    return latency + down / rate + flops / (speed * 1e6) + latency + up / 500


def times(out: Path) -> dict[tuple[str, int, int], float]:
    return {
        (r["phase"], r["round"], r["client"]): r["simulated_s"]
        for r in tiny.rows(out, "times") if r["client"] is not None and "simulated_s" in r
    }  # fmt: skip


def rounds(out: Path, phase: str = "federate") -> list[dict[str, Any]]:
    return [r for r in tiny.rows(out, "rounds") if r["phase"] == phase]


def test_every_visit_and_round_by_hand(tmp_path: Path) -> None:
    tiny.run(study(), tmp_path / "r")
    found = times(tmp_path / "r")
    assert {key[2] for key in found} == {0, 1, 2, 3}
    for (phase, round, client), seconds in found.items():
        down, up = moved(tmp_path / "r", phase, round, client)
        if phase == "federate":
            assert seconds == pytest.approx(by_hand(client, down, up, FLOPS), rel=1e-12)
        else:  # the dense twin is what a client keeps; controls, and tables of metrics, cost a device nothing
            assert seconds == pytest.approx(by_hand(client, down, 0, 2 * FLOPS), rel=1e-12)
    for row in tiny.rows(tmp_path / "r", "rounds"):
        assert row["simulated_s"] == max(found[row["phase"], row["round"], c] for c in row["clients"])
    (facts,) = read_results(tmp_path / "r").group
    federate = [row["simulated_s"] for row in rounds(tmp_path / "r")]
    assert simulated_s(facts, step=1) == pytest.approx(sum(federate))
    assert simulated_s(facts, step=2) == max(row["simulated_s"] for row in rounds(tmp_path / "r", "personalise"))
    seconds, reached = curve(facts)
    assert seconds == pytest.approx(np.concatenate(([0.0], np.cumsum(federate[:-1])))) and len(reached) == 4
    assert time_to(facts, reached[2]) == seconds[next(i for i, r in enumerate(reached) if r >= reached[2])]
    assert time_to(facts, 1.01) is None


def test_how_many_clients_a_wave_holds_changes_no_time_of_step_2(tmp_path: Path) -> None:
    found = []
    for size in (1, 4):
        made = study({"straggle": 0.5}, personalise={"epochs": 1, "clients_per_wave": size})
        tiny.run(made, tmp_path / str(size))
        (facts,) = read_results(tmp_path / str(size)).group
        found.append((simulated_s(facts, step=1), simulated_s(facts, step=2)))
    assert found[0] == found[1]


def test_the_curve_takes_no_time_of_the_fleet(tmp_path: Path) -> None:
    with_curve = study(evaluate={"every": 2})
    bare, curved = (read_results(tiny.run(made, tmp_path / str(i)).root).group[0] for i, made in
                    enumerate((study(), with_curve)))  # fmt: skip
    for step in (1, 2):
        assert simulated_s(curved, step=step) == simulated_s(bare, step=step)
    assert curve(curved) == curve(bare) and times(curved.path) == times(bare.path)
    assert "fleet: " + forecast(with_curve).partition("fleet: ")[2].partition("\n")[0] in forecast(study())


def test_alive_pays_for_what_is_alive_and_changes_nothing_else(tmp_path: Path) -> None:
    for flops in ("dense", "alive"):
        made = study({"flops": flops}, method={"name": "lotteryfl", **tiny.METHODS["lotteryfl"]},
                     personalise={"epochs": 1, "arms": ["own_tuned"]})  # fmt: skip
        tiny.run(made, tmp_path / flops)
    dense, alive = (times(tmp_path / flops) for flops in ("dense", "alive"))
    assert dense.keys() == alive.keys() and all(alive[key] < dense[key] for key in dense)
    for key in dense:
        visit = [w for r in tiny.rows(tmp_path / "alive", "times") if (r["phase"], r["round"], r["client"]) == key
                 for w in r["work"] if "density" in w]  # fmt: skip
        speed = 0.5 if key[2] == 1 else 1.0
        assert visit and dense[key] - alive[key] == pytest.approx(
            FLOPS * (1 - visit[0]["density"]) / (speed * 1e6), rel=0.2
        ), "both layers are near that density"
    without = [{k: v for k, v in r.items() if k != "simulated_s"} for r in tiny.rows(tmp_path / "dense", "rounds")]
    assert without == [
        {k: v for k, v in r.items() if k != "simulated_s"} for r in tiny.rows(tmp_path / "alive", "rounds")
    ]
    assert tiny.digests(tmp_path / "dense") == tiny.digests(tmp_path / "alive")


def test_stragglers_are_drawn_by_round_and_client(tmp_path: Path) -> None:
    tiny.run(study(), tmp_path / "calm")
    tiny.run(study({"straggle": 0.4}), tmp_path / "r")
    calm, found = times(tmp_path / "calm"), times(tmp_path / "r")
    for key, seconds in found.items():
        phase, round, client = key
        number = round if phase == "federate" else 0
        draw = rng.stream(0, f"straggle {phase}", number, client).standard_normal()
        assert seconds / calm[key] == pytest.approx(math.exp(0.4 * draw), rel=1e-9)
    assert tiny.digests(tmp_path / "calm") == tiny.digests(tmp_path / "r")


def test_a_reply_after_the_deadline_is_not_joined_and_costs_only_itself(tmp_path: Path) -> None:
    """The slow client needs 40 s and more, the others less than 20."""
    tiny.run(study({"deadline_s": 20.0}), tmp_path / "r")
    late = [(r["round"], f) for r in rounds(tmp_path / "r") for f in r["failed"]]
    assert late and {(f["client"], f["kind"]) for _, f in late} == {(1, "late")}
    assert "simulated s, fleet.deadline_s is 20" in late[0][1]["reason"]
    for row in rounds(tmp_path / "r"):
        assert (row["simulated_s"] == 20.0) == (1 in row["clients"])
    ledger = [r for r in tiny.rows(tmp_path / "r", "ledger") if r["phase"] == "federate"]
    assert {r["status"] for r in ledger if r["sender"] == "client:1"} == {"late"}
    assert {r["status"] for r in ledger if r["sender"] in ("client:0", "client:2", "client:3")} == {"ok"}
    assert [r["kind"] for r in ledger if r["receiver"] == "client:1"] == ["install"] * len(late), "it never took part"
    personal = rounds(tmp_path / "r", "personalise")
    assert not any(r["failed"] for r in personal) and max(r["simulated_s"] for r in personal) > 20, "no deadline there"
    text = [
        dict(zip(t.header, row, strict=True)) for t in [tiers_table(read_results(tmp_path / "r"))] for row in t.rows
    ]
    slow = next(row for row in text if row["tier"] == "slow")
    assert (slow["late %"], slow["dropped %"], slow["clients"]) == ("100.0", "0.0", "1")
    assert traffic(read_results(tmp_path / "r").group[0]).refused.messages == 0


def test_late_is_as_if_the_round_had_not_happened(tmp_path: Path) -> None:
    """With masks of their own: what a late client chose is known to nobody."""
    own = {"method": {"name": "lotteryfl", **tiny.METHODS["lotteryfl"]}, "personalise": {"arms": ["own"]}}
    tiny.run(study({"deadline_s": 20.0}, **own), tmp_path / "r")
    density = {r["client"]: r["density"] for r in tiny.rows(tmp_path / "r", "metrics")}
    assert density[1] == 1.0 and max(d for c, d in density.items() if c != 1) < 1.0
    assert not any(r["failed"] for r in rounds(tmp_path / "r", "personalise"))


def test_a_client_that_drops_out_has_its_download_and_nothing_else(tmp_path: Path) -> None:
    made = study({"drop": 0.4, "deadline_s": 600.0})
    tiny.run(made, tmp_path / "r")
    gone = {(r["round"], f["client"]) for r in rounds(tmp_path / "r") for f in r["failed"] if f["kind"] == "dropped"}
    clients = {(r["round"], c) for r in rounds(tmp_path / "r") for c in r["clients"]}
    assert gone == {(r, c) for r, c in clients if rng.stream(0, "drop federate", r, c).random() < 0.4}
    assert gone and gone < clients
    for round, client in clients:
        rows = [r for r in tiny.rows(tmp_path / "r", "ledger") if (r["phase"], r["round"]) == ("federate", round)
                and f"client:{client}" in (r["sender"], r["receiver"])]  # fmt: skip
        if (round, client) in gone:
            assert [(r["kind"], r["status"], r["payload_bytes"] > 0) for r in rows] == [
                ("values" if any((o, client) in clients - gone for o in range(round)) else "install", "ok", True),
                ("none", "failed: dropped", False),
            ]
        else:
            assert [r["status"] for r in rows] == ["ok"] * 3
    for row in rounds(tmp_path / "r"):
        assert (row["simulated_s"] == 600.0) == any((row["round"], c) in gone for c in row["clients"])
    found = traffic(read_results(tmp_path / "r").group[0])
    assert found.refused.messages == 0 and found.dense_ups == len(clients - gone)


def test_without_a_deadline_a_dropped_client_costs_what_it_would_have_taken(tmp_path: Path) -> None:
    tiny.run(study({"drop": 0.4}), tmp_path / "r")
    found = times(tmp_path / "r")
    gone = [(r["round"], f["client"]) for r in rounds(tmp_path / "r") for f in r["failed"]]
    for round, client in gone:
        down, up = moved(tmp_path / "r", "federate", round, client)
        assert up == 0 and found["federate", round, client] == pytest.approx(by_hand(client, down, down, FLOPS))
    for row in rounds(tmp_path / "r"):
        assert row["simulated_s"] == max(found["federate", row["round"], c] for c in row["clients"])


def test_rounds_where_nobody_ever_meets_the_deadline_are_said_clearly(tmp_path: Path) -> None:
    with pytest.raises(NothingUsable, match="3 rounds without one usable reply; last: of 3 clients 3 were late"):
        tiny.run(study({"deadline_s": 0.5}), tmp_path / "r")
    assert [r["simulated_s"] for r in rounds(tmp_path / "r")] == [0.5] * 3


def test_bad_luck_ends_no_run(tmp_path: Path) -> None:
    """Rounds in which all dropped out, or were late where others were not, neither end a run nor roll it back."""
    told: list[str] = []
    made = study({"drop": 0.9, "deadline_s": 600.0}, federate={"rounds": 12, "clients_per_round": 1})
    tiny.run(made, tmp_path / "r", tell=told.append)
    empty = [len(r["failed"]) == len(r["clients"]) for r in rounds(tmp_path / "r")]
    assert any(all(empty[i : i + 3]) for i in range(10)) and len(empty) == 12
    assert not any(r.get("rolled_back_to") for r in rounds(tmp_path / "r"))
    assert any("note: nothing was joined in federate" in line and "1 dropped out" in line for line in told)


FAULTY: dict[str, Any] = {"drop": 0.25, "deadline_s": 20.0, "straggle": 0.3}
SLICED: dict[str, Any] = {
    "method": {"name": "lotteryfl", **tiny.METHODS["lotteryfl"]},
    "personalise": {"epochs": 1, "arms": ["own_tuned", "ticket"], "clients_per_wave": 2},
    "finder": {"main": "auto", "densities": [0.5, 0.2]},
    "refine": {"rounds": 2, "clients_per_round": 3},
}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.run(study(FAULTY, **SLICED), tmp_path_factory.mktemp("fleet") / "run").root


def test_it_has_late_and_dropped_ones(faulty: Path) -> None:
    kinds = [f["kind"] for r in tiny.rows(faulty, "rounds") for f in r["failed"]]
    assert {"late", "dropped"} == set(kinds)


@pytest.mark.parametrize("after", [1, 2, 3, 5, 7])
def test_a_stop_anywhere_changes_nothing(faulty: Path, after: int, tmp_path: Path) -> None:
    started(study(FAULTY, **SLICED), tmp_path / "cut", after=after)
    session.resume(tmp_path / "cut", InProcess())
    assert tiny.facts(tmp_path / "cut") == tiny.facts(faulty) and times(tmp_path / "cut") == times(faulty)


def test_workers_change_nothing(faulty: Path, tmp_path: Path) -> None:
    tiny.run(study(FAULTY, **SLICED), tmp_path / "r", engine=Forked(2))
    assert tiny.facts(tmp_path / "r") == tiny.facts(faulty) and times(tmp_path / "r") == times(faulty)


def test_the_report_and_the_comparison_tell_it(faulty: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    page = write_report(faulty).read_text()
    assert "The fleet" in page and "What simulated time buys" in page
    assert (faulty / "tables" / "fleet.md").exists() and (faulty / "figures" / "accuracy_at_time.png").exists()
    tiny.run(study({"flops": "alive"}, **SLICED), tmp_path / "other")
    found = compare([faulty, tmp_path / "other"])
    header, rows = found.times().header, found.times().rows
    assert [row[0] for row in rows] == ["run", "other"] and header[2] == "time to it"
    assert "Simulated time to a round of" in found.text()
    bare = tiny.run(tiny.study(**{**SLICED, "clients": {"unseen": 0.0}}), tmp_path / "bare").root
    request.getfixturevalue("unpainted")
    assert not tiers_table(read_results(bare)).rows and "imulated" not in write_report(bare).read_text()


def test_the_forecast_knows_the_draws(tmp_path: Path) -> None:
    made = study({"drop": 0.4})
    tiny.run(made, tmp_path / "r")
    dropped = sum(len(r["failed"]) for r in rounds(tmp_path / "r"))
    text = forecast(made)
    assert (
        f"(12 visits: {dropped} dropped, 0 late)" in text and "  slow, 1 client: a dense visit takes download" in text
    )
    told = float(text.partition("fleet: about ")[2].split(" ")[0])
    assert told == pytest.approx(sum(r["simulated_s"] for r in rounds(tmp_path / "r")), rel=0.1)
    assert "fleet:" not in forecast(tiny.study())


@pytest.mark.parametrize("method", ["fedavg_ft", "scaffold", "dfedavg"])
def test_step_2_takes_as_long_as_forecast(tmp_path: Path, method: str) -> None:
    """Found: SCAFFOLD's variates were counted in step 2; without a server one model was, whatever neighbours send."""
    made = tiny.of_method(method, wire="raw", fleet=FLEET, federate={"rounds": 3})
    text = forecast(made)
    one, two = (float(text.partition(before)[2].split(" ")[0]) for before in ("fleet: about ", "step 1 and "))
    facts = read_run(tiny.run(made, tmp_path / "r").root)
    assert two == pytest.approx(simulated_s(facts, step=2) or 0.0, rel=0.02)
    assert one == pytest.approx(simulated_s(facts, step=1) or 0.0, rel=0.2 if method == "scaffold" else 0.02)


def test_a_forecast_of_seeds_says_that_it_is_of_one() -> None:
    assert "\nseeds: 2, a run each; the figures below are those of one run\n" in forecast(tiny.study(seeds=[0, 1]))
    assert "seeds" not in forecast(tiny.study())


@pytest.mark.parametrize(
    ("fleet", "says"),
    [
        ({"flops_s": 0}, "fleet.flops_s: input should be greater than 0, got 0"),
        ({"flops": "all"}, "fleet.flops: input should be 'dense' or 'alive'"),
        ({"drop": 1.0}, "fleet.drop: input should be less than 1"),
        ({"straggle": -0.1}, "fleet.straggle: input should be greater than or equal to 0"),
        ({"deadline_s": 0.0}, "fleet.deadline_s: input should be greater than 0"),
        ({"up_bytes_s": -1}, "fleet.up_bytes_s: input should be greater than 0"),
        ({"latency_s": -1}, "fleet.latency_s: input should be greater than or equal to 0"),
        ({"down_bytes": 1}, "fleet.down_bytes: unknown key; did you mean down_bytes_s?"),
    ],
)
def test_a_fleet_that_is_none_is_refused(fleet: dict[str, Any], says: str) -> None:
    with pytest.raises(StudyError) as caught:
        study(fleet)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_what_no_round_reads_is_noted() -> None:
    notes = resolve(study({"drop": 0.1, "deadline_s": 9.0}, method="local", personalise={"arms": ["local"]}))[1]
    assert "fleet.deadline_s, fleet.drop: have no effect, method local has no federated rounds" in notes


@pytest.mark.parametrize("flops", [[1.0], [1.0, -1.0], [float("nan"), 1.0], [1.0, float("inf")], ["1", 1.0], 3, None])
def test_flops_that_are_none_are_no_answer(flops: Any) -> None:
    import json

    job = Job(study="", phase="federate", round=1, client=0, inbox=())
    records = of_answer(Reply(round=1, client=0, outbox=(), flops=3.5, alive_flops=1.25))
    found = to_answer(records, job)
    assert isinstance(found, Reply) and (found.flops, found.alive_flops) == (3.5, 1.25)
    head = json.loads(records["head"]["b"])
    records["head"]["b"] = json.dumps({**head, "flops": flops})
    with pytest.raises(ValueError, match="flops|dense|alive"):
        to_answer(records, job)
    assert isinstance(to_answer(of_answer(Failure(round=1, client=0, kind="died", reason="x")), job), Failure)
