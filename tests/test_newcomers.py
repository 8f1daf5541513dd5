"""Clients that come late, and clients that no round has seen: who is there when, and which first ticket they get."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlth.engines.forked import Forked
from fedlth.engines.inprocess import InProcess
from fedlth.errors import StudyError
from fedlth.experiment.resolve import resolve
from fedlth.federation import session
from fedlth.federation.forecast_bytes import forecast_bytes
from fedlth.forecast import forecast
from fedlth.personalization.newcomer import NEWCOMERS, LabelHistogram, Similar, voted
from fedlth.report.build import read_results, write_report
from fedlth.report.newcomers import newcomers_table
from fedlth.storage.client_state import ClientState
from fedlth.study.sections import Joiners
from tests import tiny
from tests.test_personal import started
from tests.test_transport import Counting

LATE: dict[str, Any] = {
    "clients": {"count": 6, "unseen": 0.0, "joiners": {"share": 0.34, "round": 3}},
    "federate": {"rounds": 4, "clients_per_round": 4},
}
LOTTERY = {"name": "lotteryfl", **tiny.METHODS["lotteryfl"]}


def ledger(out: Path, **where: Any) -> list[dict[str, Any]]:
    return [r for r in tiny.rows(out, "ledger") if all(r[key] == value for key, value in where.items())]


# Late joiners


def test_who_comes_when_is_drawn_once() -> None:
    people = tiny.experiment(tiny.study(**LATE)).population
    assert len(people.arrivals) == 2 and set(people.arrivals.values()) == {3}
    assert people.there(2) == [c for c in range(6) if c not in people.arrivals] and people.there(3) == list(range(6))
    more = tiny.study(**{**LATE, "clients": {"count": 6, "unseen": 0.0, "joiners": [
        {"share": 0.17, "round": 2}, {"share": 0.34, "round": 4}]}})  # fmt: skip
    arrivals = tiny.experiment(more).population.arrivals
    assert sorted(arrivals.values()) == [2, 4, 4] and more.clients.joiners[0] == Joiners(share=0.17, round=2)
    everyone = tiny.study(**{**LATE, "federate": {"rounds": 4, "clients_per_round": 1.0}})
    (phase,) = tiny.experiment(everyone).federated_phases
    assert [len(tiny.experiment(everyone).clients(phase, r)) for r in (1, 2, 3, 4)] == [4, 4, 6, 6]


@pytest.fixture(scope="module")
def late(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tiny.study(**{**LATE, "federate": {"rounds": 4, "clients_per_round": 1.0}}, method=LOTTERY,
                      personalise={"arms": ["own_tuned"], "epochs": 1})  # fmt: skip
    return tiny.run(made, tmp_path_factory.mktemp("late") / "run").root


def test_a_late_joiner_begins_as_every_client_does(late: Path) -> None:
    """Its first download is an install of the first mask (the whole model), when the others' are sparse already."""
    joiners = read_results(late).group[0].header.joiners
    assert set(joiners.values()) == {3} and len(joiners) == 2
    for client in range(6):
        downs = ledger(late, receiver=f"client:{client}", phase="federate")
        first = joiners.get(str(client), 1)
        assert [r["round"] for r in downs] == list(range(first, 5))
        assert [r["kind"] for r in downs] == ["install", *["values"] * (len(downs) - 1)]
        assert downs[0]["density"] == 1 and [r["density"] < 1 for r in downs[1:]] == [True] * (len(downs) - 1)
    page = write_report(late).read_text()
    assert "2 clients came later, from round 3 on." in page


def test_a_late_joiner_begins_with_its_first_mask_where_a_method_has_one(tmp_path: Path) -> None:
    clients = {**LATE["clients"], "capacity": [{"share": 1.0, "density": 0.25}]}
    made = tiny.study(
        method={"name": "tests.test_method_parts:sliced", "chooses": True}, clients=clients,
        federate={"rounds": 3, "clients_per_round": 1.0}, personalise={"arms": ["own_tuned"], "epochs": 1},
    )  # fmt: skip
    tiny.run(made, tmp_path / "r")
    for client, round in read_results(tmp_path / "r").group[0].header.joiners.items():
        (down,) = ledger(tmp_path / "r", receiver=f"client:{client}", phase="federate")
        assert (down["round"], down["kind"], round) == (3, "install", 3) and down["density"] == 0.25
        assert down["mask_bytes"] == 0, "both ends know it"


def test_stops_and_workers_change_nothing_of_it(late: Path, tmp_path: Path) -> None:
    made = tiny.study(**{**LATE, "federate": {"rounds": 4, "clients_per_round": 1.0}}, method=LOTTERY,
                      personalise={"arms": ["own_tuned"], "epochs": 1})  # fmt: skip
    tiny.run(made, tmp_path / "forked", engine=Forked(2))
    started(made, tmp_path / "cut", after=2)
    session.resume(tmp_path / "cut", InProcess())
    assert tiny.facts(late) == tiny.facts(tmp_path / "forked") == tiny.facts(tmp_path / "cut")


def test_who_is_unseen_is_drawn_for_no_round_and_gets_a_ticket_all_the_same(tmp_path: Path) -> None:
    made = tiny.study(federate={"clients_per_round": 3}, personalise={"arms": ["global", "ticket"]})
    experiment, out = tiny.experiment(made), tmp_path / "r"
    (client,), (phase,) = experiment.task.splits.unseen, experiment.federated_phases
    for present in (None, frozenset(range(4))):
        assert not any(client in experiment.clients(phase, round, present) for round in range(1, 50))
    tiny.run(made, out)
    downs = ledger(out, receiver=f"client:{client}")
    assert [(r["phase"], r["kind"]) for r in downs][:1] == [("personalise", "install")], "and nothing before"
    rows = [r for r in tiny.rows(out, "metrics") if r["client"] == client]
    assert {r["arm"] for r in rows} == {"global", "ticket"} and all(r["unseen"] for r in rows)
    assert (out / "tickets" / f"client-{client:04d}.safetensors").exists()


@pytest.mark.parametrize("rule", ["trimmed_mean", "median", "krum", "multi_krum", "without_outliers"])
def test_drop_out_in_mid_round_goes_with_masks_robust_rules_and_late_joiners(rule: str, tmp_path: Path) -> None:
    made = tiny.study(
        clients=LATE["clients"], method=LOTTERY, federate={"rounds": 4, "clients_per_round": 1.0, "join": rule},
        personalise={"arms": ["own_tuned"], "epochs": 1},
        fleet={"flops_s": 1e6, "down_bytes_s": 1e4, "up_bytes_s": 1e4, "drop": 0.4},
    )  # fmt: skip
    meter = Counting()
    tiny.run(made, tmp_path / "r", engine=meter)
    gone = {(row["round"], f["client"]) for row in tiny.rows(tmp_path / "r", "rounds") for f in row["failed"]}
    assert gone, "some dropped out"
    for client in range(6):
        downs = ledger(tmp_path / "r", receiver=f"client:{client}", phase="federate")
        kept = [r for r in downs if (r["round"], client) not in gone]
        for row in downs:
            before = [r for r in kept if r["round"] < row["round"]]
            assert row["kind"] == ("values" if before else "install") and (row["density"] < 1) == bool(before)


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"federate": {"rounds": 4, "clients_per_round": 5}}, "at most the 4 clients that are there from the first"),
        ({"clients": {"joiners": {"share": 1.0, "round": 2}}}, "clients.joiners must be shares that leave a client"),
        ({"clients": {"joiners": {"share": 0.2, "round": 9}}}, "round must be at most the 4 rounds of step 1, got 9"),
        ({"clients": {"joiners": {"share": 0.2, "round": 1}}}, "clients.joiners.0.round: input should be greater than"),
        ({"clients": {"joiners": {"share": 0.2}}}, "clients.joiners.0.round: required, but missing"),
    ],
)
def test_joiners_that_make_no_sense_are_refused(sections: dict[str, Any], says: str) -> None:
    made = {key: {**LATE[key], **sections.get(key, {})} for key in LATE}
    with pytest.raises(StudyError) as caught:
        resolve(tiny.study(**made))
    assert says in str(caught.value)


# Newcomers

TWO: dict[str, Any] = {
    "clients": {"count": 6, "unseen": 0.34}, "partition": {"name": "dirichlet", "alpha": 0.5},
    "personalise": {"epochs": 1, "arms": ["global", "ticket", "global_mask", "random"], "clients_per_wave": 2},
}  # fmt: skip


def study(newcomer: Any, **more: Any) -> Any:
    sections = {**TWO, **more}
    sections["clients"] = {**TWO["clients"], **more.get("clients", {}), "newcomer": newcomer}
    return tiny.study(**sections)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name in NEWCOMERS:
        meter, out = Counting(), tmp_path_factory.mktemp(name) / "run"
        tiny.run(study(name), out, engine=meter)
        for client in range(6):
            rows = [r for r in tiny.rows(out, "ledger") if f"client:{client}" in (r["sender"], r["receiver"])]
            up = sum(r["payload_bytes"] for r in rows if r["receiver"] == "server")
            assert (meter.up[client], meter.down[client]) == (up, sum(r["payload_bytes"] for r in rows) - up)
        found[name] = out
    return found


def row(out: Path, client: int, arm: str) -> dict[str, Any]:
    (found,) = [
        r
        for r in tiny.rows(out, "metrics")
        if (r["client"], r["arm"]) == (client, arm) and r["target_density"] in (0.2, 1.0)
    ]
    return found


def unseen(out: Path) -> list[int]:
    return list(read_results(out).group[0].header.unseen)


def test_the_global_mask_as_a_first_ticket_is_that_control_bit_for_bit(runs: dict[str, Path]) -> None:
    out = runs["global"]
    assert len(unseen(out)) == 2 and not ledger(out, phase="introduce")
    for client in unseen(out):
        handed, control = row(out, client, "handed"), row(out, client, "global_mask")
        assert {**handed, "arm": ""} == {**control, "arm": ""}
    downs = ledger(out, phase="handed", sender="server")
    assert [r["mask_bytes"] for r in downs] == [0, 0] and all(r["density"] == 1 and r["broadcast"] for r in downs)
    assert {r["client"] for r in tiny.rows(out, "metrics") if r["arm"] == "handed"} == set(unseen(out))


def masks(out: Path) -> dict[int, np.ndarray]:
    folder = session.RunFolder(out)
    progress = folder.progress()
    states = {c: ClientState.from_bytes(folder.clients.get(c, progress.versions[str(c)])) for c in range(6)}
    return {c: state.masks["ticket"] for c, state in states.items()}


def test_the_nearest_label_histogram_hands_its_ticket_over(runs: dict[str, Path]) -> None:
    out = runs["label_histogram"]
    counts = np.array(read_results(out).group[0].header.client_labels, float)
    shares, held = counts / counts.sum(1, keepdims=True), masks(out)
    said = ledger(out, phase="introduce", receiver="server", kind="statistics")
    assert len(said) == 6 and all(r["payload_bytes"] > 0 for r in said)
    assert not ledger(out, phase="introduce", sender="server"), "nothing goes down to ask for it"
    for client in unseen(out):
        known = [c for c in range(6) if c not in unseen(out)]
        nearest = min(known, key=lambda c: (np.abs(shares[c] - shares[client]).sum(), c))
        assert row(out, client, "handed")["ticket"] == row(out, nearest, "ticket")["ticket"]
        (down,) = ledger(out, phase="handed", receiver=f"client:{client}")
        assert down["density"] == held[nearest].mean() and down["mask_bytes"] > 0 and down["kind"] == "values"


def test_the_nearest_mask_to_a_signature_is_handed_over(runs: dict[str, Path]) -> None:
    out = runs["similar"]
    assert {r["sender"] for r in ledger(out, phase="introduce", receiver="server", kind="mask")} == {
        f"client:{c}" for c in unseen(out)
    }
    others = {row(out, c, "ticket")["ticket"] for c in range(6) if c not in unseen(out)}
    for client in unseen(out):
        assert row(out, client, "handed")["ticket"] in others


def test_a_part_picks_by_hand() -> None:
    known = {c: np.array(m, bool) for c, m in {1: [1, 1, 0, 0], 2: [1, 0, 1, 0], 5: [0, 0, 1, 1]}.items()}
    memory = {"introduced": np.array([0, 1, 2, 5]), "labels": np.float32([[0.5, 0.5], [1, 0], [0.6, 0.4], [0, 1]])}
    assert LabelHistogram()([0], known, memory)[0].tolist() == [1, 0, 1, 0]
    assert LabelHistogram(3)([0], known, memory)[0].tolist() == [1, 0, 1, 0]  # two votes each, two weights
    assert LabelHistogram()([0, 7], known, memory).keys() == {0}, "who said nothing of itself gets the whole model"
    memory = {"introduced": np.array([0]), "signature": np.uint8([[0, 1, 1, 1]])}
    assert Similar()([0], known, memory)[0].tolist() == [0, 0, 1, 1]
    assert voted(known, {1: 0.5, 2: 0.5, 5: 0.9}, 1).tolist() == [1, 1, 0, 0], "of equals the first"


def test_nothing_else_of_a_run_changes(runs: dict[str, Path], tmp_path: Path) -> None:
    bare = tiny.run(tiny.study(**TWO), tmp_path / "bare").root
    for out in runs.values():
        assert tiny.digests(out) == tiny.digests(bare)
        others = [r for r in tiny.rows(out, "metrics") if r["arm"] != "handed"]
        assert others == tiny.rows(bare, "metrics")


def test_the_report_holds_newcomers_against_what_else_they_could_use(
    runs: dict[str, Path], request: pytest.FixtureRequest
) -> None:
    for number, out in enumerate(runs.values()):
        if number == 1:  # one report with such rows is painted
            request.getfixturevalue("unpainted")
        table = newcomers_table(read_results(out))
        labels = ["handed ticket", "personal ticket", "global model's own mask", "random ticket", "global model"]
        assert [cells[0] for cells in table.rows] == labels and {cells[2] for cells in table.rows} == {"2"}
        page = write_report(out).read_text()
        assert table.title in page and (out / "tables" / "newcomers.md").exists()
    same = newcomers_table(read_results(runs["global"])).rows[2]
    assert same[4] in ("+0.0", "0.0", "±0.0") or float(same[4]) == 0


@pytest.mark.parametrize("name", ["label_histogram", "similar"])
def test_stops_and_workers_change_nothing_of_newcomers(name: str, runs: dict[str, Path], tmp_path: Path) -> None:
    tiny.run(study(name), tmp_path / "forked", engine=Forked(2))
    last = len(tiny.experiment(study(name)).steps)
    for after in (last - 2, last - 1):
        started(study(name), tmp_path / f"cut-{after}", after=after)
        session.resume(tmp_path / f"cut-{after}", InProcess())
        assert tiny.facts(tmp_path / f"cut-{after}") == tiny.facts(runs[name])
    assert tiny.facts(tmp_path / "forked") == tiny.facts(runs[name])


@pytest.mark.parametrize("name", ["label_histogram", "similar"])
def test_newcomers_go_with_slices_refinement_and_late_joiners(name: str, tmp_path: Path) -> None:
    made = study(
        {"name": name, "nearest": 2}, method=LOTTERY, clients={"joiners": {"share": 0.3, "round": 2}},
        personalise={"epochs": 1, "arms": ["ticket", "own_tuned"]}, refine={"rounds": 1, "clients_per_round": 2},
        federate={"rounds": 2, "clients_per_round": 2},
    )  # fmt: skip
    tiny.run(made, tmp_path / "r")
    failed = [f for r in tiny.rows(tmp_path / "r", "rounds") for f in r["failed"]]
    assert not failed and not ledger(tmp_path / "r", kind="resync")
    assert {r["client"] for r in tiny.rows(tmp_path / "r", "metrics") if r["arm"] == "handed"} == set(
        unseen(tmp_path / "r")
    )


@pytest.mark.parametrize("name", NEWCOMERS)
def test_the_forecast_counts_them(name: str, runs: dict[str, Path]) -> None:
    made = study(name)
    assert "newcomer" not in " ".join(resolve(made)[1])
    told = forecast_bytes(resolve(made)[0], 0.01)
    rows = tiny.rows(runs[name], "ledger")
    down = sum(r["payload_bytes"] for r in rows if r["sender"] == "server")
    up = sum(r["payload_bytes"] for r in rows if r["receiver"] == "server")
    assert told.down.size == pytest.approx(down, rel=0.05) and told.up.size == pytest.approx(up, rel=0.05)
    assert "late joiners: clients" in forecast(tiny.study(**LATE))


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"method": "fedpm"}, "clients.newcomer: must be left out for method fedpm, which shares no weights"),
        ({"personalise": {"arms": ["global"]}}, "clients.newcomer: needs the arm ticket (personalise.arms)"),
        ({"finder": {"main": "auto", "densities": [0.5, 0.2]}}, "needs tickets of one density, got finder.main: auto"),
        (
            {"clients": {"newcomer": "nearest"}},
            "clients.newcomer.name: must be one of global, label_histogram, similar",
        ),
        (
            {"clients": {"newcomer": {"name": "similar", "steps": 0}}},
            "clients.newcomer.steps must be at least 1, got 0",
        ),
    ],
)
def test_newcomers_that_make_no_sense_are_refused(sections: dict[str, Any], says: str) -> None:
    clients = {**TWO["clients"], "newcomer": "similar", **sections.pop("clients", {})}
    with pytest.raises(StudyError) as caught:
        resolve(tiny.study(**{**TWO, **sections, "clients": clients}))
    assert says in str(caught.value)


def test_without_newcomers_it_is_noted() -> None:
    assert (
        "clients.newcomer: has no effect, clients.unseen is 0: there is no newcomer"
        in resolve(study("global", clients={"unseen": 0.0}))[1]
    )
