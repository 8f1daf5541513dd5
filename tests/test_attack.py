"""Hostile clients: each attack on four elements, against each rule; who they are; what a report makes of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedlth.data.examples import Examples
from fedlth.engines.forked import Forked
from fedlth.engines.inprocess import InProcess
from fedlth.errors import StudyError
from fedlth.experiment.resolve import read, resolve
from fedlth.federation import session
from fedlth.federation.jobs import Failure, Job, Reply
from fedlth.federation.ranges import ranges_of
from fedlth.forecast import forecast
from fedlth.methods.aggregate import Contribution, CountMean, join
from fedlth.methods.attack import ATTACKS, Aim, ColludingMask, Gaussian, LabelFlip, SignFlip
from fedlth.methods.robust import Median, TrimmedMean, WithoutOutliers, krum
from fedlth.models.layout import Entry, Layout, Params
from fedlth.report.build import read_results, write_report
from fedlth.report.compare import compare
from fedlth.storage.run_folder import RunFolder
from fedlth.storage.server_state import ServerState
from fedlth.training.local_client import LocalClient
from fedlth.wire.payload import Content, decode
from tests import tiny
from tests.test_personal import started
from tests.test_transport import Counting

FOUR = Layout((Entry("w", (4,), "param", 0, prunable=True),))
NONE, FULL = np.zeros(0, np.int64), np.ones(4, bool)
THETA = np.float32([1, 1, 1, 1])


def content(floats: list[float], mask: list[int] | None = None) -> Content:
    return Content(FULL if mask is None else np.array(mask, bool), np.float32(floats), NONE)


def aim(*, kind: str = "values", own_mask: bool = False) -> Aim:
    return Aim(kind, FOUR, Content(FULL, THETA, NONE), own_mask)


def client(number: int = 0, round: int = 1) -> LocalClient:
    return LocalClient(tiny.task(), number, round, "federate")


def test_sign_flip_by_hand() -> None:
    honest = content([1.5, 0, 1, 0], [1, 1, 1, 0])
    assert SignFlip()(client(), honest, aim()).floats.tolist() == [0.5, 2, 1, 0]
    assert SignFlip(2)(client(), honest, aim()).floats.tolist() == [0, 3, 1, 0]
    bare = Content(np.array([1, 0, 0, 1], bool), None, None)
    assert SignFlip()(client(), bare, aim(kind="mask")).mask.tolist() == [0, 1, 1, 0]
    assert SignFlip()(client(), honest, aim(kind="scores")).floats.tolist() == [-1.5, 0, -1, 0]


def test_gaussian_is_as_large_as_it_says_and_drawn_by_round_and_client() -> None:
    honest = content([2, 2, 2, 0], [1, 1, 1, 0])  # moved by 1 in three of four places
    found = Gaussian(10)(client(), honest, aim())
    noise = client().rng("attack").normal(0, 10 * math.sqrt(3 / 4), 4)
    assert found.floats.tolist() == [*(THETA + noise).astype(np.float32)[:3], 0]
    others = [Gaussian(10)(client(c, r), honest, aim()).floats.tolist() for c, r in ((0, 2), (1, 1))]
    assert found.floats.tolist() not in others and others[0] != others[1]
    bare = Content(np.array([1, 0, 0, 1], bool), None, None)
    assert Gaussian()(client(), bare, aim(kind="mask")).mask.sum() == 2


def test_label_flip_changes_labels_and_nothing_that_is_sent() -> None:
    examples = Examples(torch.zeros(4, 2), torch.tensor([0, 1, 3, -100]))
    assert LabelFlip().poison(examples, 4).y.tolist() == [3, 2, 0, -100]
    local = LocalClient(tiny.task(), 0, 1, "federate", poison=LabelFlip().poison)
    assert (local.train_part.y == 3 - client().train_part.y).all()
    assert (local.val_part.y == client().val_part.y).all() and local.num_train == client().num_train
    honest = content([1, 2, 3, 4])
    assert LabelFlip()(local, honest, aim()) is honest


def test_colluders_send_one_mask_and_one_set_of_values() -> None:
    honest = content([1, 2, 0, 0], [1, 1, 0, 0])
    found = [ColludingMask(0.5)(client(c), honest, aim(own_mask=True)) for c in (0, 1)]
    assert found[0].mask.tolist() == found[1].mask.tolist() and found[0].mask.sum() == 2
    assert found[0].floats.tolist() == found[1].floats.tolist() and not found[0].floats[~found[0].mask].any()
    assert ColludingMask(0.5)(client(0, 2), honest, aim(own_mask=True)).floats.tolist() != found[0].floats.tolist()
    kept = ColludingMask(0.5)(client(), honest, aim())
    assert kept.mask.tolist() == [1, 1, 0, 0] and not kept.floats[2:].any(), "else it would be refused at the door"
    scale = math.sqrt(float(np.mean(client().task.theta_0.floats[: client().task.layout.num_params] ** 2.0)))
    wide = ColludingMask(1.0, 3.0)(client(), honest, aim(own_mask=True)).floats
    assert 0.3 * scale < np.abs(wide).mean() < 10 * scale


RULES = {"mean": CountMean(), "trimmed": TrimmedMean(0.25), "median": Median(), "krum": krum(0.25)}


@pytest.mark.parametrize("name", ["sign_flip", "gaussian", "colluding_mask"])
def test_two_of_eight_against_each_rule(name: str) -> None:
    """All honest clients moved each of four weights from 1 to about 2; two hostile ones send what the attack makes."""
    attack = {"sign_flip": SignFlip(20), "gaussian": Gaussian(30), "colluding_mask": ColludingMask(0.5, 300)}[name]
    honest = [content([2 + 0.01 * c, 2 - 0.01 * c, 2, 2]) for c in range(8)]
    sent = [attack(client(c), one, aim(own_mask=True)) if c in (2, 5) else one for c, one in enumerate(honest)]
    came = [Contribution(c, 10, one) for c, one in enumerate(sent)]
    found = {}
    for rule, made in RULES.items():
        new = join(made, ServerState(Params(THETA, NONE)), came, FOUR).theta.floats
        found[rule] = float(np.abs(new - 2).max())
    assert found.pop("mean") > 1 and all(away < 0.1 for away in found.values()), found
    if name == "colluding_mask":
        twelve = came + [Contribution(c, 10, honest[c - 8]) for c in range(8, 12)]
        new = join(WithoutOutliers(), ServerState(Params(THETA, NONE)), twelve, FOUR).theta.floats
        assert float(np.abs(new - 2).max()) < 0.1


# A study


def study(attack: Any = None, join: Any = None, **more: Any) -> Any:
    sections: dict[str, Any] = {
        "method": "fedavg",
        "clients": {"count": 8, "unseen": 0.0, "test_samples": 60},
        "federate": {"rounds": 6, "clients_per_round": 8, "join": join},
        "train": {"lr": 0.2, "momentum": 0.5, "batch_size": 8},
        "personalise": {"clients_per_wave": 8, "epochs": 1},
        "attack": attack,
    }
    for key, value in more.items():
        sections[key] = {**sections[key], **value} if isinstance(sections.get(key), dict) else value
    return tiny.study(**sections)


FLIP = {"name": "sign_flip", "share": 0.25, "scale": 3.0}


def accuracy(out: Path) -> float:
    (facts,) = read_results(out).group
    assert len(facts.header.hostile) in (0, 2) and len(facts.metrics) == 8 - len(facts.header.hostile)
    return float(np.mean([row.test_accuracy for row in facts.metrics]))


def test_sign_flip_hurts_the_mean_and_robust_rules_recover(tmp_path: Path) -> None:
    found = {"clean": accuracy(tiny.run(study(), tmp_path / "clean").root)}
    rules: dict[str, Any] = {
        "mean": None, "trimmed": {"name": "trimmed_mean", "share": 0.25}, "median": "median",
        "krum": {"name": "krum", "share": 0.25},
    }  # fmt: skip
    for name, rule in rules.items():
        found[name] = accuracy(tiny.run(study(FLIP, rule), tmp_path / name).root)
    assert found["mean"] < found["clean"] - 0.25, found
    assert all(found[name] > found["mean"] + 0.25 for name in ("trimmed", "median", "krum")), found
    first = compare([tmp_path / "clean", tmp_path / "mean"])
    assert first.contrasts[0].pairs == 6 and first.contrasts[0].difference.mean < -0.25, "the hostile are in neither"


SLICED: dict[str, Any] = {
    "method": {"name": "lotteryfl", **tiny.METHODS["lotteryfl"]},
    "federate": {"rounds": 3, "clients_per_round": 8, "mask_outliers": True},
    "personalise": {"arms": ["global", "own_tuned"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def colluded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = study({"name": "colluding_mask", "share": 0.25, "density": 0.3}, "median", **SLICED)
    counting = Counting()
    out = tmp_path_factory.mktemp("attack") / "run"
    tiny.run(made, out, engine=counting)
    for client in range(8):
        rows = [r for r in tiny.rows(out, "ledger") if f"client:{client}" in (r["sender"], r["receiver"])]
        up = sum(r["payload_bytes"] for r in rows if r["receiver"] == "server")
        assert (counting.up[client], counting.down[client]) == (up, sum(r["payload_bytes"] for r in rows) - up)
    return out


def test_who_is_hostile_is_a_fact_and_the_report_leaves_them_out(colluded: Path) -> None:
    (facts,) = read_results(colluded).group
    hostile = facts.header.hostile
    assert len(hostile) == 2 and facts.header.attack == "colluding_mask (share 0.25, density 0.3)"
    assert {row.client for row in facts.metrics} == set(range(8)) - set(hostile)
    assert {int(r["client"]) for r in tiny.rows(colluded, "metrics")} == set(range(8)), "their rows are facts too"
    assert not any(f.kind == "refused" for row in facts.rounds for f in row.failed)
    page = write_report(colluded).read_text()
    assert "2 clients attacked (colluding_mask (share 0.25, density 0.3)); all results are of the others." in page
    assert f"clients {hostile[0]}, {hostile[1]} were hostile" in page


@pytest.mark.usefixtures("unpainted")
def test_their_masks_stand_out_in_the_rounds(colluded: Path) -> None:
    (facts,) = read_results(colluded).group
    seen = False
    for row in facts.rounds:
        if row.phase == "federate":
            met = [c for c in row.clients if c in facts.header.hostile]
            assert [one.client for one in row.mask_outliers] == met
            seen = seen or bool(met)
        else:
            assert not row.mask_outliers
    assert seen and "masks far from all others of their round" in write_report(colluded).read_text()
    ups = [r for r in tiny.rows(colluded, "ledger") if r["phase"] == "federate" and r["kind"] == "values"
           and r["receiver"] == "server" and r["sender"] in [f"client:{c}" for c in facts.header.hostile]]  # fmt: skip
    assert ups and {round(r["density"], 2) for r in ups} == {0.3}


def test_without_being_asked_no_round_says_so(tmp_path: Path) -> None:
    made = study(None, None, **{**SLICED, "federate": {"rounds": 1, "clients_per_round": 4}})
    tiny.run(made, tmp_path / "r")
    assert not any("mask_outliers" in row for row in tiny.rows(tmp_path / "r", "rounds"))


STUDIES: dict[str, Any] = {
    "masks": lambda: study({"name": "colluding_mask", "share": 0.25, "density": 0.3}, "median", **SLICED),
    "labels": lambda: study(
        {"name": "label_flip", "share": 0.3}, {"name": "multi_krum", "share": 0.3},
        federate={"rounds": 3, "clients_per_round": 4},
    ),
    "dropped": lambda: study(
        {"name": "gaussian", "share": 0.3}, {"name": "trimmed_mean", "share": 0.3}, **SLICED,
        fleet={"flops_s": 1e6, "down_bytes_s": 1e4, "up_bytes_s": 1e4, "drop": 0.3},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STUDIES)
def test_workers_and_a_stop_change_nothing(name: str, tmp_path: Path) -> None:
    made = STUDIES[name]()
    tiny.run(made, tmp_path / "r")
    tiny.run(made, tmp_path / "forked", engine=Forked(2))
    started(made, tmp_path / "cut", after=2)
    session.resume(tmp_path / "cut", InProcess())
    assert tiny.facts(tmp_path / "r") == tiny.facts(tmp_path / "forked") == tiny.facts(tmp_path / "cut")
    if name == "dropped":
        kinds = [f["kind"] for row in tiny.rows(tmp_path / "r", "rounds") for f in row["failed"]]
        assert "dropped" in kinds and "refused" not in kinds


def test_only_the_hostile_clients_messages_change(tmp_path: Path) -> None:
    more = {"federate": {"rounds": 1, "clients_per_round": 8}, "wire": "raw"}
    ends = {}
    for name, attack in (("honest", None), ("hostile", FLIP), ("labels", {"name": "label_flip", "share": 0.25})):
        engine = Counting()
        tiny.run(study(attack, **more), tmp_path / name, engine=engine)
        ends[name] = tiny.digests(tmp_path / name)["theta_g"]
    assert len(set(ends.values())) == 3


# Methods whose clients send a second message, its name, and options with which its first round of weights has it.
SECOND: dict[str, tuple[str, dict[str, Any]]] = {
    "scaffold": ("control_change", {}),
    "prunefl": ("squared_gradients", {"initial": 0, "every": 1}),
    "fedtiny": ("gradients", {"pool": 1, "density": 0.3, "every": 1, "end": 4, "rate": 0.3, "blocks": 2}),
    "fedspa": ("next_mask", {"density": 0.4}),
}


class Sent(tiny.Lists):
    """The in-process engine; it keeps what came up in rounds of weights, by client and name."""

    def __init__(self) -> None:
        self.up: dict[tuple[int, str], bytes] = {}

    def run(self, jobs: list[Job]) -> list[Reply | Failure]:
        answers = super().run(jobs)
        for job, answer in zip(jobs, answers, strict=True):
            assert isinstance(answer, Reply), answer
            if job.phase == "federate":
                self.up |= {(job.client, m.name): m.payload for m in answer.outbox}
        return answers


@pytest.mark.parametrize("attack", ["sign_flip", "gaussian", "colluding_mask", "label_flip"])
@pytest.mark.parametrize("name", SECOND)
def test_every_message_of_a_hostile_client_is_another_and_passes_the_door(
    name: str, attack: str, tmp_path: Path
) -> None:
    second, options = SECOND[name]
    scale = {"gaussian": {"scale": 1.0}}.get(attack, {})
    sent: dict[str, Sent] = {}
    for what, given in (("honest", None), ("hostile", {"name": attack, "share": 0.25, **scale})):
        made = study(
            given, method={"name": name, **options}, federate={"rounds": 1, "clients_per_round": 8}, wire="raw"
        )
        experiment, sent[what] = resolve(made)[0], Sent()
        folder = RunFolder(tmp_path / what)
        folder.create(experiment.study)
        tiny.opened(folder, sent[what]).run(stop_after=sum(phase.rounds for phase in experiment.federated_phases))
    assert {row["status"] for row in tiny.rows(tmp_path / "hostile", "ledger")} == {"ok"}, "nothing is refused"
    bad = experiment.population.hostile
    assert len(bad) == 2
    for (client, message), payload in sent["hostile"].up.items():
        if message in ("update", second):
            assert (payload != sent["honest"].up[client, message]) == (client in bad), (client, message)
    if attack == "sign_flip":
        phase = experiment.phase("federate")
        layout = experiment.message_layout(phase, second, dict(phase.update.sends)[second])
        client = min(bad)
        before, after = (
            decode(one.up[client, second], dict(phase.update.sends)[second], layout) for one in sent.values()
        )
        if before.floats is None:
            assert (after.mask == ~before.mask).all(), "of a next mask what it leaves out"
        else:
            moved, turned = layout.num_params, -before.floats
            if (limits := ranges_of(experiment, phase, 1).get(second)) is not None:
                turned = np.clip(turned, *limits)  # a square is not negative, and what is would be refused
            np.testing.assert_array_equal(after.floats[:moved], turned[:moved], err_msg="from zero, not theta_g")


def test_a_state_is_moved_from_what_came_and_nothing_else_is() -> None:
    """Thresholds are a state as weights are; a change has no base, and its noise is drawn apart."""
    honest, flip = content([1.5, 0.5, 1, 1]), SignFlip()
    assert flip(client(), honest, aim(kind="thresholds")).floats.tolist() == [0.5, 1.5, 1, 1]
    change = replace(aim(), name="control_change")
    assert flip(client(), honest, change).floats.tolist() == [-1.5, -0.5, -1, -1]
    one, other = (Gaussian(1)(client(), honest, replace(change, name=name)).floats for name in ("a", "b"))
    assert not np.allclose(one, other)
    none = Aim("statistics", Layout((Entry("n", (0,), "param", 0),)), Content(FULL, THETA, NONE), name="statistics")
    empty = Content(np.ones(0, bool), np.zeros(0, np.float32), NONE)
    assert Gaussian()(client(), empty, none) is empty


@pytest.mark.parametrize("name", ["scaffold", "fedtiny", "ssfl", "fedpm", "hermes"])
def test_methods_of_every_kind_bear_it_to_the_end(name: str, tmp_path: Path) -> None:
    made = study(
        {"name": "sign_flip", "share": 0.25}, "median", method={"name": name, **tiny.METHODS[name]},
        federate={"rounds": 2, "clients_per_round": 8},
    )  # fmt: skip
    tiny.run(made, tmp_path / "r")
    assert not any(row["failed"] for row in tiny.rows(tmp_path / "r", "rounds"))
    assert "holds a round's updates at once" in forecast(made)


@pytest.mark.parametrize(
    ("attack", "says"),
    [
        ("sign", "attack.name: must be one of sign_flip, gaussian, label_flip, colluding_mask"),
        ({"name": "sign_flip", "share": 0.0}, "attack.share must be in (0, 1), got 0.0"),
        ({"name": "sign_flip", "scale": -1.0}, "attack.scale must be above 0, got -1.0"),
        ({"name": "colluding_mask", "density": 0.0}, "attack.density must be in (0, 1], got 0.0"),
        ({"name": "label_flip", "scale": 1.0}, "attack.scale: label_flip has no such option"),
    ],
)
def test_an_attack_that_is_none_is_refused(attack: Any, says: str) -> None:
    with pytest.raises(StudyError) as caught:
        resolve(study(attack))
    assert says in str(caught.value)


def test_clients_that_send_to_one_another_are_not_attacked() -> None:
    with pytest.raises(StudyError, match="attack: must be left out for method dfedavg, whose clients send to one"):
        resolve(study(FLIP, method="dfedavg"))


def test_the_table_is_open_and_idle_ones_are_noted() -> None:
    experiment = tiny.experiment(study("tests.test_attack:Loud"))
    assert len(experiment.population.hostile) == 2 and set(ATTACKS) >= {"sign_flip", "label_flip"}
    notes = resolve(study(FLIP, method="local", personalise={"arms": ["local"]}))[1]
    assert any("attack" in note and "no effect" in note for note in notes)


@dataclass(frozen=True)
class Loud:
    """An attack as a user writes one."""

    def __call__(self, local: LocalClient, content: Content, aim: Aim, /) -> Content:
        return content


def test_an_attack_that_nothing_bears_is_said_before_the_run() -> None:
    def said(attack: Any, join: Any) -> bool:
        return any("attack: nothing bears it" in note for note in read(study(attack, join))[1])

    assert said(FLIP, None) and not said(FLIP, "median") and not said(None, None)
