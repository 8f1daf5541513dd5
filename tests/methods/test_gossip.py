"""Federation without a server: who hears whom, what an average is, where it is FedAvg bit for bit, what crosses."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlth import cli, rng
from fedlth.engines.flower_record import MOST_MESSAGES, Order, of_order, to_order
from fedlth.engines.inprocess import InProcess
from fedlth.errors import StudyError
from fedlth.experiment.resolve import read, resolve
from fedlth.federation import session
from fedlth.federation.forecast_bytes import forecast_bytes
from fedlth.federation.jobs import Failure, Job, Message, Reply
from fedlth.methods.aggregate import CountMean
from fedlth.methods.gossip import GossipUpdate, dfedavg, gossip
from fedlth.methods.method import FederatedMethod, Phase
from fedlth.methods.options import TRAIN
from fedlth.methods.topology import Full, RandomNeighbours, Ring, topology_of
from fedlth.report.build import read_results
from fedlth.report.traffic import traffic
from fedlth.storage.client_state import ClientState
from fedlth.storage.records import client_of
from fedlth.training.local_client import LocalClient
from fedlth.wire import payload
from fedlth.wire.payload import Content
from tests import tiny
from tests.test_forecast_bytes import near
from tests.test_transport import Counting

# 32 training examples each: weighing by examples and not at all are then the same sum, to the last bit.
EQUAL: dict[str, Any] = {
    "data": {"name": "tests.methods.test_gossip:examples"}, "clients": {"unseen": 0.0, "validation": 0.2},
}  # fmt: skip


def examples() -> dict[str, Any]:
    return tiny.images(train=160)


def study(topology: Any = "full", rounds: int = 3, per_round: int = 3, **more: Any) -> Any:
    method = {"name": "dfedavg", "topology": topology}
    return tiny.study(method=method, federate={"rounds": rounds, "clients_per_round": per_round}, **more)


# Who hears whom.


def draw() -> np.random.Generator:
    return rng.stream(0, "a test")


def test_a_ring_is_the_two_beside() -> None:
    others = [0, 1, 4, 7]
    assert Ring()(3, others, draw()) == [1, 4] and Ring()(9, others, draw()) == [0, 7]
    assert Ring()(5, [2], draw()) == [2] and Ring()(5, [], draw()) == ()


def test_random_neighbours_are_distinct_others() -> None:
    others = [c for c in range(12) if c != 5]
    for count in (1, 4, 11, 40):
        found = list(RandomNeighbours(count)(5, others, draw()))
        assert len(set(found)) == len(found) == min(count, 11) and set(found) <= set(others)
    assert list(Full()(5, others, draw())) == others


def test_topologies_are_named_or_the_users_own() -> None:
    assert topology_of("ring") == Ring() and topology_of({"name": "random", "count": 3}) == RandomNeighbours(3)
    assert topology_of("tests.methods.test_gossip:Star") == Star()
    with pytest.raises(StudyError, match="method.topology.count must be at least 1"):
        topology_of({"name": "random", "count": 0})
    with pytest.raises(StudyError, match="method.topology.name: must be one of ring, random, full"):
        topology_of("star")


@dataclass(frozen=True)
class Star:
    """Everyone hears the first client, and it everyone."""

    def __call__(self, client: int, others: Sequence[int], rng: np.random.Generator, /) -> Sequence[int]:
        return others if client < min(others) else [min(others)]


@dataclass(frozen=True)
class Twice:
    def __call__(self, client: int, others: Sequence[int], rng: np.random.Generator, /) -> Sequence[int]:
        return [others[0], others[0]]


def test_both_ends_draw_the_same_senders_and_each_round_anew() -> None:
    made = tiny.experiment(tiny.study(method={"name": "dfedavg", "topology": {"name": "random", "count": 2}},
                                      clients={"count": 9, "unseen": 0.25}))  # fmt: skip
    phase, unseen = made.phases[0], made.task.splits.unseen
    found = [made.senders(phase, round, 1) for round in range(1, 9)]
    assert found == [made.senders(phase, round, 1) for round in range(1, 9)] and len(set(found)) > 1
    assert not {c for senders in found for c in senders} & {1, *unseen}
    step2 = made.phase("personalise")
    assert made.senders(step2, 1, 1) == made.senders(step2, 5, 1), "which wave a client is in must not matter"


# What an average is.


def local(client: int = 1, **sections: Any) -> LocalClient:
    return LocalClient(tiny.task(**sections), client, 1, "federate")


def contents(made: LocalClient, count: int = 3) -> dict[str, Content]:
    layout, found = made.task.exchange, {}
    for client in range(10, 10 + count):
        draws = rng.stream(client, "content")
        mask = draws.random(layout.num_prunable) < 0.5
        floats = draws.normal(size=layout.num_floats).astype(np.float32)
        floats[: mask.size] *= mask
        found[f"client:{client}"] = Content(mask, floats, np.zeros(layout.num_ints, np.int64))
    return found


def test_a_weight_is_the_mean_of_those_who_hold_it_under_ones_own_mask() -> None:
    made = local()
    came, theta = contents(made), made.task.theta_0
    mask = rng.stream(0, "mask").random(made.full.size) < 0.5
    own = GossipUpdate().own(made, came, ClientState(masks={"active": mask}))
    for place in range(4):
        held = [c.floats[place] for c in came.values() if c.floats is not None and c.mask[place]]
        mine = [theta.floats[place]] if mask[place] else []
        wanted = np.mean(np.array(held + mine, np.float64)) if mask[place] else 0.0
        assert own.params.floats[place] == np.float32(wanted)
    biases = [c.floats[mask.size :] for c in came.values() if c.floats is not None] + [theta.floats[mask.size :]]
    np.testing.assert_array_equal(
        own.params.floats[mask.size :], np.mean(np.array(biases, np.float64), 0).astype(np.float32)
    )
    assert (own.mask == mask).all()


def test_neighbours_may_come_in_any_order_and_under_any_number() -> None:
    made = local()
    came = contents(made)
    wanted = GossipUpdate().own(made, came, ClientState()).params
    backwards = dict(reversed(came.items()))
    assert GossipUpdate().own(made, backwards, ClientState()).params.digest() == wanted.digest()
    other = {f"client:{40 - i}": content for i, content in enumerate(came.values())}
    assert GossipUpdate().own(made, other, ClientState()).params.digest() == wanted.digest()


def test_who_has_not_published_is_theta_0_under_its_first_mask() -> None:
    made = tiny.experiment(tiny.of_method("dispfl"))
    content, mask = made.unpublished(2), made.method.first_mask(made.task, 2)
    assert (content.mask == mask).all() and not (made.unpublished(3).mask == mask).all()
    assert content.floats is not None
    np.testing.assert_array_equal(content.floats, made.task.theta_0.masked(mask).floats)


def test_on_a_full_graph_it_is_fedavg_bit_for_bit(tmp_path: Path) -> None:
    """All take part, with equal counts: the mean of the neighbours is then the global model."""
    more = {**EQUAL, "personalise": {"arms": ["global", "dense"]}, "evaluate": {"every": 1}}
    tiny.run(study(per_round=4, **more), tmp_path / "gossip")
    tiny.run(tiny.study(method="fedavg", federate={"rounds": 3, "clients_per_round": 4}, **more), tmp_path / "fedavg")
    assert tiny.rows(tmp_path / "gossip", "metrics") == tiny.rows(tmp_path / "fedavg", "metrics")
    seen = [[r for r in tiny.rows(tmp_path / run, "curve") if r["arm"] == "global"] for run in ("gossip", "fedavg")]
    assert seen[0] == seen[1] and seen[0]
    assert tiny.digests(tmp_path / "gossip") == tiny.digests(tmp_path / "fedavg")
    seen = [[r["val_accuracy"] for r in tiny.rows(tmp_path / run, "rounds")] for run in ("gossip", "fedavg")]
    assert seen[0] == seen[1]


def test_after_the_last_download_everyones_own_model_is_then_the_consensus(tmp_path: Path) -> None:
    tiny.run(study(per_round=4, **EQUAL, personalise={"arms": ["global", "own"]}), tmp_path / "r")
    rows = tiny.rows(tmp_path / "r", "metrics")
    for client in range(4):
        told = [(r["test_accuracy"], r["test_loss"]) for r in rows if r["client"] == client]
        assert len(told) == 2 and told[0] == told[1]


def test_each_topology_is_another_run(tmp_path: Path) -> None:
    found = {}
    for name in ("full", "ring", "random"):
        spec = {"name": "random", "count": 1} if name == "random" else name
        made = study(spec, per_round=4, clients={"unseen": 0.0, "count": 5})
        found[name] = tiny.digests(tiny.run(made, tmp_path / name).root)["theta_g"]
    assert len(set(found.values())) == 3


# What crosses, and when it is current.


class Publishing(Counting):
    """A meter that also knows what each client sent up, and what came down from whom."""

    def __init__(self, **faults: Any) -> None:
        super().__init__(**faults)
        self.sent: dict[tuple[int, int], bytes] = {}
        self.came: list[tuple[str, int, int, int, bytes]] = []
        self.silent: set[tuple[int, int]] = set()

    def run(self, jobs: list[Job]) -> list[Reply | Failure]:
        answers = []
        for job in jobs:
            for m in job.inbox:
                sender = client_of(m.name)
                if sender is not None:
                    self.came.append((job.phase, job.round, sender, job.client, m.payload))
            if (job.client, job.round) in self.silent and job.phase == "federate":
                answers.append(Failure(round=job.round, client=job.client, kind="raised", reason="silent"))
                self._meter(self.down, job.client, job.inbox)
                continue
            (answer,) = super().run([job])
            if isinstance(answer, Reply) and job.phase == "federate":
                self.sent[job.client, job.round] = answer.outbox[0].payload
            answers.append(answer)
        return answers


def edges(out: Path) -> list[dict[str, Any]]:
    return [r for r in tiny.rows(out, "ledger") if "server" not in (r["sender"], r["receiver"])]


@pytest.mark.parametrize("name", ["dfedavg", "dispfl"])
def test_every_edge_has_a_row_of_its_senders_own_bytes(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each neighbour's own sparse model is received: the released code of DisPFL counts their aggregate, once."""
    meter, out = Publishing(), tmp_path / "r"
    spec = {**tiny.METHODS[name], "name": name, "topology": "full"}
    made = tiny.study(method=spec, federate={"rounds": 4, "clients_per_round": 2}, clients={"count": 5})
    tiny.run(made, out, engine=meter)
    told = [(r["phase"], r["round"], r["sender"], r["receiver"], r["payload_bytes"]) for r in edges(out)]
    assert told == [(p, n, f"client:{s}", f"client:{k}", len(data)) for p, n, s, k, data in meter.came]
    for phase, round, sender, _, data in meter.came:  # byte for byte what it sent last, in an earlier round
        before = round if phase == "federate" else 99
        assert data == meter.sent[max(key for key in meter.sent if key[0] == sender and key[1] < before)]
    assert len({(p, n, k) for p, n, _, k, _ in meter.came}) < len(meter.came), "else no sum over neighbours is tested"
    found = traffic(read_results(out).group[0])
    assert found.unicast.total_bytes == sum(r["payload_bytes"] for r in tiny.rows(out, "ledger"))
    assert {c: f.down_bytes for c, f in found.by_client.items()} == meter.down
    for client, moved in found.by_client.items():
        given = sum(len(data) for _, _, sender, _, data in meter.came if sender == client)
        published = sum(len(data) for (c, _), data in meter.sent.items() if c == client)
        assert moved.up_bytes == given + meter.up[client] - published
    capsys.readouterr()
    assert cli.main(["bytes", str(out), "--json"]) == 0
    told_json = json.loads(capsys.readouterr().out)
    busiest = told_json["busiest"]
    assert busiest["node"].startswith("client:") and busiest["total_bytes"] == max(
        sum(r["payload_bytes"] for r in edges(out) if f"client:{c}" in (r["sender"], r["receiver"])) for c in range(5)
    )
    assert {p["printed"] for p in told_json["presets"]} == {"clients send to one another", "no bare mask goes up"}


def test_no_model_comes_from_or_goes_to_a_server(tmp_path: Path) -> None:
    tiny.run(study(), tmp_path / "r")
    rows = tiny.rows(tmp_path / "r", "ledger")
    served = {(r["sender"] == "server", r["kind"]) for r in rows if "server" in (r["sender"], r["receiver"])}
    # The visits' numbers, and what the arms `global` and `dense` of step 2 need, which no client goes on from.
    assert served == {(False, "metrics"), (True, "evaluation")}
    tiny.run(study(personalise={"arms": ["own", "local"]}), tmp_path / "own")
    assert not [r for r in tiny.rows(tmp_path / "own", "ledger") if r["sender"] == "server"]


def test_with_a_server_it_is_the_busiest_node(tmp_path: Path) -> None:
    tiny.run(tiny.study(method="fedavg"), tmp_path / "r")
    found = traffic(read_results(tmp_path / "r").group[0])
    assert found.busiest[0] == "server"
    rows = [r for r in tiny.rows(tmp_path / "r", "ledger") if r["kind"] != "metrics"]
    assert found.busiest[1].total_bytes == sum(r["payload_bytes"] for r in rows)


def test_a_neighbour_that_failed_or_was_refused_keeps_its_last_model(tmp_path: Path) -> None:
    class Broken(Publishing):
        def run(self, jobs: list[Job]) -> list[Reply | Failure]:
            answers = super().run(jobs)
            for i, (job, answer) in enumerate(zip(jobs, answers, strict=True)):
                if (job.client, job.round, job.phase) == (3, 2, "federate") and isinstance(answer, Reply):
                    first, *rest = answer.outbox
                    content = payload.decode(first.payload, "values", made.layout)
                    assert content.floats is not None
                    bad = replace(content, floats=content.floats * np.float32(1e12))
                    coded = payload.encode("values", made.layout, bad)
                    answers[i] = replace(answer, outbox=(replace(first, payload=coded), *rest))
            return answers

    given = study(wire="raw", per_round=4, clients={"count": 5, "unseen": 0.2})
    made = tiny.experiment(given)
    assert 2 not in made.task.splits.unseen and 3 not in made.task.splits.unseen
    meter = Broken()
    meter.silent = {(2, 2)}
    tiny.run(given, tmp_path / "r", engine=meter)
    failed = [(r["round"], f["client"], f["kind"]) for r in tiny.rows(tmp_path / "r", "rounds") for f in r["failed"]]
    assert failed == [(2, 2, "raised"), (2, 3, "refused")]
    came = {(n, s): data for p, n, s, k, data in meter.came if p == "federate"}
    for client in (2, 3):
        assert came[3, client] == came[2, client] == meter.sent[client, 1]
    assert came[3, [c for c in range(4) if c not in (2, 3, *made.task.splits.unseen)][0]] is not None
    refused = [r for r in tiny.rows(tmp_path / "r", "ledger") if r["status"].startswith("refused")]
    assert {(r["sender"], r["receiver"]) for r in refused} == {("client:3", "server")}, "it was sent, and not relayed"


FLEET = {"flops_s": 1e6, "down_bytes_s": 1000, "up_bytes_s": 500, "latency_s": 0.25}


def test_a_client_that_drops_out_neither_trains_nor_is_charged(tmp_path: Path) -> None:
    """The released code of DisPFL trains and charges it."""
    meter = Publishing()
    made = study(per_round=4, rounds=5, clients={"unseen": 0.0}, fleet={**FLEET, "drop": 0.4})
    tiny.run(made, tmp_path / "r", engine=meter)
    rounds = [r for r in tiny.rows(tmp_path / "r", "rounds") if r["phase"] == "federate"]
    gone = {(r["round"], f["client"]) for r in rounds for f in r["failed"]}
    assert gone == {
        (n, c) for n in range(1, 6) for c in range(4) if rng.stream(0, "drop federate", n, c).random() < 0.4
    }
    assert gone and not {(n, c) for c, n in meter.sent} & gone
    ledger = [r for r in tiny.rows(tmp_path / "r", "ledger") if r["phase"] == "federate"]
    for round, client in gone:
        own = [r for r in ledger if r["round"] == round and f"client:{client}" in (r["receiver"], r["sender"])]
        told = [(r["kind"], r["status"], r["payload_bytes"]) for r in own if r["receiver"] == "server"]
        assert told == [("none", "failed: dropped", 0)]
        assert not [r for r in own if r["receiver"] == f"client:{client}"], "it hears nobody"
    times = [r for r in tiny.rows(tmp_path / "r", "times") if (r["round"], r["client"]) in gone]
    assert not [r for r in times if r["phase"] == "federate" and (r.get("work") or "simulated_s" in r)]
    for phase, round, sender, _, data in meter.came:  # who dropped out is heard with what it published before
        if phase == "federate":
            assert data == meter.sent[max(key for key in meter.sent if key[0] == sender and key[1] < round)]


def test_a_visits_time_is_its_neighbours_down_and_its_receivers_up(tmp_path: Path) -> None:
    tiny.run(study("ring", per_round=3, rounds=4, clients={"count": 6}, fleet=FLEET), tmp_path / "r")
    ledger = [r for r in edges(tmp_path / "r") if r["phase"] == "federate"]
    flops = tiny.rows(tmp_path / "r", "times")
    seconds = {(r["round"], r["client"]): r["simulated_s"] for r in flops
               if r["phase"] == "federate" and r["client"] is not None}  # fmt: skip
    trained = min(seconds.values())  # of the first round, in which nothing crosses
    assert trained == seconds[1, min(c for n, c in seconds if n == 1)]
    for (round, client), took in seconds.items():
        mine = [r for r in ledger if r["round"] == round]
        down = sum(r["payload_bytes"] for r in mine if r["receiver"] == f"client:{client}")
        up = sum(r["payload_bytes"] for r in mine if r["sender"] == f"client:{client}")
        assert took == pytest.approx(trained + down / 1000 + up / 500, rel=0.05), "parts differ by an example"


@pytest.mark.parametrize("wire", ["raw", "lossless"])
@pytest.mark.parametrize("name", ["dfedavg", "dispfl"])
def test_bytes_are_as_forecast(name: str, wire: str, tmp_path: Path) -> None:
    made = tiny.of_method(name, wire=wire, evaluate={"every": 2}, federate={"rounds": 4}, clients={"count": 6})
    told = forecast_bytes(read(made)[0], 0.01)
    found = traffic(read_results(tiny.run(made, tmp_path / "r").root).group[0])
    assert told.evaluation is not None and bool(told.down.bounds) == ((name, wire) == ("dispfl", "lossless"))
    assert near(told.down, found.unicast.down_bytes) and near(told.up, found.unicast.up_bytes)
    assert near(told.evaluation.down, found.evaluation.down_bytes)
    assert near(told.evaluation.up, found.evaluation.up_bytes)


def test_a_lost_state_comes_back_as_what_was_published(tmp_path: Path) -> None:
    class Forgetful(Publishing):
        hit = False

        def run(self, jobs: list[Job]) -> list[Reply | Failure]:
            struck = []
            for job in jobs:
                lost = not self.hit and (job.phase, job.round) == ("federate", 3) and job.version
                self.hit = self.hit or bool(lost)
                struck.append(replace(job, state=None) if lost else job)
            return super().run(struck)

    engine = Forgetful()
    made = study(wire="raw", per_round=4, clients={"unseen": 0.0})
    tiny.run(made, tmp_path / "hit", engine=engine)
    tiny.run(made, tmp_path / "whole")
    assert engine.hit and tiny.digests(tmp_path / "hit")["theta_g"] == tiny.digests(tmp_path / "whole")["theta_g"]
    again = [r for r in tiny.rows(tmp_path / "hit", "ledger") if r["kind"] == "resync"]
    assert [r["sender"] for r in again].count("server") == 1 and len(again) == 4


def _go(folder: Path, study: Any) -> None:
    if (folder / "config.yaml").exists():
        session.resume(folder, InProcess())
    else:
        tiny.run(study, folder)


def test_a_run_that_was_killed_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """kill -9 at some moments of the rounds, each time gone on with."""
    made = tiny.of_method("dispfl", federate={"rounds": 8, "clients_per_round": 3})
    tiny.run(made, tmp_path / "whole")
    context, out = multiprocessing.get_context("fork"), tmp_path / "killed"
    kills = 0
    for after in (3, 6, 8):
        process = context.Process(target=_go, args=(out, made))
        process.start()
        done = out / "rounds.jsonl"
        while process.is_alive() and (not done.exists() or done.read_bytes().count(b"\n") < after):
            process.join(0.001)
        process.kill()
        process.join()
        kills += process.exitcode != 0
    assert kills
    session.resume(out, InProcess())
    assert tiny.facts(out) == tiny.facts(tmp_path / "whole")
    commits = [json.loads((out / name).read_text()) for name in ("checkpoint.json", "checkpoint.before.json")]
    live = {version for commit in commits for version in commit["published"].values()}
    assert {path.stem for path in (out / "published").iterdir()} == live, "what nobody hears any more is gone"


@pytest.mark.parametrize("count", [20, MOST_MESSAGES])
def test_flower_carries_many_neighbours(count: int) -> None:
    inbox = tuple(Message("values", f"client:{i}", bytes([i % 251]) * 40, broadcast=True) for i in range(count))
    order = Order(Job(study="{}", phase="federate", round=1, client=0, inbox=inbox), "0" * 16, 60.0)
    assert to_order(of_order(order)).job.inbox == inbox


def test_more_neighbours_than_flower_carries_are_refused_with_the_limit(tmp_path: Path) -> None:
    from tests.engines.test_flower_engine import NODES, Loopback, engine_over

    inbox = (Message("values", "client:1", b"x", broadcast=True),) * (MOST_MESSAGES + 1)
    job = Job(study="", phase="federate", round=1, client=0, inbox=inbox)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(StudyError, match=f"carries at most {MOST_MESSAGES} messages to a client"):
        tiny.answers(engine_over(Loopback(tmp_path, NODES)), [job])


# What is refused.


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"evaluate": {"every": 1, "keep": "best"}}, "evaluate.keep: must be last for method dfedavg"),
        (
            {"finder": {"rewind": {"name": "global", "round": 1}}, "personalise": {"arms": ["ticket"]}},
            "finder.rewind.round: must be -1 for method dfedavg",
        ),
        ({"refine": {"rounds": 1}, "personalise": {"arms": ["ticket"]}}, "refine.rounds: must be 0"),
        ({"personalise": {"arms": ["own_random"]}}, "must not contain own_random"),
    ],
)
def test_what_needs_a_global_model_is_refused(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(StudyError, match=said):
        read(study(**sections))


def test_a_topology_of_the_users_is_held_to_its_word(tmp_path: Path) -> None:
    tiny.run(study("tests.methods.test_gossip:Star", clients={"unseen": 0.0}), tmp_path / "r")
    assert {"client:0"} & {r["sender"] for r in edges(tmp_path / "r")}
    with pytest.raises(StudyError, match="method.topology: Twice must return each sender once"):
        resolve(study("tests.methods.test_gossip:Twice"))


def test_a_method_that_mixes_a_server_in_is_refused() -> None:
    def mixed() -> FederatedMethod:
        made = dfedavg()
        after = Phase(name="served", update=TRAIN, join=CountMean())
        return replace(made, phases=(*made.phases, after))

    def broadcasting() -> FederatedMethod:
        return replace(dfedavg(), phases=(replace(gossip(GossipUpdate(), "full", CountMean(), own_mask=False),
                                                  down="broadcast"),))  # fmt: skip

    globals().update(mixed=mixed, broadcasting=broadcasting)
    with pytest.raises(StudyError, match="after such a phase no server has a model"):
        tiny.experiment(tiny.study(method="tests.methods.test_gossip:mixed"))
    with pytest.raises(StudyError, match="nothing where clients send to one another"):
        tiny.experiment(tiny.study(method="tests.methods.test_gossip:broadcasting"))
