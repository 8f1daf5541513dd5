"""What a client can carry: from a file too, seen by methods and finders, checked against memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from fedlth.data.capacity import named, names_of
from fedlth.errors import StudyError
from fedlth.experiment.client_memory import training_mb
from fedlth.experiment.resolve import resolve
from fedlth.methods.aggregate import FedAvg
from fedlth.methods.client_update import MaskedUpdate
from fedlth.methods.method import FederatedMethod, Phase, Seen
from fedlth.study import schema, sections
from fedlth.study.yaml_text import parse
from fedlth.training.budget import Budget
from fedlth.training.local_client import LocalClient
from fedlth.training.recipe import TrainingRecipe
from tests import tiny

HEAD = "client,density,width,speed,memory_mb,down_bytes_s,up_bytes_s,latency_s,name"
FLEET = f"""{HEAD}
0,0.5,1,0.5,,8000,4000,0.1,phone
2,0.5,1,0.5,,8000,4000,0.1,phone

1,0.25,,,64,,,,
"""


def from_file(path: Path, text: str) -> tuple[sections.Tier, ...]:
    path.write_text(text)
    return tiny.study(clients={"capacity": str(path)}).clients.capacity


def test_a_file_becomes_tiers_of_the_study_and_is_not_needed_again(tmp_path: Path) -> None:
    path = tmp_path / "fleet.csv"
    phone, other = from_file(path, FLEET)
    assert (phone.name, phone.clients, phone.density, phone.speed) == ("phone", (0, 2), 0.5, 0.5)
    assert (phone.down_bytes_s, phone.up_bytes_s, phone.latency_s, phone.memory_mb) == (8000, 4000, 0.1, None)
    assert (other.name, other.clients, other.density, other.memory_mb) == ("tier 1", (1,), 0.25, 64)
    given = tiny.study(clients={"capacity": {"file": str(path)}})
    folder = tiny.run(given, tmp_path / "run")
    path.unlink()
    assert folder.study().clients.capacity == (phone, other)
    assert schema.build(parse(schema.dump(given, given_only=True), "dump")).clients.capacity == (phone, other)
    header = json.loads((folder.root / "header.json").read_bytes())
    assert header["client_tiers"] == ["phone", "tier 1", "phone", "whole device"]


def test_tiers_of_one_name_are_told_apart() -> None:
    tiers = [sections.Tier(share=0.5, name="phone"), sections.Tier(share=0.2, name="phone", speed=0.5),
             sections.Tier(share=0.1, name="whole device")]  # fmt: skip
    names = [name for name, _ in named(tiers)]
    assert names == ["phone", "phone (2)", "whole device", "whole device (2)"]
    assert set(names_of(tiers, 10, 0)) == set(names)


@pytest.mark.parametrize("ending", ["yaml", "json"])
def test_a_list_says_the_same(ending: str, tmp_path: Path) -> None:
    rows = [
        {"client": c, "density": 0.5, "speed": 0.5, "down_bytes_s": 8000, "up_bytes_s": 4000, "latency_s": 0.1,
         "name": "phone"} for c in (0, 2)
    ]  # fmt: skip
    rows.append({"client": 1, "density": 0.25, "memory_mb": 64})
    found = from_file(tmp_path / f"fleet.{ending}", json.dumps(rows))
    assert found == from_file(tmp_path / "fleet.csv", FLEET.replace("0.5,1,0.5", "0.5,,0.5"))


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("f.csv", "client,density\n0,1\n1,1.5\n", "f.csv:3: density: input should be less than or equal to 1, got 1.5"),
        ("f.csv", "client,speed\n0,fast\n", "f.csv:2: speed: input should be a valid number, got 'fast'"),
        ("f.csv", "client,speed\n0,nan\n", "f.csv:2: speed: input should be a finite number"),
        ("f.csv", "client,speed\n0,1\n0,2\n", "f.csv:3: client: must be given once, got 0 again"),
        ("f.csv", "client,speed\n4,1\n", "f.csv:2: client: must be below clients.count = 4, got 4"),
        ("f.csv", "client,speed\n,1\n", "f.csv:2: client must be a whole number of at least 0, got None"),
        ("f.csv", "client,speed\n1\n", "f.csv:2: must have 2 cells, got 1"),
        ("f.csv", "client,sped\n1,1\n", "f.csv:2: column must be among client, density"),
        ("f.csv", "density\n1\n", "f.csv:1: header must be distinct columns, client and some of density"),
        ("f.csv", "", "f.csv:1: header must be"),
        ("f.yaml", "- {client: 0}\n- {client: 1,\n   speed: 0}\n", "f.yaml:2: speed: input should be greater than 0"),
        ("f.yaml", "- {client: 0}\n- 3\n", "f.yaml:2 must be a mapping of columns, got 3"),
        ("f.yaml", "client: 0\n", "f.yaml must be a list of clients, got 'dict'"),
        ("f.json", "[{", "f.json: not YAML"),
    ],
)  # fmt: skip
def test_a_file_that_is_none_is_refused_at_its_place(name: str, text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(StudyError) as caught:
        from_file(tmp_path / name, text)
    assert says in str(caught.value) and str(caught.value).startswith("clients.capacity: ")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_said() -> None:
    with pytest.raises(StudyError, match="clients.capacity: nowhere.csv: cannot be read"):
        tiny.study(clients={"capacity": "nowhere.csv"})


@pytest.mark.parametrize("key", ["memory_mb", "down_bytes_s", "up_bytes_s", "latency_s"])
def test_what_a_tier_cannot_be(key: str) -> None:
    with pytest.raises(StudyError, match=f"clients.capacity.0.{key}: "):
        tiny.study(clients={"capacity": [{"share": 0.5, key: -1}]})


@dataclass(frozen=True)
class AsFast(MaskedUpdate):
    """An update of one's own: a slow client trains one epoch, the others three."""

    def recipe(self, local: LocalClient, recipe: TrainingRecipe, /) -> TrainingRecipe:
        return replace(recipe, budget=Budget(epochs=1 if local.capacity.speed < 1 else 3))


def as_fast() -> FederatedMethod:
    phase = Phase(name="federate", update=AsFast(), join=FedAvg(), who=Seen(), rounds=1)
    return FederatedMethod(
        name="as_fast", paper="", summary="", phases=(phase,), arms=("own_tuned",), reads_capacity=True
    )


def test_an_outside_method_sees_a_clients_capacity(tmp_path: Path) -> None:
    slow = {"clients": [0, 3], "speed": 0.25, "name": "slow"}
    made = tiny.study(method="tests.test_capacity:as_fast", clients={"unseen": 0.0, "capacity": [slow]})
    tiny.run(made, tmp_path / "r")
    rows = [r for r in tiny.rows(tmp_path / "r", "times") if r["phase"] == "federate" and r["client"] is not None]
    trained = {r["client"]: [w["epochs"] for w in r["work"] if "epochs" in w] for r in rows}
    assert trained == {0: [1], 1: [3], 2: [3], 3: [1]}


def test_a_memory_that_is_too_small_is_said() -> None:
    study = tiny.study(clients={"capacity": [
        {"clients": [1], "memory_mb": 0.001, "name": "tag"}, {"clients": [2], "memory_mb": 8}
    ]})  # fmt: skip
    experiment, notes = resolve(study)
    task = experiment.task
    # (64 x 12 + 12 x 4) prunable, 16 biases; weights, gradients, momentum; 16 examples of 64 + 64 + 12 + 12 + 4 numbers
    whole, batch = 3 * 4 * 832, 16 * 4 * (64 + 64 + 12 + 12 + 4)
    assert training_mb(task) == pytest.approx((whole + batch) / 1e6)
    assert training_mb(task, 0.2) == pytest.approx((whole - 3 * 4 * 0.8 * 816 + batch) / 1e6)
    (note,) = [n for n in notes if "memory_mb" in n]
    assert (
        note.startswith("clients.capacity: tag: memory_mb 0.001 does not hold a dense training") and "clients 1" in note
    )
    assert note.endswith("does not fit either")


CASES: list[tuple[dict[str, Any], Sequence[str]]] = [
    ({"density": 0.5, "width": 0.5}, ["clients.capacity: has no effect, method two_step does not ask for it"]),
    ({"speed": 0.5, "memory_mb": 1000}, ["clients.capacity: speed of its tiers: no effect, nothing here reads them"]),
]


@pytest.mark.parametrize(("tier", "says"), CASES)
def test_what_nothing_reads_is_noted(tier: dict[str, Any], says: Sequence[str]) -> None:
    assert resolve(tiny.study(clients={"capacity": [{"share": 0.5, **tier}]}))[1] == says
