"""A study's text: what is refused and how, and that what is written can be read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedlth.errors import StudyError
from fedlth.experiment.resolve import read
from fedlth.study import schema
from tests import tiny

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"trian": {}}, "trian: unknown key; did you mean train"),
    ({"train": {"lrr": 1}}, "train.lrr: unknown key; did you mean lr"),
    ({"train": {"zzz": 1}}, "train.zzz: unknown key; known here: epochs, steps, batch_size, lr"),
    ({"train": {"lr": "fast"}}, "train.lr: .*number, got 'fast'"),
    ({"train": {"lr": float("inf")}}, "train.lr: .*finite"),
    ({"train": {"lr": float("nan")}}, "train.lr: "),
    ({"train": {"epochs": 0}}, "train.epochs: .*greater than or equal to 1, got 0"),
    ({"train": {"epochs": True}}, "train.epochs: .*integer, got True"),
    ({"train": {"epochs": 1.0}}, "train.epochs"),
    ({"train": {"momentum": 1}}, "train.momentum: .*less than 1"),
    ({"clients": {"count": 0}}, "clients.count: .*greater than or equal to 1, got 0"),
    ({"clients": {"validation": -0.1}}, "clients.validation"),
    ({"clients": {"test": "mine"}}, "clients.test: .*split.*own"),
    ({"clients": {"test_share": 0}}, "clients.test_share"),
    ({"data": {"pool": True}}, "data.pool: needs clients.test: own"),
    ({"clients": {"label_noise": {}}}, "clients.label_noise.rate: required"),
    ({"clients": {"label_noise": {"rate": 0}}}, "clients.label_noise.rate"),
    ({"clients": {"label_noise": {"rate": 0.1, "kind": "odd"}}}, "clients.label_noise.kind"),
    *(
        ({section: {"clients_per_round": wrong}}, rf"{section}.clients_per_round: must be a whole number .* got ")
        for section in ("federate", "refine")
        for wrong in (0, -1, 1.5, 0.0, True, "all")
    ),
    ({"clients": {"unseen": 1}}, "clients.unseen"),
    ({"finder": {"densities": [1.5]}}, r"finder.densities: each must be in \(0, 1\], got \[1.5\]"),
    ({"finder": {"densities": [0]}}, "finder.densities: each must be in"),
    ({"finder": {"densities": []}}, "finder.densities"),
    ({"finder": {"densities": [0.2, 0.5]}}, "finder.densities: must fall"),
    ({"finder": {"densities": [0.2, 0.2]}}, "finder.densities: must fall"),
    ({"finder": {"densities": "many"}}, "finder.densities: input should be a list, got 'many'"),
    ({"finder": {"main": 0.3}}, "finder.main: must be one of finder.densities, auto or capacity, got 0.3"),
    ({"method": {"name": 3}}, "method.name: required"),
    ({"partition": {"seed": "x"}}, "partition.seed: must be an integer of at least 0, got 'x'"),
    ({"partition": {"seed": -1}}, "partition.seed"),
    ({"model": {"buffers": "none"}}, "model.buffers: .*aggregate.*local_statistics.*local_all"),
    ({"engine": "rya"}, "engine: .*inprocess.*ray.*flower"),
    ({"seed": -1}, "seed: "),
    ({"seeds": "all"}, "seeds: "),
    ({"clients": 3}, "clients: input should be a mapping, got 3"),
    ({"workers": 0}, "workers: input should be 'auto', or greater than or equal to 1, got 0"),
    ({"cohort": "all"}, "cohort: input should be 'auto', or a valid integer, got 'all'"),
    ({"finder": {"main": "best"}}, "finder.main: input should be 'auto' or 'capacity', or a valid number, got 'best'"),
    ({"data": {"own": {"num_classes": 2, "input_shape": 5}}}, "data.own.input_shape: input should be a list, or a map"),
    ({"data": {"own": {"num_classes": 2, "input_shape": [4, 0]}}}, "data.own.input_shape.1: .*equal to 1, got 0"),
    ({"data": {"own": {"num_classes": 2, "input_shape": {"a": [0]}}}}, "data.own.input_shape.a.0: .* to 1, got 0"),
]


@pytest.mark.parametrize(("sections", "says"), REFUSED, ids=[s for _, s in REFUSED])
def test_refused_in_one_line_that_names_the_place(sections: dict[str, Any], says: str) -> None:
    with pytest.raises(StudyError, match=f"^here: {says}") as caught:
        schema.build(tiny.tree(**sections), "here")
    assert "\n" not in str(caught.value)


def test_required_and_not_a_mapping() -> None:
    with pytest.raises(StudyError, match="here: clients: required, but missing"):
        schema.build({}, "here")
    with pytest.raises(StudyError, match="here: must be a mapping of sections, got list"):
        schema.build([], "here")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("clients: {count: 2}\nseed: 1\nseed: 2\n", "key 'seed' is given twice.*line 3"),
        ("clients: {count: 2, count: 3}\n", "key 'count' is given twice"),
        ("clients: {count: 2\n", "not YAML"),
        ("out: {{ folder }}\nclients: {count: 2}\n", "cannot be a key"),
        ("- a\n", "must be a mapping of sections, got list"),
        ("", "must be a mapping of sections, got NoneType"),
        ("study: !!python/object/apply:os.system [ls]\n", "not YAML"),
    ],
)
def test_refused_text(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(text)
    with pytest.raises(StudyError, match=says) as caught:
        schema.load(file)
    assert str(caught.value).startswith(f"{file}: ") and "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="no such study file"):
        schema.load(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"study: caf\xe9\n")
    with pytest.raises(StudyError, match="cannot be read as UTF-8"):
        schema.load(tmp_path / "latin.yaml")


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("clients: {count: 2}\ntrain: {lr: 1e-3, weight_decay: 5E-4, momentum: .5}\n")
    study = schema.load(file)
    assert (study.train.lr, study.train.weight_decay, study.train.momentum) == (0.001, 0.0005, 0.5)


def test_overrides(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("clients: {count: 2}\npartition: iid\nmodel: mlp\n")
    study = schema.load(
        file,
        ["train.lr=1e-2", "partition.seed=3", "seeds=[0, 1]", "finder.score.name=snip", "model.options.hidden=[4]",
         "method=fedavg", "out=runs/x=y", "data.root=/data"],
    )  # fmt: skip
    assert study.train.lr == 0.01 and study.seeds == (0, 1) and study.out == "runs/x=y" and study.data.root == "/data"
    assert study.partition == {"name": "iid", "seed": 3} and study.method == {"name": "fedavg"}
    assert study.model.name == "mlp" and study.model.options == {"hidden": [4]}
    for wrong, says in (
        ("train.lr", "must be key=value"), ("=3", "must be key=value"), ("clients.count.x=3", "count is not a section"),
        ("train.lr=[", "not YAML"), ("model.options={depth:", "; a value with spaces needs quotes in a shell$"),
        ("train.lrr=3", "train.lrr: unknown key; did you mean lr"),
    ):  # fmt: skip
        with pytest.raises(StudyError, match=says):
            schema.load(file, [wrong])


@pytest.mark.parametrize("name", tiny.KINDS)
def test_what_is_dumped_loads_equal(tmp_path: Path, name: str) -> None:
    study = tiny.of_method(name, finder={"main": 0.5}, seeds=[1, 2], ray={"num_gpus": 0.25})
    (tmp_path / "s.yaml").write_text(schema.dump(study))
    again = schema.load(tmp_path / "s.yaml")
    assert again.model_dump() == study.model_dump() and schema.dump(again) == schema.dump(study)
    assert again.science() == study.science()
    assert schema.build(json.loads(study.science())).science() == study.science()


def test_the_committed_studies_are_valid() -> None:
    files = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))
    assert files
    for file in files:
        if "lottery" not in schema.read_tree(file):  # those are lottery studies, checked in test_docs.py
            read(schema.load(file))


def test_science_is_what_decides_the_numbers() -> None:
    one = tiny.study()
    outside = {"engine": "ray", "out": "x", "ray": {"workers": 9}, "job_timeout_s": 3.0, "study": "other", "seeds": [4]}
    assert tiny.study(**outside).science() == one.science()
    for inside in (
        {"seed": 1}, {"train": {"lr": 0.2}}, {"partition": {"seed": 1}}, {"finder": {"densities": [0.5]}},
        {"method": {"name": "fedavg"}}, {"data": {"options": {"seed": 1}}}, {"refine": {"rounds": 1}},
        {"device": "cuda"},
    ):  # fmt: skip
        assert tiny.study(**inside).science() != one.science(), inside


def test_a_study_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        tiny.study().train.lr = 2.0


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"method": {"name": "fedavgg"}}, r"method\.name: must be one of fedavg, .*got 'fedavgg'"),
        ({"method": {"name": "fedavg", "rate": 0.1}}, r"method\.rate: fedavg has no such option"),
        ({"method": {"name": "lotteryfl", "rate": 2}}, r"method\.rate must be in \(0, 1\), got 2"),
        ({"method": {"name": "lotteryfl", "density": 0}}, r"method\.density.* must be in \(0, 1\], got 0"),
        ({"method": {"name": "lotteryfl", "score": "magnitud"}}, r"method\.score\.name: must be one of"),
        ({"method": {"name": "fedselect", "every": 0}}, r"method\.every must be at least 1, got 0"),
        ({"method": {"name": "fedpm", "score_lr": -1.0}}, r"method\.score_lr must be above 0"),
        ({"personalise": {"arms": ["ticket", "tickt"]}}, r"personalise\.arms: must be among .*got 'tickt'"),
        ({"finder": {"score": "big"}}, r"finder\.score\.name"),
        (
            {"finder": {"rewind": {"name": "global", "round": 9}}},
            r"finder\.rewind\.round: must be at most federate\.rounds = 2",
        ),
        ({"federate": {"clients_per_round": 4}}, r"federate\.clients_per_round: must be at most the 3 clients"),
        ({"refine": {"rounds": 1}}, r"refine\.clients_per_round: must be at most the 3 clients .*got 5"),
        ({"method": {"name": "fedavg"}, "refine": {"rounds": 1}}, r"refine\.rounds: must be 0"),
        (
            {
                "method": {"name": "fedpm"},
                "personalise": {"arms": ["ticket"]},
                "refine": {"rounds": 1, "clients_per_round": 1},
            },
            r"refine\.rounds: must be 0",
        ),
        (
            {"method": {"name": "fedpm"}, "finder": {"rewind": {"name": "global", "round": 1}}},
            r"finder\.rewind\.round: must be -1",
        ),
    ],
)
def test_what_only_the_method_can_see(sections: dict[str, Any], says: str) -> None:
    with pytest.raises(StudyError, match=says) as caught:
        read(tiny.study(**sections))
    assert "\n" not in str(caught.value)


def test_the_unseen_are_counted_as_the_split_counts_them() -> None:
    """A small share of few clients is still one client: 0.1 of 3."""
    sections = {"clients": {"count": 3, "unseen": 0.1}, "federate": {"clients_per_round": 3}}
    with pytest.raises(StudyError, match="must be at most the 2 clients"):
        read(tiny.study(**sections))
    assert len(tiny.task(**{**sections, "federate": {"clients_per_round": 2}}).splits.unseen) == 1


def test_resolve_writes_the_methods_defaults_and_notes_what_has_no_effect() -> None:
    made, notes = read(tiny.of_method("standalone"))
    study = made.study
    assert study.federate.rounds == 0 and study.finder.rewind == {"name": "init"}
    assert notes == [
        "federate: has no effect, method standalone has no rounds",
        "clients.unseen: has no effect, method standalone has no rounds: no client is left out",
    ]
    notes = read(tiny.of_method("fedavg"))[1]
    assert notes == [
        "finder: has no effect, no arm of method fedavg searches for a ticket",
        "personalise.epochs: has no effect, no arm of method fedavg trains",
    ]
    assert read(tiny.study())[1] == []
    kept = read(tiny.of_method("standalone", finder={"rewind": "none"}))[0]
    assert kept.study.finder.rewind == {"name": "none"}
    few = tiny.of_method("local", clients={"count": 2}, federate={"clients_per_round": 5})
    assert read(few)[0].study.federate.rounds == 0, "rounds that never happen need no clients"


def test_one_client_and_all_clients_a_round_are_different_things(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("clients: {count: 20, unseen: 0.5}\nfederate: {clients_per_round: 1.0}\n")
    for overrides, count in (([], 10), (["federate.clients_per_round=1"], 1), (["federate.clients_per_round=.25"], 2)):
        study = schema.load(file, overrides)
        experiment = read(study)[0]
        assert experiment.per_round(study.federate) == count == len(experiment.clients(experiment.phases[0], 1))
        assert schema.build(json.loads(study.science())).science() == study.science()
    with pytest.raises(StudyError, match="federate.clients_per_round: must be at most the 10 clients"):
        read(schema.load(file, ["federate.clients_per_round=11"]))
